"""Mediation: the indirect effects that plain hooks find; in a model that adds after it attends, the last MLP has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import patchwire
from patchwire import methods

PROMPT = [3, 14, 15, 9, 26, 5]
OTHER = [3, 33, 44, 9, 26, 5]
ANSWERS = (7, 12)


class Reference:
    """Runs of the Hugging Face model in which one module's output is another run's at one token."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        base = model.base_model
        self.layers: list[nn.Module] = list(base.h if hasattr(base, "h") else base.layers)

    def modules(self, place: str) -> list[nn.Module]:
        if place == "embed":
            return [self.model.get_input_embeddings()]
        names = {"resid": (), "mlp": ("mlp",), "mixer": ("self_attn", "attn", "mixer")}[place]
        return [next((getattr(layer, name) for name in names if hasattr(layer, name)), layer) for layer in self.layers]

    def probabilities(self, ids: Sequence[int], module: nn.Module | None = None, change: Any = None) -> Tensor:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0].clone()), *output[1:])
            return change(output.clone())

        handle = module.register_forward_hook(hook) if module is not None else None
        with torch.no_grad():
            logits = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
        if handle is not None:
            handle.remove()
        return logits.double().softmax(-1)[list(ANSWERS)]

    def effect(self, changed: Tensor) -> float:
        right, wrong = self.probabilities(PROMPT)
        return float(((right - changed[0]) / changed[0] + (changed[1] - wrong) / wrong) / 2)

    def effects(self, place: str) -> Tensor:
        found = []
        for module in self.modules(place):
            seen: list[Tensor] = []

            def keep(output: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen.append(output)
                return output

            self.probabilities(OTHER, module, keep)
            for token in range(len(PROMPT)):

                def write(output: Tensor, source: Tensor = seen[0], token: int = token) -> Tensor:
                    output[:, token] = source[:, token]
                    return output

                found.append(self.effect(self.probabilities(PROMPT, module, write)))
        return torch.tensor(found).view(-1, len(PROMPT))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *[(name, place) for name in ("gpt2", "llama") for place in ("mlp", "mixer", "embed", "resid")],
        *[("mamba", place) for place in ("mixer", "embed", "resid")],
    ],
)
def test_effects_are_those_that_hooks_give(
    served: Mapping[str, patchwire.Model], references: Mapping[str, PreTrainedModel], name: str, place: str
) -> None:
    reference = Reference(references[name])
    found = methods.mediation(served[name], PROMPT, OTHER, ANSWERS, place=place)

    torch.testing.assert_close(found.values, reference.effects(place), rtol=2e-3, atol=1e-4)
    assert [found.numbers["r"], found.numbers["r'"]] == pytest.approx(
        reference.probabilities(PROMPT).tolist(), rel=1e-4
    )
    assert found.numbers["total"] == pytest.approx(reference.effect(reference.probabilities(OTHER)), rel=2e-3)
    assert found.axes[1].marked == (1, 2)


def test_the_last_state_has_the_total_effect(served: Mapping[str, patchwire.Model]) -> None:
    for name in ("gpt2", "mamba"):
        found = methods.mediation(served[name], PROMPT, OTHER, place="resid")
        assert float(found.values[-1, -1]) == pytest.approx(found.numbers["total"], rel=1e-3)


def test_importance_is_the_share_of_the_logarithms(served: Mapping[str, patchwire.Model]) -> None:
    mlp, mixer = (methods.mediation(served["gpt2"], PROMPT, OTHER, place=place) for place in ("mlp", "mixer"))
    logs, others = (mlp.values.double() + 1).log(), (mixer.values.double() + 1).log()

    found = methods.relative_importance(mlp, layer=range(1, 3), token=-1)
    assert found == pytest.approx(float(logs[1:, -1].sum() / logs.sum()))
    both = methods.relative_importance([mlp, mixer], token=[4, 5, -1])
    assert both == pytest.approx(float(logs[:, 4:].sum() / (logs.sum() + others.sum())))
    assert methods.relative_importance(mlp) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"other": [1, 2]}, "has 2 tokens"),
        ({"place": "attn"}, "no place “attn”"),
        ({"subject": [8]}, "none at 8"),
        ({"answers": ("a", 2)}, "a token id, not"),
    ],
)
def test_what_cannot_be_mediated_is_refused(
    served: Mapping[str, patchwire.Model], change: dict[str, Any], words: str
) -> None:
    told: dict[str, Any] = {"prompt": PROMPT, "other": OTHER}
    with pytest.raises(patchwire.InputError, match=words):
        methods.mediation(served["gpt2"], **(told | change))


def test_an_importance_of_nothing_is_refused(served: Mapping[str, patchwire.Model]) -> None:
    same = methods.mediation(served["gpt2"], PROMPT, PROMPT)
    assert same.values.abs().max() == 0
    with pytest.raises(patchwire.InputError, match="Nothing has an effect"):
        methods.relative_importance(same, token=-1)
    with pytest.raises(patchwire.InputError, match="has no"):
        methods.relative_importance(same, token=6)
    with pytest.raises(patchwire.InputError, match="no effects"):
        methods.relative_importance([])
