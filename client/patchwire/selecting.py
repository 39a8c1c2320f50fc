"""Selections: the values that names of modules, patterns and addresses stand for.

A pattern is a name with wildcards, over canonical names and raw paths alike: `?` is one character, `*` one part of a
name or some of it, `**` any number of parts: "layers.*.mixer", "transformer.h.?.mlp", "**.c_proj".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from patchwire.errors import SiteError, here
from patchwire.sites import INPUT, MIXERS, OUTPUT, Address, Catalogue, Name

Selected = Address | Name
"""Something that is read: the tensor at an address, or the value of a canonical name."""
_WILDCARDS = {"**": r".*", "*": r"[^.]*", "?": r"[^.]"}
_WILD = re.compile(r"(\*\*|\*|\?)")


def of_modules(catalogue: Catalogue, names: Iterable[str], sides: Iterable[str]) -> dict[str, Selected]:
    """The values on some sides of modules, each by the string form of its address.

    An input is a module's first argument. Names of values, such as "logits" or "layers.3.mlp.neurons", stand for
    themselves; a pattern matches those of values inside modules if it ends with their name: "layers.*.mlp.neurons".

    Raises:
        SiteError: a name is of no module, or nothing with a value matches a pattern.
    """
    found: dict[str, Selected] = {}
    for name in names:
        for side in sides:
            found |= _matching(catalogue, name, side) if _WILD.search(name) else _of(catalogue, name, side)
    return found


def of_addresses(catalogue: Catalogue, addresses: Iterable[str]) -> dict[str, Selected]:
    """The values at addresses, "layers.5.mixer.output", or at those that match, "layers.*.output".

    Raises:
        SiteError: there is none.
    """
    found: dict[str, Selected] = {}
    for each in addresses:
        name, _, side = each.rpartition(".")
        if each in (INPUT, OUTPUT):
            name, side = "", each
        if side in (INPUT, OUTPUT):
            found |= of_modules(catalogue, [name], [side])
        elif catalogue.named(each) is not None or _WILD.search(each):
            found |= of_modules(catalogue, [each], [OUTPUT])
        else:
            found[each] = _known(catalogue, Address.parse(each))
    return found


def _of(catalogue: Catalogue, name: str, side: str) -> dict[str, Selected]:
    named = catalogue.named(name)
    if named is not None and named.value is not None:
        return {name: Address(name)}
    if named is not None and not named.is_module:
        return {name: named}
    full = f"{name}.{side}" if name else side
    leaves = catalogue.module(name).side(side)
    if named is not None or not leaves:  # one value; if there is none, the catalogue says why
        return {full: _known(catalogue, Address(full))}
    if side == INPUT:
        return {full: _known(catalogue, Address(full, leaves[0].path))}
    return {str(address): _known(catalogue, address) for address in (Address(full, leaf.path) for leaf in leaves)}


def _known(catalogue: Catalogue, address: Address) -> Address:
    catalogue.leaf(address)
    return address


def _matching(catalogue: Catalogue, pattern: str, side: str) -> dict[str, Selected]:
    expression = "".join(_WILDCARDS.get(part, re.escape(part)) for part in _WILD.split(pattern))
    found: dict[str, Selected] = {}
    last = pattern.rpartition(".")[2]
    for name in dict.fromkeys([*_values(catalogue, last), *catalogue.modules]):
        if re.fullmatch(expression, name):
            try:
                found |= _of(catalogue, name, side)
            except SiteError:
                continue  # not called, called several times, or no tensor there: the pattern means the others
    if not found:
        raise SiteError(
            f"Nothing in {catalogue.model} that has an {side} matches `{pattern}`.",
            hint="A pattern is a name with wildcards: `layers.*.mixer`, `**.c_proj`. Print the model for its names.",
            lines=here(),
        )
    return found


def _values(catalogue: Catalogue, last: str) -> Iterator[str]:
    """The canonical names, those of values inside modules only if they end with a word; by way of the mixer too."""
    for name, each in catalogue.names.items():
        owner, _, word = name.rpartition(".")
        if each.is_module or each.value is not None:
            yield name
        elif word == last:
            yield name
            layer, _, role = owner.rpartition(".")
            if role in MIXERS and f"{layer}.mixer" in catalogue.names:
                yield f"{layer}.mixer.{word}"
