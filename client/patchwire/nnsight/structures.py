"""What modules take and return, as Python has it: tuples, mappings with attributes, and the values in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from patchwire.errors import SiteError, here
from patchwire.proxy import Structure, Value
from patchwire.sites import CALL


class Output(dict[str, Any]):
    """A mapping that a module returned: its items also as attributes, and by their position.

    While the block is recorded, an item that is assigned is written to the module: `model.output.logits = value`.
    """

    _structure: Structure | None = None

    @classmethod
    def of(cls, structure: Structure) -> Output:
        """What a structure holds."""
        keys = structure.keys()
        found = cls((str(key), plain(structure[key])) for key in keys)
        found._structure = structure
        return found

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, int):
            key = tuple(self)[key]
        if self._structure is not None and self._structure.recorded:
            assign(self._structure, {key: value})
        super().__setitem__(key, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As of any dict."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self[name] = value

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, slice)):
            return tuple(self.values())[key]
        return super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"There is no `{name}` here; there is {', '.join(f'`{each}`' for each in self)}.")


def plain(found: Value | Structure, items: int = 0) -> Any:
    """A value as it is; a structure as tuples, with None where there is no tensor, and mappings.

    Args:
        found: What is at a side of a module.
        items: How many items it has, if it is a tuple and that is known.
    """
    if not isinstance(found, Structure):
        return found
    keys = found.keys()
    if set(keys) <= set(CALL):
        args, kwargs = CALL
        return (plain(found[args]) if args in keys else ()), (plain(found[kwargs]) if kwargs in keys else {})
    if all(isinstance(key, int) for key in keys):
        count = max(items, 1 + max(key for key in keys if isinstance(key, int)))
        return tuple(plain(found[index]) if index in keys else None for index in range(count))
    return Output.of(found)


def arguments(value: Any) -> Any:
    """`(args, kwargs)`, also of `(value, kwargs)`, where one positional argument stands without its tuple."""
    if isinstance(value, tuple) and len(value) == len(CALL) and not isinstance(value[0], (tuple, list)):
        return (value[0],), value[1]
    return value


def assign(structure: Structure, value: Any) -> None:
    """Make what is in `value` the tensors of a structure; where there is None, they stay.

    Raises:
        SiteError: something in it has no place there, or `value` is one tensor.
    """
    for key, item in _items(value, structure):
        if item is None or (isinstance(item, (tuple, list, Mapping)) and not item):
            continue
        below = structure[key]
        if isinstance(below, Structure):
            assign(below, item)
        else:
            structure[key] = item


def _items(value: Any, structure: Structure) -> Iterator[tuple[int | str, Any]]:
    if isinstance(value, Mapping):
        return iter(value.items())
    if isinstance(value, (tuple, list)):
        return iter(enumerate(value))
    raise SiteError(
        f"{structure!r} is a tuple or mapping, and cannot become one tensor.",
        hint="Assign a tuple, with None for what stays: `module.output = (value, None)`.",
        lines=here(),
    )
