"""Logits are computed of the entries of the vocabulary that somebody looks at, and are what they are among all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import patchwire
import tiny
from conformance.hooks import assert_same, changed_logits, forward, record
from patchwire.sites import OUTPUT

ALL = tiny.VOCABULARY
SHORT, LONG = tiny.prompt(6), tiny.prompt(9)
DEFAULT = (*tiny.CORE, "gptj", "gemma2", "falcon_h1", "odd")
FAMILIES = [pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.slow]) for name in tiny.CONFIGS]
ANSWERS = [7, 60, 3]
PATIENCE = 60


class Watched:
    """A model, its proxy, and of how many entries the unembedding gave the logits in each pass."""

    def __init__(self, name: str | nn.Module) -> None:
        self.reference: Any = tiny.build(name).requires_grad_(False) if isinstance(name, str) else name
        served: Any = tiny.build(name).requires_grad_(False) if isinstance(name, str) else name
        self.model = patchwire.local(served, progress=False)
        self.columns: list[int] = []
        head = served.get_submodule(self.model.catalogue.raw("lm_head"))
        with self.model.trace(SHORT):  # whatever is found out when it is first asked
            self.model.logits[0, -1].save()
        head.register_forward_hook(lambda _, __, output: self.columns.append(output.shape[-1]))

    def expected(self, prompt: list[int]) -> Tensor:
        return forward(self.reference, prompt).logits

    def place(self, index: int) -> Any:
        """Where a layer's output is, for plain hooks."""
        path = self.model.catalogue.layers[index]
        return path, OUTPUT, self.model.catalogue.modules[path].side(OUTPUT)[0].path


def assert_same_among(logits: Tensor, actual: Tensor, expected: Tensor) -> None:
    """Both are the same, up to rounding of the logits that they were computed from."""
    assert actual.shape == expected.shape
    assert_same(torch.cat([actual.flatten(), logits.flatten()]), torch.cat([expected.flatten(), logits.flatten()]))


@pytest.fixture(scope="module")
def gpt2() -> Watched:
    return Watched("gpt2")


@pytest.fixture
def fresh(gpt2: Watched) -> Watched:
    gpt2.columns.clear()
    return gpt2


@pytest.mark.parametrize("name", FAMILIES)
def test_of_a_few_tokens_alone(name: str) -> None:
    watched = Watched(name)
    model = watched.model
    with model.trace(LONG):
        chosen = model.logits[:, -1, ANSWERS].save()
        difference = (model.logits[0, -1, 7] - model.logits[0, -1][60]).save()
    with model.trace(LONG, exact=True):
        alone = model.logits[:, -1, ANSWERS].save()

    assert watched.columns == [3, ALL]
    expected = watched.expected(LONG)[:, -1]
    assert_same(chosen.value, expected[:, ANSWERS])
    assert_same(chosen.value, alone.value)
    assert_same_among(expected, difference.value, expected[0, 7] - expected[0, 60])


INDICES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "one": (lambda logits: logits[0, -1, 4], 1),
    "one from the end": (lambda logits: logits[0, -1, -4], 1),
    "of every token": (lambda logits: logits[:, :, 4], 1),
    "after dots": (lambda logits: logits[..., 4], 1),
    "among dots": (lambda logits: logits[0, ..., [4, 9]], 2),
    "before dots": (lambda logits: logits[:, -1, 4, ...], 1),
    "the first": (lambda logits: logits[:, -1, :5], 5),
    "the last": (lambda logits: logits[:, -1, -5:], 5),
    "every tenth": (lambda logits: logits[:, 1:4, 3::10], 6),
    "more than there are": (lambda logits: logits[:, -1, 58:100], 3),
    "a list": (lambda logits: logits[:, -1, [5, 3, -1, 3]], 3),
    "a list of neighbours": (lambda logits: logits[:, -1, [5, 6, 7]].reshape(-1), 3),
    "one index after the other": (lambda logits: logits[0][-1][5], 1),
    "slices after slices": (lambda logits: logits[:, 2:][:, -1][:, 10:40][:, 5:9], 4),
    "a list of a list": (lambda logits: logits[0, :, [9, 8, 7]][:, [2, 0]], 3),
    "a list of rows": (lambda logits: logits[[0, 0]][:, -1, 3], 1),
    "an index of what is few": (lambda logits: logits[0, -1, 10:15][3] - logits[0, -1, 10:15].mean(), 5),
    "as many as are few": (lambda logits: logits[:, -1, :15], 15),
    "too many": (lambda logits: logits[:, -1, :16], ALL),
    "all": (lambda logits: logits[:, -1].softmax(-1), ALL),
    "none": (lambda logits: logits[:, -1, 5:5], ALL),
    "in a new dimension": (lambda logits: logits[:, -1, None, 4], ALL),
    "a mask": (lambda logits: logits[:, -1][logits[:, -1] > 0], ALL),
    "pairs": (lambda logits: logits[:, [1, 2], [3, 4]], ALL),
    "truth": (lambda logits: logits[:, -1, [True] * 3 + [False] * 58], ALL),
    "a tensor": (lambda logits: logits[:, -1, torch.tensor([3, 4])], ALL),
    "a view": (lambda logits: logits.flatten()[5], ALL),
    "one that is also the whole": (lambda logits: logits[0, -1, 4] + logits.sum(), ALL),
}


@pytest.mark.parametrize("index", INDICES)
def test_which_an_index_says(fresh: Watched, index: str) -> None:
    take, columns = INDICES[index]
    with fresh.model.trace([LONG, LONG[::-1]]):
        found = take(fresh.model.logits).save()

    assert fresh.columns == [columns]
    assert_same(found.value, take(torch.cat([fresh.expected(LONG), fresh.expected(LONG[::-1])])))


def test_together_with_few_positions(fresh: Watched) -> None:
    positions: list[int] = []
    with fresh.model.trace(LONG) as trace:
        found = fresh.model.logits[0][-2][[3, 4]].save()
        each = trace.plan().passes[0]
        positions += [each.positions, each.columns]
    assert positions == [1, 2]
    assert_same(found.value, fresh.expected(LONG)[0, -2, [3, 4]])


@pytest.mark.parametrize("index", [ALL, -ALL - 1, [3, ALL]], ids=repr)
def test_what_is_not_in_the_vocabulary_is_refused_as_ever(fresh: Watched, index: Any) -> None:
    with pytest.raises(patchwire.PatchwireError, match=r"out of (range|bounds)"), fresh.model.trace(LONG):
        fresh.model.logits[:, -1, index].save()
    assert fresh.columns in ([], [ALL])


def test_each_invoke_has_its_own(fresh: Watched) -> None:
    model, found = fresh.model, []
    with model.trace() as trace:
        for prompt, column in ((SHORT, 5), (LONG, 9), (SHORT, 60), (LONG, 5)):
            with trace.invoke(prompt):
                found.append((prompt, column, model.logits[:, 2:, column].save()))
        with trace.invoke([SHORT, SHORT[::-1]]):
            both = model.logits[1, -1, [9, 5]].save()
    assert fresh.columns == [3]
    for prompt, column, logits in found:
        assert_same(logits.value, fresh.expected(prompt)[:, 2:, column])
    assert_same(both.value, fresh.expected(SHORT[::-1])[0, -1, [9, 5]])


def test_all_of_them_if_one_invoke_looks_at_all(fresh: Watched) -> None:
    model = fresh.model
    with model.trace() as trace:
        with trace.invoke(SHORT):
            few = model.logits[:, -1, ANSWERS].save()
        with trace.invoke(LONG):
            best = model.logits[0, -1].argmax().save()
    assert fresh.columns == [ALL]
    assert_same(few.value, fresh.expected(SHORT)[:, -1, ANSWERS])
    assert best.value == fresh.expected(LONG)[0, -1].argmax()


def test_all_of_them_if_each_looks_at_others_and_together_they_are_many(fresh: Watched) -> None:
    model, found = fresh.model, []
    with model.session() as session:
        for start in range(0, 50, 10):
            with model.trace(LONG):
                found.append(model.logits[:, -1, start : start + 10].save())
    assert (session.stats.passes, fresh.columns) == (1, [ALL])
    assert_same(torch.cat([each.value for each in found], 1), fresh.expected(LONG)[:, -1, :50])


def test_rows_of_several_lengths_in_one_invoke_have_their_own(fresh: Watched) -> None:
    with fresh.model.trace() as trace:
        with trace.invoke([SHORT, LONG]):
            found, second = fresh.model.logits[:, -1, 5].save(), fresh.model.logits[1, -2:, [9, 5]].save()
        with trace.invoke(LONG[::-1]):
            other = fresh.model.logits[:, 3, 9].save()
    assert fresh.columns == [2]
    assert_same(found.value, torch.stack([fresh.expected(each)[0, -1, 5] for each in (SHORT, LONG)]))
    assert_same(second.value, fresh.expected(LONG)[0, -2:, [9, 5]])
    assert_same(other.value, fresh.expected(LONG[::-1])[:, 3, 9])


@pytest.mark.parametrize("what", ["padding", "whole"])
def test_rows_of_several_lengths_have_all_if_more_is_looked_at(fresh: Watched, what: str) -> None:
    with fresh.model.trace() as trace:
        with trace.invoke([SHORT, LONG]):
            found = fresh.model.logits[:, 2 if what == "padding" else -1, 5].save()
        with trace.invoke(LONG[::-1]):
            other = (fresh.model.logits * 1 if what == "whole" else fresh.model.logits[:, -1, 3]).save()
    assert fresh.columns == [ALL]
    position = 2 if what == "padding" else -1
    assert found.value[0].isnan() == (what == "padding")
    assert_same(found.value[1], fresh.expected(LONG)[0, position, 5])
    expected = fresh.expected(LONG[::-1])
    assert_same(other.value, expected if what == "whole" else expected[:, -1, 3])


@pytest.mark.parametrize("what", ["whole", "head", "written", "edited", "operation", "gradient", "weight", "tied"])
def test_all_of_them_if_something_needs_all(fresh: Watched, what: str) -> None:
    model = fresh.model
    expected = fresh.expected(LONG)
    with model.trace(LONG):
        match what:
            case "whole":
                model.logits.sum().save()
            case "head":
                model.lm_head.output[0, -1, 5].save()
            case "written":
                model.logits[:, 3] = 0
            case "edited":
                few = model.logits[0, -1, :4]
                few[2] = 5.0
            case "operation":
                model.source.self_lm_head_0.output[0, -1, 5].save()
            case "gradient":
                patchwire.grad(model.logits[0, -1, 3], model.layers[1].output).save()
            case "weight":
                model.lm_head.weight[3] = model.lm_head.weight[3] * 2
            case "tied":
                model.embed.weight[60] = model.embed.weight[60] * 2
        last = model.logits[0, -1, ANSWERS].save()

    assert set(fresh.columns) == {ALL}
    expected = expected[0, -1, ANSWERS]
    if what == "weight":
        expected[2] *= 2
    if what == "tied":
        expected[1] *= 2
    assert_same(last.value, expected)


def test_a_generation_has_all(fresh: Watched) -> None:
    with fresh.model.generate(LONG, max_new_tokens=2, min_new_tokens=2) as generation:
        found = fresh.model.logits[0, -1, 5].save()
        generation.output.save()
    assert set(fresh.columns) == {ALL}
    assert_same(found.value, fresh.expected(LONG)[0, -1, 5])


def test_a_lens_in_the_same_pass_has_the_whole_head(fresh: Watched) -> None:
    model = fresh.model
    with model.trace(LONG):
        lens = model.lm_head(model.norm(model.layers[-1].output)).save()
        weight, embedding = model.lm_head.weight.save(), model.embed.weight.save()
        answer = model.logits[0, -1, 5].save()
    expected = fresh.expected(LONG)
    assert fresh.columns == [ALL, 1]
    assert_same(lens.value, expected)
    assert_same(answer.value, expected[0, -1, 5])
    assert_same(weight.value, fresh.reference.lm_head.weight)
    assert_same(embedding.value, fresh.reference.lm_head.weight)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "gemma2", "mamba", "falcon_h1"])
def test_a_sweep_of_a_logit_difference_has_the_numbers_of_runs_of_their_own(name: str) -> None:
    watched, found = Watched(name), dict[tuple[int, int], Any]()
    model, length = watched.model, 21
    a, b = tiny.prompt(length), tiny.prompt(length, seed=1)
    with model.session() as session:
        with model.trace(a):
            clean = [layer.output for layer in model.layers]
        with model.trace() as trace:
            for index, layer in enumerate(model.layers):
                for position in range(length):
                    with trace.invoke(b):
                        layer.output[:, position] = clean[index][:, position]
                        logits = model.logits[:, -1]
                        found[index, position] = [logits[:, 8].save(), (logits[:, 8] - logits[:, 60]).save()]
    assert set(watched.columns) <= {2}
    assert len(watched.columns) == session.stats.passes

    seen = record(watched.reference, a)
    for (index, position), (logit, difference) in found.items():

        def patched(value: Tensor, index: int = index, position: int = position) -> Tensor:
            value[:, position] = seen[watched.place(index)][:, position]
            return value

        expected = changed_logits(watched.reference, b, {watched.place(index): patched})[:, -1]
        assert_same_among(expected, logit.value, expected[:, 8])
        assert_same_among(expected, difference.value, expected[:, 8] - expected[:, 60])


def test_what_is_kept_of_a_pass_is_a_copy(fresh: Watched) -> None:
    model = fresh.model
    with model.session():
        with model.trace(LONG):
            few = model.logits[0, -1, 5:8]
        with model.trace(SHORT):
            model.layers[0].output[:, -1, :3] = few
            changed = model.logits[0, -1, ANSWERS].save()

    put = fresh.expected(LONG)[0, -1, 5:8]

    def change(value: Tensor) -> Tensor:
        value[:, -1, :3] = put
        return value

    assert fresh.columns == [3, 3]
    expected = changed_logits(fresh.reference, SHORT, {fresh.place(0): change})
    assert_same(changed.value, expected[0, -1, ANSWERS])


def test_the_programs_own_use_of_a_model_is_not_disturbed() -> None:
    """A forward pass on another thread goes on while the head gives a few logits."""
    module: Any = tiny.build("gpt2").requires_grad_(False)
    expected = forward(module, LONG).logits
    watched, found = Watched(module), list[Tensor]()

    def own() -> None:
        found.append(forward(module, LONG).logits)

    def meanwhile(*_: Any) -> None:
        if threading.current_thread() is not thread and not found:
            thread.start()
            thread.join(PATIENCE)

    thread = threading.Thread(target=own)
    watched.columns.clear()
    module.lm_head.register_forward_pre_hook(meanwhile)
    with watched.model.trace(LONG):
        few = watched.model.logits[0, -1, ANSWERS].save()

    assert sorted(watched.columns) == [3, ALL]
    assert_same(few.value, expected[0, -1, ANSWERS])
    assert torch.equal(found[0], expected)


def test_a_plan_counts_the_logits_that_are_computed(fresh: Watched) -> None:
    plans = []
    for columns in ([3, 4], range(ALL)):
        with fresh.model.trace(LONG) as trace:
            fresh.model.logits[:, -1, list(columns)].save()
            plans.append(trace.plan().passes[0])
    few, whole = plans
    assert (few.columns, whole.columns) == (2, None)
    assert whole.flops - few.flops == pytest.approx(2 * tiny.WIDTH * (ALL - 2))
    assert few.bytes <= whole.bytes


class Centred(nn.Module):
    """A head whose logits depend on each other."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.inner = head
        self.weight = head.weight

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.inner(hidden)
        return logits - logits.mean(-1, keepdim=True)


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


class OtherResult(LlamaForCausalLM):
    """A model whose logits depend on each other."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        result = super().forward(input_ids=input_ids, **kwargs)
        result.logits = result.logits - result.logits.mean(-1, keepdim=True)
        return result


class Masked(LlamaForCausalLM):
    """A model that never says two of its tokens, and one of these is asked for."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        result = super().forward(input_ids=input_ids, **kwargs)
        result.logits[..., [2, ANSWERS[1]]] = torch.finfo(result.logits.dtype).min
        return result


class Biased(LlamaForCausalLM):
    """A model that adds something to one of its logits, however many there are."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        result = super().forward(input_ids=input_ids, **kwargs)
        result.logits = result.logits + 0.1 * (torch.arange(result.logits.shape[-1]) == ANSWERS[0])
        return result


@pytest.mark.parametrize("how", ["another module", "another forward", "another result", "masked", "biased"])
def test_a_head_that_is_more_than_a_product_has_all(how: str) -> None:
    module: Any = tiny.build("llama").requires_grad_(False)
    match how:
        case "another module":
            module.lm_head = Centred(module.lm_head)
        case "another forward":
            head = Doubled(tiny.WIDTH, ALL, bias=False).requires_grad_(False)
            head.weight.copy_(module.lm_head.weight)
            module.lm_head = head
        case "another result":
            module.__class__ = OtherResult
        case "masked":
            module.__class__ = Masked
        case "biased":
            module.__class__ = Biased
    expected = forward(module, LONG).logits
    watched = Watched(module)
    with watched.model.trace(LONG):
        found = watched.model.logits[:, -1, ANSWERS].save()
    assert watched.columns == [ALL]
    assert_same(found.value, expected[:, -1, ANSWERS])
