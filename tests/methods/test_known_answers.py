"""Known answers: what every experiment rests on, and what must come out whatever the weights are.

Twelve identities, in order, through the public interface and on a real server: a run in which nothing is changed is the
plain forward pass, a run in which everything is restored is the clean one, a change at a token leaves those before it
alone, and so on. Then some of single methods. What they are compared with is the Hugging Face model with plain hooks,
a finite difference, or a number that can be computed in the head.

Others of this kind are tested where their subject is: that an SSM's hidden attention gives its scan, and that decoding
with a cache gives the values of a full run (conformance/test_canonical_ssm.py); what a sliding window hides is no edge
(test_information_flow.py); the last row of a logit lens is the model, and a tuned lens is nearer to it at every layer
(test_lens.py); scaling one value vector moves the logits of a head without norm by its projection (test_neurons.py);
attribution patching is exact on a linear model (test_attribution.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import patchwire
import tiny
from conformance import hooks, places
from integration.refusals import refused
from patchwire import methods
from patchwire_worker.zoo import path as zoo_path
from serving import Server

CLEAN = [3, 14, 15, 9, 26, 5]
CORRUPT = [3, 33, 44, 9, 26, 5]
TOKENS = len(CLEAN)
ANSWER, FOIL = 7, 12
LAYER = 1
TRANSFORMERS = ["gpt2", "llama", "gpt_neox"]
EVERY = [*TRANSFORMERS, "mamba"]
OF_TOKENS = ("seq", "query", "key")
STEPWISE = ("scores", "pattern", "state")
"""What exists only where attention or a scan is computed step by step, which rounds otherwise than its kernel."""

Site = tuple[str, int]
"""A canonical name, "layers.1.attn.q", and which of its dimensions is that of tokens."""


@pytest.fixture(params=EVERY)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(served: Mapping[str, patchwire.Model], name: str) -> patchwire.Model:
    return served[name]


@pytest.fixture
def reference(references: Mapping[str, PreTrainedModel], name: str) -> PreTrainedModel:
    """The model as it is loaded. PyTorch groups some products otherwise where no weight asks for a gradient."""
    return copy.deepcopy(references[name]).requires_grad_(True)


@pytest.fixture(scope="module")
def others(checkpoints: Mapping[str, str]) -> Iterator[Mapping[str, patchwire.Model]]:
    """An attention-only model, and the tiny ones in float64, on a server of their own."""
    doubles = {f"{each}-float64": checkpoints[each] for each in EVERY}
    specs = {"induction-2l": "zoo:induction-2l", **doubles}
    with (
        Server(specs, dtypes=dict.fromkeys(doubles, "float64")) as server,
        patchwire.connect(server.address, progress=False) as client,
    ):
        yield {each: client.model(each) for each in specs}


def logits_of(reference: PreTrainedModel, ids: list[int]) -> Tensor:
    logits: Tensor = hooks.forward(reference, ids).logits
    return logits


def sites(model: patchwire.Model, *, computed: bool = False) -> list[Site]:
    """Every activation in the model's table of canonical sites, and both sides of its modules."""
    found: list[Site] = []
    for row in model.sites.rows:
        names = [row.name.replace("[i]", f".{layer}") for layer in row.layers] or [row.name]
        dims = row.dims.split()
        if row.kind == "value" or (computed and row.kind == "computed"):
            axis = next(axis for axis, each in enumerate(dims) if each in OF_TOKENS)
            found += [(each, axis) for each in names]
        elif row.kind == "module":
            found += [(f"{each}.{side}", 1) for each in names for side in ("input", "output")]
    return [each for each in found if each[0] != "embed.input"]  # these are token ids


def read(model: patchwire.Model, site: str) -> Any:
    """`model.layers[1].attn.q` of "layers.1.attn.q"."""
    value: Any = model
    for each in site.split("."):
        value = value[int(each)] if each.isdecimal() else getattr(value, each)
    return value


def edit(model: patchwire.Model, site: str, change: Callable[[Any, Any], Any], where: Sequence[Any] = ()) -> None:
    """Write what a change makes of the value of a site and of where it is: everywhere, or at some indices."""
    value = read(model, site)
    every = [token(1, each) for each in range(TOKENS)] if site.endswith(".state") else [...]
    for index in where or every:  # states are sites of their own, one for each token
        value[index] = change(value[index], index)


def token(axis: int, at: int) -> tuple[Any, ...]:
    """The index of a token."""
    return (*[slice(None)] * axis, at)


# --- 1. nothing changed -----------------------------------------------------------------------------------------------


def test_a_block_that_changes_nothing_is_the_plain_forward_pass_to_the_last_bit(
    model: patchwire.Model, reference: PreTrainedModel
) -> None:
    with model.trace(CLEAN):
        logits = model.logits.save()
    with model.edit() as edited:
        pass
    with edited.session(), edited.trace(CLEAN):
        in_a_session = edited.logits.save()

    plain = logits_of(reference, CLEAN)
    assert torch.equal(logits.value, plain)
    assert torch.equal(in_a_session.value, plain)


def test_writing_what_was_read_changes_nothing_at_any_site(model: patchwire.Model, reference: PreTrainedModel) -> None:
    names = [each for each, _ in sites(model)]
    changes: list[Callable[[Any, Any], Any]] = [lambda value, _: value.clone(), lambda value, _: value * torch.ones(())]
    seen: dict[str, Any] = {}
    written: dict[str, list[Any]] = {}
    with model.trace(exact=True) as trace:
        for site in names:
            with trace.invoke(CLEAN):
                read(model, site).sum().save()
                seen[site] = model.logits.save()
            for change in changes:
                with trace.invoke(CLEAN):
                    edit(model, site, change)
                    written.setdefault(site, []).append(model.logits.save())

    plain = logits_of(reference, CLEAN)
    assert len(names) > 20
    for site in names:
        if site.endswith(STEPWISE):
            hooks.assert_same(seen[site].value, plain, site, tolerance=1e-5)
        else:
            assert torch.equal(seen[site].value, plain), site
        for logits in written[site]:
            if site.endswith(
                ".conv"
            ):  # in the model its dimensions lie in memory in another order: sums round otherwise
                hooks.assert_same(logits.value, plain, site, tolerance=1e-6)
            else:
                assert torch.equal(logits.value, seen[site].value), site


# --- 2. everything restored -------------------------------------------------------------------------------------------

ADDED = ("embed.output", "mixer.update", "mlp.update")


@pytest.mark.parametrize("direction", ["restored", "corrupted"])
@pytest.mark.parametrize("which", ["every site", "the stream after one layer", "what is added to the stream"])
def test_all_values_of_another_run_are_that_run(
    model: patchwire.Model, reference: PreTrainedModel, which: str, direction: str
) -> None:
    source, base = (CLEAN, CORRUPT) if direction == "restored" else (CORRUPT, CLEAN)
    every = [site for site, _ in sites(model)]
    groups = {
        "every site": [every],
        "the stream after one layer": [[f"layers.{layer}.output"] for layer in range(model.num_layers)],
        "what is added to the stream": [[site for site in every if site.endswith(ADDED)]],
    }[which]
    runs = []
    with model.session():
        with model.trace(source):
            values = {site: read(model, site) for group in groups for site in group}
        for group in groups:
            with model.trace(base):
                for site in group:
                    edit(model, site, lambda _, where, site=site: values[site][where])
                runs.append(model.logits.save())

    expected = logits_of(reference, source)
    assert not torch.allclose(expected, logits_of(reference, base), atol=0.1)
    for logits in runs:
        hooks.assert_same(logits.value, expected, tolerance=1e-5)


# --- 3. a model of attention alone ------------------------------------------------------------------------------------


def test_in_a_model_of_attention_alone_all_heads_and_embeddings_are_everything(
    others: Mapping[str, patchwire.Model],
) -> None:
    model = others["induction-2l"]
    plain = AutoModelForCausalLM.from_pretrained(zoo_path("induction-2l"), dtype=torch.float32).eval()
    clean, corrupt = [0, 5, 9, 40, 5, 9, 40, 5], [0, 7, 33, 12, 7, 33, 12, 7]
    with model.trace() as trace:
        with trace.invoke(clean):
            embedded = model.embed.output
            heads = [layer.attn.z for layer in model.layers]
        patched = []
        for with_embeddings in (True, False):
            with trace.invoke(corrupt):
                if with_embeddings:
                    model.embed.output[:] = embedded
                for layer, z in zip(model.layers, heads, strict=True):
                    for head in range(z.shape[2]):
                        layer.attn.z[:, :, head] = z[:, :, head]
                patched.append(model.logits.save())

    everything, heads_only = (each.value for each in patched)
    torch.testing.assert_close(everything, logits_of(plain, clean), rtol=0, atol=1e-5)
    assert float((heads_only - everything).abs().max()) > 0.1, "embeddings go past the heads"


# --- 4. what the residual stream is the sum of ------------------------------------------------------------------------


def test_the_stream_is_the_sum_of_its_heads_neurons_and_biases_and_is_all_that_logits_are_made_of(
    model: patchwire.Model, reference: PreTrainedModel, name: str
) -> None:
    streams = []
    with model.trace(CLEAN):
        total = model.layers[0].input
        for layer in model.layers:
            if name == "mamba":
                total = total + (layer.ssm.scan * layer.ssm.gate_act) @ layer.ssm.W_out
            else:
                neurons, out = layer.mlp.neurons, layer.mlp.W_out
                each = (neurons[..., None] * out).sum(2) + getattr(layer.mlp, "b_out", 0)  # sum of m_i v_i
                total = total + layer.attn.head_out.sum(2) + getattr(layer.attn, "b_O", 0) + each
            streams.append(total.save())

    seen = hooks.record(reference, CLEAN)
    for layer, stream in zip(model.layers, streams, strict=True):
        hooks.assert_same(stream.value, seen[layer.path, "output", ()], layer.path, tolerance=1e-5)
    with torch.no_grad():
        norm = reference.get_submodule(places.PARTS[name]["norm"])
        logits = reference.get_output_embeddings()(norm(streams[-1].value))
    hooks.assert_same(logits, logits_of(reference, CLEAN), tolerance=1e-5)


# --- 5. causality -----------------------------------------------------------------------------------------------------


def test_a_write_at_a_token_leaves_those_before_it_alone_at_every_site(
    model: patchwire.Model, reference: PreTrainedModel
) -> None:
    """What comes before the token is what the model says of those tokens alone."""
    at = 3
    runs = {}
    with model.trace() as trace:
        for site, axis in sites(model):
            with trace.invoke(CLEAN):
                edit(model, site, lambda value, _: value * -0.5 + 0.25, [token(axis, at)])
                runs[site] = model.logits.save()

    before, plain = logits_of(reference, CLEAN[:at]), logits_of(reference, CLEAN)
    for site, logits in runs.items():
        hooks.assert_same(logits.value[:, :at], before, site, tolerance=1e-5)
        assert float((logits.value - plain)[:, at:].abs().max()) > 1e-3, site


# --- 6. knockout ------------------------------------------------------------------------------------------------------


def test_to_cut_an_edge_that_nothing_flows_through_changes_nothing(
    model: patchwire.Model, reference: PreTrainedModel, name: str
) -> None:
    """Attention that is so small as to be zero; and an SSM that is given nothing at the token that is cut."""
    key, query = 2, 4
    with model.trace(exact=True) as trace:
        runs = []
        for cut in (False, True):
            with trace.invoke(CLEAN):
                mixer = model.layers[LAYER].mixer
                if name == "mamba":
                    mixer.x_in[:, key] = 0
                else:
                    mixer.scores[:, :, query, key] -= 1e4
                    seen = mixer.pattern[0, :, query, key].clone().save()
                if cut:
                    patchwire.knockout(mixer, keys=key, queries=query)
                runs.append(model.logits.save())

    nothing, cut_off = (each.value for each in runs)
    if name != "mamba":
        assert float(seen.abs().max()) == 0
    assert torch.equal(cut_off, nothing)
    assert float((nothing - logits_of(reference, CLEAN)).abs().max()) > 1e-3, "the edge was one"


def alone(module: nn.Module, reference: PreTrainedModel, query: int) -> Tensor:
    """What a module returns for one token, given nothing but it."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    logits_of(reference, CLEAN)
    handle.remove()

    def of_the_token(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(of_the_token, value))
        return value[:, query : query + 1] if isinstance(value, Tensor) and value.ndim > 1 else value

    [(args, kwargs)] = given
    kwargs = {key: None if key == "attention_mask" else of_the_token(value) for key, value in kwargs.items()}
    with torch.no_grad():
        found: Any = module(*of_the_token(args), **kwargs)
    output: Tensor = found[0] if isinstance(found, tuple) else found
    return output[:, 0]


def test_to_cut_all_edges_but_a_tokens_own_leaves_what_the_mixer_makes_of_it_alone(
    model: patchwire.Model, reference: PreTrainedModel, name: str
) -> None:
    query = 4
    edited, module = model, reference.get_submodule(places.PARTS[name]["mixer"].format(LAYER))
    if name == "mamba":  # with its bias, the convolution would make something of nothing
        with model.edit() as edited:
            model.layers[LAYER].ssm.conv1d.bias[:] = 0
        nn.init.zeros_(module.conv1d.bias)
    with edited.trace(CLEAN):
        patchwire.knockout(edited.layers[LAYER].mixer, keys=range(query), queries=query)
        found = edited.layers[LAYER].mixer.update[:, query].save()
    with edited.trace(CLEAN):
        whole = edited.layers[LAYER].mixer.update[:, query].save()

    expected = alone(module, reference, query)
    hooks.assert_same(found.value, expected, tolerance=1e-5)
    assert float((whole.value - expected).abs().max()) > 1e-2


def test_a_scan_that_adds_powers_of_two_without_some_of_them_gives_the_sum_of_the_others(
    served: Mapping[str, patchwire.Model],
) -> None:
    """One channel is given 2, 4, 8, … times 16, another one is constant and makes B and C; nothing decays.

    Every number is exact, so that the sums say which tokens are in them. With a convolution of one tap an input comes
    once; with two it comes at its own token and at the next one, and must be gone from both.
    """
    model, prompt = served["mamba"], tiny.prompt(8)
    powers = 16 * 2.0 ** torch.arange(1, 9)  # large enough that their sigmoid is 1, and SiLU changes nothing
    cut, query = [1, 2, 5], 6
    layer = model.layers[LAYER]
    inner, state = layer.ssm.A_log.shape
    rank = layer.ssm.dt_proj.weight.shape[1]
    project = torch.zeros(rank + 2 * state, inner)
    project[rank, 1] = 1 / 32 / 32  # B: 1 / 32, as delta is 32
    project[rank + state, 1] = 1 / 32  # C: 1
    bias = torch.zeros(inner)
    bias[1] = 32.0
    for taps in ([0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]):
        filters = torch.zeros(inner, 1, 4)
        filters[0, 0] = torch.tensor(taps)
        with model.edit() as adder:
            ssm = layer.ssm
            ssm.conv1d.weight, ssm.conv1d.bias = filters, bias
            ssm.x_proj.weight = project
            ssm.dt_proj.weight, ssm.dt_proj.bias = torch.zeros(inner, rank), torch.full((inner,), 32.0)
            ssm.A_log, ssm.D = torch.full((inner, state), -1e4), torch.zeros(inner)
        scans = []
        for keys in ([], cut):
            with adder.trace(prompt):
                adder.layers[LAYER].ssm.x_in[:, :, 0] = powers
                if keys:
                    patchwire.knockout(adder.layers[LAYER].mixer, keys=keys, queries=query)
                scans.append(adder.layers[LAYER].ssm.scan[0, :, 0].clone().save())

        whole, without = (each.value for each in scans)
        shifted = torch.cat([torch.zeros(1), powers[:-1]]) * taps[2]
        assert torch.equal(whole, (powers + shifted).cumsum(0))
        kept = powers.clone()
        kept[cut] = 0
        expected = whole.clone()
        expected[query] = (kept[: query + 1] + taps[2] * torch.cat([torch.zeros(1), kept[:query]])).sum()
        assert torch.equal(without, expected)


# --- 7. sweeps --------------------------------------------------------------------------------------------------------


def test_a_grid_is_a_loop_of_single_requests_and_of_any_parts_with_the_same_noise(
    model: patchwire.Model, reference: PreTrainedModel, name: str
) -> None:
    """Noise on the embeddings of the subject, and one state restored, as causal tracing does."""
    subject, seeds = slice(1, 3), (11, 12)
    cells = [(layer, at, seed) for layer in range(tiny.LAYERS) for at in (1, 2, 5) for seed in seeds]

    def run(part: list[tuple[int, int, int]]) -> list[Any]:
        found = []
        with model.trace() as trace:
            with trace.invoke(CLEAN):
                clean = [layer.output for layer in model.layers]
            for layer, at, seed in part:
                with trace.invoke(CLEAN):
                    embedded = model.embed.output[:, subject]
                    embedded += 0.7 * patchwire.random.normal(tuple(embedded.shape), seed=seed)
                    model.layers[layer].output[:, at] = clean[layer][:, at]
                    found.append(model.logits[0, -1, [ANSWER, FOIL]].save())
        return found

    def alone(layer: int, at: int, seed: int) -> Tensor:
        def noisy(value: Tensor) -> Tensor:
            drawn = torch.randn(value[:, subject].shape, generator=torch.Generator().manual_seed(seed))
            value[:, subject] += 0.7 * drawn
            return value

        def restored(value: Tensor) -> Tensor:
            value[:, at] = states[place(layer)][:, at]
            return value

        changes = {(model.embed.path, "output", ()): noisy, place(layer): restored}
        return hooks.changed_logits(reference, CLEAN, changes)[0, -1, [ANSWER, FOIL]]

    def place(layer: int) -> hooks.Place:
        return (model.layers[layer].path, "output", ())

    states = hooks.record(reference, CLEAN)
    expected = torch.stack([alone(*cell) for cell in cells])
    for size in (len(cells), 7, 1):
        parts = [cells[start : start + size] for start in range(0, len(cells), size)]
        grid = torch.stack([each.value for part in parts for each in run(part)])
        torch.testing.assert_close(grid, expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std(0).min()) > 1e-2


def test_a_causal_trace_in_any_parts_has_the_same_noise(
    model: patchwire.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace() -> methods.Result:
        return methods.causal_trace(model, CLEAN, range(1, 3), methods.Noise(0.7, samples=3), answer=ANSWER)

    whole = trace()
    monkeypatch.setattr("patchwire.methods.sweeping._TOKENS", 5 * 3 * TOKENS)
    parts = trace()
    torch.testing.assert_close(parts.values, whole.values, rtol=1e-4, atol=1e-6)
    assert parts.numbers == pytest.approx(whole.numbers, rel=1e-4)


# --- 8. gradients -----------------------------------------------------------------------------------------------------

WRITTEN = {
    "transformer": ("output", "mixer.update", "attn.z", "mlp.neurons"),
    "ssm": ("output", "ssm.scan", "ssm.gate"),
}


def test_the_gradient_of_what_is_written_is_the_finite_difference(
    others: Mapping[str, patchwire.Model], name: str
) -> None:
    """In float64, by Richardson's rule; Llama's norms and Mamba's scan compute in float32 all the same."""
    model = others[f"{name}-float64"]
    exact = name in ("gpt2", "gpt_neox")
    width, tolerance = (1e-3, 1e-8) if exact else (1.5e-2, 2e-3)
    for site in WRITTEN["ssm" if name == "mamba" else "transformer"]:

        def metric(length: float | None, site: str = site) -> tuple[Any, Any]:
            value = read(model, f"layers.{LAYER}.{site}")
            direction = patchwire.random.normal(tuple(value[:, 3].shape), seed=5).double()
            written = value[:, 3] + (length or 0.0) * direction
            value[:, 3] = written
            said = model.logits[0, -1].log_softmax(-1)
            return said[ANSWER] - said[FOIL], (written, direction)

        with model.trace(CLEAN):
            loss, (written, direction) = metric(None)
            slope = (patchwire.grad(loss, written) * direction).sum().save()
        ends = []
        with model.trace() as trace:
            for length in (width, -width, width / 2, -width / 2):
                with trace.invoke(CLEAN):
                    ends.append(metric(length)[0].save())

        assert slope.value.dtype is torch.float64
        far, near = ((ends[at].value - ends[at + 1].value) / (2 * width / (at or 1)) for at in (0, 2))
        assert abs(float(slope)) > 1e-3
        assert float(slope) == pytest.approx(float(4 * near - far) / 3, rel=tolerance), site


# --- 9. edits ---------------------------------------------------------------------------------------------------------


def test_an_edit_is_gone_when_it_is_left_and_nobody_else_ever_sees_it(
    model: patchwire.Model, server: Server, reference: PreTrainedModel, name: str
) -> None:
    """Two programs run at the same time, one on the edited model, the other on the model as it is."""
    path = {"gpt2": "mlp.c_proj", "llama": "mlp.down_proj", "gpt_neox": "mlp.dense_4h_to_h", "mamba": "mixer.out_proj"}
    module = f"{model.layers[LAYER].path}.{path[name]}"
    with model.edit() as edited:
        weight = edited.module(module).weight
        left, right = (torch.linspace(-1, 1, each) for each in weight.shape)
        weight += 0.2 * torch.outer(left, right)
    changed = copy.deepcopy(reference)
    with torch.no_grad():
        changed.get_submodule(module).weight += 0.2 * torch.outer(left, right)
    expected, plain = logits_of(changed, CLEAN), logits_of(reference, CLEAN)
    assert not torch.allclose(expected, plain, atol=1e-2)

    start = Barrier(2)

    def runs(which: patchwire.Model) -> list[Tensor]:
        start.wait()
        return runs_of(which, 8)

    with patchwire.connect(server.address, progress=False) as other, ThreadPoolExecutor(2) as pool:
        both = pool.submit(runs, edited), pool.submit(runs, other.model(name))
        with_edit, without = (each.result() for each in both)
    with model.session():  # and in one request
        logits = []
        for which in (model, edited, model):
            with which.trace(CLEAN):
                logits.append(which.logits.save())

    assert all(torch.equal(each, plain) for each in [*without, *runs_of(model, 1), logits[0].value, logits[2].value])
    for each in [*with_edit, logits[1].value]:
        hooks.assert_same(each, expected, tolerance=1e-5)


def runs_of(model: patchwire.Model, count: int) -> list[Tensor]:
    """The logits of so many runs, one after the other."""
    found = []
    for _ in range(count):
        with model.trace(CLEAN):
            logits = model.logits.save()
        found.append(logits.value)
    return found


# --- 10. what is not there --------------------------------------------------------------------------------------------


class TestIsRefusedAtItsLine:
    """A write that would change nothing, or something else, is an error and no result."""

    def test_a_site_that_no_model_has(self, served):
        model = served["gpt2"]
        with refused(patchwire.SiteError, "mlp_out", hint=r"mlp"), model.trace(CLEAN):
            model.layers[1].mlp_out[:] = 0  # this line

    def test_a_site_that_this_model_does_not_have(self, served):
        mamba, llama = served["mamba"], served["llama"]
        with refused(patchwire.SiteError, "mlp", hint="no MLP"), mamba.trace(CLEAN):
            mamba.layers[1].mlp.output[:] = 0  # this line
        with refused(patchwire.SiteError, "attn", hint="mixer"), mamba.trace(CLEAN):
            mamba.layers[1].attn.pattern[:] = 0  # this line
        with refused(patchwire.SiteError, "ssm", hint="mixer"), llama.trace(CLEAN):
            llama.layers[1].ssm.state[:, 0] = 0  # this line

    def test_a_head_that_there_is_not(self, served):
        model = served["llama"]
        with refused(patchwire.ShapeError, r"index 4 is out of bounds .* size 4"), model.trace(CLEAN):
            model.layers[1].attn.z[:, :, 4] = 0  # this line
        with refused(patchwire.ShapeError, r"index 2 is out of bounds .* size 2"), model.trace(CLEAN):
            model.layers[1].attn.v[:, :, 2] = 0  # this line
        with refused(patchwire.GraphError, "no head 4"), model.trace(CLEAN):
            patchwire.knockout(model.layers[1].mixer, keys=1, queries=3, heads=[4])  # this line

    def test_a_neuron_or_channel_that_there_is_not(self, served):
        model = served["gpt2"]
        with refused(patchwire.ShapeError, r"index 96 is out of bounds .* size 96"), model.trace(CLEAN):
            model.layers[1].mlp.neurons[:, -1, 96] = 0  # this line
        mamba = served["mamba"]
        with refused(patchwire.ShapeError, r"index 48 is out of bounds .* size 48"), mamba.trace(CLEAN):
            mamba.layers[1].ssm.u[:, -1, 48] = 0  # this line

    def test_a_head_or_neuron_of_a_method(self, served):
        model = served["gpt2"]
        with pytest.raises(patchwire.InputError, match=r"head.* 0 to 3, and has no 4") as of_a_head:
            methods.activation_patching(model, CLEAN, CORRUPT, at="attn.z", over={"head": [4]})  # heads
        with pytest.raises(patchwire.InputError, match=r"are no neurons .* 0 to 95") as of_neurons, model.trace(CLEAN):
            methods.set_coefficients(model.layers[1], [3, 96], 0.0)  # neurons
        assert str(of_a_head.value).count("# heads") == str(of_neurons.value).count("# neurons") == 1

    def test_a_value_of_another_shape(self, served):
        model = served["llama"]
        with refused(patchwire.ShapeError, r"\[1, 6, 6\]", r"\[7\]"), model.trace(CLEAN):
            model.layers[1].attn.z[:, :, 1] = torch.zeros(7)  # this line
        with refused(patchwire.ShapeError, r"\[1, 6, 40\]", r"\[1, 6, 41\]"), model.trace(CLEAN):
            model.layers[1].mlp.neurons = torch.zeros(1, 6, 41)  # this line
        mamba = served["mamba"]
        with refused(patchwire.ShapeError, r"\[1, 48, 8\]", r"\[48, 9\]"), mamba.trace(CLEAN):
            mamba.layers[1].ssm.state[:, 2] = torch.zeros(48, 9)  # this line


# --- 11. here and there -----------------------------------------------------------------------------------------------


def experiment(model: patchwire.Model) -> dict[str, Tensor]:
    """Every site of the table, a sum of differences at each, a cut, a patch, and tokens."""
    found: dict[str, Any] = {}
    with model.session():
        with model.trace(CLEAN):
            for site, _ in sites(model, computed=True):
                found[site] = read(model, site).save()
            loss = model.logits[0, -1].log_softmax(-1)[ANSWER]
            found["gradient"] = patchwire.grad(loss, model.layers[0].output).save()
        with model.trace() as trace:
            with trace.invoke(CLEAN):
                clean = model.layers[LAYER].mixer.output[:, 2]
            with trace.invoke(CORRUPT):
                model.layers[LAYER].mixer.output[:, 2] = clean
                found["patched"] = model.logits.save()
            with trace.invoke(CORRUPT):
                patchwire.knockout(model.layers[LAYER].mixer, keys=[1, 2], queries=-1)
                found["cut"] = model.logits.save()
            with trace.invoke(CORRUPT):
                noisy = model.layers[0].output
                noisy += 0.3 * patchwire.random.normal(noisy, seed=3)
                found["noisy"] = model.logits.save()
    with model.generate(CLEAN, max_new_tokens=4, min_new_tokens=4) as gen:
        for step in gen.iter[:]:
            model.layers[LAYER].output[:, -1] *= 1.5
            found[f"step {step}"] = model.logits.save()
        found["tokens"] = gen.output.save()
    return {what: each.value for what, each in found.items()}


def test_numbers_are_the_same_on_this_machine_and_on_a_server(
    model: patchwire.Model, checkpoints: Mapping[str, str], name: str
) -> None:
    here, there = experiment(patchwire.local(checkpoints[name], progress=False)), experiment(model)

    assert here.keys() == there.keys()
    for what, each in here.items():
        finite = each.masked_fill(each < -1e30, 0) if each.is_floating_point() else each  # scores that are masked
        other = there[what].masked_fill(each < -1e30, 0) if each.is_floating_point() else there[what]
        hooks.assert_same(other, finite, what, tolerance=1e-5)


# --- 12. several prompts ----------------------------------------------------------------------------------------------

PROMPTS = [tiny.prompt(6), tiny.prompt(9), tiny.prompt(2), CLEAN]


def test_every_site_of_a_padded_batch_is_that_of_each_prompt_alone(model: patchwire.Model, name: str) -> None:
    names = [site for site, _ in sites(model, computed=True) if not site.endswith((".state", "ssm.pattern"))]
    with model.trace(PROMPTS):
        together = {site: read(model, site).save() for site in names}

    for row, prompt in enumerate(PROMPTS):
        with model.trace(prompt):
            alone = {site: read(model, site).save() for site in names}
        for site in names:
            wanted = alone[site].value
            own = (slice(row, row + 1), *(slice(-length, None) for length in wanted.shape[1:]))
            found = together[site].value[own]
            if site.endswith("scores"):  # of masked ones only that they are
                hidden = wanted < -1e30
                assert bool((found < -1e30).eq(hidden).all()), site
                wanted, found = (each.masked_fill(hidden, 0) for each in (wanted, found))
            hooks.assert_same(found, wanted, (site, row), tolerance=1e-5)


def test_an_experiment_on_a_padded_batch_is_that_on_each_prompt_alone(
    model: patchwire.Model, reference: PreTrainedModel
) -> None:
    """Steered at the last token, with the mixer of the last two tokens taken away in the layer after."""
    direction = torch.linspace(-1, 1, tiny.WIDTH)
    with model.trace(PROMPTS):
        model.layers[0].output[:, -1] += direction
        model.layers[LAYER].mixer.update[:, -2:] = 0
        said = model.logits[:, -1].save()

    def steered(value: Tensor) -> Tensor:
        value[:, -1] += direction
        return value

    def ablated(value: Tensor) -> Tensor:
        value[:, -2:] = 0
        return value

    mixer = model.layers[LAYER].mixer.path
    seen = hooks.record(reference, CLEAN)
    first = next(place for place in seen if place[:2] == (mixer, "output"))  # some give a tuple
    changes = {(model.layers[0].path, "output", ()): steered, first: ablated}
    for row, prompt in enumerate(PROMPTS):
        expected = hooks.changed_logits(reference, prompt, changes)[:, -1]
        hooks.assert_same(said.value[row : row + 1], expected, row, tolerance=1e-5)


# --- of single methods ------------------------------------------------------------------------------------------------


def test_a_dictionary_with_its_error_changes_nothing_and_without_it_does(
    model: patchwire.Model, reference: PreTrainedModel
) -> None:
    """`x + (f' - f) d` where nothing is made of the features: the splice of a sparse autoencoder."""
    torch.manual_seed(0)
    encode, decode = nn.Linear(tiny.WIDTH, 40), nn.Linear(40, tiny.WIDTH)
    runs = []
    with model.trace() as trace:
        for with_error in (True, False):
            with trace.invoke(CLEAN):
                for layer in model.layers:
                    hidden = layer.output
                    built = decode(torch.relu(encode(hidden)))
                    layer.output = built + (hidden - built) if with_error else built
                runs.append(model.logits.save())

    plain = logits_of(reference, CLEAN)
    hooks.assert_same(runs[0].value, plain, tolerance=1e-5)
    assert float((runs[1].value - plain).abs().max()) > 0.1
