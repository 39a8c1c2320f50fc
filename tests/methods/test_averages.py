"""Averages: many facts' results by the roles of their tokens, against the means taken one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

import patchwire
import tiny
from patchwire import methods

Trace = Callable[[list[int], range], methods.Result]

FACTS = [(tiny.prompt(9, seed=1), range(1, 5)), (tiny.prompt(7, seed=2), range(2, 3)), (tiny.prompt(5), range(1, 4))]
"""Subjects of four tokens, of one, and of three with one token after them."""
POSITIONS = {
    "first subject": ([1], [2], [1]),
    "middle subject": ([2, 3], [], [2]),
    "last subject": ([4], [2], [3]),
    "first subsequent": ([5], [3], [4]),
    "further": ([6, 7], [4, 5], []),
    "last": ([8], [6], [4]),
}


@pytest.fixture
def trace(served: Mapping[str, patchwire.Model]) -> Trace:
    noise = methods.Noise(std=0.7, samples=2)
    return lambda ids, subject: methods.causal_trace(served["gpt2"], ids, subject, noise, answer=7)


def test_roles_are_the_means_over_the_tokens_that_have_them(trace: Trace, tmp_path: Path) -> None:
    traces = [trace(ids, subject) for ids, subject in FACTS]
    found = methods.by_role(traces)

    expected = []
    for positions in POSITIONS.values():
        columns = [each.values[:, at] for each, its in zip(traces, positions, strict=True) for at in its]
        expected.append(torch.stack(columns).mean(0))
    torch.testing.assert_close(found.values, torch.stack(expected))
    assert [axis.name for axis in found.axes] == ["role", "layer"]
    assert found.axes[0].labels == tuple(POSITIONS)
    assert found.numbers["base"] == pytest.approx(sum(each.numbers["base"] for each in traces) / 3)
    assert methods.load(found.save(tmp_path / "roles")).origin.arguments["method"] == "causal_trace"

    effects = methods.by_role([each.effect() for each in traces])
    shifts = torch.tensor([each.numbers["base"] for each in traces])
    torch.testing.assert_close(effects.values[0], found.values[0] - shifts.mean())


def test_a_role_that_no_token_has_is_nan(trace: Trace) -> None:
    found = methods.by_role([trace(*FACTS[1])])
    assert found.values.isnan().all(1).tolist() == [False, True, False, False, False, False]
    torch.testing.assert_close(found.values[0], found.values[2])


def test_results_of_a_mamba_and_of_mediation_have_roles_too(served: Mapping[str, patchwire.Model]) -> None:
    others = [[7 if at in subject else each for at, each in enumerate(ids)] for ids, subject in FACTS]
    effects = [
        methods.mediation(served["mamba"], ids, other, place="mixer", subject=subject)
        for (ids, subject), other in zip(FACTS, others, strict=True)
    ]
    found = methods.by_role(effects)
    torch.testing.assert_close(found.values[5], torch.stack([each.values[:, -1] for each in effects]).mean(0))
    assert abs(methods.relative_importance(found, role=-1)) > 0


def test_results_with_the_same_axes_are_averaged_cell_by_cell(served: Mapping[str, patchwire.Model]) -> None:
    flows = [methods.information_flow(served["llama"], ids, subject, sources=["last"]) for ids, subject in FACTS]
    found = methods.average(flows)
    torch.testing.assert_close(found.values, torch.stack([each.values for each in flows]).mean(0))
    assert found.axes == flows[0].axes
    assert found.stats.rows == sum(each.stats.rows for each in flows)

    pairs = [methods.mediation(served["llama"], tiny.prompt(5, seed=each), tiny.prompt(5)) for each in (1, 2)]
    assert methods.average(pairs).axes[1].labels == ("0", "1", "2", "3", "4")


def test_what_has_no_mean_is_refused(served: Mapping[str, patchwire.Model], trace: Trace) -> None:
    one = trace(*FACTS[0])
    for empty in (methods.average, methods.by_role):
        with pytest.raises(patchwire.InputError, match="no results"):
            empty([])
    with pytest.raises(patchwire.InputError, match="not of one kind"):
        methods.average([one, trace(*FACTS[1])])
    with pytest.raises(patchwire.InputError, match="not of one kind"):
        methods.by_role([one, one.effect()])
    with pytest.raises(patchwire.InputError, match="not of one kind"):
        methods.by_role([one, methods.causal_trace(served["llama"], *FACTS[0], methods.Noise(std=0.7, samples=2))])
    with pytest.raises(patchwire.InputError, match="no axis “token”"):
        methods.by_role([one.at(token=0)])
    with pytest.raises(patchwire.InputError, match="No subject is marked"):
        methods.by_role([methods.mediation(served["gpt2"], [1, 2, 3], [1, 2, 3])])
