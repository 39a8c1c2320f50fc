"""Causal tracing: the numbers of one run with plain hooks for each cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import patchwire
from patchwire import methods

PROMPT = [3, 14, 15, 9, 26, 5]
OTHER = [3, 33, 44, 9, 26, 5]
SUBJECT = range(1, 3)
ANSWER = 7
SAMPLES, STD, SEED = 4, 0.7, 11
NAMES = ["gpt2", "llama", "mamba"]


class Reference:
    """Runs of the Hugging Face model with hooks."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        base = model.base_model
        self.layers: list[nn.Module] = list(base.h if hasattr(base, "h") else base.layers)
        self.embed = model.get_input_embeddings()

    def part(self, layer: int, place: str) -> nn.Module:
        names = {"resid": (), "mlp": ("mlp",), "mixer": ("self_attn", "attn", "mixer")}[place]
        found = [getattr(self.layers[layer], name) for name in names if hasattr(self.layers[layer], name)]
        return found[0] if found else self.layers[layer]

    def run(self, rows: Tensor, changes: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Tensor:
        """The probability of the answer, the mean over rows."""
        handles = []
        for module, change in changes.items():

            def hook(module: nn.Module, args: Any, output: Any, change: Callable[[Tensor], Tensor] = change) -> Any:
                if isinstance(output, tuple):
                    return (change(output[0].clone()), *output[1:])
                return change(output.clone())

            handles.append(module.register_forward_hook(hook))
        with torch.no_grad():
            logits = self.model(input_ids=rows, use_cache=False).logits[:, -1]
        for handle in handles:
            handle.remove()
        return logits.float().softmax(-1)[:, ANSWER].mean()

    def seen(self, rows: Tensor, place: str, changes: Any = None) -> dict[int, Tensor]:
        """What every layer gives at a place."""
        found: dict[int, Tensor] = {}
        for layer in range(len(self.layers)):

            def keep(value: Tensor, layer: int = layer) -> Tensor:
                found[layer] = value
                return value

            self.run(rows, {**(changes or {}), self.part(layer, place): keep})
        return found

    def trace(self, rows: Tensor, corrupt: Any, place: str, window: int, severed: str | None = None) -> Tensor:
        clean = self.seen(torch.tensor([PROMPT]), place)
        frozen = self.seen(rows, severed, corrupt) if severed else {}
        count = len(self.layers)
        values = torch.zeros(count, len(PROMPT))
        for layer in range(count):
            around = range(max(0, layer - window // 2), min(count, layer - (-window // 2)))
            for token in range(len(PROMPT)):
                changes = dict(corrupt)
                for each in range(count) if severed else ():

                    def hold(value: Tensor, source: Tensor = frozen[each], token: int = token) -> Tensor:
                        value[:, token] = source[:, token]
                        return value

                    changes[self.part(each, str(severed))] = hold
                for each in around:

                    def restore(value: Tensor, source: Tensor = clean[each], token: int = token) -> Tensor:
                        value[:, token] = source[:, token]
                        return value

                    changes[self.part(each, place)] = restore
                values[layer, token] = self.run(rows, changes)
        return values


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(served: Mapping[str, patchwire.Model], name: str) -> patchwire.Model:
    return served[name]


@pytest.fixture
def reference(references: Mapping[str, PreTrainedModel], name: str) -> Reference:
    return Reference(references[name])


def noise(reference: Reference) -> tuple[Tensor, dict[nn.Module, Callable[[Tensor], Tensor]]]:
    """The rows of the corrupted runs, and what corrupts them."""
    width = reference.embed.weight.shape[1]
    drawn = torch.randn((SAMPLES, len(SUBJECT), width), generator=torch.Generator().manual_seed(SEED))

    def corrupt(value: Tensor) -> Tensor:
        value[:, SUBJECT.start : SUBJECT.stop] += STD * drawn
        return value

    return torch.tensor([PROMPT] * SAMPLES), {reference.embed: corrupt}


@pytest.mark.parametrize(("place", "window"), [("resid", 1), ("mixer", 1), ("mixer", 2), ("resid", 3)])
def test_noise_gives_what_hooks_give(model: patchwire.Model, reference: Reference, place: str, window: int) -> None:
    rows, corrupt = noise(reference)
    corruption = methods.Noise(std=STD, samples=SAMPLES, seed=SEED)
    found = methods.causal_trace(model, PROMPT, SUBJECT, corruption, answer=ANSWER, at=place, window=window)

    torch.testing.assert_close(found.values, reference.trace(rows, corrupt, place, window), rtol=1e-4, atol=1e-6)
    assert found.numbers["base"] == pytest.approx(float(reference.run(rows, corrupt)), rel=1e-4)
    assert found.numbers["source"] == pytest.approx(float(reference.run(torch.tensor([PROMPT]), {})), rel=1e-4)
    assert found.axes[1].marked == (1, 2)


@pytest.mark.parametrize("place", ["resid", "mixer"])
def test_another_subject_gives_what_hooks_give(model: patchwire.Model, reference: Reference, place: str) -> None:
    corruption = methods.Replacement(OTHER)
    found = methods.causal_trace(model, PROMPT, SUBJECT, corruption, answer=ANSWER, at=place, window=2)

    torch.testing.assert_close(found.values, reference.trace(torch.tensor([OTHER]), {}, place, 2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("severed", ["mlp", "mixer"])
@pytest.mark.parametrize("place", ["resid", "mlp"])
def test_what_is_severed_stays_as_in_the_corrupted_run(
    model: patchwire.Model, reference: Reference, name: str, place: str, severed: str
) -> None:
    if name == "mamba" and "mlp" in (place, severed):
        pytest.skip("a Mamba has no MLPs")
    rows, corrupt = noise(reference)
    corruption = methods.Noise(std=STD, samples=SAMPLES, seed=SEED)
    found = methods.causal_trace(model, PROMPT, SUBJECT, corruption, answer=ANSWER, at=place, severed=severed)

    expected = reference.trace(rows, corrupt, place, 1, severed)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("severed", ["scan", "gate"])
@pytest.mark.parametrize("name", ["mamba"], indirect=True)
def test_paths_through_an_ssm_are_blocked(model: patchwire.Model, reference: Reference, severed: str) -> None:
    """Sharma et al. (2024), section 4: a part of every layer is held at the token whose residual stream is restored."""
    found = methods.causal_trace(model, PROMPT, SUBJECT, methods.Replacement(OTHER), answer=ANSWER, severed=severed)

    other, clean = torch.tensor([OTHER]), reference.seen(torch.tensor([PROMPT]), "resid")
    held = halves(reference, other)
    for layer in range(len(reference.layers)):
        for token in range(len(PROMPT)):

            def restore(value: Tensor, source: Tensor = clean[layer], token: int = token) -> Tensor:
                value[:, token] = source[:, token]
                return value

            seen = {}
            handles = [
                handle
                for index, each in enumerate(reference.layers)
                for handle in hold(each.get_submodule("mixer"), seen, index, severed, held[index], token)
            ]
            expected = reference.run(other, {reference.layers[layer]: restore})
            for handle in handles:
                handle.remove()
            torch.testing.assert_close(found.values[layer, token], expected, rtol=1e-4, atol=1e-6)


def halves(reference: Reference, rows: Tensor) -> list[dict[str, Tensor]]:
    """The scan and the gate of every layer; their product is what the output projection is given."""
    seen: dict[int, dict[str, Tensor]] = {}
    handles = [
        handle
        for index, each in enumerate(reference.layers)
        for handle in hold(each.get_submodule("mixer"), seen, index)
    ]
    reference.run(rows, {})
    for handle in handles:
        handle.remove()
    return [seen[index] for index in range(len(reference.layers))]


def hold(
    mixer: Any,
    seen: dict[int, dict[str, Tensor]],
    index: int,
    half: str | None = None,
    to: Mapping[str, Tensor] | None = None,
    token: int = 0,
) -> list[Any]:
    """Hooks that see a mixer's scan and gate, and make one of them at a token another."""

    def projected(module: nn.Module, args: Any, output: Tensor) -> None:
        seen[index] = {"gate": mixer.act(output.chunk(2, -1)[1])}

    def product(module: nn.Module, args: Any) -> Any:
        parts = seen[index]
        parts["scan"] = args[0] / parts["gate"]
        if half is None or to is None:
            return None
        parts[half][:, token] = to[half][:, token]
        return (parts["scan"] * parts["gate"],)

    return [mixer.in_proj.register_forward_hook(projected), mixer.out_proj.register_forward_pre_hook(product)]


def test_restoring_everything_before_the_first_change_restores_the_answer(model: patchwire.Model) -> None:
    found = methods.causal_trace(model, PROMPT, SUBJECT, methods.Replacement(OTHER), answer=ANSWER)

    last = found.normalised().values[-1]
    assert float(last[-1]) == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(last[:-1], torch.zeros(len(PROMPT) - 1), atol=1e-5, rtol=0)
