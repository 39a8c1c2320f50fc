"""Comparison: the same experiment on two models, its results side by side on one grid.

Two models differ in how many layers they have and in how they cut a text into tokens. Layers are aligned by how deep in
the model they are, tokens by the characters that they stand for, so that a cell of the grid is the same place in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchwire import tabular
from patchwire.errors import InputError, here
from patchwire.methods.measured import LAYER, TOKEN, Measured, Measuring, depths
from patchwire.model import Model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AXES = ((LAYER, TOKEN), (LAYER,), (TOKEN,))


@dataclass(frozen=True, eq=False)
class Comparison:
    """What an experiment measured in two models, on one grid."""

    names: tuple[str, str]
    """What the models are called."""
    axes: tuple[str, ...]
    """What the dimensions of `first` and `second` are: "layer", "token"."""
    depth: Tensor
    """`[layers]` float32: how deep in the model each row is, from 0 to 1; empty if there are no layers."""
    tokens: tuple[str, ...]
    """The text of each column; empty if there are no tokens."""
    first: Tensor
    """The first model's numbers, `[layers, tokens]`, or one of the two; NaN where it has no token."""
    second: Tensor
    """The second model's, of the same shape."""
    unit: str
    """What the numbers are."""
    results: tuple[Any, Any]
    """What the experiment returned for each model."""

    def plot(self, *, title: str = "") -> Figure:
        """One figure with a heatmap of each model, with the same colours.

        Raises:
            PatchwireError: matplotlib is not installed.
        """
        from patchwire import plots

        matrices = [self._matrix(each) for each in (self.first, self.second)]
        return plots.panels(
            list(zip(self.names, matrices, strict=True)),
            rows=self._rows(),
            columns=[plots.visible(each) for each in self.tokens] or [self.unit],
            title=title,
            unit=self.unit,
            signed=any(bool((each < 0).any()) for each in matrices),
            row_axis="relative depth" if LAYER in self.axes else "",
            column_axis="token" if TOKEN in self.axes else "",
        )

    def _rows(self) -> list[str]:
        return [f"{each:.2f}" for each in self.depth.tolist()] or [""]

    def _matrix(self, values: Tensor) -> Tensor:
        return values.reshape(len(self._rows()), len(self.tokens) or 1)

    def table(self) -> tuple[Sequence[str], list[Sequence[str]]]:
        """The heads of the columns, and the lines: at each depth, one for each model."""
        from patchwire import plots

        head = ["depth", "model", *([plots.visible(each) for each in self.tokens] or [self.unit])]
        both = [plots.number_texts(self._matrix(each)) for each in (self.first, self.second)]
        lines: list[Sequence[str]] = []
        for row, depth in enumerate(self._rows()):
            for name, texts in zip(self.names, both, strict=True):
                lines.append([depth if name == self.names[0] else "", name, *texts[row]])
        return head, lines

    def __repr__(self) -> str:
        return tabular.text(*self.table())

    def _repr_html_(self) -> str:
        return tabular.html(*self.table())


def compare(first: Model, second: Model, experiment: Callable[[Model], Any]) -> Comparison:
    """Run an experiment on two models and lay the results side by side.

    Layers are aligned by relative depth: layer i of n is at `(i + 0.5) / n`, the middle of its part of the model. The
    grid has the depths of the model with more layers, and in each row the layer of either model that is nearest to it
    (the earlier of two). The embeddings, where an experiment measures them too, are at depth 0.

    Tokens of a text are aligned by the characters that they stand for: every column is a run of characters that lies in
    one token of each model, so that tokens of the same characters share a column, and a token that the other tokenizer
    cuts in two has two columns with the same number. Special tokens, which stand for no characters, are aligned with
    each other at either end. Tokens of a prompt of token ids are aligned by position.

    Args:
        first: A model.
        second: Another, of any architecture; it may be on another server.
        experiment: Called with each model. Returns `patchwire.methods.Measured`, or what `logit_lens` and
            `activation_patching` return.

    Raises:
        InputError: the experiment returns something else, or the two results cannot be aligned.

    Example:
        >>> def experiment(model):
        ...     return patchwire.methods.activation_patching(model, clean, corrupt, answer=" Paris")
        >>> patchwire.compare(gpt2, mamba, experiment).plot()
    """
    models = (first, second)
    results = (experiment(first), experiment(second))
    measured = [_measured(each) for each in results]
    axes = measured[0].axes
    if measured[1].axes != axes:
        raise InputError(
            f"The experiment measured by {' and '.join(axes)} in the one model, and by "
            f"{' and '.join(measured[1].axes)} in the other.",
            hint="Return the same axes for both.",
            lines=here(),
        )
    values = [each.values.detach().to("cpu", torch.float32) for each in measured]
    depth: tuple[float, ...] = ()
    tokens: tuple[str, ...] = ()
    if LAYER in axes:
        own = [each.depths or depths(len(each.values)) for each in measured]
        depth = max(own, key=len)
        values = [each[[_nearest(mine, wanted) for wanted in depth]] for each, mine in zip(values, own, strict=True)]
    if TOKEN in axes:
        columns = _columns(models, (measured[0].prompt, measured[1].prompt))
        tokens = tuple(each.text for each in columns)
        values = [_placed(each, [column.indices[side] for column in columns]) for side, each in enumerate(values)]
    names = (first.name, second.name) if first.name != second.name else (f"{first.name} (1)", f"{second.name} (2)")
    one, other = values
    return Comparison(names, axes, torch.tensor(depth), tokens, one, other, measured[0].unit, results)


def _measured(result: Any) -> Measured:
    found = result.measured if isinstance(result, Measuring) else result
    if not isinstance(found, Measured) or found.axes not in _AXES or found.values.ndim != len(found.axes):
        raise InputError(
            f"The experiment returned a {type(result).__name__}, which does not say what was measured.",
            hint='Return `patchwire.methods.Measured(values, ("layer", "token"), prompt)`, with one dimension for '
            "each axis.",
            lines=here(),
        )
    return found


def _nearest(depths: Sequence[float], wanted: float) -> int:
    return min(range(len(depths)), key=lambda index: (round(abs(depths[index] - wanted), 9), index))


def _placed(values: Tensor, indices: Sequence[int | None]) -> Tensor:
    """The numbers of a token in each column; NaN where there is none."""
    count = values.shape[-1]
    if max((each for each in indices if each is not None), default=-1) + 1 != count:
        raise InputError(
            f"The experiment measured {count} tokens, and its prompt has others.",
            hint="Return the prompt that was measured, and all of its tokens.",
            lines=here(),
        )
    padded = torch.cat([values, values.new_full((*values.shape[:-1], 1), torch.nan)], -1)
    return padded[..., [count if each is None else each for each in indices]]


# --- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    text: str
    indices: tuple[int | None, int | None]
    """Which token of each model it is."""


@dataclass(frozen=True)
class _Tokens:
    """A text as one model cuts it."""

    before: list[int]
    """The special tokens in front."""
    ends: list[tuple[int, int]]
    """Where each token of the text ends, and its index; a token begins where the one before it ends."""
    after: list[int]
    """The special tokens behind."""

    def at(self, end: int) -> int | None:
        """The token that the characters before a position are in: of several that end together, the last."""
        reached = next((last for last, _ in self.ends if last >= end), None)
        return max((index for last, index in self.ends if last == reached), default=None)


def _columns(models: tuple[Model, Model], prompts: tuple[Any, Any]) -> list[_Column]:
    backends = [model.tokenizer.backend for model in models]
    one, other = prompts
    if not isinstance(one, str) or not isinstance(other, str) or None in backends:
        rows = [model.tokenize(prompt)[0] for model, prompt in zip(models, prompts, strict=True)]
        count = max(map(len, rows))
        ids = [[f"#{row[index]}" if index < len(row) else "" for row in rows] for index in range(count)]
        places = [tuple(index if index < len(row) else None for row in rows) for index in range(count)]
        return [
            _Column("/".join(dict.fromkeys(filter(None, each))), (one, other))
            for each, (one, other) in zip(ids, places, strict=True)
        ]
    if one != other:
        raise InputError("The experiment measured another prompt in each model.", hint="Take one.", lines=here())
    first, second = (_tokens(model, one) for model in models)
    columns = _paired(models, one, first.before, second.before)
    start = 0
    for end in sorted({each for tokens in (first, second) for each, _ in tokens.ends}):
        columns.append(_Column(one[start:end], (first.at(end), second.at(end))))
        start = end
    return columns + _paired(models, one, first.after, second.after)


def _tokens(model: Model, text: str) -> _Tokens:
    assert model.tokenizer.backend is not None
    encoded = model.tokenizer.backend.encode(text)
    found, end = _Tokens([], [], []), 0
    for index, ((_, last), special) in enumerate(zip(encoded.offsets, encoded.special_tokens_mask, strict=True)):
        if special:
            (found.after if found.ends else found.before).append(index)
        else:
            end = max(end, last)
            found.ends.append((end, index))
    return found


def _paired(models: tuple[Model, Model], text: str, first: list[int], second: list[int]) -> list[_Column]:
    """Columns of special tokens."""
    columns = []
    for index in range(max(len(first), len(second))):
        places = tuple(each[index] if index < len(each) else None for each in (first, second))
        words = [
            model.tokenizer.decode(model.tokenizer.encode(text)[place])
            for model, place in zip(models, places, strict=True)
            if place is not None
        ]
        columns.append(_Column("/".join(dict.fromkeys(words)), (places[0], places[1])))
    return columns
