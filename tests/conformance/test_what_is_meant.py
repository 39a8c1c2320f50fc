"""What ordinary Python says in a block is what is run: nothing is lost, and nothing is done to something else.

Each of these programs once ran without an error and gave other numbers than its reader expects, or could have. What
cannot be meant is refused at its line.
"""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pytest
import torch

import patchwire
import tiny
from conformance.hooks import Place, assert_same, changed_logits, forward, record
from integration.refusals import refused
from patchwire import nnsight
from patchwire.errors import GraphError, InputError, OperationError
from serving import Server

IDS, OTHERS, FEW = tiny.prompt(9), tiny.prompt(9, seed=1), tiny.prompt(5)
MIDDLE: Place = ("transformer.h.1", "output", ())
DIRECTION = torch.linspace(-1, 1, tiny.WIDTH)


@pytest.fixture
def model(served: Any) -> patchwire.Model:
    """A model whose embedding and head are one weight."""
    found: patchwire.Model = served["gpt2"]
    return found


@pytest.fixture
def reference(references: Any) -> Any:
    """The same model here."""
    return references["gpt2"]


@pytest.fixture
def language_model(server: Server) -> nnsight.LanguageModel:
    """The same model, as nnsight has it."""
    return nnsight.LanguageModel("gpt2", server=server.address, progress=False)


def emptied(value: torch.Tensor, place: int) -> torch.Tensor:
    value[:, place] = 0
    return value


class TestAValueThatBecomesASites:
    """Edits of a site are edits of that site, and not of where its value came from."""

    def test_leaves_the_run_alone_that_it_was_patched_from(self, model: Any, reference: Any) -> None:
        clean = record(reference, IDS)[MIDDLE]

        with model.trace() as trace:
            with trace.invoke(IDS):
                hidden = model.layers[1].output
                first = model.logits.save()
            with trace.invoke(OTHERS):
                model.layers[1].output = hidden
                model.layers[1].output[:, -1] = 0
                second = model.logits.save()

        assert_same(first.value, forward(reference, IDS).logits)
        expected = changed_logits(reference, OTHERS, {MIDDLE: lambda _: emptied(clean.clone(), -1)})
        assert_same(second.value, expected)

    def test_leaves_an_earlier_layer_alone(self, model: Any, reference: Any) -> None:
        with model.trace(IDS):
            model.layers[2].output = model.layers[0].output
            model.layers[2].output += 1
            between = model.layers[1].output.save()
            after = model.layers[2].output.save()

        seen = record(reference, IDS)
        assert_same(between.value, seen[MIDDLE])
        assert_same(after.value, seen["transformer.h.0", "output", ()] + 1)

    @pytest.mark.parametrize("computed", [False, True], ids=["read", "computed"])
    def test_is_what_it_was_in_the_next_trace(self, model: Any, reference: Any, computed: bool) -> None:
        found = []
        with model.session():
            with model.trace(IDS):
                clean = model.layers[1].output
            clean = clean * 1 if computed else clean
            for place in range(3):
                with model.trace(OTHERS):
                    model.layers[1].output = clean
                    model.layers[1].output[:, place] = 0
                    found.append(model.logits.save())

        for place, logits in enumerate(found):
            changed = emptied(record(reference, IDS)[MIDDLE], place)
            assert_same(logits.value, changed_logits(reference, OTHERS, {MIDDLE: lambda _, it=changed: it}))

    def test_stays_what_is_kept(self, model: Any, reference: Any) -> None:
        with model.trace(IDS):
            kept = model.layers[1].output.keep()
        with model.session():
            for place in range(2):
                with model.trace(OTHERS):
                    model.layers[1].output = kept
                    model.layers[1].output[:, place] = 0
                    logits = model.logits.save()

        changed = emptied(record(reference, IDS)[MIDDLE], 1)
        assert_same(logits.value, changed_logits(reference, OTHERS, {MIDDLE: lambda _: changed}))

    def test_is_said_to_be_kept_with_its_later_edits(self, model: Any) -> None:
        with pytest.warns(patchwire.PatchwireWarning, match="A kept value was edited"), model.trace(IDS):  # noqa: PT031
            hidden = model.layers[1].output
            kept = hidden.keep()
            hidden[:] = 0
        with model.trace(IDS):
            found = (kept * 1).save()

        assert not found.value.any()

    def test_stays_what_is_carried(self, model: Any) -> None:
        with model.session() as session:
            with session.repeat(3) as loop:
                value = loop.carry(torch.ones(1, 9, tiny.WIDTH))
                with model.trace(IDS):
                    model.layers[1].output = value
                    model.layers[1].output[:, -1] = 5
                    site = model.layers[1].output[0, -2:, 0].save()
                value += 1
            final = loop.result(value).save()

        assert site.tolist() == [[1, 5], [2, 5], [3, 5]]
        assert final.value.eq(4).all()

    def test_may_be_edited_in_a_loop_that_it_comes_to_from_outside(self, model: Any, reference: Any) -> None:
        with model.session() as session:
            with model.trace(IDS):
                clean = model.layers[1].output
            with session.repeat(2) as loop:
                count = loop.carry(torch.tensor(0))
                with model.trace(OTHERS):
                    model.layers[1].output = clean
                    model.layers[1].output[:, 2] = 0
                    logits = model.logits.save()
                count += 1

        changed = emptied(record(reference, IDS)[MIDDLE], 2)
        for each in logits.value:
            assert_same(each, changed_logits(reference, OTHERS, {MIDDLE: lambda _: changed}))

    def test_may_be_what_was_there_before(self, model: Any, reference: Any) -> None:
        with model.trace(IDS):
            hidden = model.layers[1].output
            model.layers[1].output = hidden * 2
            model.layers[1].output = hidden
            hidden[:, -1] = 0
            logits = model.logits.save()

        assert_same(logits.value, changed_logits(reference, IDS, {MIDDLE: lambda h: emptied(h, -1)}))

    def test_cannot_be_edited_as_if_the_site_would_follow(self, model: Any) -> None:
        with refused(GraphError, "has become this value", hint="before it is assigned"), model.trace(IDS):
            hidden = model.layers[0].output
            model.layers[2].output = hidden
            hidden[:, -1] = 0  # this line


class TestAnAttributeThatIsSet:
    def test_of_a_structure_is_a_write(self, model: Any) -> None:
        with model.trace(IDS):
            model.output.logits = model.output.logits * 0
            logits = model.output.logits.save()

        assert not logits.value.any()

    @pytest.mark.parametrize("how", ["attribute", "item", "update"])
    def test_of_an_output_in_nnsights_way_is_a_write(self, language_model: Any, how: str) -> None:
        with language_model.trace([IDS]):
            output = language_model.output
            new = output.logits * 0
            if how == "attribute":
                output.logits = new
            elif how == "item":
                output["logits"] = new
            else:
                output.update(logits=new)
            logits = language_model.output.logits.save()

        assert not logits.any()

    def test_of_a_value_is_refused(self, model: Any, language_model: Any) -> None:
        with refused(GraphError, "nothing would come of it", hint="in place"), model.trace(IDS):
            hidden = model.layers[1].output
            hidden.data = hidden * 2  # this line
        with refused(OperationError, "`.data`", hint="Edit the value itself"), model.trace(IDS):
            model.layers[1].output.data[:] = 0  # this line
        with refused(GraphError, "nothing would come of it"), language_model.trace([IDS]):
            language_model.lm_head.output.data = torch.zeros(1)  # this line

    def test_of_a_saved_value_is_its_tensors(self, model: Any) -> None:
        with model.trace(IDS):
            hidden = model.layers[1].output
            hidden.requires_grad = True  # needs no asking
            hidden.save()
        hidden.requires_grad = True
        hidden.value.sum().backward()

        assert hidden.grad.eq(1).all()

    def test_of_a_structure_after_the_block_is_refused(self, model: Any) -> None:
        with model.trace(IDS):
            inputs = model.layers[1].inputs
            inputs.save()
        with refused(GraphError, "the block has ended"):
            inputs[0][0] = torch.zeros(1)  # this line


class TestGradients:
    def test_that_are_asked_for_twice_are_two_tensors(self, model: Any) -> None:
        with model.trace(IDS):
            hidden, loss = model.layers[0].output, model.logits[0, -1, 3]
            first = patchwire.grad(loss, hidden)
            before = first.clone().save()
            first *= 2
            second = patchwire.grad(loss, hidden).save()

        assert before.value.any()
        assert_same(second.value, before.value)

    def test_of_backward_are_one(self, model: Any) -> None:
        with model.trace(IDS):
            hidden = model.layers[0].output
            model.logits[0, -1, 3].backward()
            hidden.grad[:] = 7
            again = hidden.grad.save()

        assert again.value.eq(7).all()

    def test_may_be_with_respect_to_what_is_kept(self, model: Any) -> None:
        with model.trace(IDS):
            hidden = model.layers[1].output
            expected = patchwire.grad(model.logits[0, -1, 3], hidden).save()
            kept = hidden.keep()
        with model.trace(IDS):
            model.layers[1].output = kept
            found = patchwire.grad(model.logits[0, -1, 3], kept).save()

        assert_same(found.value, expected.value)


class TestWhatIsCarried:
    def test_may_not_be_edited_after_its_step(self, model: Any) -> None:
        lost = refused(GraphError, "the edit would be lost", hint="into one value")
        with lost, model.session() as session, session.repeat(2) as loop:
            vector = loop.carry(DIRECTION)
            with model.trace(IDS):
                model.layers[1].output[:, -1] += vector
                loss = model.logits[0, -1, 3]
            loop.step(patchwire.optim.SGD(lr=0.1), loss, [vector])
            vector /= vector.norm()  # this line

    def test_may_be_one_number_that_adam_optimises(self, model: Any, reference: Any) -> None:
        with model.session() as session:
            with session.repeat(4) as loop:
                scale = loop.carry(1.0)
                with model.trace(IDS):
                    model.layers[1].output[:, -1] *= scale
                    loss = model.logits[0, -1, 3]
                loop.step(patchwire.optim.Adam(lr=0.1), loss, [scale])
            final = loop.result(scale).save()

        expected = torch.tensor(1.0, requires_grad=True)
        optimiser = torch.optim.Adam([expected], lr=0.1)

        def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            return torch.cat([output[:, :-1], output[:, -1:] * expected], 1)

        handle = reference.transformer.h[1].register_forward_hook(hook)
        for _ in range(4):
            optimiser.zero_grad()
            reference(torch.tensor([IDS]), use_cache=False).logits[0, -1, 3].backward()
            optimiser.step()
        handle.remove()
        torch.testing.assert_close(final.value, expected.detach(), rtol=1e-5, atol=1e-5)


class TestADataSet:
    @pytest.mark.parametrize("kind", [dict, collections.UserDict])
    def test_is_not_a_mapping_whose_names_would_be_its_texts(self, model: Any, kind: Any) -> None:
        encoded = kind({"input_ids": [IDS, OTHERS], "attention_mask": [[1] * 9] * 2})
        with refused(GraphError, "is not a data set", hint="token ids"), model.session() as session:
            session.over(encoded)  # this line
        with refused(InputError, "is not a data set", hint="token ids"):
            model.activations(encoded, ["layers.1.output"])  # this line

    def test_may_have_a_condition_in_each_of_its_batches(self, model: Any, reference: Any) -> None:
        prompts = [FEW, IDS]
        with model.session() as session, session.over(prompts) as batches, model.trace(batches.prompt):
            hidden = model.layers[1].output
            hidden[:] = patchwire.cond(hidden.norm() > 0, lambda h: h * 2, lambda h: h, hidden)
            logits = model.logits.save()

        for prompt, each in zip(prompts, logits.value, strict=True):
            assert_same(each, changed_logits(reference, prompt, {MIDDLE: lambda value: value * 2}))


class TestTheMask:
    def test_is_that_of_the_invoke_around_it(self, model: Any) -> None:
        with model.trace() as trace:
            with trace.invoke([IDS, FEW]):
                first = trace.mask()
            with trace.invoke([FEW, IDS]):
                second, ids = trace.mask(), trace.token_ids().save()

        assert torch.equal(second, first.flip(0))
        assert torch.equal(ids.value >= 0, second)
        assert torch.equal(trace.mask(1), second)

    def test_has_to_be_chosen_outside_of_several_invokes(self, model: Any) -> None:
        with model.trace() as trace:
            with trace.invoke(IDS):
                model.logits.save()
            with trace.invoke(FEW):
                model.logits.save()
        with refused(GraphError, "which of the 2 invokes", hint="trace.mask"):
            trace.mask()  # this line


class TestAnEdit:
    def test_reads_the_same_weight_for_every_invoke(self, model: Any, reference: Any) -> None:
        with model.edit() as edited:
            before = model.lm_head.weight.clone()
            model.lm_head.weight *= 2
            model.layers[1].output[:] += before[5]
        with edited.trace() as trace:
            found = []
            for _ in range(2):
                with trace.invoke(IDS):
                    found.append(model.layers[1].output.save())
        # The embedding is the same weight, and doubled with it.
        with model.trace(IDS):
            model.lm_head.weight *= 2
            expected = (model.layers[1].output + reference.lm_head.weight[5]).save()

        for each in found:
            assert_same(each.value, expected.value)

    @pytest.mark.parametrize(
        "use",
        [
            lambda h: h.sum(1, keepdim=True) / h.shape[1],
            lambda h: h[:, h.shape[1] - 10 :],
            lambda h: h * len(h),
            lambda h: h.sum() / h.numel(),
        ],
        ids=["division", "slice", "rows", "count"],
    )
    def test_knows_no_length_of_a_prompt_that_is_still_to_come(self, model: Any, use: Any) -> None:
        with refused(GraphError, "not known in an edit", hint="from the end", line=False), model.edit():
            use(model.layers[1].output)

    def test_knows_widths_and_the_prompt_that_it_is_given(
        self, model: Any, reference: Any, language_model: Any
    ) -> None:
        with model.edit() as edited:
            hidden = model.layers[1].output
            hidden[:] = hidden.sum(-1, keepdim=True) / hidden.shape[-1]
        with edited.trace(FEW):
            logits = model.logits.save()
        expected = changed_logits(reference, FEW, {MIDDLE: lambda h: h.mean(-1, keepdim=True).expand_as(h)})
        assert_same(logits.value, expected)

        with model.edit(IDS) as edited:
            hidden = model.layers[1].output
            hidden[:, hidden.shape[1] // 2] = 0
        with edited.trace(IDS):
            logits = model.logits.save()
        assert_same(logits.value, changed_logits(reference, IDS, {MIDDLE: lambda h: emptied(h, 4)}))

        with refused(GraphError, "not known in an edit"), language_model.edit():
            len(language_model.transformer.h[1].output)  # this line


class TestATiedWeight:
    def test_is_one_tensor_under_both_names(self, model: Any, reference: Any) -> None:
        with model.trace(IDS):
            model.lm_head.weight *= 2
            applied = model.embed(torch.tensor([IDS])).save()
            model.embed.weight[3] = 0
            read, head = model.transformer.wte.weight.save(), model.lm_head.weight.save()
            logits = model.logits.save()

        weight = reference.lm_head.weight
        expected = 2 * weight
        expected[3] = 0
        assert_same(applied.value, 2 * weight[torch.tensor([IDS])])
        assert_same(read.value, expected)
        assert_same(head.value, expected)
        before = weight.clone()
        try:
            weight.copy_(expected)
            assert_same(logits.value, forward(reference, IDS).logits)
        finally:
            weight.copy_(before)


class TestStepsOfAGeneration:
    def test_of_two_iterators_are_not_mixed_up(self, model: Any) -> None:
        with refused(GraphError, "one after the other"), model.generate(IDS, max_new_tokens=4) as gen:
            for _ in zip(gen.iter[0:2], gen.iter[2:4], strict=True):  # this line
                model.logits.save()

    def test_of_a_block_that_has_ended_leave_the_next_one_alone(self, model: Any) -> None:
        with model.generate(IDS, max_new_tokens=2) as gen:
            steps = gen.all()
            next(steps)
            model.logits.save()
        with model.trace(IDS):
            del steps
            logits = model.logits.save()
        assert logits.shape == (1, 9, tiny.VOCABULARY)


def test_numbers_of_numpy_are_numbers_on_either_side(model: Any, reference: Any) -> None:
    with model.trace(IDS):
        hidden = model.layers[1].output
        one = (np.float64(0.5) * hidden).save()
        other = (np.full(tiny.WIDTH, 0.5, dtype=np.float32) * hidden).save()

    expected = record(reference, IDS)[MIDDLE] * 0.5
    assert_same(one.value, expected)
    assert_same(other.value, expected)


class TestATensorOfTheProgram:
    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize(
        "index",
        [lambda found: found, lambda found: found[None], lambda found: found[0], lambda found: (found, 1)],
        ids=["a list", "two dimensions", "one", "with a number"],
    )
    @pytest.mark.parametrize("count", [1, 3, 40])
    def test_is_indexed_by_a_value_as_a_whole(self, model: Any, reference: Any, count: int, index: Any) -> None:
        table = torch.randn(tiny.VOCABULARY, 4, generator=torch.Generator().manual_seed(0))

        with model.trace(IDS):
            found = model.logits[0, -1].topk(count)[1]
            rows = table[index(found)].save()
            there = found.save()

        expected = forward(reference, IDS).logits[0, -1].topk(count)[1]
        assert torch.equal(rows.value, table[index(expected)])
        assert torch.equal(table[there], table[expected])  # also when the block has ended

    @pytest.mark.filterwarnings("error")
    def test_is_indexed_by_a_value_that_is_kept(self, model: Any, reference: Any) -> None:
        table = torch.arange(tiny.VOCABULARY) * 2
        with model.trace(IDS):
            kept = model.logits[0, -1].topk(3)[1].keep()
        with model.trace(IDS):
            rows = table[kept].save()
        kept.forget()

        assert torch.equal(rows.value, 2 * forward(reference, IDS).logits[0, -1].topk(3)[1])

    def test_is_not_changed_at_a_place_that_is_not_known(self, model: Any) -> None:
        table = torch.zeros(tiny.VOCABULARY)

        with refused(GraphError, "cannot be changed in place"), model.trace(IDS):
            table[model.logits[0, -1].topk(3)[1]] = 1.0  # this line


class TestATupleOfValues:
    def test_is_saved_part_by_part_even_beside_nnsight(self, model: Any, reference: Any) -> None:
        import nnsight  # noqa: F401 - it gives every object a `save`

        with model.trace(IDS):
            top = model.logits[0, -1].topk(3).save()
            halves = model.layers[0].output.split(tiny.WIDTH // 2, dim=-1).save()

        expected = forward(reference, IDS).logits[0, -1].topk(3)
        assert isinstance(top.value, torch.return_types.topk)
        assert_same(top.value.values, expected.values)
        assert torch.equal(top.indices, expected.indices)
        hidden = record(reference, IDS)["transformer.h.0", "output", ()]
        assert_same(torch.cat(halves.value, -1), hidden)

    def test_is_a_tuple_with_the_names_of_its_items(self, model: Any) -> None:
        with model.trace(IDS):
            top = model.logits[0, -1].topk(3)
            values, indices = top
            assert (top.values, top.indices) == (values, indices)
            with pytest.raises(AttributeError, match="no “best”"):
                top.best  # noqa: B018
            gradients = patchwire.grad(model.logits[0, -1].sum(), model.layers[0].output.split(1, dim=1))
            top.values.sum().save()
        assert isinstance(gradients, tuple)

    def test_is_there_only_when_the_block_has_ended(self, model: Any) -> None:
        with refused(patchwire.BranchError, "when the block has ended"), model.trace(IDS):
            model.logits[0, -1].topk(3).save().value  # noqa: B018 # this line
        with model.trace(IDS):
            top = model.logits[0, -1].topk(3)
            top.values.save()
        with pytest.raises(GraphError, match="was not saved"):
            top.value  # noqa: B018

    def test_may_be_what_either_branch_returns(self, model: Any, reference: Any) -> None:
        with model.trace(IDS):
            last = model.logits[0, -1]
            best, _ = patchwire.cond(last[0] > 1e9, lambda: (last[:3], last[:3].argsort()), lambda: last.topk(3))
            best.save()

        assert_same(best.value, forward(reference, IDS).logits[0, -1].topk(3).values)

    def test_goes_as_one_argument_into_a_loop(self, model: Any, reference: Any) -> None:
        with model.session() as session:
            with model.trace(IDS):
                halves = model.layers[1].output.split(tiny.WIDTH // 2, dim=-1)
            loop = session.repeat(2)
            with loop:
                again = torch.cat(halves, -1).save()

        assert_same(again.value[1], record(reference, IDS)[MIDDLE])
