"""Knockout, against the same cut made with plain PyTorch: in the attention mask, or in a second run of an SSM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import patchwire
import tiny
from integration.refusals import refused

ATTENTION = ("gpt2", "llama", "gpt_neox")
SSM = ("mamba", "mamba2")
KEYS, QUERIES = [1, 2], [4, 6]
PROMPT = tiny.prompt(7)


def masked(
    reference: Any,
    layers: dict[int, str],
    rows: list[int],
    keys: list[int],
    queries: list[int],
    heads: Any = slice(None),
) -> torch.Tensor:
    """Logits when a layer's attention gets a mask that hides the keys from the queries."""
    number = reference.config.num_attention_heads

    def hide(module: Any, args: Any, kwargs: Any) -> Any:
        length = len(rows)
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1).expand(1, number, -1, -1).clone()
        for query in queries:
            for key in keys:
                mask[:, heads, query, key] = float("-inf")
        return args, kwargs | {"attention_mask": mask}

    reference.set_attn_implementation("eager")
    hooks = [
        reference.get_submodule(path).register_forward_pre_hook(hide, with_kwargs=True) for path in layers.values()
    ]
    try:
        with torch.no_grad():
            return reference(torch.tensor([rows])).logits
    finally:
        for each in hooks:
            each.remove()
        reference.set_attn_implementation("sdpa")


def run_twice(reference: Any, layers: list[int], rows: Any, keys: list[int], queries: list[int], fill: Any) -> Any:
    """Logits when mixers are run a second time, with their keys replaced after `in_proj`, for the queries' outputs."""

    def replace(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        return fill(output)

    def again(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        hook = module.in_proj.register_forward_hook(replace)
        cut = type(module).forward(module, *args, **kwargs)
        hook.remove()
        output = output.clone()
        output[:, queries] = cut[:, queries]
        return output

    hooks = [reference.backbone.layers[layer].mixer.register_forward_hook(again, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            return reference(torch.tensor(rows), use_cache=False).logits
    finally:
        for each in hooks:
            each.remove()


def zeroed(keys: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    def fill(output: torch.Tensor) -> torch.Tensor:
        output[:, keys] = 0
        return output

    return fill


class TestAttention:
    @pytest.mark.parametrize("name", ATTENTION)
    @pytest.mark.parametrize("heads", [None, [0, 3]])
    def test_is_that_of_a_mask(self, served, references, name, heads):
        model = served[name]
        with model.trace(PROMPT):
            for layer in (0, 1):
                patchwire.knockout(model.layers[layer].mixer, KEYS, QUERIES, heads=heads)
            found = model.logits.save()
            plain = model.layers[1].mixer.pattern.save()
        layers = {layer: model.layers[layer].mixer.path for layer in (0, 1)}
        wanted = masked(references[name], layers, PROMPT, KEYS, QUERIES, slice(None) if heads is None else heads)
        torch.testing.assert_close(found.value, wanted, rtol=1e-5, atol=1e-5)
        assert plain[:, 0 if heads is None else heads, QUERIES][..., KEYS].abs().max() == 0

    def test_of_the_last_from_the_first_by_any_spelling_of_the_positions(self, served):
        model, found = served["gpt2"], []
        for keys, queries in (([0, 1], [6]), (slice(0, 2), -1), (range(2), slice(-1, None)), ([-7, -6, 0], 6)):
            with model.trace(PROMPT):
                patchwire.knockout(model.layers[1].mixer, keys, queries)
                found.append(model.logits.save())
        assert all(torch.equal(each.value, found[0].value) for each in found)

    def test_a_query_sees_one_position_at_least(self, served):
        model = served["gpt2"]
        with refused(patchwire.GraphError, "see nothing", hint="itself"), model.trace(PROMPT):
            patchwire.knockout(model.layers[1].mixer, [0, 1, 2], 2)  # this line

    def test_in_a_step_of_a_generation(self, served, references):
        model = served["llama"]
        with model.generate(PROMPT, max_new_tokens=3) as gen:
            for _ in gen.iter[1]:
                patchwire.knockout(model.layers[1].mixer, KEYS, -1)
                pattern = model.layers[1].mixer.pattern.save()
        assert pattern.shape == (1, 4, 1, 8)
        assert pattern[..., KEYS].abs().max() == 0
        torch.testing.assert_close(pattern.sum(-1), torch.ones(1, 4, 1))


class TestAnSSM:
    @pytest.mark.parametrize("name", SSM)
    def test_is_that_of_a_second_run_for_the_queries(self, served, references, name):
        model = served[name]
        with model.trace(PROMPT):
            for layer in (0, 1):
                patchwire.knockout(model.layers[layer].mixer, KEYS, QUERIES)
            found = model.logits.save()
        wanted = run_twice(references[name], [0, 1], [PROMPT], KEYS, QUERIES, zeroed(KEYS))
        torch.testing.assert_close(found.value, wanted, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", SSM)
    def test_with_a_mean_in_the_place_of_the_keys(self, served, references, name):
        model = served[name]
        mean = torch.linspace(-1, 1, references[name].backbone.layers[0].mixer.intermediate_size)
        with model.trace(PROMPT):
            patchwire.knockout(model.layers[1].mixer, KEYS, QUERIES, value=mean)
            found = model.logits.save()
        start = 0 if name == "mamba" else mean.shape[0]  # Mamba-2 has the gate first

        def fill(output: torch.Tensor) -> torch.Tensor:
            output[:, KEYS] = 0
            output[:, KEYS, start : start + mean.shape[0]] = mean
            return output

        wanted = run_twice(references[name], [1], [PROMPT], KEYS, QUERIES, fill)
        torch.testing.assert_close(found.value, wanted, rtol=1e-5, atol=1e-5)

    def test_leaves_earlier_tokens_and_other_queries_alone(self, served):
        model = served["mamba"]
        with model.trace(PROMPT):
            plain = model.layers[1].output.save()
        with model.trace(PROMPT):
            patchwire.knockout(model.layers[1].mixer, KEYS, [4])
            cut = model.layers[1].output.save()
        changed = (plain.value - cut.value).abs().amax((0, 2)) > 1e-4
        assert changed.tolist() == [False] * 4 + [True] + [False] * 2

    def test_two_different_cuts_of_one_layer_are_two_runs(self, served, references):
        model = served["mamba"]
        with model.trace(PROMPT):
            patchwire.knockout(model.layers[1].mixer, [1], [4])
            patchwire.knockout(model.layers[1].mixer, [2], [6])
            found = model.layers[1].output.save()
        wanted = []
        for keys, query in ([1], 4), ([2], 6):
            with model.trace(PROMPT):
                patchwire.knockout(model.layers[1].mixer, keys, query)
                wanted.append(model.layers[1].output[:, query].save())
        torch.testing.assert_close(found[:, [4, 6]], torch.stack([each.value for each in wanted], 1))

    @pytest.mark.parametrize("name", SSM)
    def test_cuts_of_the_same_query_add_up(self, served, references, name):
        model = served[name]
        with model.trace() as trace:
            with trace.invoke(PROMPT):
                patchwire.knockout(model.layers[1].mixer, [1], [4, 6])
                patchwire.knockout(model.layers[1].mixer, [2], [6, 5], value=0.5)
                found = model.layers[1].output.save()
            with trace.invoke(PROMPT):
                patchwire.knockout(model.layers[1].mixer, [1], [4])
                patchwire.knockout(model.layers[1].mixer, [2], [5], value=0.5)
                apart = model.layers[1].output.save()
        reference = references[name]

        def fill(output: torch.Tensor) -> torch.Tensor:
            parts = output[:, [1, 2]].clone()
            width = reference.config.hidden_size * reference.config.expand
            start = 0 if name == "mamba" else width
            parts[:] = 0
            parts[:, 1, start : start + width] = 0.5
            output[:, [1, 2]] = parts
            return output

        outputs: list[torch.Tensor] = []
        hook = reference.backbone.layers[1].register_forward_hook(lambda _, __, output: outputs.append(output))
        run_twice(reference, [1], [PROMPT], [1, 2], [6], fill)
        hook.remove()
        whole = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        torch.testing.assert_close(found[:, 6], whole[:, 6], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[:, [4, 5]], apart.value[:, [4, 5]], rtol=1e-5, atol=1e-5)

    def test_in_exact_passes_each_has_its_two_runs_in_one_of_its_own(self, served, references):
        model = served["mamba"]
        with model.trace(exact=True) as trace:
            found = []
            for layers in ([1], [0, 1], []):
                with trace.invoke(PROMPT):
                    for layer in layers:
                        patchwire.knockout(model.layers[layer].mixer, KEYS, QUERIES)
                    found.append(model.logits.save())
        assert trace.stats.passes == 3
        for layers, logits in zip(([1], [0, 1], []), found, strict=True):
            wanted = run_twice(references["mamba"], layers, [PROMPT], KEYS, QUERIES, zeroed(KEYS))
            torch.testing.assert_close(logits.value, wanted, rtol=1e-5, atol=1e-5)

    def test_the_second_run_is_not_shown(self, served):
        model = served["mamba"]
        with model.trace() as trace:
            with trace.invoke(PROMPT):
                patchwire.knockout(model.layers[1].mixer, KEYS, QUERIES)
            with trace.invoke(PROMPT[:4]):
                pass
            with trace.invoke():
                rows = model.logits.save()
            assert trace.tokens == [PROMPT, PROMPT[:4]]
        assert rows.shape[0] == 2

    def test_prompts_of_different_lengths_keep_their_own(self, served):
        model, prompts = served["mamba2"], [PROMPT, tiny.prompt(5)]
        with model.trace(prompts):
            patchwire.knockout(model.layers[1].mixer, -3, -1)
            found = model.logits[:, -1].save()
        for row, prompt in enumerate(prompts):
            with model.trace(prompt):
                patchwire.knockout(model.layers[1].mixer, -3, -1)
                alone = model.logits[0, -1].save()
            torch.testing.assert_close(found[row], alone.value, rtol=1e-5, atol=1e-5)

    def test_has_no_heads(self, served):
        model = served["mamba"]
        with refused(patchwire.OperationError, "SSM", hint="heads"), model.trace(PROMPT):
            patchwire.knockout(model.layers[1].mixer, 1, 2, heads=[0])  # this line

    def test_is_not_for_generations(self, served):
        model = served["mamba"]
        with refused(patchwire.OperationError, "generation", hint="trace"), model.generate(PROMPT, max_new_tokens=2):
            patchwire.knockout(model.layers[1].mixer, 1, 2)  # this line


class TestOfKeysThatAQueryDoesNotSee:
    def test_changes_nothing_for_it(self, served):
        model = served["gpt2"]
        with model.trace() as trace:
            with trace.invoke(PROMPT):
                before = model.layers[1].output.save()
            with trace.invoke(PROMPT):
                patchwire.knockout(model.layers[1].mixer, keys=range(3, 6), queries=slice(None, 3))
                after = model.layers[1].output.save()
        torch.testing.assert_close(after.value, before.value, rtol=1e-5, atol=1e-5)


class TestIsRefused:
    def test_if_several_leave_a_query_nothing(self, served):
        model = served["llama"]
        with refused(patchwire.GraphError, "sees 3 positions"), model.trace(PROMPT):
            patchwire.knockout(model.layers[1].mixer, [0, 1], [2, 4])
            patchwire.knockout(model.layers[1].mixer, [2], [4], heads=[0])
            patchwire.knockout(model.layers[1].mixer, [2], [2], heads=[-1])  # this line

    def test_if_a_shorter_row_would_see_nothing(self, served):
        model = served["llama"]
        with refused(patchwire.GraphError, "sees 1 positions"), model.trace([PROMPT, PROMPT[:5]]):
            patchwire.knockout(model.layers[1].mixer, 2, 2)  # this line

    def test_for_what_mixes_nothing(self, served):
        model = served["gpt2"]
        with refused(patchwire.SiteError, "neither scores nor a scan"), model.trace(PROMPT):
            patchwire.knockout(model.layers[1].mlp, 1, 2)  # this line

    @pytest.mark.parametrize(
        ("keys", "says"), [(7, "no key 7"), ([True], "no key True"), ("ab", "str"), (0.5, "float")]
    )
    def test_for_positions_that_are_not_there(self, served, keys, says):
        model = served["mamba"]
        with refused(patchwire.GraphError, says), model.trace(PROMPT):
            patchwire.knockout(model.layers[1].mixer, keys, 2)  # this line
