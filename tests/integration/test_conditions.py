"""Conditions: `patchwire.cond` chooses on the worker, and nothing of the other branch shows."""

from __future__ import annotations

import pytest
import torch

import patchwire
from conformance.hooks import assert_same, changed_logits
from integration.refusals import refused
from patchwire import BranchError, GraphError, ShapeError, SiteError

IDS = [1, 2, 3, 4, 5]


@pytest.fixture
def model(served) -> patchwire.Model:
    return served["gpt2"]


@pytest.fixture(scope="module")
def norms(served) -> list[float]:
    """The norm of the last state of two prompts, the larger first, as (prompt, norm)."""
    found = []
    for ids in (IDS, [7, 8, 9]):
        with served["gpt2"].trace(ids):
            norm = served["gpt2"].layers[1].output[0, -1].norm().save()
        found.append((ids, norm.item()))
    return sorted(found, key=lambda each: -each[1])


class TestTheChoice:
    @pytest.mark.parametrize("holds", [True, False])
    def test_is_that_of_the_predicate(self, model, holds):
        with model.trace(IDS):
            hidden = model.layers[1].output
            predicate = (hidden.norm() > 0) == holds
            chosen = patchwire.cond(predicate, lambda h: h * 2, lambda h: h - 1, hidden).save()
            plain = hidden.save()

        assert torch.equal(chosen.value, plain.value * 2 if holds else plain.value - 1)

    def test_is_made_for_each_prompt_by_its_own_numbers(self, model, norms):
        (large, above), (small, below) = norms
        threshold = (above + below) / 2

        with model.trace() as trace:
            chosen = []
            for ids in (large, small):
                with trace.invoke(ids):
                    norm = model.layers[1].output[0, -1].norm()
                    chosen.append(patchwire.cond(norm > threshold, lambda n: n * 0 + 1, lambda n: n * 0 - 1, norm))
            patchwire.save(chosen)

        assert [each.item() for each in chosen] == [1, -1]

    @pytest.mark.parametrize("predicate", [lambda h: h.new_zeros(1, 1), lambda h: h.new_zeros(()) != 0])
    def test_takes_one_element_of_any_shape_and_dtype(self, model, predicate):
        with model.trace(IDS):
            hidden = model.layers[1].output
            chosen = patchwire.cond(predicate(hidden), lambda: hidden + 1, lambda: hidden + 2).save()
            plain = hidden.save()

        assert chosen.shape == plain.shape
        assert torch.equal(chosen.value, plain.value + 2)

    def test_counts_any_number_but_zero_as_true_as_python_does(self, model):
        with model.trace(IDS):
            hidden = model.layers[1].output
            chosen = [
                patchwire.cond(
                    hidden.new_full((), each), lambda h: h[0, 0, 0] * 0 + 1, lambda h: h[0, 0, 0] * 0, hidden
                )
                for each in (-0.5, 0.0, float("nan"))
            ]
            patchwire.save(chosen)

        assert [each.item() for each in chosen] == [1, 0, 1]

    def test_changes_what_the_model_computes_when_it_is_written(self, model, references):
        with model.trace(IDS):
            hidden = model.layers[1].output
            hidden[:, -1] = patchwire.cond(hidden.norm() > 0, lambda h: h / 2, lambda h: h, hidden[:, -1])
            logits = model.logits.save()

        def halve(tensor):
            tensor[:, -1] /= 2
            return tensor

        assert_same(logits.value, changed_logits(references["gpt2"], IDS, {("transformer.h.1", "output", ()): halve}))

    def test_is_python_s_where_the_predicate_is_known(self, model):
        called = []
        with model.trace(IDS):
            hidden = model.layers[1].output
            chosen = patchwire.cond(
                hidden.shape[1] > 3, lambda h: called.append(1) or h + 1, lambda h: called.append(2), hidden
            ).save()
            plain = hidden.save()

        assert called == [1]
        assert torch.equal(chosen.value, plain.value + 1)
        assert patchwire.cond(plain.norm() > 0, lambda: "yes", lambda: "no") == "yes"


class TestTheOtherBranch:
    @pytest.mark.parametrize("holds", [True, False])
    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    def test_leaves_none_of_its_numbers(self, model, holds, number):
        with model.trace(IDS):
            hidden = model.layers[1].output
            branches = (lambda h: h + 1, lambda h: h * 0 + number)
            chosen = patchwire.cond((hidden.norm() > 0) == holds, *(branches if holds else branches[::-1]), hidden)
            model.layers[1].output = chosen
            logits = model.logits.save()
            chosen.save()

        assert chosen.value.isfinite().all()
        assert logits.value.isfinite().all()

    @pytest.mark.parametrize(
        ("what", "does"),
        [
            ("write", lambda model, hidden: setattr(model.layers[2], "output", hidden)),
            ("edit", lambda model, hidden: hidden.zero_()),
            ("edit", lambda model, hidden: hidden.__setitem__((slice(None), -1), 0)),
            ("edit", lambda model, hidden: model.layers[2].output.mul_(0)),
            ("write", lambda model, hidden: model.transformer.h[2].attn.output.__setitem__(0, hidden)),
            ("save", lambda model, hidden: (hidden * 2).save()),
        ],
        ids=["site", "edit", "part", "site edit", "tuple item", "save"],
    )
    @pytest.mark.parametrize("in_true", [True, False])
    def test_cannot_do_what_would_happen_anyway(self, model, what, does, in_true):
        def branch(hidden):
            does(model, hidden)
            return hidden

        branches = (branch, lambda h: h) if in_true else (lambda h: h, branch)
        with (
            refused(GraphError, f"cannot {what}.*both branches", hint="Return the value", line=False) as refusal,
            model.trace(IDS),
        ):
            patchwire.cond(model.layers[1].output.norm() > 0, *branches, model.layers[1].output)
        assert refusal.error.lines[0].file == __file__

    def test_cannot_edit_what_was_made_before_it(self, model):
        with refused(GraphError, "cannot edit a value that it has not made itself"), model.trace(IDS):
            copy = model.layers[1].output.clone()

            def branch(h):
                copy[:] = 0  # this line
                return h

            patchwire.cond(copy.norm() > 0, branch, lambda h: h, copy)

    def test_is_a_branch_no_more_after_a_refusal(self, model):
        with model.trace(IDS):
            hidden = model.layers[1].output
            with pytest.raises(GraphError):
                patchwire.cond(hidden.norm() > 0, lambda h: h.zero_(), lambda h: h, hidden)
            hidden[:] = 1
            changed = hidden.save()

        assert torch.equal(changed.value, torch.ones_like(changed.value))


class TestABranch:
    def test_may_edit_what_it_has_made(self, model):
        def cut(h):
            own = h.clone()
            own[:, 0] = 0
            own += 1
            return own

        with model.trace(IDS):
            hidden = model.layers[1].output
            chosen = patchwire.cond(hidden.norm() > 0, cut, lambda h: h, hidden).save()
            plain = hidden.save()

        assert torch.equal(chosen.value, cut(plain.value))

    def test_may_read_sites_and_apply_modules(self, model):
        with model.trace(IDS):
            hidden = model.layers[1].output
            lens = patchwire.cond(
                hidden.norm() < 0, lambda: model.logits, lambda: model.lm_head(model.norm(hidden))
            ).save()
            expected = model.lm_head(model.norm(hidden)).save()

        assert torch.equal(lens.value, expected.value)

    def test_may_have_conditions_in_it(self, model):
        def sign(h):
            return patchwire.cond(h > 0, lambda: h * 0 + 1, lambda: patchwire.cond(h < 0, lambda: h * 0 - 1, lambda: h))

        with model.trace(IDS):
            zero = model.layers[1].output.new_zeros(())
            signs = [sign(zero + each) for each in (3.0, -3.0, 0.0)]
            patchwire.save(signs)

        assert [each.item() for each in signs] == [1, -1, 0]

    def test_may_return_containers_of_values_and_tensors(self, model):
        with model.trace(IDS):
            hidden = model.layers[1].output
            chosen = patchwire.cond(
                hidden.norm() > 0,
                lambda h: {"a": (h, torch.tensor(1.0)), "b": [h.argmax(-1)]},
                lambda h: {"a": (h + 1, h.sum()), "b": [h.argmin(-1)]},
                hidden,
            )
            patchwire.save(chosen)
            plain = hidden.save()

        assert torch.equal(chosen["a"][0].value, plain.value)
        assert chosen["a"][1].item() == 1
        assert torch.equal(chosen["b"][0].value, plain.value.argmax(-1))


class TestRefusals:
    @pytest.mark.parametrize(
        ("one", "other", "says"),
        [
            (lambda h: h, lambda h: h[0], r"\[1, 5, 24\] float32.*\[5, 24\] float32"),
            (lambda h: h, lambda h: h.half(), "float32.*float16"),
            (lambda h: (h, h), lambda h: (h,), "2 items.*1 items"),
            (lambda h: h, lambda h: [h], "a Value.*a list"),
            (lambda h: {"a": h}, lambda h: {"b": h}, "'a'.*'b'"),
            (lambda h: {"a": h}, lambda h: {"a": h[0]}, r"Item \['a'\]"),
        ],
        ids=["shapes", "dtypes", "lengths", "structures", "keys", "inside"],
    )
    def test_of_branches_that_return_different_things(self, model, one, other, says):
        with refused(ShapeError, says, hint="same structure"), model.trace(IDS):
            hidden = model.layers[1].output
            patchwire.cond(hidden.norm() > 0, one, other, hidden)  # this line

    @pytest.mark.parametrize("result", [1.0, None, "text"])
    def test_of_branches_that_return_no_values(self, model, result):
        with refused(GraphError, "not a value", hint="torch.tensor"), model.trace(IDS):
            patchwire.cond(model.layers[1].output.norm() > 0, lambda: result, lambda: result)  # this line

    def test_of_a_predicate_of_several_elements(self, model):
        with refused(ShapeError, r"one element; this one is \[1, 5, 24\] bool", hint=r"\.any\(\)"), model.trace(IDS):
            patchwire.cond(model.layers[1].output > 0, lambda: 1, lambda: 0)  # this line

    def test_of_a_tuple_as_predicate(self, model):
        with refused(SiteError, "not one tensor"), model.trace(IDS):
            patchwire.cond(model.transformer.h[0].attn.output, lambda: 1, lambda: 0)  # this line

    def test_of_results_of_unknown_shape(self, model):
        with refused(BranchError, "depends on data"), model.trace(IDS):
            hidden = model.layers[1].output
            patchwire.cond(hidden.norm() > 0, lambda h: h[h > 0], lambda h: h[h < 0], hidden)  # this line

    @pytest.mark.parametrize("test", [lambda h: h > 0, lambda h: h.norm() > 1, lambda h: not h.sum()])
    def test_of_a_branch_of_python_s_name_cond(self, model, test):
        with (
            refused(BranchError, "only when the block has ended", hint=r"patchwire\.cond", line=False) as refusal,
            model.trace(IDS),
        ):
            bool(test(model.layers[1].output))
        assert refusal.error.lines[0].file == __file__
