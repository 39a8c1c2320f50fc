"""Operations inside forwards: what is read there is what the formulas say, and what is written there is gone on with.

The reference is `formulas.py`, in the place of transformers' own functions, and for all operations at once nnsight.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from nnsight import NNsight
from torch import Tensor
from transformers import AutoModelForCausalLM

import patchwire
import tiny
from conformance import formulas, hooks
from conformance.hooks import assert_same
from patchwire.sites import Axis
from serving import Server

EAGER = ("gpt2", "llama")
QUERY = {"gpt2": "query_states_1", "llama": "apply_rotary_pos_emb_0"}


@pytest.fixture(scope="module")
def eager(checkpoints: dict[str, str]) -> Iterator[dict[str, patchwire.Model]]:
    """Models whose attention is computed step by step."""
    with (
        Server({name: checkpoints[name] for name in EAGER}, attention="eager") as server,
        patchwire.connect(server.address, progress=False) as client,
    ):
        yield {name: client.model(name) for name in EAGER}


@pytest.fixture(scope="module")
def eager_references(checkpoints: dict[str, str]) -> dict[str, Any]:
    """The same models as plain Hugging Face modules in this process."""
    return {
        name: AutoModelForCausalLM.from_pretrained(
            checkpoints[name], dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for name in EAGER
    }


def inside_attention(model: patchwire.Model, layer: int) -> Any:
    """What happens inside the attention function of a layer."""
    return model.layers[layer].mixer.source.attention_interface_1.source


def inside_scan(model: patchwire.Model, layer: int) -> Any:
    """What happens inside the scan of a layer of Mamba, where no kernel is installed."""
    return model.layers[layer].mixer.source.mamba_selective_scan_0.source


def head_off(probabilities: Tensor) -> Tensor:
    changed = probabilities.clone()
    changed[:, 1] = 0
    return changed


@pytest.mark.parametrize("name", EAGER)
class TestAttention:
    @pytest.fixture
    def model(self, name: str, eager: dict[str, patchwire.Model]) -> patchwire.Model:
        return eager[name]

    @pytest.fixture
    def run(self, name: str, eager_references: dict[str, Any]) -> Any:
        """Runs the reference on a prompt, with changes."""
        return partial(formulas.Run, eager_references[name], shown=partial(formulas.attention, name))

    @pytest.mark.parametrize("length", [1, 2, 9, 17])
    def test_scores_and_probabilities_of_every_layer_are_those_of_the_formula(
        self, length: int, model: patchwire.Model, run: Any
    ) -> None:
        expected = run(ids := tiny.prompt(length)).values

        found = {}
        with model.trace(ids):
            for layer in range(model.num_layers):
                inside = inside_attention(model, layer)
                found["scores", layer] = inside.attn_weights_0.output.save()
                found["probabilities", layer] = inside.nn_functional_dropout_0.output.save()

        for place, value in found.items():
            assert_same(value.value, expected[place], place)

    def test_an_operation_takes_what_another_returns(self, model: patchwire.Model, run: Any) -> None:
        expected = run(ids := tiny.prompt(7)).values

        with model.trace(ids):
            inside = inside_attention(model, 1)
            first = inside.torch_matmul_1.input.save()
            one = inside.torch_matmul_1.inputs[0][0].save()
            outer = model.layers[1].mixer.source.attention_interface_1.output[1].save()
            query = model.layers[1].mixer.source.attention_interface_1.inputs[0][1].save()

        for value in (first, one, outer):
            assert_same(value.value, expected["probabilities", 1], "probabilities")
        assert_same(query.value, expected["query", 1], "query")

    @pytest.mark.parametrize("how", ["in place", "assigned", "augmented", "as an input", "as an item of the output"])
    def test_a_head_is_cut_off_by_its_probabilities(self, how: str, model: patchwire.Model, run: Any) -> None:
        ids = tiny.prompt(8)
        place = ("query", 1) if how == "as an item of the output" else ("probabilities", 1)
        expected = run(ids, changes={place: head_off}).logits

        with model.trace(ids):
            inside = inside_attention(model, 1)
            if how == "in place":
                inside.nn_functional_softmax_0.output[:, 1] = 0
            elif how == "assigned":
                inside.attn_weights_2.output = head_off(inside.attn_weights_2.output)
            elif how == "augmented":
                inside.attn_weights_2.output[:, 1] *= 0
            elif how == "as an input":
                inside.torch_matmul_1.input[:, 1] = 0
            else:
                query = model.layers[1].mixer.source
                query = query.query_states_1 if "query_states_1" in query else query.apply_rotary_pos_emb_0
                value = query.output if query.name == "query_states_1" else query.output[0]
                value[:, 1] = 0
            logits = model.logits.save()

        assert_same(logits.value, expected, how)

    def test_a_read_after_a_write_sees_it_and_so_does_the_module(self, model: patchwire.Model, run: Any) -> None:
        ids = tiny.prompt(6)
        expected = run(ids, changes={("probabilities", 0): head_off})

        with model.trace(ids):
            probabilities = inside_attention(model, 0).attn_weights_3.output
            before = probabilities.clone().save()
            probabilities[:, 1] = 0
            again = inside_attention(model, 0).attn_weights_3.output.save()
            later = inside_attention(model, 1).attn_weights_0.output.save()

        assert_same(before.value, run(ids).values["probabilities", 0], "before")
        assert_same(again.value, expected.values["probabilities", 0], "again")
        assert_same(later.value, expected.values["scores", 1], "later")

    def test_prompts_of_different_lengths_share_a_pass_and_see_only_their_own(
        self, model: patchwire.Model, run: Any
    ) -> None:
        prompts = [tiny.prompt(length) for length in (3, 11, 6)]
        changes: list[Any] = [None, {("probabilities", 1): head_off}, None]
        expected = [run(ids, changes=change) for ids, change in zip(prompts, changes, strict=True)]

        found = []
        with model.trace() as trace:
            for index, ids in enumerate(prompts):
                with trace.invoke(ids):
                    if index == 1:
                        inside_attention(model, 1).nn_functional_softmax_0.output[:, 1] = 0
                    values = [inside_attention(model, 1).attn_weights_3.output.save(), model.logits.save()]
                    found.append([*values, inside_attention(model, 2).torch_matmul_0.output.save()])

        assert trace.stats.passes == 1
        for (probabilities, logits, scores), reference in zip(found, expected, strict=True):
            assert_same(probabilities.value, reference.values["probabilities", 1], "probabilities")
            assert_same(logits.value, reference.logits, "logits")
            assert scores.value.shape == reference.values["scores", 2].shape

    def test_rows_of_different_lengths_end_together(self, model: patchwire.Model, run: Any) -> None:
        prompts = [tiny.prompt(length) for length in (4, 9)]

        with model.trace(prompts):
            probabilities = inside_attention(model, 1).attn_weights_3.output
            rows = probabilities.save()

        short, long = (run(ids).values["probabilities", 1] for ids in prompts)
        assert_same(rows.value[1:], long, "the long row")
        assert_same(rows.value[:1, :, -4:, -4:], short, "the short row")
        assert rows.value[0, :, :5].isnan().all()
        assert rows.value[0, :, :, :5].isnan().all()

    def test_probabilities_of_one_prompt_are_patched_into_another(self, model: patchwire.Model, run: Any) -> None:
        clean, corrupt = tiny.prompt(7, seed=1), tiny.prompt(7, seed=2)
        given = run(clean).values["probabilities", 1]
        expected = run(corrupt, changes={("probabilities", 1): lambda _: given}).logits

        with model.trace() as trace:
            with trace.invoke(clean):
                probabilities = inside_attention(model, 1).attn_weights_3.output
            with trace.invoke(corrupt):
                inside_attention(model, 1).attn_weights_3.output = probabilities
                logits = model.logits.save()

        assert_same(logits.value, expected, "logits")

    def test_a_trace_that_looks_inside_leaves_later_ones_alone(self, model: patchwire.Model, run: Any) -> None:
        ids = tiny.prompt(9)
        with model.trace(ids):
            before = model.logits.save()

        with model.trace(ids):
            inside_attention(model, 0).attn_weights_3.output[:] = 0
            changed = model.logits.save()
        with model.trace(ids):
            after = model.logits.save()

        assert torch.equal(before.value, after.value)
        assert not torch.equal(before.value, changed.value)
        assert_same(before.value, run(ids).logits, "logits")

    def test_raw_paths_lead_to_the_same_sites(self, model: patchwire.Model, run: Any) -> None:
        ids = tiny.prompt(5)
        raw = model.module(model.layers[1].mixer.path)

        with model.trace(ids):
            raw.source.attention_interface_1.source.attn_weights_3.output[:, 1] = 0
            value = inside_attention(model, 1).attn_weights_3.output.save()
            logits = model.logits.save()

        expected = run(ids, changes={("probabilities", 1): head_off})
        assert_same(value.value, expected.values["probabilities", 1], "probabilities")
        assert_same(logits.value, expected.logits, "logits")


class TestMamba:
    @pytest.fixture
    def model(self, served: Any) -> patchwire.Model:
        return served["mamba"]

    @pytest.fixture
    def run(self, references: Any) -> Any:
        """Runs the reference on a prompt, with changes in layer 1."""
        return partial(formulas.Run, references["mamba"], shown=partial(formulas.scan, layer=1))

    @pytest.mark.parametrize("length", [1, 5, 12])
    def test_the_convolution_and_the_state_after_every_step_are_those_of_the_formula(
        self, length: int, model: patchwire.Model, run: Any
    ) -> None:
        expected = run(ids := tiny.prompt(length)).values

        with model.trace(ids):
            conv = model.layers[1].mixer.source.causal_conv1d_fn_0.output.save()
            states = [inside_scan(model, 1).ssm_state_3[step].output.save() for step in range(length)]

        assert_same(conv.value, expected["conv", 1], "conv")
        for step, state in enumerate(states):
            assert_same(state.value, expected["state", step], step)

    def test_the_output_of_the_convolution_can_be_changed(self, model: patchwire.Model, run: Any) -> None:
        ids = tiny.prompt(7)
        expected = run(ids, changes={("conv", 1): lambda value: value * (torch.arange(48)[:, None] > 5)}).logits

        with model.trace(ids):
            model.layers[1].mixer.source.causal_conv1d_fn_0.output[:, :6] = 0
            logits = model.logits.save()

        assert_same(logits.value, expected, "logits")

    def test_a_state_can_be_changed_at_one_step_and_the_next_go_on_from_there(
        self, model: patchwire.Model, run: Any
    ) -> None:
        ids = tiny.prompt(9)
        expected = run(ids, changes={("state", 3): torch.zeros_like, ("state", 6): lambda state: state * 2})

        with model.trace(ids):
            state = inside_scan(model, 1).ssm_state_3
            state[3].output[:] = 0
            next_one = state[4].output.save()
            state[6].output = state[6].output * 2
            logits = model.logits.save()

        assert_same(next_one.value, expected.values["state", 4], "the next state")
        assert_same(logits.value, expected.logits, "logits")

    def test_a_state_can_be_written_with_an_earlier_one(self, model: patchwire.Model, run: Any) -> None:
        ids = tiny.prompt(8)
        early = run(ids).values["state", 2]
        expected = run(ids, changes={("state", 5): lambda _: early}).logits

        with model.trace(ids):
            state = inside_scan(model, 1).ssm_state_3
            state[5].output = state[2].output
            logits = model.logits.save()
        assert_same(logits.value, expected, "logits")

    def test_a_state_cannot_be_written_with_a_later_one(self, model: patchwire.Model) -> None:
        def backwards() -> None:
            with model.trace(tiny.prompt(8)):
                state = inside_scan(model, 1).ssm_state_3
                state[2].output = state[5].output
                model.logits.save()

        with pytest.raises(patchwire.OrderError, match="comes later") as caught:
            backwards()
        assert "state[2].output = state[5].output" in str(caught.value)

    def test_prompts_of_different_lengths_share_a_pass_and_have_their_own_steps(
        self, model: patchwire.Model, run: Any
    ) -> None:
        prompts = [tiny.prompt(length) for length in (3, 10, 6)]
        changes: list[Any] = [None, {("state", 2): torch.zeros_like}, None]
        expected = [run(ids, changes=change) for ids, change in zip(prompts, changes, strict=True)]

        found = []
        with model.trace() as trace:
            for index, ids in enumerate(prompts):
                with trace.invoke(ids):
                    if index == 1:
                        inside_scan(model, 1).ssm_state_3[2].output[:] = 0
                    states = [inside_scan(model, 1).ssm_state_3[step].output.save() for step in range(len(ids))]
                    found.append((states, model.logits.save()))

        assert trace.stats.passes == 1
        for (states, logits), reference in zip(found, expected, strict=True):
            assert_same(logits.value, reference.logits, "logits")
            for step, state in enumerate(states):
                assert_same(state.value, reference.values["state", step], step)

    def test_a_step_that_is_padding_is_refused(self, model: patchwire.Model) -> None:
        def read() -> None:
            with model.trace() as trace:
                for length in (9, 4):
                    with trace.invoke(tiny.prompt(length)):
                        inside_scan(model, 1).ssm_state_3[4].output.save()

        with pytest.raises(patchwire.SiteError, match="with this prompt the operation runs 4 times"):
            read()

    def test_steps_of_rows_of_different_lengths_are_refused(self, model: patchwire.Model) -> None:
        prompts = [tiny.prompt(3), tiny.prompt(5)]
        with pytest.raises(patchwire.SiteError, match="cannot be told apart"), model.trace(prompts):
            inside_scan(model, 1).ssm_state_3[0].output.save()

    def test_several_rows_of_one_length_have_their_steps(self, model: patchwire.Model, run: Any) -> None:
        prompts = [tiny.prompt(6, seed=seed) for seed in (1, 2, 3)]

        with model.trace(prompts):
            state = inside_scan(model, 1).ssm_state_3[4].output.save()

        for row, ids in enumerate(prompts):
            assert_same(state.value[row : row + 1], run(ids).values["state", 4], row)

    def test_which_step_has_to_be_said(self, model: patchwire.Model) -> None:
        says = r"runs \[seq\] times"
        with pytest.raises(patchwire.SiteError, match=says) as caught, model.trace(tiny.prompt(5)):
            inside_scan(model, 1).ssm_state_3.output.save()

        assert "ssm_state_3[0].output" in str(caught.value)


class TestOddForwards:
    """A model that calls one module several times, works in place, and returns one tensor twice."""

    def test_each_call_of_a_module_that_is_called_several_times(self, served: Any, references: Any) -> None:
        ids = tiny.prompt(6)
        outputs = []

        def visit(path: str, side: str, value: Any) -> Any:
            if (path, side) == ("shared", "output"):
                outputs.append(value.clone())
            return value

        with hooks.hooked(references["odd"], visit):
            hooks.forward(references["odd"], ids)

        with served["odd"].trace(ids):
            operation = served["odd"].shared.source.F_linear_0
            found = [operation[index].output.save() for index in range(len(outputs))]

        assert len(outputs) == 2
        assert operation.runs.size == 2
        for index, value in enumerate(found):
            assert_same(value.value, outputs[index], index)

    def test_one_call_of_it_is_changed(self, served: Any, references: Any) -> None:
        ids = tiny.prompt(6)
        count = iter(range(2))

        def visit(path: str, side: str, value: Any) -> Any:
            return value * 0 if (path, side) == ("shared", "output") and next(count) == 1 else value

        with hooks.hooked(references["odd"], visit):
            expected = hooks.forward(references["odd"], ids).logits

        with served["odd"].trace(ids):
            served["odd"].shared.source.F_linear_0[1].output[:] = 0
            logits = served["odd"].logits.save()

        assert_same(logits.value, expected, "logits")

    def test_what_a_statement_returns_is_not_written_in_vain(self, served: Any) -> None:
        model = served["odd"]
        says = "does nothing with what this call returns"
        with pytest.raises(patchwire.SiteError, match=says), model.trace(tiny.prompt(4)):
            model.blocks[0].source.hidden_add__0.output[:] = 0


SOURCES = {
    "gpt2": ("attn", "mlp", "", "attn.c_attn"),
    "llama": ("self_attn", "mlp", "", "input_layernorm"),
    "gpt_neox": ("attention", "mlp", ""),
    "mamba": ("mixer", "norm", ""),
    "mamba2": ("mixer", ""),
    "odd": ("", "twice", "flat"),
}
LAYER = {"gpt2": "transformer.h.1", "llama": "model.layers.1", "gpt_neox": "gpt_neox.layers.1"} | {
    "mamba": "backbone.layers.1",
    "mamba2": "backbone.layers.1",
    "odd": "blocks.1",
}


@pytest.mark.parametrize("name", tiny.SERVED)
class TestEveryOperation:
    def test_is_what_nnsight_sees(self, name: str, served: Any, references: Any) -> None:
        ids = torch.tensor([tiny.prompt(9)])
        for part in SOURCES[name]:
            path = f"{LAYER[name]}.{part}".rstrip(".")
            source = served[name].module(path).source
            once = [each.name for each in source if str(each.runs) == "1"]

            expected = through_nnsight(references[name], path, once, ids)
            with served[name].trace(ids):
                found = {
                    (leaf.operations[-1], leaf.side, leaf.path): read(source, leaf).save()
                    for each in once
                    for leaf in source._known.operations[each].leaves
                }

            assert found.keys() == expected.keys()
            for place, value in found.items():
                assert_same(value.value, expected[place], (path, place))

    def test_has_its_symbolic_shape_and_its_order(self, name: str, served: Any, references: Any) -> None:
        path = f"{LAYER[name]}.{SOURCES[name][0]}".rstrip(".")
        model = served[name]
        known = model.module(path).source._known
        leaves = [leaf for each in known.operations.values() for leaf in each.leaves]
        entered, left = (model.catalogue.modules[path].main(side).order for side in ("input", "output"))

        found = []
        assert leaves
        assert all(entered < leaf.order <= leaf.latest < left for leaf in leaves)
        with model.trace(tiny.prompt(13)):
            for leaf in leaves:
                if leaf.runs.axis is Axis.CONSTANT and leaf.runs.size == 1:
                    value = read(model.module(path).source, leaf).save()
                    found.append((leaf, value))

        for leaf, value in found:
            assert leaf.lengths(1, 13) in (None, tuple(value.value.shape)), leaf

    def test_is_the_same_alone_and_in_company(self, name: str, served: Any) -> None:
        path = f"{LAYER[name]}.{SOURCES[name][0]}".rstrip(".")
        model = served[name]
        source = model.module(path).source
        leaves = [leaf for each in source for leaf in source._known.operations[each.name].leaves if leaf.packs]
        leaves = [leaf for leaf in leaves if not (leaf.runs.axis is Axis.CONSTANT and leaf.runs.size > 1)]
        prompts = [tiny.prompt(4), tiny.prompt(12), tiny.prompt(7)]

        alone = []
        for ids in prompts:
            with model.trace(ids):
                alone.append([read(source, leaf).save() for leaf in leaves])
        together = []
        with model.trace() as trace:
            for ids in prompts:
                with trace.invoke(ids):
                    together.append([read(source, leaf).save() for leaf in leaves])

        assert leaves
        for ours, theirs in zip(alone, together, strict=True):
            for leaf, one, other in zip(leaves, ours, theirs, strict=True):
                assert_same(other.value, one.value, leaf)


@pytest.mark.parametrize("name", tiny.SERVED)
class TestEveryWrite:
    """Each tensor that an operation returns is made half as large again, in the second of three prompts."""

    def test_does_what_it_does_in_nnsight_and_leaves_other_prompts_alone(
        self, name: str, served: Any, references: Any
    ) -> None:
        path = f"{LAYER[name]}.{SOURCES[name][0]}".rstrip(".")
        model = served[name]
        source = model.module(path).source
        prompts = [tiny.prompt(3), tiny.prompt(8), tiny.prompt(10)]
        plain = [hooks.forward(references[name], ids).logits for ids in prompts]
        places = [
            (each.name, leaf.path)
            for each in source
            for leaf in source._known.operations[each.name].side("output")
            if str(leaf.runs) == "1" and leaf.dtype == torch.float32 and len(leaf.path) < 2 and not leaf.unused
        ]
        expected = changed_through_nnsight(references[name], path, places, torch.tensor([prompts[1]]))

        moved = 0
        for (operation, steps), reference in zip(places, expected, strict=True):
            logits = []
            with model.trace() as trace:
                for index, ids in enumerate(prompts):
                    with trace.invoke(ids):
                        if index == 1:
                            value = getattr(source, operation).output
                            for step in steps:
                                value = value[step]
                            value *= 1.5
                        logits.append(model.logits.save())
            assert_same(logits[1].value, reference, (operation, steps))
            for index in (0, 2):
                assert_same(logits[index].value, plain[index], (operation, steps, index))
            moved += not torch.allclose(reference, plain[1])
        assert moved > 3


def read(source: Any, leaf: Any) -> Any:
    """The value of a leaf, inside a block."""
    operation = getattr(source, leaf.operations[-1])
    operation = operation if str(leaf.runs) == "1" else operation[0]
    steps = leaf.path
    if leaf.side == "input":
        value, steps = operation.inputs[("args", "kwargs").index(steps[0])], steps[1:]
    else:
        value = operation.output
    for step in steps:
        value = value[step]
    return value


def wrapped(model: Any, path: str) -> tuple[NNsight, Any, dict[str, Any]]:
    """A copy of a model in nnsight, one of its modules there, and what it is called with besides token ids."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    traced = NNsight(copy.deepcopy(model))
    envoy: Any = traced
    for part in path.split("."):
        envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
    return traced, envoy, options


def changed_through_nnsight(
    model: Any, path: str, places: list[tuple[str, tuple[Any, ...]]], ids: Tensor
) -> list[Tensor]:
    """The logits with each of these outputs made half as large again by nnsight itself."""
    traced, envoy, options = wrapped(model, path)
    found: list[Tensor] = []
    for operation, steps in places:
        with traced.trace(input_ids=ids, **options):
            value = getattr(envoy.source, operation).output
            getattr(envoy.source, operation).output = hooks.with_change(value, "output", steps, lambda each: each * 1.5)
            found.append(traced.output.logits.clone())
    return found


def through_nnsight(
    model: Any, path: str, operations: list[str], ids: Tensor
) -> dict[tuple[str, str, tuple[Any, ...]], Tensor]:
    """Every tensor that operations are called with and return, as nnsight itself reads them."""
    traced, envoy, options = wrapped(model, path)
    found: dict[tuple[str, str, tuple[Any, ...]], Tensor] = {}
    for operation in operations:
        for side, handle in (("input", "inputs"), ("output", "output")):
            with traced.trace(input_ids=ids, **options):
                # Copied at once: a model may go on to change it in place.
                for steps, tensor in hooks.tensors_in(getattr(getattr(envoy.source, operation), handle), side):
                    found[operation, side, steps] = tensor.clone()
    return found
