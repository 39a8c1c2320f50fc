"""Other names of modules, as `rename={...}` gives them.

A key is a path of raw names, and is looked for under every module: "mlp" names the `mlp` of each layer,
"transformer.h" the list of layers from the model itself. The new name stands where the key was looked for:
`{"transformer.h": "layers"}` makes `model.layers`, `{"mlp": "feed_forward"}` makes
`model.transformer.h[0].feed_forward`. A `*` stands for any one name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from patchwire.errors import SiteError, here
from patchwire.sites import Catalogue, spell

Aliases = dict[str, dict[str, str]]
"""By the raw path of the module where it stands: the other name, and the raw path of what it means."""


def aliases(rename: Mapping[str, str | Sequence[str]], catalogue: Catalogue, taken: Sequence[str]) -> Aliases:
    """Where each new name stands, and for what.

    Args:
        rename: New names, or lists of them, by the key of what they name.
        catalogue: The model's modules.
        taken: Names that every module has already.

    Raises:
        SiteError: a key means several modules from one place, or a new name is taken.
    """
    found: Aliases = {}
    for key, given in rename.items():
        if not isinstance(key, str):
            raise SiteError(
                f"`rename` has the key {key!r}; classes are on the server.", hint="Write a path instead.", lines=here()
            )
        for host in catalogue.modules:
            targets = _targets(host, key, catalogue, found)
            if len(targets) > 1:
                raise SiteError(
                    f"`rename` key {key!r} means {len(targets)} modules of `{spell(host)}`: {', '.join(targets)}.",
                    hint="Key these by their names.",
                    lines=here(),
                )
            for target in targets:
                for alias in [given] if isinstance(given, str) else given:
                    _bind(found, catalogue, taken, host, alias, target)
    return found


def _targets(host: str, key: str, catalogue: Catalogue, found: Aliases) -> list[str]:
    places = [host]
    for part in key.lstrip(".").split("."):
        places = [
            f"{place}.{child}" if place else child
            for place in places
            for child in (catalogue.children[place] if part == "*" else [part])
            if child in catalogue.children[place]
        ] or [found[place][part] for place in places if part in found.get(place, {})]
    return list(dict.fromkeys(places))


def _bind(found: Aliases, catalogue: Catalogue, taken: Sequence[str], host: str, alias: str, target: str) -> None:
    prefix, _, name = alias.rpartition(".")
    if prefix:
        host = f"{host}.{prefix}" if host else prefix
        if not target.startswith(f"{host}."):
            raise SiteError(
                f"`rename` gives `{spell(target)}` the name {alias!r}, which is under another module.",
                hint="A new name with dots starts as the key does.",
                lines=here(),
            )
    there = f"{host}.{name}" if host else name
    if there == target or found.get(host, {}).get(name) == target:
        return
    if name in taken or there in catalogue.modules or name in found.get(host, {}):
        raise SiteError(
            f"`rename` cannot name `{spell(target)}` {name!r}: `{spell(there)}` is something else already.",
            hint="Choose another name.",
            lines=here(),
        )
    found.setdefault(host, {})[name] = target
