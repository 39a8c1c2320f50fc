"""Attribution: what activation patching would measure, estimated for all cells at once from gradients.

A patch changes a site by `x_source - x_base`; to first order the metric changes by that times its gradient at the base
run. Two forward passes and a backward one stand for a pass of each cell: attribution patching, Nanda (2023); Syed,
Rager and Conmy (2024), "Attribution Patching Outperforms Automated Circuit Discovery". Where the metric is saturated
that gradient says little, even of the sign; gradients at inputs between the two runs say more: Hanna, Pezzelle and
Belinkov (2024), "Have Faith in Faithfulness" (EAP-IG), here of nodes instead of edges. `agreement` says how far an
estimate is to be trusted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import patchwire
from patchwire.errors import InputError, here
from patchwire.methods.grids import Along, At, Grid, Over
from patchwire.methods.metrics import Metric, checked
from patchwire.methods.patching import LAYERS_AND_TOKENS, Direction, Pair, Runs, metric_of, origin_of
from patchwire.methods.result import Result
from patchwire.model import Model
from patchwire.results import Stats

if TYPE_CHECKING:
    from rich.table import Table

_NOTHING = 1e-5
"""An effect of less than this share of the largest is rounding, and has no sign."""


def attribution_patching(
    model: Model,
    clean: Any,
    corrupt: Any,
    metric: Metric | None = None,
    *,
    answer: str | int | None = None,
    foil: str | int | None = None,
    at: At = "resid",
    over: Over = LAYERS_AND_TOKENS,
    direction: Direction = "denoising",
) -> Result:
    """Estimate `activation_patching` to first order: the base run's metric, and `Σ (x_source - x_base) ∂m/∂x` at the
    base run, summed over a cell (Nanda 2023; Syed et al. 2024).

    It takes two passes, whatever the number of cells. The arguments are those of `activation_patching`; there is an
    axis of layers, one at a time, because first-order effects of several layers do not add up: what one changes,
    another has already counted.

    Returns:
        As `activation_patching`, in float64; `effect()` is the estimated effect.

    Raises:
        InputError: as there; or the layers are not one at a time.
        SiteError: the model has no such site.
        OperationError: the metric has no gradient, as a rank.

    Example:
        >>> estimated = attribution_patching(model, clean, corrupt, metric, at="attn.z", over=("layer", "head"))
        >>> exact = activation_patching(model, clean, corrupt, metric, at="attn.z", over=("layer", "head"))
        >>> agreement(estimated, exact)
    """
    pair = Pair.of(model, clean, corrupt, direction)
    metric = checked(metric) or metric_of(model, pair.clean, answer, foil)
    grid = Grid.of(model, pair.clean, at, over, marked=pair.different)
    values, numbers, stats = _estimated(model, pair, metric, grid, 1)
    origin = origin_of("attribution_patching", model, pair, metric, at, grid)
    return Result(values, grid.axes, metric.unit, origin, numbers, metric.signed, stats)


def integrated_gradients(
    model: Model,
    clean: Any,
    corrupt: Any,
    metric: Metric | None = None,
    *,
    answer: str | int | None = None,
    foil: str | int | None = None,
    at: At = "resid",
    over: Over = LAYERS_AND_TOKENS,
    direction: Direction = "denoising",
    steps: int = 10,
) -> Result:
    """Estimate `activation_patching` as `attribution_patching` does, with the mean of the gradients at inputs between
    the two runs: token embeddings `base + (k / steps) (source - base)`, for k = 0, …, steps - 1 (Hanna et al. 2024).

    With one step it is attribution patching. The steps are rows of one pass, so that it takes two passes, too.

    Args and Raises: those of `attribution_patching`, and

        steps: How many gradients are averaged.

    Returns:
        As `activation_patching`, in float64; `effect()` is the estimated effect.

    Example:
        >>> estimated = integrated_gradients(model, clean, corrupt, answer=" Paris", foil=" Rome", steps=20)
        >>> estimated.effect().plot().savefig("effects.png")
    """
    if steps < 1:
        raise InputError(f"Gradients are averaged over at least one step, not {steps}.", lines=here())
    pair = Pair.of(model, clean, corrupt, direction)
    metric = checked(metric) or metric_of(model, pair.clean, answer, foil)
    grid = Grid.of(model, pair.clean, at, over, marked=pair.different)
    values, numbers, stats = _estimated(model, pair, metric, grid, steps)
    origin = origin_of("integrated_gradients", model, pair, metric, at, grid, steps=steps)
    return Result(values, grid.axes, metric.unit, origin, numbers, metric.signed, stats)


def _estimated(
    model: Model, pair: Pair, metric: Metric, grid: Grid, steps: int
) -> tuple[Tensor, dict[str, float], Stats]:
    """The estimated metric of every cell, the metric of both runs, and the cost."""
    layers = next((each for each in grid.along if each.dim is None), None)
    if layers is None or any(len(step) != 1 for step in layers.steps):
        raise InputError(
            "Effects are estimated of one layer at a time.",
            hint='Name the axis, `over=("layer", "head")`; add up what you need of the result.',
            lines=here(),
        )
    with model.session() as session:
        with model.trace() as trace:
            runs = Runs.record(model, trace, pair, grid, metric)
            with trace.invoke(pair.source.rows):
                embedded = model.embed.output
        with model.trace(pair.base.rows * steps):
            share = (torch.arange(steps) / steps)[:, None, None]
            if steps > 1:
                model.embed.output = model.embed.output + share * (embedded - model.embed.output)
            sites = grid.values()
            measured = metric(model.logits[:, -1], runs.clean).sum()
            gradients = patchwire.grad(measured, list(sites.values()))
            reduced = {}
            for (layer, site), gradient in zip(sites.items(), gradients, strict=True):
                change = (runs.states[layer] - site[:1]).float()
                reduced[layer] = _reduced(grid, change * gradient.float().mean(0, keepdim=True)).save()
    base, source = float(runs.base), float(runs.source)
    effects = torch.stack([reduced[layer].value for (layer,) in layers.steps], grid.along.index(layers))
    assert session.stats is not None
    return base + effects.double(), {"base": base, "source": source}, session.stats


def _reduced(grid: Grid, products: Any) -> Any:
    """The sums over each cell of one layer: a dimension for each axis, in their order."""
    along = [each for each in grid.along if each.dim is not None]
    dims = [each.dim for each in along]
    others = [dim for dim in range(grid.ndim) if dim not in dims]
    found = products.permute([*dims, *others]).flatten(len(dims)).sum(-1) if others else products.permute(dims)
    for dim, each in enumerate(along):
        if not each.is_whole or found.shape[dim] != len(each.steps):
            found = _summed(found.movedim(dim, -1), each).movedim(-1, dim)
    return found


def _summed(values: Any, along: Along) -> Any:
    """The sums at each step of an axis, which is the last: steps of fewer indices than others are filled with a 0."""
    longest = max(map(len, along.steps))
    zero = values.shape[-1]
    indices = torch.tensor([[*step, *[zero] * (longest - len(step))] for step in along.steps])
    return torch.nn.functional.pad(values, (0, 1))[..., indices].sum(-1)


@dataclass(frozen=True, eq=False)
class Agreement:
    """How far an estimate of effects agrees with the exact ones."""

    pearson: float
    """The correlation of the effects over all cells; NaN if either has none."""
    sign: float
    """The share of cells whose effects have the same sign; one of less than 1e-5 of the largest exact one has none."""
    sign_of_large: float
    """The same among those cells whose exact effect is large."""
    cells: int
    """How many cells there are."""
    large: int
    """How many of them are large."""
    threshold: float
    """What is large: more than this share of the largest exact effect."""
    error: float
    """The largest difference of any two effects."""
    approximate: Result
    """The estimated effects."""
    exact: Result
    """The exact ones."""

    def table(self) -> Table:
        """Its numbers, for the terminal."""
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for head in ("", self.approximate.origin.method.replace("_", " ")):
            table.add_column(head, justify="left" if not head else "right")
        for name, number in (
            ("Pearson correlation", f"{self.pearson:.4f}"),
            (f"same sign, of {self.cells} cells", f"{self.sign:.2f}"),
            (f"same sign, of {self.large} above {self.threshold:.0%} of the largest", f"{self.sign_of_large:.2f}"),
            ("largest error", f"{self.error:.3g}"),
        ):
            table.add_row(name, number)
        return table


def _flat(given: Any) -> Any:
    """Token ids without the dimension that a row of them may have."""
    return given[0] if isinstance(given, list) and len(given) == 1 and isinstance(given[0], list) else given


_COMPARABLE = {
    "model": "models",
    "prompt": "clean prompts",
    "corrupt": "corrupt prompts",
    "metric": "metrics",
    "at": "sites",
    "direction": "directions",
}
"""What an estimate and the exact effects have to have in common, by the argument's name."""


def agreement(approximate: Result, exact: Result, *, threshold: float = 0.05) -> Agreement:
    """How far estimated effects agree with exact ones, in size and in sign.

    Args:
        approximate: What `attribution_patching` or `integrated_gradients` gave.
        exact: What `activation_patching` gave over the same axes.
        threshold: From which share of the largest exact effect on an effect is large.

    Raises:
        InputError: they are of other cells, prompts, sites or metrics, or one is no patching experiment.
    """
    if approximate.axes != exact.axes:
        raise InputError(
            "The two results have not the same axes.",
            hint="Give both methods the same prompts, `at` and `over`.",
            lines=here(),
        )
    for name, what in _COMPARABLE.items():
        given = [
            _flat({"model": each.origin.model, **each.origin.arguments}.get(name)) for each in (approximate, exact)
        ]
        if given[0] != given[1] and not any(" at 0x" in str(each) for each in given):  # functions may be the same
            raise InputError(
                f"The two results are of different {what}: {given[0]} and {given[1]}.",
                hint="Give both methods the same.",
                lines=here(),
            )
    effects = approximate.effect(), exact.effect()
    one, other = (each.values.double().flatten() for each in effects)
    largest = other.abs().max()
    first, second = (each.sign() * (each.abs() > _NOTHING * largest) for each in (one, other))
    same = first == second
    large = other.abs() > threshold * largest
    return Agreement(
        pearson=float(torch.nn.functional.cosine_similarity(one - one.mean(), other - other.mean(), 0))
        if one.std() > 0 and other.std() > 0
        else torch.nan,
        sign=float(same.double().mean()),
        sign_of_large=float(same[large].double().mean()),
        cells=len(one),
        large=int(large.sum()),
        threshold=threshold,
        error=float((one - other).abs().max()),
        approximate=effects[0],
        exact=effects[1],
    )
