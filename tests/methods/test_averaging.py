"""Averages over prompts, and by the role of tokens."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

import patchwire
from patchwire import methods
from patchwire.errors import InputError
from patchwire.methods.measured import role_of
from patchwire.methods.result import Axis, Origin, Result

ORIGIN = Origin("causal_trace", "tiny", "", {"prompt": "text"})


def result(values: torch.Tensor, marked: tuple[int, ...], unit: str = "probability") -> Result:
    layers, tokens = values.shape
    axes = Axis("layer", tuple(map(str, range(layers)))), Axis("token", tuple("abcdefghij"[:tokens]), marked)
    return Result(values, axes, unit, ORIGIN, {"base": float(tokens)})


def test_roles_are_those_of_the_paper() -> None:
    roles = [role_of(token, range(1, 4), 8) for token in range(8)]
    first, middle, last, following, further, end = methods.ROLES
    assert roles == [None, first, middle, last, following, further, further, end]
    assert role_of(1, [1], 4) == last, "the only token of a subject is its last"
    assert role_of(2, [1, 2], 3) == end
    assert role_of(3, [1, 2], 4) == end


def test_tokens_of_a_role_are_averaged_before_facts() -> None:
    one = result(torch.arange(8.0).repeat(2, 1), (1, 2, 3))
    other = result(10 * torch.arange(5.0).repeat(2, 1), (2,))
    found = methods.by_role([one, other])
    assert [axis.name for axis in found.axes] == ["layer", "role"]
    # first and middle: only the first fact; last subject 3 and 20; following 4 and 30; further 5.5; the last 7 and 40.
    expected = torch.tensor([1.0, 2.0, 11.5, 17.0, 5.5, 23.5])
    torch.testing.assert_close(found.values, expected.repeat(2, 1))
    assert found.numbers == {"base": 6.5}
    assert found.origin.arguments["prompts"] == ["text", "text"]
    assert torch.isnan(methods.by_role([other]).values[:, 0]).all(), "no fact has the role"


def test_prompts_of_a_template_are_put_on_top_of_each_other() -> None:
    one, other = result(torch.zeros(2, 3), (1,)), result(torch.ones(2, 3), (2,))
    renamed = Axis("token", ("a", "x", "c"), (1,))
    both = methods.stacked([one, Result(other.values, (other.axes[0], renamed), other.unit, ORIGIN)])
    assert [axis.name for axis in both.axes] == ["prompt", "layer", "token"]
    assert both.axes[2].labels == ("a", "1", "c")
    assert both.axes[2].marked == (1,)
    torch.testing.assert_close(both.mean("prompt").values, torch.full((2, 3), 0.5))


def test_tokens_of_a_template_are_named_by_what_they_are(served: Mapping[str, patchwire.Model]) -> None:
    facts = [([3, 14, 15, 16, 9, 10, 26], 44), ([3, 24, 25, 26, 8, 10, 27], 45), ([3, 4, 5, 6, 8, 10, 28], 43)]
    traces = [
        methods.causal_trace(
            served["gpt2"], prompt, range(1, 4), methods.Replacement([prompt[0], other, *prompt[2:]]), answer=7
        )
        for prompt, other in facts
    ]

    found = methods.stacked(traces)
    roles = ("#3", *methods.ROLES[:4], "#10", methods.ROLES[5])
    assert found.axes[2] == Axis("token", roles, (1, 2, 3))
    assert found.axes[2].shown[2:4] == ["middle subject tokens*", "last subject token*"]
    further = [(prompt[:1] + prompt[1:2] * 2 + prompt[3:], other) for prompt, other in facts]
    both = methods.stacked(
        [
            methods.causal_trace(served["gpt2"], prompt, range(1), methods.Replacement([other, *prompt[1:]]), answer=7)
            for prompt, other in further
        ]
    )
    assert both.axes[2].labels[2:4] == ("further tokens 2", "further tokens 3")
    assert both.axes[2].shown[2] == "further tokens 2"

    named = methods.stacked(traces, roles=tuple("abcdefg"))
    assert named.axes[2] == Axis("role", tuple("abcdefg"), (1, 2, 3))
    with pytest.raises(InputError, match="There are 7 tokens, and 2 roles"):
        methods.stacked(traces, roles=("subject", "rest"))


def test_effects_of_a_template_with_named_tokens_have_a_relative_importance(
    served: Mapping[str, patchwire.Model],
) -> None:
    pairs = [([3, 14, 9, 26], [3, 33, 9, 26]), ([5, 14, 9, 26], [5, 20, 9, 26])]
    effects = {
        at: methods.stacked(
            [methods.mediation(served["gpt2"], *pair, at=at) for pair in pairs],
            roles=("first operand", "second operand", "of", "equals"),
        )
        for at in ("mlp", "mixer")
    }

    plain = {at: methods.stacked([methods.mediation(served["gpt2"], *pair, at=at) for pair in pairs]) for at in effects}
    assert methods.relative_importance(effects, "mlp") == methods.relative_importance(plain, "mlp")


def test_what_does_not_belong_together_is_refused() -> None:
    one = result(torch.zeros(2, 3), (1,))
    with pytest.raises(InputError, match="no results"):
        methods.by_role([])
    with pytest.raises(InputError, match="different things"):
        methods.stacked([one, result(torch.zeros(2, 3), (1,), "rank")])
    with pytest.raises(InputError, match="same shape") as caught:
        methods.stacked([one, result(torch.zeros(2, 4), (1,))])
    assert "by_role" in str(caught.value)
    with pytest.raises(InputError, match="no subject"):
        methods.by_role([result(torch.zeros(2, 3), ())])


def test_a_trace_of_several_facts_is_one_figure(served: Mapping[str, patchwire.Model]) -> None:
    traces = [
        methods.causal_trace(served["mamba"], prompt, subject, methods.Replacement(other), answer=7).effect()
        for prompt, other, subject in [
            ([3, 14, 15, 9, 26], [3, 33, 44, 9, 26], range(1, 3)),
            ([3, 14, 9, 26], [3, 33, 9, 26], range(1, 2)),
        ]
    ]
    found = methods.by_role(traces)
    assert found.values.shape == (served["mamba"].num_layers, 6)
    last = (traces[0].values[:, 2] + traces[1].values[:, 1]) / 2
    torch.testing.assert_close(found.values[:, 2], last)
    assert str(found.table().columns[1].header) == "first\nsubject\ntoken"
    drawn = found.plot().axes[0]
    assert [label.get_text() for label in drawn.get_yticklabels()] == list(methods.ROLES)
    assert drawn.get_xlabel() == "layer"
