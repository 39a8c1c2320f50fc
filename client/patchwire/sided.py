"""What has an input and an output: a module, and an operation inside a forward. Both read and write in the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patchwire.errors import SiteError, here
from patchwire.proxy import Structure, Value
from patchwire.sites import INPUT, OUTPUT, Address, Catalogue, Leaf
from patchwire.tracing import current

if TYPE_CHECKING:
    from patchwire.model import Model


class Sided:
    """Something that is called with values and returns values."""

    _model: Model
    _name: str

    @property
    def _catalogue(self) -> Catalogue:
        return self._model.catalogue

    def _leaves(self, side: str) -> tuple[Leaf, ...]:
        """The tensors of one side.

        Raises:
            SiteError: there are none; at the user's line.
        """
        raise NotImplementedError

    @property
    def output(self) -> Any:
        """What it returns: a value, or a structure if that is a tuple or mapping."""
        return self._side(OUTPUT)

    @output.setter
    def output(self, value: Any) -> None:
        self._assign(OUTPUT, value)

    @property
    def input(self) -> Any:
        """Its first argument; of an operation, the first that is a tensor or has one in it."""
        return self._side(INPUT)

    @input.setter
    def input(self, value: Any) -> None:
        self._assign(INPUT, value)

    @property
    def inputs(self) -> Structure:
        """All arguments: `inputs[0]` the positional, `inputs[1]` the named ones."""
        address = self._address(INPUT)
        scope = current(address.spelled, self._model)
        leaves = self._leaves(INPUT)
        return Structure(scope.recorder, scope.site(Address(address.name)), leaves)

    def _address(self, side: str) -> Address:
        return Address(f"{self._name}.{side}" if self._name else side)

    def _side(self, side: str) -> Value | Structure:
        address = self._address(side)
        scope = current(address.spelled, self._model)
        leaves = self._leaves(side)
        if self._name in self._catalogue.names:
            return self._read(address)
        if side == INPUT:  # the first argument only
            address = Address(address.name, leaves[0].path[:2])
            leaves = tuple(leaf for leaf in leaves if leaf.path[:2] == address.path)
        if len(leaves) == 1 and leaves[0].path == address.path:
            return self._read(address)
        return Structure(scope.recorder, scope.site(address), leaves)

    def _assign(self, side: str, value: Any) -> None:
        here_now = self._side(side)
        if isinstance(here_now, Structure):
            if isinstance(value, (tuple, list)):
                for index, item in enumerate(value):
                    if item is not None:
                        here_now[index] = item
                return
            raise SiteError(
                f"`{self._address(side).spelled}` is a tuple or mapping.",
                hint="Assign its items one by one.",
                lines=here(),
            )
        address = self._address(side)
        if side == INPUT and self._name not in self._catalogue.names:
            address = Address(address.name, self._leaves(side)[0].path)
        self._write(address, value)

    def _read(self, address: Address) -> Value:
        scope = current(address.spelled, self._model)
        return scope.recorder.read(scope.site(address))

    def _write(self, address: Address, value: Any) -> None:
        scope = current(address.spelled, self._model)
        scope.recorder.assign(scope.site(address), value)


class NoSuchName(SiteError, AttributeError):
    """A name that is not in the model; also an AttributeError, so that `hasattr` works.

    `SiteError` itself is none: Python would hide one that a property raises.
    """

    def __reduce__(self) -> tuple[object, ...]:
        return SiteError(self.message, hint=self.hint, lines=self.lines).__reduce__()


NoSuchName.__name__ = NoSuchName.__qualname__ = "SiteError"  # what the user sees
NoSuchName.__module__ = SiteError.__module__
