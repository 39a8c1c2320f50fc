"""Activation patching: write states of one run into another, and measure which of them matter.

Zhang and Nanda (2024), "Towards Best Practices of Activation Patching in Language Models: Metrics and Methods": two
prompts of as many tokens, of which the corrupt one has another answer; every effect is that of one patch on a metric of
the last token's logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from patchwire.errors import InputError, here
from patchwire.methods.grids import At, Cell, Grid, Over
from patchwire.methods.measured import LAYER, TOKEN
from patchwire.methods.metrics import LogitDifference, Metric, Probability, checked
from patchwire.methods.prompts import Prompt, answer_of, prompt_of, token_of
from patchwire.methods.result import Origin, Result
from patchwire.methods.sweeping import sweep
from patchwire.model import Model
from patchwire.tracing import Trace

Direction = Literal["denoising", "noising"]
"""What is patched: states of the clean run into the corrupt one, or of the corrupt run into the clean one."""
LAYERS_AND_TOKENS = (LAYER, TOKEN)


@dataclass(frozen=True)
class Pair:
    """The two runs of a patching experiment."""

    clean: Prompt
    corrupt: Prompt
    direction: Direction

    @classmethod
    def of(cls, model: Model, clean: Any, corrupt: Any, direction: Direction) -> Pair:
        """Two prompts.

        Raises:
            InputError: one is several, they have not as many tokens, or there is no such direction.
        """
        one, other = prompt_of(model, clean), prompt_of(model, corrupt)
        if len(one) != len(other):
            raise InputError(
                f"“{clean}” and “{corrupt}” do not have the same number of tokens.",
                hint="Take two prompts that differ in some tokens; `model.tokenizer.tokens(text)` shows them.",
                lines=here(),
            )
        if direction not in ("denoising", "noising"):
            raise InputError(f"There is no direction “{direction}”; there are denoising and noising.", lines=here())
        return cls(one, other, direction)

    @property
    def base(self) -> Prompt:
        """The prompt whose run is patched."""
        return self.corrupt if self.direction == "denoising" else self.clean

    @property
    def source(self) -> Prompt:
        """The prompt whose states are written."""
        return self.clean if self.direction == "denoising" else self.corrupt

    @property
    def different(self) -> tuple[int, ...]:
        """Where the prompts have different tokens."""
        return tuple(at for at, (one, other) in enumerate(zip(self.clean.ids, self.corrupt.ids, strict=True))
                     if one != other)  # fmt: skip


@dataclass(frozen=True)
class Runs:
    """What the two runs give, without a patch."""

    states: dict[int, Any]
    """The source run's, of each layer of the grid."""
    clean: Any
    """The clean run's last logits, `[1, vocabulary]`."""
    base: Any
    source: Any

    @classmethod
    def record(cls, model: Model, trace: Trace, pair: Pair, grid: Grid, metric: Metric) -> Runs:
        """Record both runs, each in an invoke of its own."""
        with trace.invoke(pair.clean.rows):
            clean = model.logits[:, -1]
            measured = [metric(clean, clean).mean().save()]
            states = grid.values() if pair.direction == "denoising" else {}
        with trace.invoke(pair.corrupt.rows):
            measured.append(metric(model.logits[:, -1], clean).mean().save())
            states = states or grid.values()
        source, base = measured if pair.direction == "denoising" else reversed(measured)
        return cls(states, clean, base, source)


def activation_patching(
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
    window: int = 1,
) -> Result:
    """Write states of one run into the other, a cell of a grid at a time (Zhang and Nanda 2024, sections 2 and 3).

    `result.effect()` is by how much each patch moves the metric, and `result.normalised()` the same as a share of what
    lies between the two runs: 0 if the patch does nothing, 1 if it does all. All cells are rows of a few passes: what
    a cell has in common with the run that is patched, every layer before the first patch, is computed once.

    Args:
        model: Any model with the site: attention or SSM alike.
        clean: One prompt: a text, or token ids.
        corrupt: Another of as many tokens.
        metric: What is measured of the last token's logits, instead of the answer's probability. KL is from the clean
            run, in either direction.
        answer: Whose probability is measured: how the clean text goes on, or a token id; what the model itself says
            after the clean prompt if left out.
        foil: Another answer, in the same way: then the metric is the difference of their logits, which Zhang and Nanda
            recommend.
        at: What is patched: one of `patchwire.methods.PLACES`, the name of a site in a layer (docs/sites.md): "attn.z",
            "attn.pattern", "mlp.neurons", "ssm.scan"; or a function of a layer that gives a value.
        over: The axes: "layer", and those dimensions that the site has: "token" (the query, of a pattern), "key",
            "head", "neuron", "channel". A mapping has the indices of each: `{"layer": [3], "neuron": Blocks(64)}`.
            Along what is not named, all is patched: without "layer" all layers.
        direction: "denoising": states of the clean run into the corrupt run, what is sufficient; "noising": states of
            the corrupt run into the clean run, what is necessary.
        window: In how many layers around each: `[l - window // 2, l + (window + 1) // 2)`, clipped.

    Returns:
        A dimension for each axis, in their order, float32; `numbers` has "base", the run that is patched, and "source",
        the other.

    Raises:
        InputError: the prompts do not have the same number of tokens, the answer is no answer, or the site has no such
            axis or index.
        SiteError: the model has no such site, or it cannot be written.

    Example:
        >>> clean, corrupt = "The Eiffel Tower is in the city of", "The Lisbon Tower is in the city of"
        >>> found = activation_patching(model, clean, corrupt, answer=" Paris", foil=" Lisbon")
        >>> heads = activation_patching(model, clean, corrupt, answer=" Paris", at="attn.z", over=("layer", "head"))
        >>> heads.normalised().plot().savefig("heads.png")
    """
    pair = Pair.of(model, clean, corrupt, direction)
    metric = checked(metric) or metric_of(model, pair.clean, answer, foil)
    grid = Grid.of(model, pair.clean, at, over, marked=pair.different).windows(window)

    def measure(trace: Trace, runs: Runs, cell: Cell) -> Any:
        with trace.invoke(pair.base.rows):
            grid.patch(cell, runs.states)
            return metric(model.logits[:, -1], runs.clean).mean()

    def before(trace: Trace) -> Runs:
        return Runs.record(model, trace, pair, grid, metric)

    values, runs, stats = sweep(model, grid.cells, len(pair.clean), before, measure, writes=grid.writes, what="patches")
    return Result(
        values=values.reshape([len(each) for each in grid.axes]),
        axes=grid.axes,
        unit=metric.unit,
        origin=origin_of("activation_patching", model, pair, metric, at, grid, window=window),
        numbers={"base": float(runs[0].base), "source": float(runs[0].source)},
        signed=metric.signed,
        stats=stats,
    )


def metric_of(model: Model, clean: Prompt, answer: str | int | None, foil: str | int | None) -> Metric:
    """The probability of an answer, or the difference of its logit from that of another.

    Raises:
        InputError: one of them is no answer.
    """
    right = answer_of(model, clean, answer)
    return Probability(right) if foil is None else LogitDifference(right, token_of(model, clean, foil))


def origin_of(method: str, model: Model, pair: Pair, metric: Metric, at: At, grid: Grid, **more: Any) -> Origin:
    """Where a result of patching is from."""
    return Origin.of(
        method,
        model,
        prompt=pair.clean.given,
        corrupt=pair.corrupt.given,
        metric=repr(metric),
        at=at,
        over={each.axis.name: each.steps for each in grid.along},
        direction=pair.direction,
        **more,
    )
