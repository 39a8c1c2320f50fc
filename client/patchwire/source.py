"""Inside a forward: every call and every assignment in its text, read and written as modules' inputs and outputs are.

`print(model.layers[5].mixer.source)` shows the text with the operations' names: what is called or assigned, and a
number ("torch_matmul_0" is the first call of `torch.matmul`). A function that is called there has a source of its own.
What is inside is asked of the server when it is first needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from patchwire import display, sites
from patchwire.errors import SiteError, here
from patchwire.sided import NoSuchName, Sided
from patchwire.sites import SOURCE, Address, Dim, Leaf, spell
from patchwire.tracing import scope_now

if TYPE_CHECKING:
    from patchwire.model import Model


class Source:
    """The operations inside the forward of a module, or inside a function that is called there.

    Example:
        >>> with model.trace("The Eiffel Tower is in the city of"):
        ...     attention = model.layers[5].mixer.source.attention_interface_1
        ...     probabilities = attention.source.nn_functional_softmax_0.output.save()
        >>> probabilities.shape
        torch.Size([1, 12, 10, 10])

    Iterating gives the operations, in the order of the text; `names` and `dir` list their names.
    """

    _model: Model
    _name: str
    _known: sites.Source

    def __init__(self, model: Model, name: str) -> None:
        """
        Args:
            model: The model.
            name: The name, ending with "source": "layers.5.mixer.source".

        Raises:
            SiteError: a forward pass does not come by there, or the text of the function is not to be had.
        """
        found = model.catalogue.split(name)
        try:
            if found is None:
                model.catalogue.module(name.rpartition(".")[0])
                raise SiteError(f"`{spell(name)}` is a module.", hint=f"Write `model.module({name!r})`.")
            module, path, _ = found
            known = model.catalogue.source(module, path)
        except SiteError as error:
            raise SiteError(error.message, hint=error.hint, lines=here()) from None
        put = object.__setattr__
        put(self, "_model", model)
        put(self, "_name", name)
        put(self, "_known", known)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the operations, in the order of the text."""
        return tuple(self._known.operations)

    @property
    def text(self) -> str:
        """The text of the function."""
        return self._known.text

    def __getattr__(self, name: str) -> Operation:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._known.operations:
            error = self._model.catalogue.no_operation(self._known, name, spell(self._name))
            raise NoSuchName(error.message, hint=error.hint, lines=here())
        return self._operation(f"{self._name}.{name}")

    def _operation(self, name: str) -> Operation:
        return Operation(self._model, name, self._known)

    def __setattr__(self, name: str, value: Any) -> None:
        operation = getattr(self, name)
        typed = spell(operation._name)
        raise SiteError(
            f"`{typed}` cannot be assigned: only values can.",
            hint=f"Write `{typed}.output = …` inside a block.",
            lines=here(),
        )

    def __iter__(self) -> Iterator[Operation]:
        return (getattr(self, name) for name in self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._known.operations

    def __len__(self) -> int:
        return len(self._known.operations)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.names})

    def __repr__(self) -> str:
        return display.source(self._known)


class Operation(Sided):
    """A call or an assignment inside a forward: `model.layers[5].mixer.source.attn_output_0`.

    Inside a block:

    - `operation.output`: what the call returns, or the value that is assigned.
    - `operation.input`, `operation.inputs`: what it is called with, without the object whose method it is.
    - `operation[3]`: the fourth time that it runs in the pass, where it runs several times, as in a loop. Which one is
      meant has to be said there.
    - `operation.source`: the operations inside the function that it calls. Where that function runs several times,
      their numbers count all of these.

    Reading, assigning and editing in place follow the rules of modules.
    """

    _source: sites.Source

    def __init__(self, model: Model, name: str, source: sites.Source, occurrence: int | None = None) -> None:
        put = object.__setattr__
        put(self, "_model", model)
        put(self, "_name", name if occurrence is None else f"{name}[{occurrence}]")
        put(self, "_source", source)
        put(self, "_occurrence", occurrence)
        put(self, "_operation", source.operations[name.rpartition(".")[2]])

    _operation: sites.Operation
    _occurrence: int | None

    @property
    def name(self) -> str:
        """Its name in the source."""
        return self._operation.name

    @property
    def line(self) -> int:
        """Its line in the text, from 1."""
        return self._operation.line

    @property
    def runs(self) -> Dim:
        """How often one forward pass runs it: "1", "seq", or "?" if that depends on what the tokens are."""
        return self._operation.runs

    @property
    def source(self) -> Source:
        """The operations inside the function that it calls."""
        if self._occurrence is not None:
            plain = spell(self._name).rpartition("[")[0]
            raise SiteError(
                f"`{spell(self._name)}.{SOURCE}` does not exist: the number goes to the operation inside.",
                hint=f"Write `{plain}.{SOURCE}.…[n]`, where n counts every time that it runs in the pass.",
                lines=here(),
            )
        return self._inside(f"{self._name}.{SOURCE}")

    def _inside(self, name: str) -> Source:
        return Source(self._model, name)

    def __getitem__(self, occurrence: int) -> Operation:
        if self._occurrence is not None or isinstance(occurrence, bool) or not isinstance(occurrence, int):
            raise SiteError(
                f"`{spell(self._name)}[{occurrence!r}]` does not exist: one number says which time the operation runs.",
                hint=f"For an item of what it returns, write `{spell(self._name)}.output[{occurrence!r}]`.",
                lines=here(),
            )
        if occurrence < 0:
            raise SiteError(
                f"`{spell(self._name)}[{occurrence}]`: the times that an operation runs are counted from 0.",
                hint="The last is [n - 1] for one that runs n times, and there are n tokens if it runs for each.",
                lines=here(),
            )
        return type(self)(self._model, self._name, self._source, occurrence)

    def __iter__(self) -> Iterator[Any]:
        raise TypeError(f"`{spell(self._name)}` cannot be iterated over: say how often, `for n in range(…)`.")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("output", "input"):
            raise SiteError(
                f"`{spell(self._name)}.{name}` cannot be assigned.",
                hint=f"`{spell(self._name)}.output` and `.input` can.",
                lines=here(),
            )
        object.__setattr__(self, name, value)

    def _leaves(self, side: str) -> tuple[Leaf, ...]:
        name = Address(f"{self._name}.{side}").name
        try:
            scope = scope_now()
            step = 0 if scope is None else scope.step
            return self._catalogue.operation_leaves(name, self._operation, self._occurrence, side, step)
        except SiteError as error:
            raise SiteError(error.message, hint=error.hint, lines=here()) from None

    def __repr__(self) -> str:
        return display.operation(self._source, self.name)
