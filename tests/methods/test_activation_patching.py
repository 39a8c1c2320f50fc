"""Activation patching: the numbers of one run with plain hooks for each cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import patchwire
from patchwire import methods

CLEAN = [3, 14, 15, 9, 26, 5]
CORRUPT = [3, 33, 44, 9, 26, 5]
ANSWER, FOIL = 7, 12
HEADS = 4
TRANSFORMERS = ["gpt2", "llama"]
EVERY = [*TRANSFORMERS, "mamba"]

Spot = tuple[nn.Module, bool, tuple[Any, ...]]
"""A module, whether its input is meant, and what of it."""


class Reference:
    """Runs of the Hugging Face model with hooks."""

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        self.name = name
        self.model = model
        base = model.base_model
        self.layers: list[nn.Module] = list(base.h if hasattr(base, "h") else base.layers)

    def module(self, layer: int, *paths: str) -> nn.Module:
        """The first of these paths that is in a layer."""
        for path in paths:
            try:
                return self.layers[layer].get_submodule(path)
            except AttributeError:
                continue
        raise AssertionError(paths)

    def run(self, ids: list[int], hooks: Mapping[tuple[nn.Module, bool], Callable[[Tensor], Tensor]]) -> Tensor:
        """The last token's logits `[1, vocabulary]`; inputs and outputs become what the hooks give."""
        handles = []
        for (module, is_input), change in hooks.items():
            if is_input:

                def before(module: nn.Module, args: Any, change: Callable[[Tensor], Tensor] = change) -> Any:
                    return (change(args[0].clone()), *args[1:])

                handles.append(module.register_forward_pre_hook(before))
            else:

                def after(module: nn.Module, args: Any, out: Any, change: Callable[[Tensor], Tensor] = change) -> Any:
                    return (change(out[0].clone()), *out[1:]) if isinstance(out, tuple) else change(out.clone())

                handles.append(module.register_forward_hook(after))
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
        for handle in handles:
            handle.remove()
        return logits

    def patched(self, base: list[int], source: list[int], spots: Sequence[Spot]) -> Tensor:
        """The base run's logits with the source run's values in some spots."""
        places = {(module, is_input) for module, is_input, _ in spots}
        states: dict[tuple[nn.Module, bool], Tensor] = {}

        def keep(place: tuple[nn.Module, bool]) -> Callable[[Tensor], Tensor]:
            return lambda value: states.setdefault(place, value)

        self.run(source, {place: keep(place) for place in places})

        def change(place: tuple[nn.Module, bool]) -> Callable[[Tensor], Tensor]:
            def changed(value: Tensor) -> Tensor:
                for module, is_input, where in spots:
                    if (module, is_input) == place:
                        value[where] = states[place][where]
                return value

            return changed

        return self.run(base, {place: change(place) for place in places})


@pytest.fixture(params=EVERY)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(served: Mapping[str, patchwire.Model], name: str) -> patchwire.Model:
    return served[name]


@pytest.fixture
def reference(references: Mapping[str, PreTrainedModel], name: str) -> Reference:
    return Reference(name, references[name])


transformers = pytest.mark.parametrize("name", TRANSFORMERS, indirect=True)

METRICS: dict[str, tuple[methods.Metric, Callable[[Tensor, Tensor], Tensor]]] = {
    "probability": (methods.Probability(ANSWER), lambda logits, clean: logits.softmax(-1)[0, ANSWER]),
    "log probability": (methods.LogProbability(ANSWER), lambda logits, clean: logits.log_softmax(-1)[0, ANSWER]),
    "difference": (methods.LogitDifference(ANSWER, FOIL), lambda logits, clean: logits[0, ANSWER] - logits[0, FOIL]),
    "divergence": (
        methods.KL(),
        lambda logits, clean: nn.functional.kl_div(
            logits.log_softmax(-1)[0], clean.log_softmax(-1)[0], log_target=True, reduction="sum"
        ),
    ),
    "rank": (
        methods.Rank(ANSWER),
        lambda logits, clean: (logits[0].argsort(descending=True) == ANSWER).nonzero()[0, 0].float(),
    ),
}


def difference(logits: Tensor) -> Tensor:
    return logits[0, ANSWER] - logits[0, FOIL]


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("metric", METRICS)
def test_every_layer_and_token_gives_what_hooks_give(
    model: patchwire.Model, reference: Reference, metric: str, direction: Any
) -> None:
    theirs, ours = METRICS[metric]
    found = methods.activation_patching(model, CLEAN, CORRUPT, theirs, direction=direction)

    base, source = (CORRUPT, CLEAN) if direction == "denoising" else (CLEAN, CORRUPT)
    clean = reference.run(CLEAN, {})
    for layer, module in enumerate(reference.layers):
        for token in range(len(CLEAN)):
            logits = reference.patched(base, source, [(module, False, (slice(None), token))])
            assert float(found.values[layer, token]) == pytest.approx(float(ours(logits, clean)), rel=1e-4, abs=1e-5)
    for name, prompt in (("base", base), ("source", source)):
        expected = float(ours(reference.run(prompt, {}), clean))
        assert found.numbers[name] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert [axis.name for axis in found.axes] == ["layer", "token"]
    assert found.axes[1].marked == (1, 2)


def test_effects_are_those_of_the_paper(model: patchwire.Model) -> None:
    metric = methods.LogitDifference(ANSWER, FOIL)
    found = methods.activation_patching(model, CLEAN, CORRUPT, metric)

    base, source = found.numbers["base"], found.numbers["source"]
    torch.testing.assert_close(found.effect().values, found.values - base)
    torch.testing.assert_close(found.normalised().values, (found.values - base) / (source - base))


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("at", ["resid", "mixer"])
def test_all_sites_at_once_are_all_of_the_effect_and_none_is_none(
    model: patchwire.Model, at: str, direction: Any
) -> None:
    metric = methods.LogitDifference(ANSWER, FOIL)
    everything = methods.activation_patching(model, CLEAN, CORRUPT, metric, over=(), direction=direction)
    nothing = methods.activation_patching(
        model, CLEAN, CORRUPT, metric, at=at, over={"token": [0]}, direction=direction
    )

    assert everything.values.shape == ()
    assert float(everything.normalised().values) == pytest.approx(1, abs=1e-5)
    assert float(nothing.normalised().values[0]) == pytest.approx(0, abs=1e-5)  # the prompts begin with the same token


@pytest.mark.parametrize(("at", "path"), [("mixer", ("attn", "self_attn", "mixer")), ("mlp", ("mlp",))])
def test_a_window_patches_the_layers_around(
    model: patchwire.Model, reference: Reference, name: str, at: str, path: tuple[str, ...]
) -> None:
    if name == "mamba" and at == "mlp":
        pytest.skip("a Mamba has no MLPs")
    metric = methods.LogitDifference(ANSWER, FOIL)
    found = methods.activation_patching(model, CLEAN, CORRUPT, metric, at=at, window=2)

    for layer in range(len(reference.layers)):
        around = range(max(0, layer - 1), layer + 1)
        for token in range(len(CLEAN)):
            spots: list[Spot] = [(reference.module(each, *path), False, (slice(None), token)) for each in around]
            expected = difference(reference.patched(CORRUPT, CLEAN, spots))
            torch.testing.assert_close(found.values[layer, token], expected, rtol=1e-4, atol=1e-5)


@transformers
def test_heads_are_slices_of_the_input_of_the_output_projection(model: patchwire.Model, reference: Reference) -> None:
    metric = methods.LogitDifference(ANSWER, FOIL)
    heads = methods.activation_patching(model, CLEAN, CORRUPT, metric, at="attn.z", over=("layer", "head"))
    last = methods.activation_patching(
        model, CLEAN, CORRUPT, metric, at=lambda layer: layer.mixer.z, over={"head": None, "layer": [1], "token": [5]}
    )

    for layer in range(len(reference.layers)):
        module = reference.module(layer, "attn.c_proj", "self_attn.o_proj")
        for head in range(HEADS):
            of_head = slice(6 * head, 6 * (head + 1))
            expected = difference(reference.patched(CORRUPT, CLEAN, [(module, True, (..., of_head))]))
            torch.testing.assert_close(heads.values[layer, head], expected, rtol=1e-4, atol=1e-5)
            if layer == 1:
                spot = (module, True, (slice(None), 5, of_head))
                expected = difference(reference.patched(CORRUPT, CLEAN, [spot]))
                torch.testing.assert_close(last.values[head, 0, 0], expected, rtol=1e-4, atol=1e-5)


@transformers
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_queries_keys_and_values_of_a_head_are_what_the_projection_gives(
    model: patchwire.Model, reference: Reference, name: str, part: str
) -> None:
    metric = methods.LogitDifference(ANSWER, FOIL)
    found = methods.activation_patching(model, CLEAN, CORRUPT, metric, at=f"attn.{part}", over=("layer", "head"))

    assert found.values.shape == (len(reference.layers), 2 if name == "llama" and part in "kv" else HEADS)
    for layer in range(len(reference.layers)):
        for head in range(found.values.shape[1]):
            module = reference.module(layer, "attn.c_attn", f"self_attn.{part}_proj")
            start = 6 * head + (24 * "qkv".index(part) if name == "gpt2" else 0)
            spot = (module, False, (..., slice(start, start + 6)))
            expected = difference(reference.patched(CORRUPT, CLEAN, [spot]))
            torch.testing.assert_close(found.values[layer, head], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2"], indirect=True)
def test_a_pattern_is_patched_by_head_and_by_query(model: patchwire.Model, reference: Reference) -> None:
    metric = methods.LogitDifference(ANSWER, FOIL)
    heads = methods.activation_patching(model, CLEAN, CORRUPT, metric, at="attn.pattern", over=("layer", "head"))
    found = methods.activation_patching(
        model, CLEAN, CORRUPT, metric, at="attn.pattern", over={"layer": [2], "head": [3], "token": None}
    )

    values, patterns = {}, {}
    for prompt in (CLEAN, CORRUPT):

        def keep(value: Tensor, key: int = prompt[1]) -> Tensor:
            values[key] = value
            return value

        reference.run(prompt, {(reference.module(2, "attn.c_attn"), False): keep})
        q, k, v = values[prompt[1]][0].view(len(prompt), 3, HEADS, 6).permute(1, 2, 0, 3)
        mask = torch.ones(len(prompt), len(prompt)).triu(1).bool()
        patterns[prompt[1]] = (q @ k.transpose(-1, -2) / 6**0.5).masked_fill(mask, -torch.inf).softmax(-1)
        values[prompt[1]] = v
    mixed = (patterns[CLEAN[1]] @ values[CORRUPT[1]]).transpose(0, 1).reshape(1, len(CLEAN), -1)
    module = reference.module(2, "attn.c_proj")

    def of_head(head: int, queries: slice) -> Callable[[Tensor], Tensor]:
        def changed(value: Tensor) -> Tensor:
            value[:, queries, 6 * head : 6 * (head + 1)] = mixed[:, queries, 6 * head : 6 * (head + 1)]
            return value

        return changed

    for head in range(HEADS):
        expected = difference(reference.run(CORRUPT, {(module, True): of_head(head, slice(None))}))
        torch.testing.assert_close(heads.values[2, head], expected, rtol=1e-4, atol=1e-5)
    for query in range(len(CLEAN)):
        expected = difference(reference.run(CORRUPT, {(module, True): of_head(3, slice(query, query + 1))}))
        torch.testing.assert_close(found.values[0, 0, query], expected, rtol=1e-4, atol=1e-5)


@transformers
def test_neurons_are_patched_alone_or_in_blocks(model: patchwire.Model, reference: Reference) -> None:
    metric = methods.LogitDifference(ANSWER, FOIL)
    steps = [5, [0, 1, 2, 9], [39, 7]]
    some = methods.activation_patching(
        model, CLEAN, CORRUPT, metric, at="mlp.neurons", over={"layer": [1], "neuron": steps, "token": [5]}
    )
    blocks = methods.activation_patching(
        model, CLEAN, CORRUPT, metric, at="mlp.neurons", over={"layer": [0], "neuron": methods.Blocks(15)}
    )

    for index, step in enumerate(steps):
        module = reference.module(1, "mlp.c_proj", "mlp.down_proj")
        spot = (module, True, (slice(None), 5, step))
        expected = difference(reference.patched(CORRUPT, CLEAN, [spot]))
        torch.testing.assert_close(some.values[0, index, 0], expected, rtol=1e-4, atol=1e-5)
    assert some.axes[1].labels == ("5", "0–2,9", "7,39")
    module = reference.module(0, "mlp.c_proj", "mlp.down_proj")
    for index in range(blocks.values.shape[1]):
        spot = (module, True, (..., slice(15 * index, 15 * (index + 1))))
        expected = difference(reference.patched(CORRUPT, CLEAN, [spot]))
        torch.testing.assert_close(blocks.values[0, index], expected, rtol=1e-4, atol=1e-5)
    assert blocks.axes[1].labels[:2] == ("0–14", "15–29")


@pytest.mark.parametrize("name", ["mamba"], indirect=True)
@pytest.mark.parametrize("at", ["scan", "gate"])
def test_channels_of_an_ssm_are_patched(model: patchwire.Model, reference: Reference, at: str) -> None:
    metric = methods.LogitDifference(ANSWER, FOIL)
    found = methods.activation_patching(
        model, CLEAN, CORRUPT, metric, at=at, over={"layer": None, "channel": methods.Blocks(20), "token": [2, 5]}
    )

    for layer, module in enumerate(reference.layers):
        halves = halves_of(reference, module, CLEAN)
        for block in range(3):
            for index, token in enumerate((2, 5)):
                where = (slice(None), token, slice(20 * block, 20 * (block + 1)))
                expected = difference(with_half(reference, module, CORRUPT, at, halves, where))
                torch.testing.assert_close(found.values[layer, block, index], expected, rtol=1e-4, atol=1e-5)


def halves_of(reference: Reference, layer: nn.Module, prompt: list[int]) -> dict[str, Tensor]:
    """The scan's output and the gate: their product is what the output projection is given."""
    mixer: Any = layer.get_submodule("mixer")
    seen: dict[str, Tensor] = {}

    def projected(value: Tensor) -> Tensor:
        seen["gate"] = mixer.act(value.chunk(2, -1)[1])
        return value

    def product(value: Tensor) -> Tensor:
        seen["scan"] = value / seen["gate"]
        return value

    reference.run(prompt, {(mixer.in_proj, False): projected, (mixer.out_proj, True): product})
    return seen


def with_half(
    reference: Reference, layer: nn.Module, prompt: list[int], half: str, to: dict[str, Tensor], where: tuple[Any, ...]
) -> Tensor:
    """The logits of a run in which part of one of both is another."""
    halves = halves_of(reference, layer, prompt)
    halves[half][where] = to[half][where]
    changed = halves["scan"] * halves["gate"]
    return reference.run(prompt, {(layer.get_submodule("mixer.out_proj"), True): lambda value: changed})


def test_a_sweep_of_many_requests_is_the_same_sweep(model: patchwire.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = methods.activation_patching(model, CLEAN, CORRUPT, answer=ANSWER, foil=FOIL)
    for limit, most in (("_TOKENS", 7 * len(CLEAN)), ("_WRITES", 7)):
        with monkeypatch.context() as limited:
            limited.setattr(f"patchwire.methods.sweeping.{limit}", most)
            parts = methods.activation_patching(model, CLEAN, CORRUPT, answer=ANSWER, foil=FOIL)
        torch.testing.assert_close(parts.values, whole.values, rtol=1e-4, atol=1e-5)
        assert parts.numbers == pytest.approx(whole.numbers, rel=1e-4)
        assert parts.stats.passes > whole.stats.passes


def test_without_an_answer_it_is_what_the_model_says(model: patchwire.Model, reference: Reference) -> None:
    found = methods.activation_patching(model, CLEAN, CORRUPT, over={"layer": [0], "token": [1]})

    assert found.numbers["source"] == pytest.approx(float(reference.run(CLEAN, {}).softmax(-1).max()), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"over": ("head",)}, "no axis “head” at “resid”; there are layer, token, channel"),
        ({"over": {"token": [6]}}, "indices 0 to 5, and has no 6"),
        ({"over": {"token": [[]]}}, "needs some of them at each step"),
        ({"over": {"token": methods.Blocks(0)}}, "at least one index"),
        ({"window": 0}, "at least one layer"),
        ({"direction": "sideways"}, "no direction “sideways”"),
        ({"at": "layers"}, "not in"),
        ({"at": "mixer.W_out"}, "no value of a run"),
        ({"at": lambda layer: layer}, "no value of a layer"),
        ({"corrupt": CORRUPT[:-1]}, "the same number of tokens"),
    ],
)
@pytest.mark.parametrize("name", ["mamba"], indirect=True)
def test_what_cannot_be_patched_is_refused(model: patchwire.Model, arguments: dict[str, Any], message: str) -> None:
    wanted: dict[str, Any] = {"corrupt": CORRUPT, "answer": ANSWER} | arguments
    with pytest.raises(patchwire.PatchwireError) as caught:
        methods.activation_patching(model, CLEAN, **wanted)
    assert message in str(caught.value)
    assert caught.value.lines


@pytest.mark.parametrize("name", ["gpt2"], indirect=True)
@pytest.mark.parametrize(("axis", "site"), [("head", "attn.z"), ("neuron", "mlp.neurons"), ("key", "attn.pattern")])
def test_an_axis_that_is_elsewhere_is_named_there(model: patchwire.Model, axis: str, site: str) -> None:
    with pytest.raises(patchwire.InputError, match=f'`at="{site}"` has it'):
        methods.activation_patching(model, CLEAN, CORRUPT, answer=ANSWER, over=("layer", axis))
    assert methods.activation_patching(model, CLEAN, CORRUPT, answer=ANSWER, at=site, over=(axis,)).axes[0].name == axis


@pytest.mark.parametrize("metric", ["logit_diff", lambda logits, clean: logits[:, 0]], ids=["a name", "a function"])
def test_what_is_no_metric_is_refused(model: patchwire.Model, metric: Any) -> None:
    with pytest.raises(patchwire.InputError, match=r"is no metric(.|\n)*LogitDifference\(answer, foil\)"):
        methods.activation_patching(model, CLEAN, CORRUPT, metric)


@pytest.mark.parametrize(
    ("metric", "instead"), [(methods.KL, "KL()"), (methods.LogitDifference, "LogitDifference(answer, foil)")]
)
def test_a_class_of_metrics_is_no_metric(model: patchwire.Model, metric: Any, instead: str) -> None:
    with pytest.raises(patchwire.InputError, match="is a class") as caught:
        methods.activation_patching(model, CLEAN, CORRUPT, metric)
    assert instead in caught.value.hint


@pytest.mark.parametrize("answer", [-1, 10**6])
def test_an_answer_is_a_token_that_there_is(model: patchwire.Model, answer: int) -> None:
    with pytest.raises(patchwire.InputError, match=f"no token {answer}"):
        methods.activation_patching(model, CLEAN, CORRUPT, answer=answer)
    number = methods.activation_patching(model, CLEAN, CORRUPT, answer=torch.tensor(ANSWER))
    assert torch.equal(number.values, methods.activation_patching(model, CLEAN, CORRUPT, answer=ANSWER).values)


def test_the_states_of_an_ssm_are_patched_at_single_tokens(served: Any) -> None:
    """Each cell is what writing that token's state by hand gives."""
    model = served["mamba"]
    found = methods.activation_patching(model, CLEAN, CORRUPT, answer=ANSWER, at="ssm.state")
    for layer in range(model.num_layers):
        for token in range(len(CLEAN)):
            with model.trace() as trace:
                with trace.invoke(CLEAN):
                    state = model.layers[layer].ssm.state[:, token]
                with trace.invoke(CORRUPT):
                    model.layers[layer].ssm.state[:, token] = state
                    expected = model.logits[0, -1].softmax(-1)[ANSWER].save()
            assert float(found.values[layer, token]) == pytest.approx(float(expected), rel=1e-5)
    assert float(found.effect().values.abs().max()) > 0


def test_a_result_says_what_it_is_and_where_it_is_highest(model: patchwire.Model) -> None:
    found = methods.activation_patching(model, CLEAN, CORRUPT, answer=ANSWER)
    best = found.values.argmax()
    layer, token = divmod(int(best), len(CLEAN))

    said = repr(found)
    assert said.startswith(
        f"<activation_patching of {model.name}: probability, {model.num_layers} layers × 6 tokens; from "
    )
    assert f" to {found.values.max():.4g} (layer {layer}, token {found.axes[1].shown[token]}); base " in said
    assert repr(found.at(layer=0, token=0)).split("; ")[1] == f"{found.values[0, 0]:.4g}"
    nowhere = dataclasses.replace(found, values=torch.full_like(found.values, torch.nan))
    assert "from" not in repr(nowhere)


def test_a_result_goes_to_a_file_and_back(model: patchwire.Model, tmp_path: Any) -> None:
    found = methods.activation_patching(
        model, CLEAN, CORRUPT, answer=ANSWER, at=lambda layer: layer.output, over={"layer": None, "token": [[1, 2], 5]}
    )
    again = methods.load(found.save(tmp_path / "patching.safetensors"))

    assert again.origin == found.origin
    assert again.axes == found.axes
    torch.testing.assert_close(again.values, found.values)
