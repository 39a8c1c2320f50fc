"""Knockout: cut the flow from some positions to others inside one mixer, the same call for attention and for an SSM.

Attention mixes tokens in one place: there the scores of the keys become minus infinity for the queries. An SSM mixes
them twice, in its convolution and in its scan, and by the scan a key has long been in its neighbours. So the keys' part
of what enters the convolution is replaced in a second run of the mixer, and its scan is used for the queries alone
(the neighbours' own outputs stay what they are). That run has rows of its own in the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from patchwire.canonical import lengths_of, parse, tokens_of, viewed
from patchwire.errors import GraphError, OperationError, SiteError, here
from patchwire.model import Module
from patchwire.proxy import Value
from patchwire.sites import spell
from patchwire.tracing import Scope, current

Positions = int | slice | range | Sequence[int]
_SEQ = 1


@dataclass(frozen=True)
class _Cut:
    """What one call cuts."""

    keys: frozenset[int]
    queries: frozenset[int]
    heads: frozenset[int] = frozenset()
    """Of attention: in which heads."""
    value: Any = 0.0
    """Of an SSM: what enters the convolution at the keys."""


def knockout(
    mixer: Module, keys: Positions, queries: Positions, *, heads: Positions | None = None, value: Any = 0.0
) -> None:
    """Cut what flows from `keys` to `queries` in one mixer, attention or SSM. Several cuts of one mixer add up.

    With attention the probabilities of the keys become zero for the queries, and those of the others grow (Geva et al.
    2023, "Dissecting Recall of Factual Associations", section 4). With an SSM the queries' output of the scan becomes
    that of a run in which the input of the convolution at the keys is `value`; everything else stays, the gate too.

    A query whose sliding window has nothing left but keys attends to nothing: what follows from it is NaN.

    Args:
        mixer: `model.layers[i].mixer`.
        keys: The positions that are not seen any more: a number, a slice, or a list; negative ones count from the end.
        queries: The positions that do not see them.
        heads: Of an attention mixer: in these heads only.
        value: Of an SSM: what the input of the convolution, `ssm.x_in`, is at the keys: a number, or a tensor
            `[d_inner]` such as a mean over a data set. What else enters the convolution there becomes 0.

    Raises:
        SiteError: `mixer` is not one that has scores or a scan.
        GraphError: a query would see nothing at all, or this is outside of a block.
        OperationError: an SSM in a generation.

    Example:
        >>> with model.trace("The Eiffel Tower is in the city of"):
        ...     for layer in model.layers[8:12]:
        ...         patchwire.knockout(layer.mixer, keys=range(1, 4), queries=-1)
        ...     logits = model.logits.save()
    """
    catalogue = mixer._model.catalogue
    name = mixer._name if isinstance(mixer, Module) else ""
    scope = current(f"knockout({spell(name)}, …)", mixer._model)
    if catalogue.named(f"{name}.scores") is not None:
        _of_attention(mixer, scope, keys, queries, heads)
    elif catalogue.named(f"{name}.x_in") is not None and catalogue.named(f"{name}.scan") is not None:
        _of_ssm(mixer, scope, keys, queries, heads, value)
    else:
        raise SiteError(
            f"`{spell(name)}` has neither scores nor a scan.", hint="Write `model.layers[i].mixer`.", lines=here()
        )


def _of_attention(mixer: Module, scope: Scope, keys: Positions, queries: Positions, heads: Positions | None) -> None:
    scores: Any = mixer.scores
    if scores.fake is None:
        raise GraphError("How many tokens there are is not known here.", hint="Knock out in a trace.", lines=here())
    *_, number, length = scores.shape
    seen, asking = _positions(keys, length, "key"), _positions(queries, number, "query")
    chosen = list(range(scores.shape[1])) if heads is None else _positions(heads, scores.shape[1], "head")
    named = mixer._model.catalogue.named(f"{mixer._name}.scores")
    assert named is not None
    assert named.part is not None
    cuts = scope.recorder.cuts.setdefault(scope.site(parse(named.part.address)), [])
    cut = _Cut(frozenset(seen), frozenset(asking), frozenset(chosen))
    shortest = min(lengths_of(scope)) if length == tokens_of(scope) else length
    for query in asking:
        visible = range(length - shortest, query + length - number + 1)
        for head in chosen:
            hidden = cut.keys.union(*(each.keys for each in cuts if query in each.queries and head in each.heads))
            if visible and hidden.issuperset(visible):
                raise GraphError(
                    f"Position {query} would see nothing: it sees {len(visible)} positions, and all of them are keys.",
                    hint="Leave it one key at least, such as itself.",
                    lines=here(),
                )
    cuts.append(cut)
    for query in asking:
        row = scores[:, chosen, query]
        # What a causal mask hides is only very small there; it must not become what is left.
        hidden = row <= torch.finfo(scores.dtype).min / 2
        row = row.masked_fill(hidden, float("-inf"))
        row[..., seen] = float("-inf")
        scores[:, chosen, query] = row


def _of_ssm(
    mixer: Module, scope: Scope, keys: Positions, queries: Positions, heads: Positions | None, value: Any
) -> None:
    catalogue, recorder = mixer._model.catalogue, scope.recorder
    if heads is not None:
        raise OperationError(
            f"`{spell(mixer._name)}` is an SSM: it has no heads that could be chosen.",
            hint="Leave `heads` out.",
            lines=here(),
        )
    if recorder.request.traces[scope.trace].generation is not None:
        raise OperationError(
            "An SSM cannot be knocked out in a generation: its second run would need a cache of its own.",
            hint="Generate first, and trace the generated tokens: `model.trace(ids)`.",
            lines=here(),
        )
    named = catalogue.named(f"{mixer._name}.x_in")
    scan = catalogue.named(f"{mixer._name}.scan")
    assert named is not None
    assert named.part is not None
    assert scan is not None
    assert scan.part is not None
    length = tokens_of(scope)
    place = scope.site(parse(named.part.address))
    cuts = recorder.cuts.setdefault(place, [])
    seen, asking = _positions(keys, length, "key"), _positions(queries, length, "query")
    cuts.append(_Cut(frozenset(seen), frozenset(asking), value=value))
    # The queries of which the same has been cut share a run.
    groups: dict[tuple[int, ...], list[int]] = {}
    for query in asking:
        groups.setdefault(tuple(at for at, each in enumerate(cuts) if query in each.queries), []).append(query)
    for of, together in groups.items():
        enters: Value = recorder.read(place).clone()
        for each in (cuts[at] for at in of):
            where = sorted(each.keys)
            enters[:, where] = 0.0
            if isinstance(each.value, (Tensor, Value)) or each.value:
                viewed(enters, named.part)[:, where] = each.value
        twin = recorder.twin(scope.trace, place.invoke, mixer.path)
        recorder.assign(replace(place, invoke=twin), enters)
        there: Any = viewed(recorder.read(replace(place, invoke=twin, address=parse(scan.part.address))), scan.part)
        mixer.scan[:, together] = there[:, together]


def _positions(given: Positions, length: int, what: str) -> list[int]:
    """The positions, from 0 on, each once."""
    if isinstance(given, bool) or not isinstance(given, (int, slice, range, Sequence)) or isinstance(given, str):
        raise GraphError(
            f"A {type(given).__name__} does not say which {what} is meant.",
            hint="Write a number, a slice, or a list of numbers.",
            lines=here(),
        )
    numbers = (
        range(*given.indices(length)) if isinstance(given, slice) else [given] if isinstance(given, int) else given
    )
    found = []
    for each in numbers:
        if isinstance(each, bool) or not isinstance(each, int) or not -length <= each < length:
            raise GraphError(
                f"There is no {what} {each!r}: there are {length}.",
                hint="Positions are counted from 0, or from the end with -1.",
                lines=here(),
            )
        found.append(each % length)
    return sorted(set(found))
