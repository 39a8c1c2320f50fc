"""Residual patching: copy states of one run into another, and see which of them carry the answer.

Activation patching of the residual stream, as in Meng et al. (2022), "Locating and Editing Factual Associations in
GPT", and Heimersheim and Nanda (2024), "How to use and interpret activation patching".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchwire.errors import InputError, here
from patchwire.methods.measured import LAYER, TOKEN, Measured
from patchwire.model import Model
from patchwire.results import Stats

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

ROWS_PER_PASS = 64
"""How many states are copied in one request, each in a row of its own."""


@dataclass(frozen=True, eq=False)
class ResidualPatching:
    """What copying each state of the clean run into the corrupt run does to the probability of the answer."""

    layers: tuple[str, ...]
    """"0", "1", …: the residual stream after each layer."""
    tokens: tuple[str, ...]
    """The clean prompt's tokens."""
    corrupt: tuple[str, ...]
    """The corrupt prompt's tokens."""
    prompt: Any
    """The clean prompt."""
    answer: int
    """The token id whose probability was measured."""
    word: str
    """The same as text."""
    probabilities: Tensor
    """`[layers, tokens]` float32: of the answer in the corrupt run, when the residual stream after that layer, at that
    token, is the clean run's."""
    unpatched: float
    """The same without a patch."""
    stats: Stats
    """What the runs cost."""

    @property
    def measured(self) -> Measured:
        """The probabilities by layer and token."""
        return Measured(self.probabilities, (LAYER, TOKEN), self.prompt, unit=f"probability of “{self.word}”")

    def table(self, *, width: int | None = None) -> Table:
        """A table for the terminal, each cell shaded by its probability.

        Args:
            width: How many characters wide; the last positions that fit are shown.
        """
        from patchwire import plots

        return plots.grid(self.probabilities, rows=self.layers, columns=self._labels(), width=width)

    def plot(self, *, title: str = "Residual stream patched, one (layer, token) at a time") -> Figure:
        """A heatmap of the probabilities.

        Raises:
            PatchwireError: matplotlib is not installed.
        """
        from patchwire import plots

        return plots.heatmap(
            self.probabilities,
            rows=self.layers,
            columns=self._labels(),
            title=title,
            unit=f"probability of “{plots.visible(self.word)}”",
            annotate="values",
            column_axis="token (clean prompt / corrupt prompt)",
        )

    def _labels(self) -> list[str]:
        """The token at each position, or both on two lines where the prompts differ."""
        from patchwire import plots

        return [
            plots.visible(one) if one == other else f"{plots.visible(one)}\n{plots.visible(other)}"
            for one, other in zip(self.tokens, self.corrupt, strict=True)
        ]


def residual_patching(model: Model, clean: Any, corrupt: Any, answer: str | int | None = None) -> ResidualPatching:
    """Copy the clean run's residual stream into the corrupt run, one (layer, token) at a time.

    Every cell is a row of its own, and so is the clean prompt: its states flow to the other rows inside the pass.

    Args:
        model: Any model with `layers`: attention or SSM alike.
        clean: One prompt: a text, or token ids.
        corrupt: Another of as many tokens.
        answer: Whose probability after the last token is measured: a token id, or how the clean text goes on, of which
            the first token counts. What the model itself says after the clean prompt, if left out.

    Raises:
        InputError: the prompts do not have the same number of tokens, or the answer is not one.

    Example:
        >>> found = residual_patching(
        ...     model, "The Eiffel Tower is in the city of", "The Colosseum is in the city of", " Paris"
        ... )
        >>> found.probabilities[5, 2]  # after layer 5, at the third token
    """
    rows, others = model.tokenize(clean), model.tokenize(corrupt)
    if len(rows) != 1 or len(others) != 1 or len(rows[0]) != len(others[0]):
        raise InputError(
            f"“{clean}” and “{corrupt}” do not have the same number of tokens.",
            hint="Take two prompts that differ in some tokens; `model.tokenizer.tokens(text)` shows them.",
            lines=here(),
        )
    costs: list[Stats] = []
    token = answer if isinstance(answer, int) else _token(model, clean, answer, rows[0], costs)
    length = len(rows[0])
    cells = [(layer, position) for layer in range(model.num_layers) for position in range(length)]
    probabilities = []
    for start in range(0, len(cells), ROWS_PER_PASS):
        part = cells[start : start + ROWS_PER_PASS]
        with model.trace() as trace:
            with trace.invoke(others):
                unpatched = model.logits[0, -1].float().softmax(-1)[token].save()
            with trace.invoke(rows):
                states = {layer: model.layers[layer].output for layer, _ in part}
            for layer, position in part:
                with trace.invoke(others):
                    model.layers[layer].output[:, position] = states[layer][:, position]
                    probabilities.append(model.logits[0, -1].float().softmax(-1)[token].save())
        assert trace.stats is not None
        costs.append(trace.stats)
    return ResidualPatching(
        layers=tuple(map(str, range(model.num_layers))),
        tokens=_texts(model, rows[0]),
        corrupt=_texts(model, others[0]),
        prompt=clean,
        answer=token,
        word=_texts(model, [token])[0],
        probabilities=torch.stack([each.value for each in probabilities]).reshape(-1, length),
        unpatched=float(unpatched),
        stats=Stats.sum(costs),
    )


def _token(model: Model, clean: Any, answer: str | None, row: Sequence[int], costs: list[Stats]) -> int:
    """The token id that an answer begins with, or that the model would say."""
    if answer is None:
        with model.trace([list(row)]) as trace:
            best = model.logits[0, -1].argmax().save()
        assert trace.stats is not None
        costs.append(trace.stats)
        return int(best)
    if not isinstance(clean, str):
        raise InputError(
            "Token ids go on with a token id, not with a text.", hint="Give the answer's id.", lines=here()
        )
    whole = model.tokenize(clean + answer)[0]
    if len(whole) <= len(row) or whole[: len(row)] != list(row):
        raise InputError(
            f"“{answer}” is not how “{clean}” goes on: together they are other tokens.",
            hint="Begin it with a space where a new word begins, or give a token id.",
            lines=here(),
        )
    return whole[len(row)]


def _texts(model: Model, row: Sequence[int]) -> tuple[str, ...]:
    """The text of each token; its id where the model has no tokenizer here."""
    return tuple(f"#{each}" for each in row) if model.tokenizer.backend is None else tuple(model.tokenizer.tokens(row))
