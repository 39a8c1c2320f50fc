"""Trigger examples: at which texts each neuron is largest, and how often it is on.

Geva, Schuster, Berant and Levy (2021), "Transformer Feed-Forward Layers Are Key-Value Memories", section 3. An example
is a prefix, a text up to one of its tokens. The data set goes through the model batch by batch and the `top` best of
each neuron stay on the server, so that no activations travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from patchwire.errors import InputError, here
from patchwire.kept import Kept
from patchwire.methods.neurons import chosen_of, layer_of, neurons_of
from patchwire.methods.prompts import texts
from patchwire.methods.result import Axis, Origin, Result
from patchwire.model import Model
from patchwire.results import Stats

_BATCHES = 64
"""How many batches a request has."""
SECONDS = 3600.0
"""For how long the server keeps what it has found so far, if the next request does not come."""
_SPAN = 1 << 24
"""An example's number times this, plus a position, is one number."""


@dataclass(frozen=True, eq=False)
class Triggers:
    """The examples that most activate each neuron of a layer."""

    coefficients: Result
    """`[neuron, rank]` float32: the coefficients, the largest first; NaN where there are not so many examples."""
    examples: Tensor = field(repr=False)
    """`[neuron, rank]` int64: the numbers of the examples; -1 where there are not so many."""
    positions: Tensor = field(repr=False)
    """`[neuron, rank]` int64: at which token."""
    statistics: Result
    """`[neuron, statistic]` float32, over all tokens: "active", the share of them at which the coefficient is more than
    0; its "mean", and its standard deviation, "std". `numbers["active"]` is how large a share of the neurons is active
    at a token, `numbers["tokens"]` how many tokens there were."""
    layer: int
    kind: str
    """Whose neurons: one of `patchwire.methods.NEURONS`."""
    neurons: tuple[int, ...] = field(repr=False)
    """Their numbers in the layer: what the first dimension goes along."""
    rows: tuple[tuple[int, ...], ...] = field(repr=False)
    """The token ids of every example."""
    model: Model = field(repr=False)

    @cached_property
    def following(self) -> Tensor:
        """The token after each trigger, `[neuron, rank]` int64; -1 at the end of an example."""
        found = [
            self.rows[example][place + 1] if example >= 0 and place + 1 < len(self.rows[example]) else -1
            for example, place in zip(self.examples.flatten().tolist(), self.positions.flatten().tolist(), strict=True)
        ]
        return torch.tensor(found).view(self.examples.shape)

    def prefix(self, neuron: int, rank: int = 0) -> tuple[str, ...]:
        """The tokens of a trigger, up to the one at which the neuron is so large.

        Args:
            neuron: Its place among `neurons`.
            rank: 0 for the largest.

        Raises:
            InputError: there are not so many examples.
        """
        example, position = int(self.examples[neuron, rank]), int(self.positions[neuron, rank])
        if example < 0:
            raise InputError(f"There are not so many examples: no {rank}.", lines=here())
        return texts(self.model, self.rows[example][: position + 1])


def triggers(
    model: Model,
    layer: int,
    examples: Iterable[Any],
    *,
    top: int = 50,
    kind: str | None = None,
    neurons: Sequence[int] | None = None,
    distinct: bool = True,
    batch_size: int = 16,
) -> Triggers:
    """The examples of a data set that most activate each neuron of a layer (Geva et al. 2021, section 3.1).

    The model runs once over the data, no further than the layer. Beside the answer, `top` numbers for each neuron, only
    token ids are held here. Ctrl-C ends it after its batch: then it is of what has been run.

    Args:
        model: Any model with the neurons: those of an MLP, or the channels of an SSM.
        layer: Which layer's.
        examples: Texts, or lists of token ids: any iterable.
        top: How many triggers of each neuron.
        kind: One of `patchwire.methods.NEURONS`; "mlp" if left out, or "ssm" of a layer without an MLP.
        neurons: Which of them; all if left out.
        distinct: Whether a prefix that several texts begin with counts once: a model that sees no later tokens does the
            same on each, and they would be each other's neighbours.
        batch_size: How many texts a pass has.

    Raises:
        InputError: there are no examples, no such layer, or no such neurons.
        SiteError: the model does not have them.

    Example:
        >>> found = methods.triggers(model, 5, texts, top=10)
        >>> found.prefix(neuron=17), found.coefficients.at(neuron=17).values[0]
        >>> found.statistics.numbers["active"]
    """
    if top < 1 or batch_size < 1:
        raise InputError("There is at least one trigger, and one text in a batch.", lines=here())
    layer, module = layer_of(model, layer)
    kind, site = neurons_of(module, kind)
    width = site.values(module).shape[0]
    which = list(range(width)) if neurons is None else chosen_of(neurons, width)

    state: list[Any] = [
        torch.full((len(which), top), -torch.inf),
        torch.full((len(which), top), -1),
        torch.zeros(3, len(which), dtype=torch.float64),
        torch.tensor(0),
    ]
    rows: list[tuple[int, ...]] = []
    met: dict[tuple[int, int], int] = {}
    costs: list[Stats] = []
    for part in parts(model, examples, batch_size):
        # Texts of about one length share a batch: less is padded.
        order = sorted(range(len(part)), key=lambda index: len(part[index]))
        numbers = torch.tensor(order) + len(rows)
        counts = new_prefixes(part, met if distinct else None)[torch.tensor(order)]
        rows += [tuple(row) for row in part]
        before = state
        with model.session() as session:
            batches: Any = session.over([part[index] for index in order], batch_size=batch_size)
            with batches:
                carried = [batches.carry(each) for each in state]
                with model.trace(batches.prompt) as trace:
                    seen = site.coefficients(model.layers[layer])
                    seen = (seen if neurons is None else seen[..., which]).float()
                mask: Any = trace.mask()
                positions = mask.long().cumsum(1) - 1
                row = batches.index * batch_size + mask[:, -1].long().cumsum(0) - 1
                counted = mask & torch.index_select(counts, 0, row).gather(1, positions.clamp(min=0))
                places = torch.index_select(numbers, 0, row)[:, None] * _SPAN + positions
                for each, then in zip(carried, _next(carried, seen, mask, counted, places), strict=True):
                    batches.update(each, then)
            state = [batches.result(each).keep(seconds=SECONDS) for each in carried]
        assert session.stats is not None
        costs.append(session.stats)
        forget(before)
        if batches.iterations < batches.count:  # Ctrl-C: what has been found is the result
            break
    if not rows:
        raise InputError("There are no examples.", hint="Give texts, or lists of token ids.", lines=here())
    with model.trace([[0]]):
        saved = [each.save() for each in state]
    forget(state)

    best, found, sums, count = (each.value for each in saved)
    there = best > -torch.inf
    active, mean, square = sums / count
    origin = Origin.of(
        "triggers", model, layer=layer, kind=kind, neurons=neurons, top=top, examples=len(rows), distinct=distinct
    )
    axis, stats = Axis("neuron", tuple(map(str, which))), Stats.sum(costs)
    return Triggers(
        coefficients=Result(
            values=best.masked_fill(~there, torch.nan),
            axes=(axis, Axis("rank", tuple(map(str, range(top))))),
            unit="coefficient",
            origin=origin,
            signed=True,
            stats=stats,
        ),
        examples=torch.where(there, found // _SPAN, -1),
        positions=torch.where(there, found % _SPAN, -1),
        statistics=Result(
            values=torch.stack([active, mean, (square - mean**2).clamp(min=0).sqrt()], 1).float(),
            axes=(axis, Axis("statistic", ("active", "mean", "std"))),
            unit="share of tokens, and coefficients",
            origin=origin,
            numbers={"active": float(active.mean()), "tokens": float(count)},
            stats=stats,
        ),
        layer=layer,
        kind=kind,
        neurons=tuple(which),
        rows=tuple(rows),
        model=model,
    )


def _next(carried: Sequence[Any], seen: Any, mask: Any, counted: Any, places: Any) -> list[Any]:
    """What has been found after another batch: the largest coefficients of each neuron, where they are, the sums of the
    statistics, and the number of tokens.

    Args:
        carried: The same before it.
        seen: The coefficients of the batch, `[rows, tokens, neurons]`.
        mask: Which of its positions are tokens, `[rows, tokens]`.
        counted: Which of these are examples.
        places: The number of each.
    """
    best, place, sums, count = carried
    top = best.shape[1]
    new = torch.where(counted[..., None], seen, -torch.inf).flatten(0, 1).T
    most, index = torch.cat([best, new], 1).topk(top, 1)
    older = place.gather(1, index.clamp(max=top - 1))
    newer = places.flatten()[(index - top).clamp(min=0)]
    tokens = torch.where(mask[..., None], seen, 0.0).flatten(0, 1)
    moments = [(tokens > 0), tokens, tokens**2]
    sums = sums + torch.stack([each.sum(0, dtype=torch.float64) for each in moments])
    return [most, torch.where(index < top, older, newer), sums, count + mask.sum()]


def forget(state: Sequence[Any]) -> None:
    """Have the server drop what it keeps."""
    for each in state:
        if isinstance(each, Kept):
            each.forget()


def parts(model: Model, examples: Iterable[Any], batch_size: int) -> Iterator[list[list[int]]]:
    """The token ids of as many examples as a request has.

    Raises:
        InputError: this is one text, or the model cannot take one of them.
    """
    if isinstance(examples, (str, Mapping)):
        raise InputError(f"A {type(examples).__name__} is no data set.", hint="Give a list of texts.", lines=here())
    rest = iter(examples)
    while part := list(islice(rest, _BATCHES * batch_size)):
        yield model.tokenize([each.tolist() if isinstance(each, Tensor) else each for each in part])


def new_prefixes(rows: Sequence[Sequence[int]], met: dict[tuple[int, int], int] | None) -> Tensor:
    """Which prefixes count, `[rows, longest]` bool: those not met before, if they are noted. A prefix is noted as the
    number of the one without its last token, and that token."""
    found = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool)
    for index, row in enumerate(rows):
        if met is None:
            found[index, : len(row)] = True
            continue
        prefix, new = 0, []
        for token in row:
            new.append((prefix, token) not in met)
            prefix = met.setdefault((prefix, token), len(met) + 1)
        found[index, : len(row)] = torch.tensor(new)
    return found
