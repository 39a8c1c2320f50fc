"""Canonical values: `attn.q`, `mlp.neurons`, `ssm.state`, `W_O`, the same on every architecture that has them.

The catalogue says where each is in this model: a tensor and the way to a part of it, or a formula over others. To
read one is to read the tensor and take the views, so that an in-place edit of it is a write to the model; to assign one
is to edit all of it. What a formula computes cannot be written.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from patchwire import ops
from patchwire.checking import describe
from patchwire.errors import GraphError, ShapeError, SiteError, here
from patchwire.formulas import FORMULAS
from patchwire.proxy import Value
from patchwire.sites import Address, Name, Parameter, Part, spell
from patchwire.states import States
from patchwire.tracing import Scope, current, recording

if TYPE_CHECKING:
    from patchwire.model import Model

EVERY = "[*]"
"""What follows an operation in an address that runs once for each token, and all of these times are meant."""
parse = functools.lru_cache(1 << 14)(Address.parse)
"""The address of a text."""


def read(model: Model, named: Name) -> Any:
    """The value of a canonical name; of a parameter, outside of blocks, what is known of it.

    Raises:
        SiteError: the model never comes by it.
        GraphError: it is read outside of a block.
    """
    if named.part is not None and named.part.parameter and not recording():
        return _parameter(model, named, named.part)
    scope = current(spell(named.name), model)
    if named.formula:
        formula = FORMULAS.get(named.formula)
        if formula is None:
            raise SiteError(
                f"`{spell(named.name)}` is computed in a way that this version does not know.",
                hint="Install a newer version of patchwire here.",
                lines=here(),
            )
        computed = formula(model, named.name.rpartition(".")[0])
        computed.memory.constant = _computed(named)
        return computed
    part = _part(named, scope)
    recorder = scope.recorder
    if part.parameter:
        value = recorder.parameter(scope.trace, part.address)
    elif EVERY in part.address:
        site = scope.site(parse(part.address.replace(EVERY, "[0]")))
        addresses = (parse(part.address.replace(EVERY, f"[{token}]")) for token in range(tokens_of(scope)))
        return States([viewed(recorder.read(replace(site, address=each)), part) for each in addresses])
    else:
        value = recorder.read(scope.site(parse(part.address)))
    value = viewed(value, part, 0 if part.parameter else len(lengths_of(scope)))
    if named.is_computed:
        value.memory.constant = _computed(named)
    return value


def viewed(value: Value, part: Part, rows: int = 0) -> Value:
    """The part of a tensor that is meant; `rows` is how many there are, where it has the tokens of all in one."""

    def views_of(whole: Value) -> Value:
        for view in part.views:
            name, args = view.call(rows)
            whole = whole.recorder.call(ops.OPERATIONS[name], (whole, *args), {})
        return whole

    found = views_of(value)
    if found is not value:
        found._made_of = [value], lambda wholes: views_of(wholes[0])
    return found


def _computed(named: Name) -> str:
    """Why it cannot be written."""
    return f"`{spell(named.name)}` is computed from other values and cannot be written."


def lengths_of(scope: Scope) -> list[int]:
    """How many tokens each row has."""
    invokes = scope.recorder.request.traces[scope.trace].invokes
    mine = invokes if scope.invoke is None or scope.invoke < 0 else [invokes[scope.invoke]]
    return [length for invoke in mine for length in invoke.lengths]


def tokens_of(scope: Scope) -> int:
    """How many tokens of the longest row are in the pass."""
    return 1 if scope.step else max(lengths_of(scope))


def assign(model: Model, named: Name, value: Any) -> None:
    """Make a value that of a canonical name.

    Raises:
        ShapeError: it has another shape or dtype.
        SiteError: the name is of something that is computed.
    """
    if named.is_computed:
        raise SiteError(
            f"`{spell(named.name)}` is computed from other values and cannot be written.",
            hint="Write one that it is computed from.",
            lines=here(),
        )
    place = read(model, named)
    if value is place or (isinstance(value, Value) and not value.ready and value.memory is place.memory
                          and repr(value.views) == repr(place.views)):  # fmt: skip
        return  # `site += 1` has edited the value and now assigns it
    if not isinstance(value, (Value, Tensor)):
        raise ShapeError(
            f"`{spell(named.name)}` cannot become a {type(value).__name__}.",
            hint="Assign a tensor, or set the elements: `value[:] = 0`.",
            lines=here(),
        )
    known = place.fake is not None and (not isinstance(value, Value) or value.ready or value.fake is not None)
    if known and (tuple(value.shape), value.dtype) != (tuple(place.shape), place.dtype):
        found = value if isinstance(value, Tensor) else value.fake if not value.ready else value.value
        raise ShapeError(
            f"`{spell(named.name)}` is {describe(place.fake)} and cannot become {describe(found)}.",
            hint=f"Its dimensions are {named.dims}.",
            lines=here(),
        )
    place[...] = value


def _part(named: Name, scope: Scope) -> Part:
    part = named.part_in_steps if scope.step and named.part_in_steps is not None else named.part
    assert part is not None
    return part


def _parameter(model: Model, named: Name, part: Part) -> Parameter:
    raw = model.catalogue.parameter(part.address)
    return Parameter(named.name.rpartition(".")[2], shape_of(named), raw.dtype)


def shape_of(named: Name) -> tuple[int, ...]:
    """The shape of a parameter: all its dimensions are constant.

    Raises:
        GraphError: the server says something else of them.
    """
    lengths = [each.rpartition("=")[2] for each in named.dims.split()]
    if not all(each.isdecimal() for each in lengths):
        raise GraphError(
            f"The server says that `{spell(named.name)}` is a parameter of dimensions {named.dims!r}.",
            hint="Compare `patchwire doctor` here and there.",
            lines=here(),
        )
    return tuple(map(int, lengths))
