"""Every mistake, made on purpose: the class of its error, its words, the user's own line, and what to write."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch

import patchwire
from integration.refusals import assert_names, marked, refused
from patchwire import (
    BranchError,
    ExecutionError,
    GraphError,
    InputError,
    LimitError,
    ModelNotFoundError,
    OperationError,
    OrderError,
    ShapeError,
    SiteError,
)
from patchwire import graph as g

IDS = [1, 2, 3]
LOGS = 5_000
"""So many of the longest texts are more than a request may log."""


@pytest.fixture
def model(served) -> patchwire.Model:
    return served["gpt2"]


class TestUnknownSites:
    def test_a_wrong_name_of_a_part(self, model):
        with refused(SiteError, r"layers\[1\]\.mixr", hint=r"`model\.layers\[1\]\.mixer`"), model.trace(IDS):
            model.layers[1].mixr.output.save()  # this line

    def test_a_wrong_raw_path(self, model):
        with (
            refused(SiteError, r"transformer\.h\[1\]\.attnn", hint=r"`model\.transformer\.h\[1\]\.attn`"),
            model.trace(IDS),
        ):
            model.transformer.h[1].attnn.output.save()  # this line

    def test_a_wrong_name_at_the_top(self, model):
        with refused(SiteError, r"`model\.logit`", hint=r"`model\.logits`"), model.trace(IDS):
            model.logit.save()  # this line

    @pytest.mark.parametrize("index", [3, 99, -4])
    def test_an_index_out_of_range(self, model, index):
        with refused(SiteError, str(index), hint="indices 0 to 2"), model.trace(IDS):
            model.layers[index].output.save()  # this line

    def test_an_index_out_of_range_in_a_raw_path(self, model):
        with refused(SiteError, "7", hint="indices 0 to 2"), model.trace(IDS):
            model.transformer.h[7].output.save()  # this line

    def test_an_index_of_what_is_no_list(self, model):
        with refused(SiteError, "not a list"), model.trace(IDS):
            model.lm_head[0].output.save()  # this line

    @pytest.mark.parametrize(
        ("name", "meant"), [("outputs", "output"), ("inptu", "input"), ("resid_post", "output"), ("resid_pre", "input")]
    )
    def test_a_wrong_name_of_what_goes_in_and_comes_out(self, model, name, meant):
        with refused(SiteError, name, hint=rf"`model\.layers\[1\]\.{meant}`[.?]$"), model.trace(IDS):
            getattr(model.layers[1], name)  # this line

    def test_the_output_of_all_layers(self, model):
        with refused(SiteError, r"`model\.layers`", hint=r"It is a list: `model\.layers\[0\]`"), model.trace(IDS):
            model.layers.output.save()  # this line

    def test_the_attention_of_an_ssm(self, served):
        mamba = served["mamba"]
        with refused(SiteError, "attn", hint=r"SSM.*`model\.layers\[0\]\.mixer`"), mamba.trace(IDS):
            mamba.layers[0].attn.output.save()  # this line

    def test_the_mlp_of_a_model_without(self, served):
        mamba = served["mamba"]
        with refused(SiteError, "mlp", hint="no MLP"), mamba.trace(IDS):
            mamba.layers[0].mlp.output.save()  # this line

    def test_an_item_that_a_tuple_does_not_have(self, model):
        with refused(SiteError, r"attn\.output\[7\]", hint=r"attn\.output\[0\]"), model.trace(IDS):
            model.transformer.h[0].attn.output[7].save()  # this line

    def test_an_argument_that_a_module_is_not_called_with(self, model):
        with refused(SiteError, "no_such_argument", hint="tensors there are"), model.trace(IDS):
            model.layers[0].inputs[1]["no_such_argument"].save()  # this line

    def test_a_module_as_a_source(self, model):
        with refused(SiteError, "is a module", hint=r"model\.module"):
            patchwire.source.Source(model, "lm_head")  # this line

    def test_a_module_that_a_forward_pass_does_not_call(self, served):
        model = served["llama"]
        with refused(SiteError, "never exists"), model.trace(IDS):
            model.model.layers.output.save()  # this line

    def test_a_parameter_that_is_not_there(self, model):
        with refused(SiteError, "wait", hint="weight"), model.trace(IDS):
            model.lm_head.wait.sum().save()  # this line

    def test_a_model_that_the_server_does_not_have(self, client):
        with refused(ModelNotFoundError, "`gpt3`", hint="`gpt2`", line=False):
            client.model("gpt3")

    def test_a_missing_name_is_missing_for_hasattr_too(self, model):
        assert not hasattr(model.layers[0], "mixr")
        assert hasattr(model.layers[0], "mixer")


class TestWrites:
    def test_of_another_shape(self, model):
        shapes = (r"\[1, 3, 24\] float32", r"\[batch, seq, 24\]", r"\[1, 3, 7\]")
        with refused(ShapeError, r"layers\[1\]\.output|layers\.1\.output", *shapes), model.trace(IDS):
            model.layers[1].output = torch.zeros(1, 3, 7)  # this line

    def test_of_a_part_of_another_shape(self, model):
        with refused(ShapeError, r"\[1, 3, 24\]", r"\[7\]"), model.trace(IDS):
            model.layers[1].output[:, -1] = torch.zeros(7)  # this line

    def test_of_another_dtype(self, model):
        with refused(ShapeError, "float32", "float16", hint=r"\.to\(torch\.float32\)"), model.trace(IDS):
            model.layers[1].output = model.layers[0].output.half()  # this line

    def test_of_no_tensor(self, model):
        with refused(ShapeError, "cannot become a int", hint=r"value\[:\] = 0"), model.trace(IDS):
            model.layers[1].output = 0  # this line

    def test_outside_of_the_rows(self, model):
        with refused(ShapeError, "index|size|range"), model.trace(IDS):
            model.layers[1].output[:, 5] = 0  # this line

    def test_of_a_later_value(self, model):
        with refused(OrderError, r"layers\.?\[?0.*layers\.?\[?2", hint="second trace"), model.trace(IDS):
            late = model.layers[2].output  # and this line
            model.layers[0].output = late * 2  # this line

    def test_of_a_later_value_into_a_part(self, model):
        with refused(OrderError, "later in the forward pass", hint="second trace"), model.trace(IDS):
            late = model.layers[2].output[:, 0]  # and this line
            model.layers[0].output[:, -1] = late  # this line

    def test_of_an_output_into_the_input_that_it_came_from(self, model):
        with refused(OrderError, "later in the forward pass"), model.trace(IDS):
            out = model.layers[1].mlp.output  # and this line
            model.layers[1].mlp.input = out  # this line

    def test_of_another_shape_to_a_weight(self, model):
        with refused(ShapeError, r"lm_head\.weight"), model.trace(IDS):
            model.lm_head.weight = torch.zeros(61, 25)  # this line

    def test_of_a_value_of_the_run_to_a_weight_that_it_runs_with(self, model):
        with refused(OrderError, r"lm_head\.weight", hint="earlier trace"), model.trace(IDS):
            total = model.layers[0].output.sum()  # and this line
            model.lm_head.weight += total  # this line

    def test_of_a_module(self, model):
        with refused(SiteError, "mlp", hint=r"mlp\.output = "), model.trace(IDS):
            model.layers[0].mlp = torch.zeros(1, 3, 24)  # this line

    def test_of_a_value_into_a_tensor_of_this_program(self, model):
        mine = torch.zeros(1, 3, 24)
        with refused(GraphError, "in place", hint="new_zeros"), model.trace(IDS):
            mine[:] = model.layers[0].output  # this line

    def test_of_a_value_onto_a_tensor_of_this_program(self, model):
        mine = torch.zeros(1, 3, 24)
        with refused(GraphError, "in place", hint="clone"), model.trace(IDS):
            mine.add_(model.layers[0].output)  # this line

    def test_of_a_tensor_to_a_tuple(self, model):
        with refused(SiteError, "tuple", hint="items"), model.trace(IDS):
            model.transformer.h[0].attn.output = torch.zeros(1, 3, 24)  # this line


class TestBlocks:
    def test_a_detached_trace_inside_a_session(self, model):
        with refused(GraphError, "runs with it", hint=r"session\(blocking=False\)"), model.session():
            model.trace(IDS, blocking=False).__enter__()  # this line

    def test_an_edit_inside_a_session(self, model):
        with refused(GraphError, "outside of sessions", hint="before"), model.session():
            model.edit().__enter__()  # this line

    def test_a_scan_inside_a_session(self, model):
        with refused(GraphError, "outside of sessions", hint="before"), model.session():
            model.scan(IDS).__enter__()  # this line

    def test_activations_inside_a_session(self, model):
        with refused(GraphError, "requests of their own", hint="outside"), model.session():
            next(model.activations([IDS], "logits"))  # this line

    def test_the_tokens_of_no_prompt(self, model):
        with refused(GraphError, "that of an invoke", hint=r"gen\.invoke"), model.generate(max_new_tokens=2) as gen:
            gen.output.save()  # this line


class TestGradients:
    @pytest.mark.parametrize("loss", [3, torch.ones(())])
    def test_of_what_is_no_value(self, model, loss):
        with refused(GraphError, "a value inside the block"), model.trace(IDS):
            patchwire.grad(loss, model.layers[0].output)  # this line

    def test_of_a_value_whose_block_has_ended(self, model):
        with model.trace(IDS):
            total = model.logits.sum().save()
        with refused(GraphError, "a value inside the block", hint="After the block"):
            total.backward()  # this line

    def test_with_respect_to_a_later_value(self, model):
        with refused(OrderError, "does not depend on") as refusal, model.trace(IDS):
            later = model.layers[2].output  # and this line
            loss = model.layers[0].output.sum()  # this line
            patchwire.grad(loss, later)
        assert "loss = model.layers[0].output.sum()" in str(refusal.error)

    def test_with_respect_to_a_name(self, model):
        with refused(GraphError, "with respect to values"), model.trace(IDS):
            patchwire.grad(model.logits.sum(), "layers.0.output")  # this line


class TestOnlyInTheRun:
    """What the server finds when it has the numbers."""

    def test_a_model_that_fails_on_what_was_written(self, model):
        with refused(ExecutionError, "The model failed: .*range", hint="write"), model.trace(IDS):
            model.transformer.wte.input = torch.full((1, 3), 10**6)  # this line
            model.logits.save()

    def test_a_tuple_of_unknown_size_that_is_saved(self, model):
        with refused(ExecutionError, "cannot be saved: it is not a tensor", hint="items"), model.trace(IDS):
            hidden = model.layers[0].output
            torch.topk(hidden[hidden > hidden.min()], 2).save()  # this line

    def test_a_tuple_of_unknown_size_that_is_logged(self, model):
        with refused(ExecutionError, "not one tensor", hint="items"), model.trace(IDS) as trace:
            hidden = model.layers[0].output
            trace.log(torch.topk(hidden[hidden > hidden.min()], 2))  # this line

    def test_more_bytes_than_the_server_sends(self, chatty):
        with refused(LimitError, "more than 500,000 bytes"), chatty.trace(IDS):
            torch.nonzero(chatty.logits.new_ones(70_000)).save()  # this line

    def test_more_log_than_a_request_may_have(self, model):
        with refused(LimitError, "more than .* characters", hint="Log less"), model.trace(IDS) as trace:
            for _ in range(LOGS):
                trace.log("x" * g.LONGEST_TEXT, model.logits)  # this line

    def test_a_write_of_a_step_that_the_generation_did_not_reach(self, model):
        with refused(ExecutionError, "a step that was not reached", hint="min_new_tokens"), model.session():
            with model.generate(IDS, max_new_tokens=20) as gen:
                for _ in gen.all():
                    late = model.layers[0].output
                    model.lm_head.output[:, :, 0] = 1000  # the token that ends it
            with model.trace(IDS):
                model.layers[1].output = late[:, -1:].expand(1, 3, 24)  # this line
                model.logits.save()

    def test_changes_of_two_weights_that_are_one(self, model):
        with refused(GraphError, "is tied to another weight", hint="one of them"), model.trace(IDS):
            model.lm_head.weight = model.lm_head.weight * 2
            model.transformer.wte.weight = model.transformer.wte.weight * 3  # this line
            model.logits.save()

    def test_a_change_of_a_buffer(self, served):
        model = served["llama"]
        with refused(GraphError, "buffer", hint="computed from it", line=False), model.trace(IDS):
            model.model.rotary_emb.inv_freq *= 2
            model.logits.save()


class TestPythonThatNeedsTheValue:
    def test_a_branch(self, model):
        with refused(BranchError, "only when the block has ended", hint=r"torch\.where.*save"), model.trace(IDS):
            hidden = model.layers[0].output
            if hidden.sum() > 0:  # this line
                hidden[:] = 0

    @pytest.mark.parametrize(
        "use",
        [
            lambda value: float(value),
            lambda value: int(value),
            lambda value: bool(value),
            lambda value: value.item(),
            lambda value: value.tolist(),
            lambda value: value.numpy(),
            lambda value: np.asarray(value),
            lambda value: [1, 2, 3][value],
            lambda value: 1.0 in value,
            lambda value: value.value,
            lambda value: max(value, 0),
            lambda value: range(value),
        ],
        ids=["float", "int", "bool", "item", "tolist", "numpy", "asarray", "index", "in", "value", "max", "range"],
    )
    def test_a_number(self, model, use):
        with (
            refused(BranchError, "not known while it is recorded", hint="save", line=False) as refusal,
            model.trace(IDS),
        ):
            use(model.layers[0].output.sum())
        assert_names(refusal.error, __file__, refusal.error.lines[0].line)

    def test_float_in_the_block_names_its_line(self, model):
        with refused(BranchError, "not known"), model.trace(IDS):
            float(model.layers[0].output.sum())  # this line

    def test_numpy_in_the_block_names_its_line(self, model):
        with refused(BranchError, r"\.numpy\(\)"), model.trace(IDS):
            model.layers[0].output.numpy()  # this line

    def test_item_in_the_block_names_its_line(self, model):
        with refused(BranchError, r"\.item\(\)"), model.trace(IDS):
            model.layers[0].output.sum().item()  # this line

    def test_a_loop_over_something_of_unknown_length(self, model):
        with refused(BranchError, "depends on data"), model.trace(IDS):
            hidden = model.layers[0].output
            for _ in hidden[hidden > 0]:  # this line
                pass


class TestOperations:
    def test_a_method_that_is_not_on_the_list(self, model):
        with refused(OperationError, "softmx", hint=r"`\.softmax`"), model.trace(IDS):
            model.layers[0].output.softmx(-1).save()  # this line

    def test_a_method_of_tensors_that_is_not_on_the_list(self, model):
        with refused(OperationError, "normal_"), model.trace(IDS):
            model.layers[0].output.normal_()  # this line

    def test_a_function_that_is_not_on_the_list(self, model):
        with refused(OperationError, "bernoulli"), model.trace(IDS):
            torch.bernoulli(model.layers[0].output).save()  # this line

    def test_a_function_of_a_submodule_that_is_not_on_the_list(self, model):
        with refused(OperationError, "dropout"), model.trace(IDS):
            torch.nn.functional.dropout(model.layers[0].output, 0.5).save()  # this line

    def test_a_function_that_writes_into_a_tensor(self, model):
        mine = torch.zeros(1, 3, 24)
        with refused(OperationError, "`out`", hint="out"), model.trace(IDS):
            torch.add(model.layers[0].output, 1, out=mine)  # this line

    def test_an_activation_that_works_in_place(self, model):
        with refused(OperationError, "`inplace`", hint="inplace"), model.trace(IDS):
            torch.nn.functional.relu(model.layers[0].output, inplace=True)  # this line

    def test_shapes_that_do_not_fit(self, model):
        with refused(ShapeError, r"`matmul`|`__matmul__`", r"\[1, 3, 24\] float32", r"\[1, 3, 61\]"), model.trace(IDS):
            (model.layers[0].output @ model.logits).save()  # this line

    @pytest.mark.parametrize(
        "multiply",
        [
            lambda hidden, double: hidden @ double,
            lambda hidden, double: double @ hidden[0].T,
            lambda hidden, double: torch.nn.functional.linear(hidden, double),
            lambda hidden, double: torch.nn.Linear(24, 24).double()(hidden),
            lambda hidden, double: torch.mv(hidden[0], double[0]),
            lambda hidden, double: torch.addmm(double[:3], hidden[0], double.float()),
            lambda hidden, double: torch.cdist(hidden, double),
        ],
    )
    def test_a_product_of_two_dtypes(self, model, multiply):
        double = torch.randn(24, 24, dtype=torch.float64)
        with pytest.raises(RuntimeError):
            multiply(torch.zeros(1, 3, 24), double)
        says, hint = "one dtype.*float(32|64).*float(32|64)", r"`\.to\(torch\.float"
        with refused(ShapeError, says, hint=hint, line=False) as refusal, model.trace(IDS):
            multiply(model.layers[0].output, double)
        assert refusal.error.lines[0].line == multiply.__code__.co_firstlineno

    def test_a_module_on_a_value_of_the_wrong_width(self, model):
        with refused(ShapeError, "24", "61"), model.trace(IDS):
            model.lm_head(model.logits).save()  # this line

    def test_a_tensor_that_is_not_dense(self, model):
        with refused(GraphError, "ordinary dense tensors", hint="to_dense"), model.trace(IDS):
            (model.layers[0].output @ torch.eye(24).to_sparse()).save()  # this line

    def test_a_dtype_by_its_name(self, model):
        with refused(GraphError, "'bf16' is not a dtype", hint=r"torch\.bfloat16"), model.trace(IDS):
            model.layers[0].output.save(dtype="bf16")  # this line

    def test_a_size_that_depends_on_values(self, model):
        with refused(OperationError, "The size of", hint="after the block"), model.trace(IDS):
            torch.meshgrid(model.layers[0].output, indexing="ij")  # this line

    def test_an_argument_that_is_no_data(self, model):
        with refused(GraphError, "cannot be used inside the block", hint="Numbers, strings"), model.trace(IDS):
            model.layers[0].output.sum(object())  # this line

    def test_a_value_that_is_called(self, model):
        with refused(GraphError, "cannot be called"), model.trace(IDS):
            model.layers[0].output()  # this line

    def test_an_operation_that_fails_only_on_real_numbers(self, model):
        with refused(ExecutionError, "singular"), model.trace(IDS):
            zero = model.layers[0].output.new_zeros(3, 3)
            torch.linalg.inv(zero).save()  # this line

    def test_an_index_that_is_out_of_range_only_on_real_numbers(self, model):
        with refused(ExecutionError, "index|range"), model.trace(IDS):
            where = model.layers[0].output.new_full((1,), 99).long()
            model.layers[0].output[0].index_select(0, where).save()  # this line


class TestStructures:
    def test_an_item_by_no_number_or_name(self, model):
        with refused(SiteError, "tuple or mapping, not a tensor", hint=r"output\[0\]"), model.trace(IDS):
            model.transformer.h[0].attn.output[:, -1].save()  # this line

    def test_a_tuple_used_as_a_tensor(self, model):
        with refused(SiteError, "tuple", hint=r"output\[0\]"), model.trace(IDS):
            model.transformer.h[0].attn.output.mean().save()  # this line

    @pytest.mark.parametrize(
        "use",
        [
            lambda hidden, structure: hidden + structure,
            lambda hidden, structure: structure + hidden,
            lambda hidden, structure: structure + 1,
            lambda hidden, structure: 2 * structure,
            lambda hidden, structure: -structure,
            lambda hidden, structure: structure > 0,
            lambda hidden, structure: torch.sum(structure),
            lambda hidden, structure: torch.cat([hidden, structure]),
            lambda hidden, structure: torch.nn.functional.relu(structure),
            lambda hidden, structure: np.asarray(structure),
        ],
        ids=["right", "left", "number", "reflected", "negated", "compared", "torch", "list", "functional", "numpy"],
    )
    def test_a_tuple_in_an_expression(self, model, use):
        with refused(SiteError, "not one tensor", hint=r"output\[0\]", line=False) as refusal, model.trace(IDS):
            use(model.layers[0].output, model.transformer.h[0].attn.output)
        assert refusal.error.lines[0].file == __file__

    def test_a_tuple_that_is_edited_as_a_tensor(self, model):
        with refused(SiteError, "not one tensor", hint=r"output\[0\]"), model.trace(IDS):
            model.transformer.h[0].attn.output += 1  # this line


class TestScopes:
    def test_a_value_of_another_trace(self, model):
        with model.trace(IDS):
            foreign = model.layers[0].output
            foreign.sum().save()
        with refused(GraphError, "belongs to another trace", hint=r"\.save\(\)"), model.trace(IDS):
            (model.layers[1].output + foreign).save()  # this line

    def test_a_value_of_another_trace_written_to_a_site(self, model):
        with model.trace(IDS):
            foreign = model.layers[0].output
            foreign.sum().save()
        with refused(GraphError, "belongs to another trace"), model.trace(IDS):
            model.layers[1].output = foreign  # this line

    def test_a_value_that_was_not_saved(self, model):
        with model.trace(IDS):
            hidden = model.layers[0].output
            hidden.sum().save()
        with refused(GraphError, "not saved", hint=r"\.save\(\)"):
            print(hidden.value)  # this line

    @pytest.mark.parametrize(
        "use", [lambda v: v + 1, lambda v: torch.relu(v), lambda v: v.mean(), lambda v: v[0], float, np.asarray]
    )
    def test_a_value_that_was_not_saved_in_any_use(self, model, use):
        with model.trace(IDS):
            hidden = model.layers[0].output
            hidden.sum().save()
        with refused(GraphError, "not saved", hint=r"\.save\(\)", line=False) as refusal:
            use(hidden)
        assert refusal.error.lines[0].file == __file__

    def test_a_save_after_the_block(self, model):
        with model.trace(IDS):
            hidden = model.layers[0].output
            hidden.sum().save()
        with refused(GraphError, "block has ended", hint="inside"):
            hidden.save()  # this line

    def test_a_site_outside_of_a_block(self, model):
        with refused(GraphError, r"layers\[0\]\.output", hint=r"with model\.trace"):
            model.layers[0].output.save()  # this line

    def test_a_write_outside_of_a_block(self, model):
        with refused(GraphError, "only while the model runs", hint=r"with model\.trace"):
            model.layers[0].output = torch.zeros(1, 3, 24)  # this line

    def test_a_named_value_outside_of_a_block(self, model):
        with refused(GraphError, "logits", hint=r"with model\.trace"):
            model.logits.save()  # this line

    def test_a_module_applied_outside_of_a_block(self, model):
        with refused(GraphError, "lm_head", hint=r"with model\.trace"):
            model.lm_head(torch.zeros(1, 24))  # this line

    def test_a_trace_inside_another(self, model):
        with refused(GraphError, "inside another", hint="invoke"), model.trace(IDS):
            model.layers[0].output.save()
            with model.trace(IDS):  # this line
                pass

    def test_a_trace_used_twice(self, model):
        trace = model.trace(IDS)
        with trace:
            model.layers[0].output.save()
        with refused(GraphError, "used already", hint=r"with model\.trace"):
            trace.__enter__()  # this line

    def test_a_forgotten_prompt(self, model):
        with refused(GraphError, "outside of the trace's invokes|no prompt", hint="invoke|prompt"), model.trace():
            model.layers[0].output.save()  # this line

    def test_a_trace_without_anything(self, model):
        with refused(GraphError, "no prompt", hint=r"model\.trace"), model.trace():  # this line
            pass

    def test_a_site_between_invokes(self, model):
        with refused(GraphError, "outside of the trace's invokes", hint=r"with trace\.invoke"), model.trace() as trace:
            with trace.invoke(IDS):
                model.layers[0].output.save()
            model.layers[1].output.save()  # this line

    def test_an_invoke_inside_another(self, model):
        with refused(GraphError, "directly inside a trace", hint=r"trace\.invoke"), model.trace() as trace:
            model.layers[0]
            with trace.invoke(IDS):
                model.logits.save()
                with trace.invoke(IDS):  # this line
                    pass

    def test_an_invoke_in_a_trace_with_a_prompt(self, model):
        with refused(GraphError, "directly inside a trace", hint=r"model\.trace\(\)"), model.trace(IDS) as trace:
            model.logits.save()
            with trace.invoke(IDS):  # this line
                pass

    def test_a_site_of_another_model(self, model, served):
        with refused(GraphError, "belongs to llama", "traces gpt2", hint="block of its own"), model.trace(IDS):
            served["llama"].layers[0].output.save()  # this line


class TestPrompts:
    def test_that_are_too_long(self, model):
        with refused(InputError, "65 tokens", "64"), model.trace([1] * 65):  # this line
            model.logits.save()

    def test_with_ids_out_of_the_vocabulary(self, model):
        with refused(InputError, "61", "0 to 60"), model.trace([1, 61]):  # this line
            model.logits.save()

    def test_of_text_for_a_model_without_a_tokenizer(self, model):
        with refused(InputError, "no tokenizer", hint="token ids"), model.trace("text"):  # this line
            model.logits.save()

    def test_that_are_none(self, model):
        with refused(InputError, "This float is not a prompt", hint="text"), model.trace(3.14):  # this line
            model.logits.save()

    def test_with_a_word_for_true(self, model):
        with refused(GraphError, "`exact` is True or False, not 'no'"), model.trace(IDS, exact="no"):  # this line
            model.logits.save()
        with refused(GraphError, "`blocking` is True or False, not 0"), model.session(blocking=0):  # this line
            pass

    def test_in_an_invoke(self, model):
        with refused(InputError, "token id -5"), model.trace() as trace, trace.invoke([-5]):  # this line
            model.logits.save()


class TestEdgesOfTheBlock:
    def test_an_error_of_the_user_s_own_is_passed_on_as_it_is(self, model):
        with pytest.raises(ZeroDivisionError), model.trace(IDS):
            model.layers[0].output[:] = 1 / 0

    def test_after_an_error_the_next_trace_works(self, model):
        with pytest.raises(patchwire.SiteError), model.trace(IDS):
            _ = model.layers[99]
        with model.trace(IDS):
            logits = model.logits.save()

        assert logits.shape == (1, 3, 61)

    def test_a_value_whose_run_failed_says_so(self, model):
        with pytest.raises(ExecutionError), model.trace(IDS):
            saved = torch.linalg.inv(model.layers[0].output.new_zeros(3, 3)).save()
        with refused(GraphError, "did not end well", line=True):
            print(saved.value)  # this line

    def test_a_saved_value_that_is_edited_later_is_warned_of_with_both_lines(self, model):
        with warnings.catch_warnings(record=True) as warned, model.trace(IDS):
            warnings.simplefilter("always")
            hidden = model.layers[0].output
            first = hidden[:, 0].save()
            hidden[:] = 0
        text = str(warned[0].message)

        assert warned[0].category is patchwire.PatchwireWarning
        assert warned[0].filename == __file__
        assert "first = hidden[:, 0].save()" in text
        assert "hidden[:] = 0" in text
        assert ".clone().save()" in text
        assert first.value.abs().sum() == 0

    def test_a_helper_function_is_the_user_s_own_line(self, model):
        def ablate(layer):
            layer.output[:, 99] = 0  # this line

        with refused(ShapeError, "index|size|range", line=False) as refusal, model.trace(IDS):
            ablate(model.layers[0])
        assert_names(refusal.error, __file__, refusal.error.lines[0].line)
        assert "layer.output[:, 99] = 0" in str(refusal.error)

    def test_the_traceback_ends_at_the_user_s_line(self, model):
        with pytest.raises(ShapeError) as caught, model.trace(IDS):
            model.layers[1].output = torch.zeros(7)  # the last entry of the traceback
        assert caught.traceback[-1].path.name == "test_errors_at_the_line.py" or (
            "# the last entry" in str(caught.traceback[-1].statement)
        )

    def test_errors_of_the_server_name_the_line_too(self, model):
        with refused(LimitError, "bytes", line=False), model.trace(IDS):
            model.layers[0].output.repeat(10**6, 10**6, 1).save()


def test_a_script_that_imports_nothing_else_gets_its_own_line(server, tmp_path):
    script = tmp_path / "experiment.py"
    script.write_text(
        textwrap.dedent(f"""\
        import patchwire
        model = patchwire.connect("{server.address}", progress=False).model("gpt2")
        with model.trace([1, 2, 3]):
            hidden = model.layers[0].output
            hidden.relu().softmx(-1).save()
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)

    assert done.returncode == 1
    assert done.stderr.splitlines().count("    experiment.py:5    hidden.relu().softmx(-1).save()") == 1
    assert "patchwire.OperationError: `.softmx` is not an operation" in done.stderr
    assert "site-packages" not in done.stderr
    assert "client/patchwire" not in done.stderr


def test_markers_are_found_by_the_helper_itself():
    assert marked(__file__, 1)[0] > 1
