"""What does not fit into memory at once runs in parts, with the same numbers; and nobody is told anything twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import patchwire
import tiny
from conformance.hooks import assert_same
from integration.refusals import refused

MOST_ROWS = 8
PROMPT, OTHER = tiny.prompt(9), tiny.prompt(12, seed=1)


def with_little_memory(name: str, words: str) -> patchwire.Model:
    """A model whose second layer has no memory for more than a few rows, in the words of a device or of a computer."""
    served = tiny.build(name)

    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        rows = (args[0] if args else kwargs["hidden_states"]).shape[0]
        if rows > MOST_ROWS and words == "device":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if rows > MOST_ROWS:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

    served.base_model.layers[1].register_forward_pre_hook(refuse, with_kwargs=True)
    return patchwire.local(served, progress=False)


@pytest.fixture(scope="module", params=["device", "host"])
def narrow(request: pytest.FixtureRequest) -> patchwire.Model:
    return with_little_memory("llama", request.param)


@pytest.fixture(scope="module")
def wide() -> patchwire.Model:
    return patchwire.local(tiny.build("llama"), progress=False)


def many_prompts(model: patchwire.Model) -> tuple[list[Any], Any]:
    found = []
    with model.trace() as trace:
        for seed in range(21):
            with trace.invoke(tiny.prompt(8 + seed % 3, seed=seed)):
                before = model.layers[0].output[:, -1].save()
                model.layers[1].output[:, -1] *= 2
                found += [before, model.logits.save()]
    return found, trace.stats


def from_one_to_all(model: patchwire.Model) -> tuple[list[Any], Any]:
    found = []
    with model.trace() as trace:
        with trace.invoke(PROMPT):
            clean = model.layers[0].output[:, -1]
        for seed in range(20):
            with trace.invoke(tiny.prompt(9, seed=seed + 1)):
                model.layers[0].output[:, -1] = clean
                found.append(model.logits[:, -1].save())
    return found, trace.stats


def a_session(model: patchwire.Model) -> tuple[list[Any], Any]:
    found = []
    with model.session() as session:
        for seed in range(30):
            with model.trace(tiny.prompt(9, seed=seed)):
                found.append(model.layers[2].output.save())
        with model.trace(PROMPT):
            model.layers[1].output[:] = found[3] * 0.5
            found.append(model.logits.save())
    return found, session.stats


@pytest.mark.parametrize("work", [many_prompts, from_one_to_all, a_session])
def test_a_pass_for_which_there_is_no_memory_runs_in_parts(
    narrow: patchwire.Model, wide: patchwire.Model, work: Callable[[patchwire.Model], tuple[list[Any], Any]]
) -> None:
    expected, usual = work(wide)
    found, stats = work(narrow)
    assert stats.passes > usual.passes
    assert stats.result_bytes == usual.result_bytes
    for one, other in zip(found, expected, strict=True):
        assert_same(one.value, other.value)


def test_the_two_runs_of_a_knocked_out_ssm_stay_together() -> None:
    def work(model: patchwire.Model) -> tuple[list[Any], Any]:
        found = []
        with model.trace() as trace:
            for seed in range(11):
                with trace.invoke(tiny.prompt(9, seed=seed)):
                    patchwire.knockout(model.layers[1].mixer, keys=[1, 2], queries=6)
                    found.append(model.logits.save())
        return found, trace.stats

    found, stats = work(with_little_memory("mamba", "device"))
    expected, usual = work(patchwire.local(tiny.build("mamba"), progress=False))
    assert stats.passes > usual.passes
    for one, other in zip(found, expected, strict=True):
        assert_same(one.value, other.value)


def test_what_cannot_be_parted_is_refused(narrow: patchwire.Model) -> None:
    prompts = [tiny.prompt(9, seed=seed) for seed in range(10)]
    no_memory = refused(patchwire.LimitError, "no memory for 10 rows of 9 tokens", hint="fewer or shorter", line=False)
    with no_memory, narrow.trace(prompts):
        narrow.logits.save()
    with narrow.trace(PROMPT):
        logits = narrow.logits.save()
    assert logits.value.isfinite().all(), "the next request is as good as any"


def test_a_plan_that_would_not_fit_is_split_before_it_runs() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    wide = patchwire.local(LlamaForCausalLM(LlamaConfig(vocab_size=4000, **sizes)).eval(), progress=False)
    prompts = [tiny.prompt(60, seed=seed) for seed in range(300)]
    with wide.trace() as trace:
        found = []
        for prompt in prompts:
            with trace.invoke(prompt):
                found.append(wide.logits[:, ::2].mean(dim=1).save())
        plan = trace.plan()
    assert len(plan.passes) > 1
    assert max(each.bytes for each in plan.passes) < 1 << 28
    assert trace.stats.passes == len(plan.passes)
    for index in (0, 150, 299):
        with wide.trace(prompts[index]):
            alone = wide.logits[:, ::2].mean(dim=1).save()
        assert_same(found[index].value, alone.value)
