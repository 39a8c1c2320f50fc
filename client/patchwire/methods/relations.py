"""Linear relational embeddings: how a model goes from a subject to what it says of it, as one affine map.

Hernandez, Sharma, Haklay, Meng, Wattenberg, Andreas, Belinkov and Bau (2023), "Linearity of Relation Decoding in
Transformer Language Models", section 3; on Mamba: Sharma, Atkinson and Bau (2024), section 6.

With s the residual stream at the subject's last token after some layer, and o the one at the prompt's last token after
the last layer, `o = F(s)` is expanded around a few examples: `LRE(s) = β J s + b`, where J and b are the means of
`∂F/∂s` and of `F(s) - ∂F/∂s s`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

import patchwire
from patchwire.errors import InputError, here
from patchwire.methods.editing import Mention
from patchwire.methods.prompts import Prompt, prompt_of, span
from patchwire.methods.result import Axis, Origin, Result
from patchwire.model import Model
from patchwire.results import Stats


@dataclass(frozen=True, eq=False)
class LinearRelation:
    """A relation as an affine map of the subject's state."""

    model: Model = field(repr=False)
    layer: int
    """After which layer the subject's state is read."""
    jacobian: Tensor = field(repr=False)
    """J: the mean over examples of ∂o/∂s, `[width, width]` float32."""
    bias: Tensor = field(repr=False)
    """b: the mean over examples of o - ∂o/∂s s, `[width]` float32."""
    stats: Stats = field(default_factory=Stats)
    """What the runs cost."""

    def faithfulness(self, mentions: Sequence[Mention], *, beta: float = 1.0) -> Result:
        """For which subjects the map says first what the model says first (Hernandez et al. 2023, section 4.1).

        Args:
            mentions: Prompts of the relation, each with its subject; of others than the examples.
            beta: By how much J s is scaled; the mean over examples makes it too short.

        Returns:
            `[prompt]`: 1 where both say the same, or 0; `numbers["faithfulness"]` is the mean.

        Raises:
            InputError: there are no prompts, or a subject is not in its prompt.
        """
        model, found = self.model, []
        with model.trace() as trace:
            for prompt, place in _placed(model, mentions):
                with trace.invoke(prompt.rows):
                    state = model.layers[self.layer].output[0, place]
                    dtype = state.dtype
                    made = beta * (self.jacobian @ state.float()) + self.bias
                    said = model.lm_head(model.norm(made[None, None].to(dtype)).to(model.lm_head.input.dtype))
                    found.append((said[0, 0].argmax() == model.logits[0, -1].argmax()).save())
        values = torch.stack([each.value for each in found]).float()
        return Result(
            values=values,
            axes=(Axis("prompt", tuple(map(str, range(len(values))))),),
            unit="1 where the map says what the model says",
            origin=Origin.of(
                "faithfulness", model, layer=self.layer, beta=beta, prompts=[each.prompt for each in mentions]
            ),
            numbers={"faithfulness": float(values.mean())},
            stats=trace.stats or Stats(),
        )


def linear_relation(model: Model, examples: Sequence[Mention], layer: int, *, rows: int = 16) -> LinearRelation:
    """Expand what a model says of a subject around a few examples (Hernandez et al. 2023, section 3.2, eq. 4).

    The Jacobian is made on the server, `rows` of its rows at a time: those of a pass belong to copies of the prompt.

    Args:
        model: Any model with `layers`, `norm` and `lm_head`: attention or SSM alike.
        examples: Prompts of one relation, each with its subject.
        layer: After which layer the subject's state is read.
        rows: How many rows of the Jacobian, and copies of each prompt, a pass has.

    Raises:
        InputError: there are no examples, a subject is not in its prompt, or there is no such layer.

    Example:
        >>> capitals = [Mention(f"The capital of {each} is", each) for each in ("France", "Peru", "Kenya")]
        >>> relation = linear_relation(model, capitals, 12)
        >>> relation.faithfulness([Mention("The capital of Japan is", "Japan")], beta=2.25).numbers
    """
    if rows < 1:
        raise InputError(f"A pass has at least one row, not {rows}.", lines=here())
    if not 0 <= layer < model.num_layers:
        raise InputError(f"The model has layers 0 to {model.num_layers - 1}, and no {layer}.", lines=here())
    placed = _placed(model, examples)
    last = model.num_layers - 1
    ends: list[Any] = []
    with model.session() as session:
        with model.trace() as trace:
            for prompt, place in placed:
                with trace.invoke(prompt.rows):
                    states = (model.layers[layer].output[0, place], model.layers[last].output[0, -1])
                    ends.append(torch.stack([each.float() for each in states]))
        objects: Any = sum((each[1] for each in ends), torch.tensor(0.0)) / len(ends)
        objects = objects.save()
        width = ends[0].shape[-1]
        rows = min(rows, width)
        loop: Any = session.repeat(-(-width // rows))
        with loop:
            chosen = (loop.index * rows + torch.arange(rows))[:, None] == torch.arange(width)
            jacobian, linear = torch.tensor(0.0), torch.tensor(0.0)
            for (prompt, place), each in zip(placed, ends, strict=True):
                with model.trace(prompt.rows * rows):
                    hidden = model.layers[layer].output
                    end = model.layers[last].output[:, -1]
                    part = patchwire.grad(end, hidden, weights=chosen.to(end.dtype))[:, place].float() / len(placed)
                jacobian = jacobian + part
                linear = linear + part @ each[0]
            jacobians, products = cast(Any, jacobian).save(), cast(Any, linear).save()
    assert session.stats is not None
    return LinearRelation(
        model=model,
        layer=layer,
        jacobian=jacobians.value.flatten(0, 1)[:width],
        bias=objects.value - products.value.flatten()[:width],
        stats=session.stats,
    )


def _placed(model: Model, mentions: Sequence[Mention]) -> list[tuple[Prompt, int]]:
    """Prompts, and the position of each subject's last token."""
    if not mentions:
        raise InputError("There are no prompts.", lines=here())
    prompts = [prompt_of(model, each.prompt) for each in mentions]
    return [
        (prompt, span(prompt, each.subject if isinstance(each.subject, str) else list(each.subject))[-1])
        for prompt, each in zip(prompts, mentions, strict=True)
    ]
