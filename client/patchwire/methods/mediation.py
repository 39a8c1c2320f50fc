"""Mediation: which components carry a change of the question to a change of the answer.

Stolfo, Belinkov and Sachan (2023), "A Mechanistic Interpretation of Arithmetic Reasoning in Language Models using
Causal Mediation Analysis": two questions of one form, such as "2 + 3 =" and "4 + 1 =", have the results r and r'. A
component is made to do in the run of the first what it does in that of the second, and the indirect effect is by how
much this lowers the probability of r and raises that of r'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchwire.errors import InputError, here
from patchwire.methods.averaging import PROMPT
from patchwire.methods.grids import At, Grid
from patchwire.methods.measured import LAYER, ROLE, TOKEN
from patchwire.methods.patching import LAYERS_AND_TOKENS, Pair
from patchwire.methods.prompts import token_of
from patchwire.methods.result import Origin, Result
from patchwire.methods.sweeping import sweep
from patchwire.model import Model, Module
from patchwire.tracing import Trace

EMBEDDINGS = "embed"
"""The place that is the embeddings, as they go into the first layer."""


@dataclass(frozen=True)
class _Runs:
    states: dict[int, Any]
    """The second question's, of each layer."""
    unchanged: Any
    """The probabilities of both results after the first question, `[2]`."""
    source: Any
    """The same after the second."""


def mediation(
    model: Model,
    question: Any,
    other: Any,
    result: str | int | None = None,
    other_result: str | int | None = None,
    *,
    at: At = "mlp",
) -> Result:
    """The indirect effect of each component at each token (Stolfo et al. 2023, section 3).

    `IE = ½ [(P(r) - P*(r)) / P*(r) + (P*(r') - P(r')) / P(r')]`, with P the first question's run and P* the same with
    one component's output, at one token, as in the second question's run. It is greater than -1; 0 if nothing changes.

    Args:
        model: Any model with the component.
        question: One prompt: a text, or token ids.
        other: Another of as many tokens.
        result: The first question's result r: how the text goes on, or a token id; what the model itself says if left
            out.
        other_result: The second question's result r'; it may be r.
        at: The component: "mlp", "mixer", "embed" for the embeddings, or what `activation_patching` takes.

    Returns:
        `[layers, tokens]` float32, of the embeddings `[1, tokens]`; the tokens that differ are marked. `numbers` has
        P(r) as "result" and P(r') as "other_result", and both after the second question as "result_after_other" and
        "other_result_after_other".

    Raises:
        InputError: the questions do not have the same number of tokens, or a result is not how one goes on.
        SiteError: the model does not have the component.

    Example:
        >>> pairs = [("2 + 3 =", "4 + 1 ="), ("1 + 6 =", "5 + 3 =")]
        >>> mlps = methods.stacked([methods.mediation(model, *each) for each in pairs]).mean("prompt")
    """
    pair = Pair.of(model, question, other, "noising")
    results = _results(model, pair, (result, other_result))
    embeddings = at == EMBEDDINGS
    place: At = _into if embeddings else at
    over: Any = {LAYER: [0], TOKEN: None} if embeddings else LAYERS_AND_TOKENS
    grid = Grid.of(model, pair.clean, place, over, marked=pair.different)

    def probabilities() -> Any:
        return model.logits[0, -1].float().softmax(-1)[list(results)]

    def before(trace: Trace) -> _Runs:
        with trace.invoke(pair.clean.rows):
            unchanged = probabilities().save()
        with trace.invoke(pair.corrupt.rows):
            return _Runs(grid.values(), unchanged, probabilities().save())

    def measure(trace: Trace, runs: _Runs, cell: tuple[int, ...]) -> Any:
        with trace.invoke(pair.clean.rows):
            grid.patch(cell, runs.states)
            return probabilities()

    patched, runs, stats = sweep(model, grid.cells, len(pair.clean), before, measure, what="components")
    unchanged, source = runs[0].unchanged.value, runs[0].source.value
    return Result(
        values=indirect_effect(unchanged, patched).reshape([len(each) for each in grid.axes]),
        axes=grid.axes,
        unit="indirect effect",
        origin=Origin.of(
            "mediation", model, prompt=pair.clean.given, other=pair.corrupt.given, results=list(results), at=at
        ),
        numbers={
            "result": float(unchanged[0]),
            "other_result": float(unchanged[1]),
            "result_after_other": float(source[0]),
            "other_result_after_other": float(source[1]),
        },
        signed=True,
        stats=stats,
    )


def indirect_effect(unchanged: Tensor, patched: Tensor) -> Tensor:
    """`½ [(P(r) - P*(r)) / P*(r) + (P*(r') - P(r')) / P(r')]`.

    Args:
        unchanged: P of r and r', `[2]`.
        patched: P*, `[…, 2]`.
    """
    one, other = patched[..., 0], patched[..., 1]
    return ((unchanged[0] - one) / one + (other - unchanged[1]) / unchanged[1]) / 2


def relative_importance(
    effects: Mapping[str, Result],
    component: str,
    *,
    layers: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
) -> float:
    """How much of all effects is that of some components: `Σ_M log(IE + 1) / Σ log(IE + 1)` (Stolfo et al. 2023).

    Args:
        effects: All indirect effects, by component: `{"mlp": …, "mixer": …}`; of several pairs, by `stacked` or
            `by_role`, their mean is taken.
        component: Which of them.
        layers: In which of its layers; all if left out. Negative ones are from the end.
        tokens: At which tokens, or roles; all if left out. Negative ones are from the end.

    Raises:
        InputError: there is no such component, layer or token, or the effects are of something else.

    Example:
        >>> effects = {at: methods.mediation(model, "2 + 3 =", "4 + 1 =", at=at) for at in ("mlp", "mixer")}
        >>> methods.relative_importance(effects, "mlp", tokens=[-1])
    """
    if component not in effects:
        raise InputError(f"There is no “{component}” among {', '.join(effects)}.", lines=here())
    logs: dict[str, Tensor] = {}
    for name, each in effects.items():
        mean = each.mean(PROMPT) if each.axes[0].name == PROMPT else each
        names = [axis.name for axis in mean.axes]
        if names not in ([LAYER, TOKEN], [LAYER, ROLE]) or each.origin.method != "mediation":
            raise InputError(f"“{name}” has no indirect effects by layer and token.", lines=here())
        of_nobody = mean.values.isnan().all(0) & (names[1] == ROLE)  # `by_role` gives roles that no prompt has
        logs[name] = torch.log1p(mean.values.double()).masked_fill(of_nobody, 0.0)
    part = logs[component]
    for dim, wanted in enumerate((layers, tokens)):
        if wanted is not None:
            length = part.shape[dim]
            if not all(-length <= index < length for index in wanted):
                raise InputError(f"{list(wanted)} are not all between 0 and {length - 1}.", lines=here())
            part = part.index_select(dim, torch.tensor([index % length for index in wanted], dtype=torch.long))
    return float(part.sum() / sum(each.sum() for each in logs.values()))


def _into(layer: Module) -> Any:
    return layer.input


def _results(model: Model, pair: Pair, given: tuple[str | int | None, str | int | None]) -> tuple[int, int]:
    """The token ids of both results."""
    prompts = (pair.clean, pair.corrupt)
    best: list[Any] = [None, None]
    if None in given:
        with model.trace() as trace:
            for index, prompt in enumerate(prompts):
                with trace.invoke(prompt.rows):
                    best[index] = model.logits[0, -1].argmax().save()
    one, other = (
        token_of(model, prompt, int(said) if answer is None else answer)
        for prompt, answer, said in zip(prompts, given, best, strict=True)
    )
    return one, other
