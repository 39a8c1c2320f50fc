"""Canonical values of state space models and hybrids, against the formulas of their papers in plain PyTorch.

The reference computes each mixer by hand (recurrences.py) from the weights of the Hugging Face model, which computes
all the rest; so a value, and what follows from writing it, is compared with something that shares no code with either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import patchwire
import tiny
from conformance.recurrences import by_formula, mixed
from patchwire.errors import GraphError, ShapeError, SiteError
from serving import Server

FAMILIES: dict[str, bool] = {
    # By name: whether it is tested by default, or only among the slow ones.
    "mamba_odd": True,
    "falcon_mamba_odd": True,
    "mamba2_odd": True,
    "jamba": True,
    "bamba": True,
    "zamba2": True,
    "falcon_h1": True,
    "recurrent_gemma": True,
    "granitemoehybrid": True,
    "nemotron_h": True,
    "mamba": False,
    "mamba2": False,
    "falcon_mamba": False,
    "zamba2_adapted": False,
    "falcon_h1_norm": False,
    "falcon_h1_norm_after": False,
    "recurrent_gemma_wide": False,
}
ALL = [pytest.param(name, marks=[] if default else [pytest.mark.slow]) for name, default in FAMILIES.items()]
ALONE = [name for name, default in FAMILIES.items() if name.endswith("_odd") and default]
"""Those whose layers have nothing but an SSM."""
FEW = [
    pytest.param(name, marks=[] if name in (*ALONE, "falcon_h1", "recurrent_gemma") else [pytest.mark.slow])
    for name in FAMILIES
]
SELECTIVE = {"delta", "B", "C"}
VALUES = ("x_in", "conv", "u", "gate", "gate_act", "delta", "B", "C", "scan", "state")
TOLERANCE = 1e-5
PROMPT = tiny.prompt(7)
Pairs = dict[str, tuple[patchwire.Model, Any]]


@pytest.fixture(scope="module")
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairs]:
    """Each model: its proxy, and the model here."""
    root = tmp_path_factory.mktemp("ssm")
    wanted = {
        item.callspec.params.get("name", "mamba_odd")
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    } | {"mamba_odd", "granitemoehybrid", "recurrent_gemma", *SINGLE}
    directories = {}
    for name in sorted(wanted):
        reference = _reference(name)
        reference.save_pretrained(root / name)
        directories[name] = root / name
    with Server(directories) as server, patchwire.connect(server.address, progress=False) as client:
        yield {
            name: (client.model(name), AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False))
            for name, path in directories.items()
        }


SINGLE = tuple(f"{name}/single" for name in ALONE)
"""The same with one layer."""


def _reference(name: str) -> Any:
    family, _, single = name.partition("/")
    return tiny.build(family, layers=1 if single else None)


def ssm_layers(model: patchwire.Model) -> list[int]:
    return [index for index in range(model.num_layers) if "ssm" in dir(model.layers[index])]


def attention_layers(model: patchwire.Model) -> list[int]:
    return [index for index in range(model.num_layers) if "attn" in dir(model.layers[index])]


def names_of(model: patchwire.Model, layer: int) -> list[str]:
    return [name for name in VALUES if name in dir(model.layers[layer].ssm)]


def mixer_of(model: patchwire.Model, reference: Any, layer: int) -> Any:
    return reference.get_submodule(model.layers[layer].ssm.path)


def through(module: Any, run: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """What a module of the reference is given, and what it returns."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        seen.append((given, output[0] if isinstance(output, tuple) else output))

    handle = module.register_forward_hook(look, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return seen[0]


def logits_of(reference: Any, ids: list[int]) -> Tensor:
    return reference(torch.tensor([ids]), use_cache=False).logits  # type: ignore[no-any-return]


def assert_close(found: Any, expected: Tensor, what: object = "", tolerance: float = TOLERANCE) -> None:
    found = found.value if isinstance(found, patchwire.Value) else found
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    scale = max(float(expected.abs().max()), 1e-3)
    assert float((found - expected).abs().max()) <= tolerance * scale, (what, float((found - expected).abs().max()))


@pytest.mark.parametrize("name", ALL)
def test_every_value_of_an_ssm_is_what_its_formula_gives(name: str, pairs: Pairs) -> None:
    model, reference = pairs[name]
    layers = ssm_layers(model)
    assert layers
    for layer in layers:
        missing = set(VALUES) - set(names_of(model, layer))
        assert missing == (SELECTIVE if "recurrent_gemma" in name else set())

    with model.trace(PROMPT):
        found = {
            (at, each): getattr(model.layers[at].ssm, each).save() for at in layers for each in names_of(model, at)
        }
        outputs = {at: model.layers[at].ssm.output.save() for at in layers}
        logits = model.logits.save()

    assert_close(logits, logits_of(reference, PROMPT), "logits")
    for layer in layers:
        mixer = mixer_of(model, reference, layer)
        given, returned = through(mixer, lambda: logits_of(reference, PROMPT))
        output, expected = mixed(mixer, given)
        assert_close(output, returned, "the formulas are those of the model")
        output_here = outputs[layer].value
        assert_close(output_here[0] if isinstance(output_here, tuple) else output_here, output, "output")
        for each in names_of(model, layer):
            assert_close(found[layer, each], expected[each], (layer, each))


@pytest.mark.parametrize("name", ALL)
def test_updates_add_up_along_the_residual_stream(name: str, pairs: Pairs) -> None:
    model, _ = pairs[name]
    seen = []

    with model.trace(PROMPT):
        for layer in model.layers:
            parts = [part for part in ("mixer", "mlp", "attn", "ssm") if _has(layer, part, "update")]
            seen.append({part: getattr(layer, part).update.save() for part in parts})
            seen[-1] |= {"input": layer.input.save(), "output": layer.output.save()}
            if "resid_mid" in dir(layer):
                seen[-1]["resid_mid"] = layer.resid_mid.save()

    for values in seen:
        now = values["input"].value
        assert "mixer" in values or "mlp" in values
        if "mixer" in values:
            now = now + values["mixer"].value
            if "resid_mid" in values:
                assert_close(values["resid_mid"], now)
            updates = [values[part].value for part in ("attn", "ssm") if part in values]
            assert_close(torch.stack(updates).sum(0), values["mixer"].value)
        if "mlp" in values:
            now = now + values["mlp"].value
        assert_close(values["output"], now)


@pytest.mark.parametrize("name", ALL)
def test_verification_finds_that_all_equations_hold(name: str, pairs: Pairs) -> None:
    model, _ = pairs[name]

    found = patchwire.verify(model)

    assert found.passed, found
    assert len(found.of(f"layers.{ssm_layers(model)[0]}.ssm.scan")) > 2


def _has(layer: Any, part: str, name: str) -> bool:
    return part in dir(layer) and name in dir(getattr(layer, part))


@pytest.mark.parametrize("name", FEW)
def test_the_hidden_attention_of_an_ssm_gives_its_scan(name: str, pairs: Pairs) -> None:
    """`scan_t = sum_s alpha_ts u_s + D u_t` with `alpha_ts = C_t exp(sum of delta A after s) delta_s B_s`."""
    model, reference = pairs[name]
    layer = ssm_layers(model)[-1]
    mixer = mixer_of(model, reference, layer)
    if not set(names_of(model, layer)) >= SELECTIVE:
        assert hasattr(mixer, "rg_lru")
        return

    with model.trace(PROMPT):
        values = {each: getattr(model.layers[layer].ssm, each).save() for each in ("delta", "B", "C", "u", "scan")}
        W_out = model.layers[layer].ssm.W_out.save()

    delta, B, C, u, scan = (each.value for each in values.values())
    A = -torch.exp(mixer.A_log)
    if B.ndim == 4:  # heads: as many channels with the same delta, and groups of heads with the same B and C
        channels, heads = u.shape[-1] // len(A), len(A)
        B, C = (each.repeat_interleave(heads // each.shape[2] * channels, 2) for each in (B, C))
        delta, A, D = delta.repeat_interleave(channels, 2), A.repeat_interleave(channels)[:, None], mixer.D
        D = D.repeat_interleave(channels)
    else:
        B, C, D = B[:, :, None], C[:, :, None], mixer.D
    elapsed = delta.cumsum(1)
    expected = D * u
    for t in range(len(PROMPT)):
        for s in range(t + 1):
            decay = torch.exp((elapsed[:, t] - elapsed[:, s])[..., None] * A)
            alpha = (C[:, t] * decay * delta[:, s, :, None] * B[:, s]).sum(-1)
            expected[:, t] += alpha * u[:, s]
    assert_close(scan, expected)
    assert_close(W_out, mixer.out_proj.weight.T)


@pytest.mark.parametrize("name", FEW)
def test_a_write_goes_on_as_in_the_formula_and_leaves_earlier_tokens_alone(name: str, pairs: Pairs) -> None:
    model, reference = pairs[name]
    layer, at = ssm_layers(model)[0], 3
    mixer = mixer_of(model, reference, layer)
    clean = logits_of(reference, PROMPT)
    results = {}

    with model.trace() as trace:
        for each in names_of(model, layer):
            with trace.invoke(PROMPT):
                value = getattr(model.layers[layer].ssm, each)
                value[:, at] = value[:, at] * 0.5 + 0.25
                results[each] = model.logits.save()

    for each, logits in results.items():

        def change(name: str, position: int | None, value: Tensor, wanted: str = each) -> Tensor:
            if name != wanted:
                return value
            changed = value.clone()
            if position is None:
                changed[:, at] = value[:, at] * 0.5 + 0.25
            elif position == at:
                changed = value * 0.5 + 0.25
            return changed

        with by_formula(mixer, change):
            expected = logits_of(reference, PROMPT)
        assert_close(logits, expected, each)
        assert_close(logits.value[:, :at], clean[:, :at], each)
        assert float((expected - clean)[:, at:].abs().max()) > 1e-3, each


@pytest.mark.parametrize("name", FEW)
def test_a_gradient_is_that_of_the_formula(name: str, pairs: Pairs) -> None:
    model, reference = pairs[name]
    layer = ssm_layers(model)[0]
    mixer = mixer_of(model, reference, layer)
    with model.trace(PROMPT):
        values = {each: getattr(model.layers[layer].ssm, each) for each in names_of(model, layer)}
        gradients = patchwire.save(patchwire.grad(model.logits[0, -1, 3], list(values.values())))

    for each, gradient in zip(values, gradients, strict=True):
        probe = torch.zeros(gradient.shape, requires_grad=True)

        def change(name: str, position: int | None, value: Tensor, wanted: str = each, probe: Tensor = probe) -> Tensor:
            if name != wanted:
                return value
            return value + (probe if position is None else probe[:, position])

        with by_formula(mixer, change):
            logits_of(reference, PROMPT)[0, -1, 3].backward()  # type: ignore[no-untyped-call]
        assert probe.grad is not None
        assert_close(gradient, probe.grad, each, tolerance=1e-4)
        assert float(probe.grad.abs().max()) > 0, each


@pytest.mark.parametrize("name", FEW)
def test_prompts_of_different_lengths_in_one_trace_give_what_each_gives_alone(name: str, pairs: Pairs) -> None:
    model, reference = pairs[name]
    layer = ssm_layers(model)[-1]
    mixer = mixer_of(model, reference, layer)
    prompts = [tiny.prompt(length) for length in (6, 1, 9)]
    found = []

    with model.trace() as trace:
        for prompt in prompts:
            with trace.invoke(prompt):
                found.append({each: getattr(model.layers[layer].ssm, each).save() for each in names_of(model, layer)})

    for prompt, values in zip(prompts, found, strict=True):
        given, _ = through(mixer, lambda ids=prompt: logits_of(reference, ids))
        _, expected = mixed(mixer, given)
        for each, value in values.items():
            assert_close(value, expected[each], (len(prompt), each))


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("length", [7, 2])
def test_a_generation_has_the_values_of_a_run_without_a_cache(name: str, length: int, pairs: Pairs) -> None:
    model, reference = pairs[name]
    layer, prompt, new = ssm_layers(model)[-1], tiny.prompt(length), 4
    mixer = mixer_of(model, reference, layer)
    steps = []

    with model.generate(prompt, max_new_tokens=new, min_new_tokens=new) as generation:
        for _ in generation.all():
            steps.append({each: getattr(model.layers[layer].ssm, each).save() for each in names_of(model, layer)})
        output = generation.output.save()

    tokens = output.value[0].tolist()
    given, _ = through(mixer, lambda: logits_of(reference, tokens[:-1]))
    _, expected = mixed(mixer, given)
    assert len(steps) == new
    for each in names_of(model, layer):
        assert steps[0][each].shape == expected[each][:, :length].shape
        together = torch.cat([step[each].value for step in steps], dim=1)
        assert_close(together, expected[each], each, 5e-5)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("step", [0, 2])
def test_a_state_written_in_a_generation_is_in_the_cache_from_then_on(name: str, step: int, pairs: Pairs) -> None:
    model, reference = pairs[name]
    layer, prompt, new = ssm_layers(model)[0], tiny.prompt(5), 6
    mixer = mixer_of(model, reference, layer)
    at = 2 if step == 0 else 0
    position = at if step == 0 else len(prompt) + step - 1
    steps = []

    with model.generate(prompt, max_new_tokens=new, min_new_tokens=new) as generation:
        for number, _ in enumerate(generation.all()):
            if number == step:
                state = model.layers[layer].ssm.state
                state[:, at] = -state[:, at] + 0.5
            steps.append(model.logits[:, -1].save())
        output = generation.output.save()

    def change(name: str, token: int | None, value: Tensor) -> Tensor:
        return -value + 0.5 if name == "state" and token == position else value

    tokens = output.value[0].tolist()
    with by_formula(mixer, change):
        expected = logits_of(reference, tokens[:-1])[0, len(prompt) - 1 :]
    assert tokens[: len(prompt)] == prompt
    assert_close(torch.cat([each.value for each in steps]), expected, tolerance=5e-5)
    changed = (expected - logits_of(reference, tokens[:-1])[0, len(prompt) - 1 :]).abs().amax(-1)
    assert float(changed[step:].min()) > 1e-3
    expected[:, reference.config.eos_token_id] = float("-inf")  # it is not to end yet
    assert expected.argmax(-1).tolist() == tokens[len(prompt) :]


def remembers(reference: Any) -> int:
    """How many inputs of the convolution a layer remembers besides its state."""
    (width,) = {each.kernel_size[0] for each in reference.modules() if isinstance(each, torch.nn.Conv1d)}
    return int(width) - 1


@pytest.mark.parametrize("name", ALONE)
def test_the_memory_of_one_prompt_written_into_another_continues_as_the_first(name: str, pairs: Pairs) -> None:
    """All that such a model knows of the past is each layer's state and its last inputs of the convolution.

    So with both of every layer, everything after is the first prompt's, whatever came before and at whatever position;
    with the states alone it is not, because the convolution still sees the other prompt.
    """
    model, reference = pairs[name]
    first, second, rest = tiny.prompt(8), tiny.prompt(5, seed=1), tiny.prompt(6, seed=2)
    width = remembers(reference)
    after, other = len(first) - 1, len(second) - 1
    whole = logits_of(reference, first + rest)[:, len(first) :]

    with model.session():
        with model.trace(first):
            states = [layer.ssm.state[:, after] for layer in model.layers]
            fed = [convolved(layer)[:, after + 1 - width :] for layer in model.layers]
        with model.trace(second + rest):
            for index, layer in enumerate(model.layers):
                layer.ssm.state[:, other] = states[index]
                convolved(layer)[:, other + 1 - width : other + 1] = fed[index]
            patched = model.logits[:, len(second) :].save()
        with model.trace(second + rest):
            for index, layer in enumerate(model.layers):
                layer.ssm.state[:, other] = states[index]
            only_states = model.logits[:, len(second) :].save()

    assert_close(patched, whole)
    assert float((only_states.value - whole).abs().max()) > 1e-3


def convolved(layer: Any) -> Any:
    """All that goes into the convolution: in Mamba-2 what B and C come from, too, besides `x_in`."""
    return layer.ssm.x_in if "x_proj" in dir(layer.ssm) else layer.ssm.in_proj.output


@pytest.mark.parametrize("name", ALONE)
def test_the_state_alone_is_enough_where_the_convolution_sees_the_same(name: str, pairs: Pairs) -> None:
    """In a model of one layer, the inputs of the convolution depend on their own tokens only.

    So after as many common tokens as the convolution is wide, less one, the state is all that differs.
    """
    model, reference = pairs[f"{name}/single"]
    width = remembers(reference)
    common, rest = tiny.prompt(width, seed=3), tiny.prompt(5, seed=2)
    first, second = tiny.prompt(8) + common, tiny.prompt(4, seed=1) + common
    whole = logits_of(reference, first + rest)[:, len(first) :]

    with model.session():
        with model.trace(first):
            state = model.layers[0].ssm.state[:, -1]
        with model.trace(second + rest):
            model.layers[0].ssm.state[:, len(second) - 1] = state
            patched = model.logits[:, len(second) :].save()
            tokens_before = model.logits[:, : len(second) - 1].save()

    assert_close(patched, whole)
    assert_close(tokens_before, logits_of(reference, second)[:, :-1])
    assert float((logits_of(reference, second + rest)[:, len(second) :] - whole).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["jamba", "bamba", "falcon_h1", "recurrent_gemma", "zamba2", *(
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("granitemoehybrid", "nemotron_h", "zamba2_adapted", "recurrent_gemma_wide")
)])  # fmt: skip
def test_the_attention_of_a_hybrid_has_the_same_vocabulary_as_elsewhere(name: str, pairs: Pairs) -> None:
    model, reference = pairs[name]
    layer = attention_layers(model)[0]
    attention = reference.get_submodule(model.layers[layer].attn.path)
    everything = ("q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z", "head_out")

    with model.trace(PROMPT):
        attn = model.layers[layer].attn
        found = {each: getattr(attn, each).save() for each in everything}
        W_O = attn.W_O.save()
        bias = attn.b_O.save() if "b_O" in dir(attn) else None

    value = {each: of.value for each, of in found.items()}
    for each in "qkv":
        projection = getattr(attention, f"{each}_proj")
        given, expected = through(projection, lambda: logits_of(reference, PROMPT))
        if hasattr(attention, "linear_q_adapter_list"):
            number = attention.layer_dic[layer]
            expected = expected + getattr(attention, f"linear_{each}_adapter_list")[number](given)
        assert_close(value[each].flatten(2), expected, each)
    concatenated, returned = through(attention.o_proj, lambda: logits_of(reference, PROMPT))
    assert_close(value["z"].flatten(2), concatenated, "z")
    assert_close(W_O.value.flatten(0, 1).T, attention.o_proj.weight, "W_O")
    contributions = value["head_out"].sum(2) + (0 if bias is None else bias.value)
    assert_close(contributions, returned, "head_out")
    times = value["q"].shape[2] // value["k"].shape[2]
    keys, values = (value[each].repeat_interleave(times, 2) for each in ("k_rot", "v"))
    products = torch.einsum("bqhd,bkhd->bhqk", value["q_rot"], keys) * attention.scaling
    seen = value["scores"] > -1e30
    window = getattr(attention, "sliding_window", None) or len(PROMPT)
    reach = torch.ones(len(PROMPT), len(PROMPT)).tril()
    assert torch.equal(seen[0, 0], (reach - reach.tril(-window)).bool())
    assert_close(value["scores"][seen], products[seen], "scores")
    assert_close(value["pattern"], value["scores"].softmax(-1), "pattern")
    assert_close(torch.einsum("bhqk,bkhd->bqhd", value["pattern"], values), value["z"], "pattern @ v")


@pytest.mark.parametrize("name", ["jamba", "falcon_h1", "zamba2", "recurrent_gemma", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("bamba", "granitemoehybrid", "nemotron_h", "zamba2_adapted")
)])  # fmt: skip
def test_the_mlp_of_a_hybrid_has_the_same_vocabulary_as_elsewhere(name: str, pairs: Pairs) -> None:
    model, reference = pairs[name]
    layers = [index for index in range(model.num_layers) if "mlp" in dir(model.layers[index])]
    assert layers
    values: dict[int, dict[str, Any]] = {}

    with model.trace(PROMPT):
        for at in layers:
            mlp = model.layers[at].mlp
            names = [each for each in ("neurons", "pre", "up", "router", "chosen_experts") if each in dir(mlp)]
            values[at] = {each: getattr(mlp, each).save() for each in names}

    for at, found in values.items():
        mlp = reference.get_submodule(model.layers[at].mlp.path)
        if "neurons" in found:
            given, _ = through(mlp.down_proj, lambda mlp=mlp: logits_of(reference, PROMPT))
            assert_close(found["neurons"], given)
            act = mlp.act_fn(found["pre"].value)
            assert_close(act * found["up"].value if "up" in found else act, given)
        else:
            router = getattr(mlp, "router", None) or mlp.gate
            given, logits = through(router, lambda router=router: logits_of(reference, PROMPT))
            assert_close(found["router"].value[0], logits)
            scores = logits + getattr(router, "e_score_correction_bias", 0)
            best = scores.topk(found["chosen_experts"].shape[-1], dim=-1)[1]
            assert torch.equal(found["chosen_experts"].value[0].sort(-1)[0], best.sort(-1)[0])


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize(
    "index",
    [(slice(None), slice(3, 4)), (slice(None), slice(2, 5)), (slice(None), slice(None, None, 2)), (slice(None), 3)],
    ids=str,
)
def test_states_of_one_run_are_written_into_another_at_the_same_positions(
    name: str, index: tuple[Any, ...], pairs: Pairs
) -> None:
    """As a whole slice, and as each token's state, one after the other: they are the same."""
    model, _ = pairs[name]
    other = tiny.prompt(len(PROMPT), seed=5)
    positions = range(len(PROMPT))[index[1]]
    found, states = [], []
    for whole in (True, False):
        with model.trace() as trace:
            with trace.invoke(other):
                given = model.layers[0].ssm.state
            with trace.invoke(PROMPT):
                own = model.layers[0].ssm.state
                if whole:
                    own[index] = given[index]
                else:
                    for at in [positions] if isinstance(positions, int) else positions:
                        own[:, at] = given[:, at]
                states.append(own[:, 1:6].save())
                found.append(model.logits.save())
    assert torch.equal(found[0].value, found[1].value)
    assert torch.equal(states[0].value, states[1].value)
    with model.trace(PROMPT):
        clean = model.logits.save()
        taken = model.layers[0].ssm.state[:, 1:6].save()
        part = model.layers[0].ssm.state[:, 1:6, ..., :2].save()
    assert float((clean.value - found[0].value).abs().max()) > 1e-4
    assert torch.equal(taken.value[..., :2], part.value)
    assert taken.value.shape == states[0].value.shape


def test_states_are_moved_as_they_were(pairs: Pairs) -> None:
    """What is written is what was there before the first of them was written, as with tensors."""
    model, _ = pairs["mamba_odd"]
    with model.trace(PROMPT):
        before = model.layers[0].ssm.state.save()
    with model.trace(PROMPT):
        state = model.layers[0].ssm.state
        state[:, 1:3] = state[:, 0:2]
        after = state.save()
    assert torch.equal(after.value[:, 1:3], before.value[:, 0:2])


@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(1, 3), [0, 2], slice(None), [1, 3]),
        (slice(None), slice(1, 3), [0, 2]),
        (slice(None), slice(1, 3), 0, slice(None), [1, 3]),
        (slice(None), slice(1, 3), 1),
        (0, slice(1, 3), [0, 2]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["mamba2_odd"])
def test_any_index_takes_of_states_what_it_takes_of_a_tensor(name: str, index: Any, pairs: Pairs) -> None:
    model, _ = pairs[name]
    with model.trace([PROMPT, PROMPT[::-1]]):
        whole = model.layers[0].ssm.state.save()
        part = model.layers[0].ssm.state[index].save()
    assert part.value.shape == whole.value[index].shape
    assert torch.equal(part.value, whole.value[index])


def test_an_index_that_is_a_value_takes_of_states_what_it_takes_of_a_tensor(pairs: Pairs) -> None:
    model, _ = pairs["mamba_odd"]
    with model.trace(PROMPT):
        state = model.layers[0].ssm.state
        best = state[:, 0].sum((0, 2)).argsort()[:2]
        part, whole, index = state[:, 1:3, best].save(), state.save(), best.save()
    assert torch.equal(part.value, whole.value[:, 1:3, index.value])


def test_states_that_do_not_fit_are_refused(pairs: Pairs) -> None:
    model, _ = pairs["mamba_odd"]
    with model.trace() as trace:
        with trace.invoke(PROMPT[::-1]):
            other = model.layers[0].ssm.state
        with trace.invoke(PROMPT):
            state = model.layers[0].ssm.state
            with pytest.raises(ShapeError, match="does not fit"):
                state[:, 0:2] = other[:, 0:2, 0]
            with pytest.raises(ShapeError, match="does not fit"):
                state[:, 0:2] = other[:, 0:3]
            with pytest.raises(GraphError, match="several dimensions"):
                state[:, 0:2, 0, [0, 1]] = 0.0
            with pytest.raises((ShapeError, ValueError)):
                state[:, ::-1].sum()
            model.logits.save()


def test_a_slice_of_states_is_a_view_of_them(pairs: Pairs) -> None:
    model, _ = pairs["mamba_odd"]
    found = []
    for through in (True, False):
        with model.trace(PROMPT):
            state = model.layers[0].ssm.state
            if through:
                part = state[:, 2:5]
                part[:, 1] = 0.5
            else:
                state[:, 3] = 0.5
            found += [state.save(), model.logits.save()]
    for one, other in zip(found[:2], found[2:], strict=True):
        assert torch.equal(one.value, other.value)
    assert bool((found[0].value[:, 3] == 0.5).all())


def test_states_are_written_at_positions(pairs: Pairs) -> None:
    model, _ = pairs["mamba_odd"]

    for index in ((Ellipsis, slice(None)), 0, (Ellipsis, 0), (slice(None), torch.tensor([1, 2]))):
        with pytest.raises(GraphError, match=r"(?s)positions of the states.*`state\[:, t\] = …`"), model.trace(PROMPT):
            model.layers[0].ssm.state[index] = 0.0
    with pytest.raises(GraphError, match="token by token"), model.trace(PROMPT):
        model.layers[0].ssm.state.mul_(0.5)
    with model.trace(PROMPT):
        model.logits.save()
        with pytest.raises(IndexError, match="there are 7 tokens"):
            model.layers[0].ssm.state[:, 7] = 0.0


def test_states_of_prompts_of_different_lengths_in_one_list_are_refused(pairs: Pairs) -> None:
    model, _ = pairs["mamba_odd"]
    lists = [tiny.prompt(4), tiny.prompt(6)]

    refused = r"(?s)prompts of different lengths.*one trace for each prompt"
    with pytest.raises(SiteError, match=refused), model.trace(lists):
        model.layers[0].ssm.state.save()


def test_what_is_computed_cannot_be_written(pairs: Pairs) -> None:
    model, _ = pairs["granitemoehybrid"]

    with pytest.raises(SiteError, match="computed from other values"), model.trace(PROMPT):
        model.layers[0].ssm.update = torch.zeros(1, 7, tiny.WIDTH)
    with pytest.raises(GraphError, match="computed from other values"), model.trace(PROMPT):
        model.layers[0].mixer.update[:, 1] = 0.0


def test_a_part_that_only_other_layers_have_is_not_there(pairs: Pairs) -> None:
    model, _ = pairs["recurrent_gemma"]

    for layer in model.layers:
        parts = {"attn", "ssm"} & set(dir(layer))
        assert len(parts) == 1
        assert ("state" in dir(layer.mixer)) == (parts == {"ssm"})
        assert ("pattern" in dir(layer.mixer)) == (parts == {"attn"})


def test_what_one_request_makes_of_a_model_that_remembers_is_not_seen_by_the_next(pairs: Pairs) -> None:
    model, reference = pairs["recurrent_gemma"]
    prompt = [7]
    expected = reference.generate(torch.tensor([prompt]), max_new_tokens=5, min_new_tokens=5, do_sample=False)

    with model.generate(PROMPT, max_new_tokens=2, min_new_tokens=2):
        model.layers[0].ssm.state[:, 0] = float("inf")
        model.logits.save()
    with model.generate(prompt, max_new_tokens=5, min_new_tokens=5) as generation:
        for _ in generation.iter[1]:
            model.layers[0](model.layers[0].input[:, -1:])  # a module that is applied in between has its own memory
        output = generation.output.save()

    assert output.value.tolist() == expected.tolist()
