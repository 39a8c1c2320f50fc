"""Results: numbers with named axes, and what produced them.

Every method returns one. Its numbers are a tensor with a name for each dimension and a label for each index, which is
all that a plot or a data frame needs. With it comes where it is from, model, prompts, seeds and versions, so that a
figure can be made again; `save` writes all of it to one file, and `load` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from patchwire.errors import InputError, PatchwireError, here
from patchwire.methods.measured import LAYER, ROLE, TOKEN, Measured, is_role
from patchwire.model import Model
from patchwire.results import Stats
from patchwire.version import VERSION

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series
    from rich.table import Table

_VALUES, _ABOUT, _FORMAT = "values", "patchwire", 1


@dataclass(frozen=True)
class Axis:
    """A dimension of a result."""

    name: str
    """What it goes along: "layer", "token", "head"."""
    labels: tuple[str, ...]
    """A label for each index."""
    marked: tuple[int, ...] = ()
    """The indices that stand out: the tokens of the subject. Figures and tables put a * behind their labels."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shown(self) -> list[str]:
        """The labels as figures show them: with a * where they are marked, and with visible spaces in tokens."""
        from patchwire import plots

        is_token = self.name == TOKEN
        labels = [plots.visible(each) if is_token and not is_role(each) else each for each in self.labels]
        return [label + ("*" if index in self.marked else "") for index, label in enumerate(labels)]


@dataclass(frozen=True)
class Origin:
    """What produced a result."""

    method: str
    """The function's name."""
    model: str
    """The model's name on the server."""
    fingerprint: str
    """The model's: SHA-256 of its module tree."""
    arguments: Mapping[str, Any]
    """What else the function was given: prompts, sites, seeds; as JSON knows them."""
    patchwire: str = VERSION
    """The version of Patchwire."""
    torch: str = torch.__version__
    """The version of PyTorch on the laptop."""

    @classmethod
    def of(cls, method: str, model: Model, **arguments: Any) -> Origin:
        """Of a method that was given these arguments."""
        return cls(method, model.name, model.fingerprint, json.loads(json.dumps(arguments, default=_plain)))


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """Numbers with named axes."""

    values: Tensor
    """The numbers, with as many dimensions as there are axes."""
    axes: tuple[Axis, ...]
    """What its dimensions are."""
    unit: str
    """What the numbers are: "probability of “ Paris”"."""
    origin: Origin
    """What produced them."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What was measured beside them, by name. Of a patching experiment: "base", the run that is patched, without any
    patch; and "source", the run that the patches come from."""
    signed: bool = False
    """Whether they mean something below zero: figures then colour by sign, white at 0."""
    stats: Stats = field(default_factory=Stats)
    """What the runs cost; not saved."""

    def __post_init__(self) -> None:
        if tuple(self.values.shape) != tuple(map(len, self.axes)):
            raise InputError(
                f"Values of shape {list(self.values.shape)} do not fit axes of {[len(each) for each in self.axes]}."
            )

    def __repr__(self) -> str:
        """What was measured of what, from its lowest to its highest number, and what else was measured."""
        axes = " × ".join(_counted(len(each), each.name) for each in self.axes)
        said = [f"{self.origin.method} of {self.origin.model}: {self.unit}{f', {axes}' if axes else ''}"]
        numbers = self.values.nan_to_num(torch.nan, torch.nan, torch.nan).flatten()
        if self.axes and not numbers.isnan().all():
            lowest = numbers.nan_to_num(torch.inf).argmin()
            highest = numbers.nan_to_num(-torch.inf).argmax()
            said.append(f"from {self._shown(int(lowest))} to {self._shown(int(highest))}")
        elif not self.axes:
            said.append(f"{self.values.item():.4g}")
        said += [f"{name} {number:.4g}" for name, number in self.numbers.items()]
        return f"<{'; '.join(said)}>"

    def _shown(self, index: int) -> str:
        """One of its numbers, and where it is."""
        places = torch.unravel_index(torch.tensor(index), self.values.shape)
        where = [f"{axis.name} {axis.shown[int(at)]}" for axis, at in zip(self.axes, places, strict=True)]
        return f"{self.values.flatten()[index].item():.4g} ({', '.join(where)})"

    def axis(self, name: str) -> int:
        """The position of an axis.

        Raises:
            InputError: there is no such axis.
        """
        names = [each.name for each in self.axes]
        if name not in names:
            raise InputError(f"There is no axis “{name}”; there are {', '.join(names)}.", lines=here())
        return names.index(name)

    def mean(self, name: str) -> Result:
        """The means along an axis, NaN left out.

        Raises:
            InputError: there is no such axis.
        """
        dim = self.axis(name)
        left = (*self.axes[:dim], *self.axes[dim + 1 :])
        return self._with(self.values.nanmean(dim), left)

    def at(self, **where: int) -> Result:
        """The numbers at some index of some axes, negative ones from the end: `result.at(layer=5)`.

        Raises:
            InputError: there is no such axis, or no such index.
        """
        found = self
        for name, index in where.items():
            dim = found.axis(name)
            length = len(found.axes[dim])
            if not -length <= index < length:
                raise InputError(f"The axis “{name}” goes from 0 to {length - 1}, and has no {index}.", lines=here())
            found = found._with(found.values.select(dim, index), (*found.axes[:dim], *found.axes[dim + 1 :]))
        return found

    def effect(self) -> Result:
        """By how much each patch changes the base run: `value - base`, the indirect effect of Meng et al. (2022).

        Raises:
            InputError: this is no patching experiment.
        """
        base, _ = self._ends()
        return replace(self, values=self.values - base, unit=f"change of {self.unit}", signed=True)

    def normalised(self) -> Result:
        """How much of the way from the base run to the source run each patch goes: `(value - base) / (source - base)`,
        0 for no effect and 1 for all of it (Zhang and Nanda 2024, section 3.1). Shares of any metric are of one unit,
        and can stand in one figure.

        Raises:
            InputError: this is no patching experiment, or both runs measure the same.
        """
        base, source = self._ends()
        if source == base:
            raise InputError(f"Both runs have the same {self.unit}, {base:.3g}: there is nothing to restore.")
        values = (self.values - base) / (source - base)
        return replace(self, values=values, unit="normalised effect", signed=True)

    def _ends(self) -> tuple[float, float]:
        if not {"base", "source"} <= self.numbers.keys():
            raise InputError(f"What `{self.origin.method}` measured is no patch of one run with another.", lines=here())
        return self.numbers["base"], self.numbers["source"]

    def _with(self, values: Tensor, axes: tuple[Axis, ...]) -> Result:
        return replace(self, values=values, axes=axes)

    @cached_property
    def measured(self) -> Measured:
        """The numbers by layer and token, as `patchwire.compare` aligns them.

        Raises:
            InputError: it has other axes.
        """
        names = tuple(each.name for each in self.axes)
        if names not in ((LAYER, TOKEN), (LAYER,), (TOKEN,)):
            raise InputError(f"Results by {' and '.join(names)} are not compared; by layer and token they are.")
        return Measured(self.values, names, self.origin.arguments.get("prompt"), unit=self.unit)

    def table(self, *, width: int | None = None) -> Table:
        """A table for the terminal, each cell shaded by its value.

        Args:
            width: How many characters wide; the last columns that fit are shown.

        Raises:
            InputError: it has more than two axes: take a mean, or one index, of the others.
        """
        from patchwire import plots

        values, rows, columns = self._matrix()
        heads = [each.replace(" ", "\n") for each in columns.shown]  # a word a line: long ones would be cut
        return plots.grid(values, rows=rows.shown, columns=heads, corner=rows.name, width=width)

    def plot(self, *, title: str = "") -> Figure:
        """A heatmap in the look of the field's figures: tokens, or their roles, down and layers across; of other axes,
        the first upwards and the second to the right.

        Raises:
            InputError: it has more than two axes: take a mean, or one index, of the others.
            PatchwireError: matplotlib is not installed.
        """
        return side_by_side({title or self.origin.method.replace("_", " "): self})

    def _matrix(self) -> tuple[Tensor, Axis, Axis]:
        if len(self.axes) == 2:
            return self.values, self.axes[0], self.axes[1]
        if len(self.axes) == 1:
            return self.values[:, None], self.axes[0], Axis("", (self.unit,))
        names = ", ".join(each.name for each in self.axes)
        raise InputError(
            f"A figure has two axes, and this result has {len(self.axes)}: {names}.",
            hint="Take a mean of one (`result.mean('sample')`), or one of its indices (`result.at(head=3)`).",
            lines=here(),
        )

    def to_pandas(self) -> Series[float] | DataFrame:
        """A `DataFrame` with a row for each index of the first axis, if there are two axes, or else a `Series` with an
        index level for each axis.

        Raises:
            PatchwireError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise PatchwireError(f"This needs pandas ({error}).", hint="Install it: `pip install pandas`.") from None
        numbers = self.values.detach().cpu().double().numpy()
        if len(self.axes) == 2:
            rows, columns = (pd.Index(each.labels, name=each.name) for each in self.axes)
            return pd.DataFrame(numbers, index=rows, columns=columns)
        index = pd.MultiIndex.from_product([each.labels for each in self.axes], names=[each.name for each in self.axes])
        return pd.Series(numbers.reshape(-1), index=index, name=self.unit)

    def save(self, path: str | Path) -> Path:
        """Write it to a file: the tensor in safetensors, with everything else as JSON in its header.

        Raises:
            PatchwireError: the file cannot be written.
        """
        path = Path(path)
        about = {
            "format": _FORMAT,
            "axes": [asdict(each) for each in self.axes],
            "unit": self.unit,
            "origin": asdict(self.origin),
            "numbers": dict(self.numbers),
            "signed": self.signed,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({_VALUES: self.values.detach().contiguous()}, path, {_ABOUT: json.dumps(about)})
        except (OSError, safetensors.SafetensorError) as error:
            raise PatchwireError(f"The result cannot be written to {path}: {error}") from error
        return path


def load(path: str | Path) -> Result:
    """Read a result that `save` wrote.

    Raises:
        PatchwireError: it cannot be read, or is no result.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_ABOUT])
            values = file.get_tensor(_VALUES)
        if about["format"] != _FORMAT:
            raise PatchwireError(f"{path} is from another version of Patchwire (format {about['format']}).")
        axes = tuple(Axis(each["name"], tuple(each["labels"]), tuple(each["marked"])) for each in about["axes"])
        return Result(values, axes, about["unit"], Origin(**about["origin"]), about["numbers"], about["signed"])
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise PatchwireError(f"{path} is no result of Patchwire: {error}") from error


def side_by_side(results: Mapping[str, Result], *, title: str = "") -> Figure:
    """Results as panels of one figure, with one colour scale: of several models, places or corruptions.

    Args:
        results: By what is written above each. They may have other tokens and layers than each other.
        title: Written above all.

    Raises:
        InputError: there are none, they are of different units, or one has more than two axes.
        PatchwireError: matplotlib is not installed.

    Example:
        >>> found = {each.name: causal_trace(each, prompt, subject).effect() for each in (gpt2, mamba)}
        >>> side_by_side(found).savefig("compared.png")
    """
    from patchwire import plots

    units = {each.unit for each in results.values()}
    if len(units) != 1:
        raise InputError(
            f"One colour scale is for results of one unit, not of {len(units)}: {', '.join(sorted(units))}.",
            hint="Plot each alone, or take `effect()` or `normalised()` of all.",
            lines=here(),
        )
    parts = []
    for name, each in results.items():
        values, rows, columns = each._matrix()
        tokens_down = rows.name == LAYER and columns.name in (TOKEN, ROLE)
        if tokens_down:
            values, rows, columns = values.T, columns, rows
        across = columns.shown if columns.name else [""]
        parts.append(plots.Panel(name, values, rows.shown, across, rows.name, columns.name, tokens_down))
    signed = any(each.signed for each in results.values())
    return plots.side_by_side(parts, title=title, unit=units.pop(), signed=signed)


def layers_axis(model: Model) -> Axis:
    """The axis "layer" of a result: all layers of a model, labelled with their numbers."""
    return Axis(LAYER, tuple(map(str, range(model.num_layers))))


def tokens_axis(labels: Sequence[str], marked: Sequence[int] = ()) -> Axis:
    """The axis "token" of a result.

    Args:
        labels: The texts of the tokens: `prompt.tokens`.
        marked: Those that stand out, by position: the subject, `span(prompt, "The Eiffel Tower")`. `by_role` averages
            by them.
    """
    return Axis(TOKEN, tuple(labels), tuple(marked))


def _plain(value: Any) -> Any:
    """What JSON does not know, as something that it knows."""
    if isinstance(value, Tensor):
        return value.tolist()
    return list(value) if isinstance(value, (range, set, frozenset)) else repr(value)


def _counted(count: int, name: str) -> str:
    one = name.removesuffix("s")
    return f"{count} {one if count == 1 else one + 's'}"
