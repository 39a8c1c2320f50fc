# ruff: noqa: PT012  (a block that is refused is several statements)
"""What nnsight does with language models, through `patchwire.nnsight`: the same blocks, the model made differently.

Every number is compared with plain hooks on the Hugging Face model, its own `generate`, or autograd. Where Patchwire
differs on purpose, a test says how, and what the error tells to write instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import patchwire
import tiny
from conformance.hooks import hooked
from patchwire import nnsight
from patchwire.errors import PatchwireError
from patchwire.nnsight import LanguageModel
from serving import Server

GARDEN = "madison square garden is in the city of"
TOWER = "the eiffel tower is located in the city of"
OTHERS = "new york paris hello world _ fish a b c d quick brown fox hi"
WORDS = list(dict.fromkeys(f"<end> {GARDEN} {TOWER} {OTHERS}".split()))
LAYERS = 5
STEPS = 3

needs_edit = pytest.mark.skipif(not hasattr(patchwire.Model, "edit"), reason="waits for `Model.edit`")
needs_source = pytest.mark.skipif(not hasattr(patchwire.Module, "source"), reason="waits for `Module.source`")


# --- a small model that speaks, and the references ------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("speaking") / "gpt2"
    config = tiny.CONFIGS["gpt2"]()
    config.n_layer = LAYERS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).eval().save_pretrained(root)
    words = WORDS + [f"word{index}" for index in range(tiny.VOCABULARY - len(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="_", eos_token="<end>").save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def address(directory: Path) -> Iterator[str]:
    with Server({"gpt2": directory}) as server:
        yield server.address


@pytest.fixture(scope="module")
def gpt2(address: str) -> LanguageModel:
    return LanguageModel("gpt2", server=address, device_map="auto", dispatch=True, progress=False)


@pytest.fixture(scope="module")
def reference(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def ids(gpt2: LanguageModel, text: str) -> Tensor:
    return gpt2.tokenizer(text, return_tensors="pt")["input_ids"]


class Pass:
    """What hooks saw in one call of the reference."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, **changes: Any) -> None:
        self.outputs: dict[str, list[Any]] = {}
        self.inputs: dict[str, list[Any]] = {}

        def visit(path: str, side: str, value: Any) -> Any:
            if side == "output" and path in changes:
                value = changes[path](value)
            (self.outputs if side == "output" else self.inputs).setdefault(path, []).append(value)
            return value

        with torch.no_grad(), hooked(model, visit):
            self.logits = self.run(model, tokens)

    def run(self, model: PreTrainedModel, tokens: Tensor) -> Tensor:
        return model(tokens).logits

    def __getitem__(self, path: str) -> Any:
        return self.outputs[path][0]


class Generated(Pass):
    """What hooks saw in each step of a generation; `logits` are the token ids that it ended with."""

    def run(self, model: PreTrainedModel, tokens: Tensor) -> Tensor:
        mask = torch.ones_like(tokens)
        return model.generate(tokens, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)


def same(found: Any, expected: Tensor) -> None:
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def zeros(value: Tensor) -> Tensor:
    return torch.zeros_like(value)


def refused(error: PatchwireError) -> str:
    """What an error says; it names a line of this file and what to write instead."""
    assert error.hint
    assert any(line.file == __file__ for line in error.lines)
    return str(error)


# --- generation -----------------------------------------------------------------------------------------------------


def test_generation_of_several_tokens_ends_with_the_tokens_of_hugging_face(gpt2: Any, reference: Any) -> None:
    with gpt2.generate(max_new_tokens=STEPS) as generator, generator.invoke(GARDEN):
        output = gpt2.generator.output.save()
        result = generator.result.save()
    expected = reference.generate(ids(gpt2, GARDEN), max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
    assert torch.equal(output, expected)
    assert torch.equal(result, expected)
    assert gpt2.tokenizer.decode(output[0]).startswith(GARDEN)


def test_a_trace_has_no_generated_text(gpt2: Any) -> None:
    with pytest.raises(patchwire.GraphError) as caught, gpt2.trace(GARDEN):
        gpt2.generator.output.save()
    assert "model.generate" in refused(caught.value)


def test_hidden_states_and_inputs_are_saved_as_tensors(gpt2: Any, reference: Any) -> None:
    with gpt2.generate("hello world"):
        before = gpt2.transformer.h[-1].input.save()
        after = gpt2.transformer.h[-1].output.save()
    expected = Pass(reference, ids(gpt2, "hello world"))
    assert isinstance(before, Tensor)
    same(before, expected.inputs["transformer.h.4"][0][0][0])
    same(after, expected["transformer.h.4"])


# --- changing activations -------------------------------------------------------------------------------------------


def test_an_edit_in_place_changes_what_is_generated(gpt2: Any, reference: Any) -> None:
    with gpt2.generate(max_new_tokens=STEPS) as tracer, tracer.invoke(GARDEN):
        before = gpt2.transformer.h[-1].output.clone().save()
        gpt2.transformer.h[-1].output[:] = 0
        after = gpt2.transformer.h[-1].output.save()
        logits = gpt2.lm_head.output.save()
    expected = Pass(reference, ids(gpt2, GARDEN), **{"transformer.h.4": zeros})
    same(before, Pass(reference, ids(gpt2, GARDEN))["transformer.h.4"])
    assert not after.any()
    same(logits, expected.logits)


def test_an_assigned_product_replaces_the_output(gpt2: Any, reference: Any) -> None:
    with gpt2.generate(GARDEN):
        before = gpt2.transformer.wte.output.clone().save()
        gpt2.transformer.wte.output = gpt2.transformer.wte.output * 2
        after = gpt2.transformer.wte.output.save()
        logits = gpt2.lm_head.output.save()
    expected = Pass(reference, ids(gpt2, GARDEN), **{"transformer.wte": lambda value: value * 2})
    assert torch.equal(after, before * 2)
    same(logits, expected.logits)


def test_a_tuple_is_not_replaced_by_a_tensor(gpt2: Any) -> None:
    with pytest.raises(patchwire.SiteError) as caught, gpt2.trace(GARDEN):
        gpt2.transformer.h[0].attn.output = gpt2.transformer.h[0].attn.input
    assert "module.output = (value, None)" in refused(caught.value)


def test_an_edit_in_one_invoke_is_not_seen_in_another(gpt2: Any, reference: Any) -> None:
    with gpt2.trace() as tracer:
        with tracer.invoke(GARDEN):
            gpt2.transformer.h[-1].output = torch.zeros_like(gpt2.transformer.h[-1].output)
        with tracer.invoke(GARDEN):
            hidden = gpt2.transformer.h[-1].output.save()
            last = gpt2.lm_head.output[0][-1].argmax(dim=-1).save()
    expected = Pass(reference, ids(gpt2, GARDEN))
    same(hidden, expected["transformer.h.4"])
    assert last == expected.logits[0, -1].argmax()


def test_an_output_that_requires_grad_can_be_replaced(gpt2: Any, reference: Any) -> None:
    with gpt2.trace() as tracer:
        with tracer.invoke(GARDEN):
            gpt2.transformer.h[0].output.requires_grad_(True)
            gpt2.transformer.h[0].output = torch.zeros_like(gpt2.transformer.h[0].output)
            changed = gpt2.lm_head.output.save()
        with tracer.invoke(GARDEN):
            hidden = gpt2.transformer.h[0].output.save()
    same(hidden, Pass(reference, ids(gpt2, GARDEN))["transformer.h.0"])
    same(changed, Pass(reference, ids(gpt2, GARDEN), **{"transformer.h.0": zeros}).logits)


# --- modules applied to values --------------------------------------------------------------------------------------


def test_a_logit_lens_applies_the_last_modules_to_a_hidden_state(gpt2: Any, reference: Any) -> None:
    with gpt2.generate() as generator, generator.invoke(TOWER):
        hidden = gpt2.transformer.h[1].output
        lens = gpt2.lm_head(gpt2.transformer.ln_f(hidden), hook=True)
        tokens = torch.softmax(lens, dim=2).argmax(dim=2).save()
    hidden = Pass(reference, ids(gpt2, TOWER))["transformer.h.1"]
    assert torch.equal(tokens, reference.lm_head(reference.transformer.ln_f(hidden)).argmax(-1))


# --- embeddings that move -------------------------------------------------------------------------------------------


def transferred(gpt2: Any, reference: Any, blank: Tensor) -> Tensor:
    """The tokens that the reference generates after a blank prompt with the embeddings of another."""
    embeddings = reference.transformer.wte(ids(gpt2, GARDEN))
    first = [True]

    def visit(value: Tensor) -> Tensor:
        return embeddings if first and first.pop() else value

    return Generated(reference, blank, **{"transformer.wte": visit}).logits


def test_embeddings_move_between_invokes_with_a_barrier(gpt2: Any, reference: Any) -> None:
    blank = "_ _ _ _ _ _ _ _"
    with gpt2.generate(max_new_tokens=STEPS) as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(GARDEN):
            embeddings = gpt2.transformer.wte.output
            barrier()
            first = tracer.result.save()
        with tracer.invoke(blank):
            barrier()
            gpt2.transformer.wte.output = embeddings
            second = tracer.result.save()
    assert torch.equal(first, Generated(reference, ids(gpt2, GARDEN)).logits)
    assert torch.equal(second, transferred(gpt2, reference, ids(gpt2, blank)))


def test_embeddings_move_between_traces(gpt2: Any, reference: Any) -> None:
    blank = "_ _ _ _ _ _ _ _"
    with gpt2.generate(max_new_tokens=STEPS) as generator, generator.invoke(GARDEN):
        embeddings = gpt2.transformer.wte.output.save()
    with gpt2.generate(max_new_tokens=STEPS) as generator, generator.invoke(blank):
        gpt2.transformer.wte.output = embeddings
        output = gpt2.generator.output.save()
    assert torch.equal(output, transferred(gpt2, reference, ids(gpt2, blank)))


# --- gradients ------------------------------------------------------------------------------------------------------


def gradients(reference: Any, tokens: Tensor, *paths: str) -> list[Tensor]:
    """The gradients of the sum of all logits with respect to modules' outputs."""
    kept: dict[str, Tensor] = {}

    def visit(path: str, side: str, value: Any) -> Any:
        if side == "output" and path in paths:
            kept[path] = value
        return value

    with hooked(reference, visit):
        loss = reference(tokens).logits.sum()
    return list(torch.autograd.grad(loss, [kept[path] for path in paths]))


def test_a_retained_gradient_is_on_the_saved_tensor(gpt2: Any, reference: Any) -> None:
    with gpt2.trace() as tracer, tracer.invoke("hello world"):
        hidden = gpt2.transformer.h[-1].output.save()
        hidden.retain_grad()
        logits = gpt2.lm_head.output
        logits.sum().backward()
    same(hidden.grad, gradients(reference, ids(gpt2, "hello world"), "transformer.h.4")[0])


def test_a_gradient_is_read_edited_and_replaced(gpt2: Any, reference: Any) -> None:
    with gpt2.trace() as tracer, tracer.invoke("hello world"):
        hidden = gpt2.transformer.h[-1].output.save()
        logits = gpt2.lm_head.output.save()
        with logits.sum().backward():
            gradient = hidden.grad.clone().save()
            edited = hidden.grad.save()
            edited[:] = 0
    same(gradient, gradients(reference, ids(gpt2, "hello world"), "transformer.h.4")[0])
    assert not edited.any()

    with gpt2.trace() as tracer, tracer.invoke("hello world"):
        hidden = gpt2.transformer.h[-1].output
        with gpt2.lm_head.output.sum().backward():
            gradient = hidden.grad.clone()
            gradient[:] = 0
            hidden.grad = gradient
            replaced = hidden.grad.save()
    assert not replaced.any()


def test_a_gradient_behind_an_edited_one_is_refused(gpt2: Any) -> None:
    """On purpose: each gradient comes from a backward pass of its own, which an edit of another does not reach."""
    with pytest.raises(patchwire.GraphError) as caught, gpt2.trace("hello world"):
        early, late = gpt2.transformer.h[1].output, gpt2.transformer.h[3].output
        with gpt2.lm_head.output.sum().backward():
            late.grad[:] = 0
            early.grad.save()
    assert "patchwire.grad(h, other, weights=edited)" in refused(caught.value)


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda hidden, loss: hidden.requires_grad_(False), "cannot be turned off"),
        (lambda hidden, loss: loss.backward(create_graph=True), "takes `gradient` and `retain_graph`"),
        (lambda hidden, loss: setattr(hidden, "grad", hidden * 0), "assigned in `with loss.backward():`"),
    ],
)
def test_a_gradient_that_there_is_not_is_refused(gpt2: Any, use: Any, says: str) -> None:
    with pytest.raises(patchwire.GraphError) as caught, gpt2.trace("hello world"):
        use(gpt2.transformer.h[1].output, gpt2.lm_head.output.sum())
    assert says in refused(caught.value)


def test_a_gradient_of_another_shape_is_refused(gpt2: Any) -> None:
    with pytest.raises(patchwire.GraphError) as caught, gpt2.trace("hello world"):
        hidden = gpt2.transformer.h[1].output
        with gpt2.lm_head.output.sum().backward():
            hidden.grad = hidden.grad[:, 0]
    assert f"[1, 2, {tiny.WIDTH}] cannot become [1, {tiny.WIDTH}]" in refused(caught.value)


def test_backward_runs_twice(gpt2: Any, reference: Any) -> None:
    with gpt2.trace() as tracer, tracer.invoke("hello world"):
        hidden = gpt2.transformer.h[-1].output
        logits = gpt2.lm_head.output
        with logits.sum().backward(retain_graph=True):
            first = hidden.grad.save()
        logits = logits * 2
        with logits.sum().backward():
            second = hidden.grad.save()
    (expected,) = gradients(reference, ids(gpt2, "hello world"), "transformer.h.4")
    same(first, expected)
    same(second, 2 * expected)


def test_modules_and_tensors_of_the_program_are_used_in_the_block(gpt2: Any, reference: Any) -> None:
    linear = nn.Linear(tiny.WIDTH, tiny.WIDTH).to(next(gpt2.parameters()))
    bias = torch.randn(tiny.WIDTH).to(next(gpt2.parameters()))

    def function(value: Any) -> Any:
        return nn.ReLU()(linear(value) - bias)

    with gpt2.trace("fish"):
        found = function(gpt2.transformer.h[0].mlp.output).save()
    same(found, function(Pass(reference, ids(gpt2, "fish"))["transformer.h.0.mlp"]).detach())


def test_the_numbers_of_a_weight_are_not_here(gpt2: Any) -> None:
    weight = dict(gpt2.named_parameters())["lm_head.weight"]
    assert weight.shape == (tiny.VOCABULARY, tiny.WIDTH)
    with pytest.raises(patchwire.GraphError, match=r"Read it inside a block.*model.lm_head.weight"):
        weight.sum()


def test_the_numbers_of_a_weight_are_not_here_in_another_tensor_either(gpt2: Any) -> None:
    weight = dict(gpt2.named_parameters())["lm_head.weight"]
    with pytest.raises(patchwire.GraphError) as caught:
        torch.ops.aten.neg(weight)
    assert "Read it inside a block" in refused(caught.value)


# --- editing --------------------------------------------------------------------------------------------------------


class Inner(nn.Module):
    def forward(self, value: Any) -> Any:
        return value


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = Inner()

    def forward(self, value: Any) -> Any:
        return self.one(value) * 2


@needs_edit
def test_an_edit_of_a_copy_leaves_the_model_as_it_was(gpt2: Any, reference: Any) -> None:
    with gpt2.edit(inplace=True):
        gpt2.transformer.h[1].output[:, 0] = 0
    with gpt2.edit() as edited:
        edited.transformer.h[1].output[:, 1] = 0
    with gpt2.trace(GARDEN):
        mine = gpt2.transformer.h[1].output.save()
    with edited.trace(GARDEN):
        its = edited.transformer.h[1].output.save()
    gpt2.clear_edits()
    assert not mine[:, 0].any()
    assert mine[:, 1].all()
    assert not its[:, :2].any()
    same(its[:, 2:], Pass(reference, ids(gpt2, GARDEN))["transformer.h.1"][:, 2:])


@needs_edit
def test_edits_are_cleared(gpt2: Any, reference: Any) -> None:
    with gpt2.edit(inplace=True):
        gpt2.transformer.h[1].output[:] = 0
    with gpt2.trace(GARDEN):
        edited = gpt2.transformer.h[1].output.save()
    gpt2.clear_edits()
    with gpt2.trace(GARDEN):
        unedited = gpt2.transformer.h[1].output.save()
    assert not edited.any()
    same(unedited, Pass(reference, ids(gpt2, GARDEN))["transformer.h.1"])


def test_a_module_of_the_program_is_attached_and_applied(gpt2: Any, reference: Any) -> None:
    layer = gpt2.transformer.h[0]
    layer.attachment = Outer()
    with gpt2.trace(["a b", "c d"]):
        layer.output[:] = layer.attachment(layer.output.clone(), hook=True)
        inside = layer.attachment.one.output.save()
        whole = layer.attachment.output.save()
        logits = gpt2.lm_head.output.save()
    tokens = torch.cat([ids(gpt2, "a b"), ids(gpt2, "c d")])
    same(logits, Pass(reference, tokens, **{"transformer.h.0": lambda value: value * 2}).logits)
    assert whole.shape[0] == 2
    assert torch.equal(whole, inside * 2)


def test_the_output_of_an_attached_module_is_not_assigned(gpt2: Any) -> None:
    """On purpose: it has run when its output is there."""
    layer = gpt2.transformer.h[0]
    layer.attachment = Outer()
    with pytest.raises(patchwire.SiteError) as caught, gpt2.trace("a b"):
        layer.attachment(layer.output, hook=True)
        layer.attachment.output = layer.output
    assert "Edit the value that the call returned" in refused(caught.value)


def test_an_attached_module_that_was_not_applied_has_no_output(gpt2: Any) -> None:
    layer = gpt2.transformer.h[2]
    layer.attachment = Outer()
    with pytest.raises(patchwire.GraphError) as caught, gpt2.trace("a b"):
        layer.attachment.output.save()
    assert "hook=True" in refused(caught.value)


def test_a_part_of_the_model_is_not_set(gpt2: Any) -> None:
    """On purpose: the model is on the server, and others use it."""
    with pytest.raises(patchwire.SiteError) as caught:
        gpt2.transformer.h[0].mlp = Outer()
    assert "under another name" in refused(caught.value)


# --- conditions -----------------------------------------------------------------------------------------------------


def test_a_branch_on_a_value_is_refused_and_told_what_to_write(gpt2: Any) -> None:
    """On purpose: the block runs before the model."""
    with pytest.raises(patchwire.BranchError) as caught, gpt2.session(), gpt2.trace("hello world"):
        if torch.all(gpt2.transformer.h[2].output < 100000):
            gpt2.transformer.h[-1].output[:] = 0
    assert "torch.where" in refused(caught.value)


def test_no_tensor_is_made_of_a_value_in_the_block(gpt2: Any) -> None:
    """On purpose: the block runs before the model."""
    with pytest.raises(patchwire.BranchError) as caught, gpt2.trace("hello world"):
        Tensor.clone(Tensor.detach(Tensor.as_subclass(gpt2.lm_head.output, Tensor)))
    assert "make the tensor after the block" in refused(caught.value)


def test_a_condition_is_written_as_a_choice_between_values(gpt2: Any) -> None:
    with gpt2.session(), gpt2.trace("hello world"):
        last = gpt2.transformer.h[-1].output
        small = torch.all(gpt2.transformer.h[2].output < 100000)
        gpt2.transformer.h[-1].output = torch.where(small, torch.zeros_like(last), last)
        output = gpt2.transformer.h[-1].output.save()
    assert not output.any()


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_the_input_of_a_layer_is_set_in_a_later_trace_of_a_session(gpt2: Any, reference: Any) -> None:
    with gpt2.session():
        with gpt2.trace(GARDEN):
            hidden = gpt2.transformer.h[3].inputs
            first = gpt2.lm_head.output.save()
        with gpt2.trace(GARDEN.replace("madison", "paris")):
            gpt2.transformer.h[3].input = hidden[0][0]
            second = gpt2.lm_head.output.save()
    same(first, Pass(reference, ids(gpt2, GARDEN)).logits)
    same(second, first)


# --- invokes and batches --------------------------------------------------------------------------------------------


def test_an_invoke_without_a_prompt_has_the_rows_of_those_above(gpt2: Any, reference: Any) -> None:
    with gpt2.trace() as tracer:
        with tracer.invoke(TOWER):
            one = gpt2.lm_head.output[:, -1].save()
        with tracer.invoke([GARDEN, TOWER]):
            two = gpt2.lm_head.output[:, -1].save()
        with tracer.invoke(GARDEN):
            three = gpt2.lm_head.output[:, -1].save()
        with tracer.invoke():
            everyone = gpt2.lm_head.output[:, -1].save()
        with tracer.invoke():
            again = gpt2.lm_head.output[:, -1].save()
    assert [each.shape[0] for each in (one, two, three, everyone, again)] == [1, 2, 1, 4, 4]
    assert torch.equal(torch.cat([one, two, three]), everyone)
    assert torch.equal(everyone, again)
    same(one, Pass(reference, ids(gpt2, TOWER)).logits[:, -1])
    same(two[1:], one)


def test_an_invoke_with_a_prompt_after_one_without_is_refused(gpt2: Any) -> None:
    """On purpose: the rows of an invoke are known when it is written."""
    with pytest.raises(patchwire.GraphError) as caught, gpt2.trace() as tracer:
        with tracer.invoke(TOWER):
            pass
        with tracer.invoke():
            gpt2.lm_head.output[:, -1].save()
        with tracer.invoke(GARDEN):
            pass
    assert "Write it last" in refused(caught.value)


@pytest.mark.parametrize(
    "groups",
    [
        [["hi"], ["a b c", "d"]],
        [["a b c", "d"], ["hi"]],
        [["hi", "a b c"], ["the quick brown fox", "d"]],
    ],
)
def test_lists_of_different_lengths_are_batched_without_padding(gpt2: Any, reference: Any, groups: Any) -> None:
    texts = [text for group in groups for text in group]
    with gpt2.trace(texts):
        listed = gpt2.lm_head.output[:, -1].save()
    with gpt2.trace() as tracer:
        for group in groups:
            with tracer.invoke(group if len(group) > 1 else group[0]):
                pass
        with tracer.invoke():
            invoked = gpt2.lm_head.output[:, -1].save()
    same(listed, torch.cat([Pass(reference, ids(gpt2, text)).logits[:, -1] for text in texts]))
    same(invoked, listed)


def test_an_invoke_tells_its_input_ids(gpt2: Any) -> None:
    with gpt2.trace() as tracer:
        with tracer.invoke("hello world") as invoker:
            found = invoker.inputs[1]["input_ids"].save()
        with tracer.invoke("fish"):
            gpt2.lm_head.output.save()
    assert torch.equal(found, ids(gpt2, "hello world"))


def test_there_are_no_inputs_outside_of_an_invoke(gpt2: Any) -> None:
    with pytest.raises(patchwire.GraphError) as caught, gpt2.trace() as tracer:
        print(tracer.inputs)
    assert "in one with a prompt" in refused(caught.value)


def test_prompts_may_be_token_ids(gpt2: Any, reference: Any) -> None:
    first, second = ids(gpt2, TOWER), ids(gpt2, GARDEN)
    with gpt2.trace() as tracer:
        with tracer.invoke(first):
            one = gpt2.lm_head.output[0, -1].save()
        with tracer.invoke(input_ids=second, attention_mask=torch.ones_like(second)):
            two = gpt2.lm_head.output[0, -1].save()
    same(one, Pass(reference, first).logits[0, -1])
    same(two, Pass(reference, second).logits[0, -1])


def test_a_call_outside_of_a_block_gives_the_models_output(gpt2: Any, reference: Any) -> None:
    encoding = gpt2.tokenizer(GARDEN, return_tensors="pt").to(gpt2.device)
    same(gpt2(**encoding)["logits"], reference(encoding["input_ids"]).logits.detach())


# --- scanning -------------------------------------------------------------------------------------------------------


def test_a_scan_gives_shapes_without_numbers(gpt2: Any) -> None:
    with gpt2.scan(GARDEN):
        before = gpt2.transformer.h[0].attn.input.save()
        after = gpt2.transformer.h[0].attn.output[0].save()
        width = gpt2.transformer.h[0].output.shape[-1].save()
    assert isinstance(before, torch._subclasses.fake_tensor.FakeTensor)
    assert isinstance(after, torch._subclasses.fake_tensor.FakeTensor)
    assert before.shape == after.shape == (1, 8, tiny.WIDTH)
    assert width == tiny.WIDTH


def test_a_scan_refuses_a_write_of_another_shape(gpt2: Any) -> None:
    """On purpose: the model would compute something else than it seems."""
    with pytest.raises(patchwire.ShapeError) as caught, gpt2.scan(GARDEN):
        gpt2.transformer.h[0].mlp.c_proj.output = torch.ones(1, 1, tiny.WIDTH).to(gpt2.device)
    assert "[1, 1, 24]" in str(caught.value)
    with gpt2.scan(GARDEN):
        gpt2.transformer.h[0].mlp.c_proj.output[:] = torch.ones(1, 1, tiny.WIDTH)
        shape = gpt2.transformer.h[0].mlp.c_proj.output.shape
    assert shape == (1, 8, tiny.WIDTH)


def test_a_scan_refuses_to_save_what_has_a_shape_only_in_a_run(gpt2: Any) -> None:
    """On purpose: nnsight would run the block on numbers that are none."""
    with pytest.raises(patchwire.GraphError) as caught, gpt2.scan(GARDEN):
        hidden = gpt2.transformer.h[0].output
        hidden[hidden > 0].save()
    assert "depends on data" in refused(caught.value)


def test_a_scan_needs_no_weights_here(gpt2: Any) -> None:
    with gpt2.scan(GARDEN):
        pass
    assert gpt2.dispatched is False


# --- order ----------------------------------------------------------------------------------------------------------


def test_modules_may_be_read_in_any_order(gpt2: Any, reference: Any) -> None:
    """On purpose: a read happens at its module, whatever line it is on."""
    with gpt2.trace("_"):
        late = gpt2.transformer.h[2].output.save()
        early = gpt2.transformer.h[1].input.save()
    expected = Pass(reference, ids(gpt2, "_"))
    same(late, expected["transformer.h.2"])
    same(early, expected["transformer.h.0"])


def test_a_write_of_what_comes_later_is_refused(gpt2: Any) -> None:
    with pytest.raises(patchwire.OrderError) as caught, gpt2.trace("_"):
        later = gpt2.transformer.h[2].output
        gpt2.transformer.h[1].skip(later)
    assert len(caught.value.lines) == 2


def test_a_layer_cannot_be_skipped_with_what_it_returns(gpt2: Any) -> None:
    with pytest.raises(patchwire.OrderError) as caught, gpt2.trace("_"):
        own = gpt2.transformer.h[0].output.save()
        gpt2.transformer.h[1].skip(own)
        gpt2.transformer.h[0].skip(own)
    assert "Assign it instead of skipping" in refused(caught.value)


# --- operations inside a forward ------------------------------------------------------------------------------------


def split_of(reference: Any, tokens: Tensor, layer: int) -> tuple[Tensor, ...]:
    return Pass(reference, tokens)[f"transformer.h.{layer}.attn.c_attn"].split(tiny.WIDTH, dim=2)


@needs_source
def test_the_output_of_an_operation_is_a_tuple(gpt2: Any, reference: Any) -> None:
    with gpt2.trace("_"):
        found = gpt2.transformer.h[0].attn.source.split_1.output.save()
    assert isinstance(found, tuple)
    for one, other in zip(found, split_of(reference, ids(gpt2, "_"), 0), strict=True):
        same(one, other)


@needs_source
def test_the_inputs_of_an_operation_are_a_tuple(gpt2: Any) -> None:
    with gpt2.trace("_"):
        found = gpt2.transformer.h[0].attn.source.attention_interface_1.inputs.save()
    assert isinstance(found, tuple)


@needs_source
def test_reading_operations_leaves_the_model_as_it_was(gpt2: Any, reference: Any) -> None:
    gpt2.transformer.h[0].attn.source  # noqa: B018
    with gpt2.trace("_"):
        gpt2.transformer.h[0].attn.c_attn.output = torch.zeros_like(gpt2.transformer.h[0].attn.c_attn.output)
        out = gpt2.transformer.h[0].attn.source.split_1.output.save()
    assert not out[0].any()
    same(gpt2(GARDEN)["logits"], Pass(reference, ids(gpt2, GARDEN)).logits)


@needs_source
def test_several_operations_are_read_in_one_block(gpt2: Any, reference: Any) -> None:
    with gpt2.trace("_"):
        splits, attended = [], []
        for layer in gpt2.transformer.h[:2]:
            splits.append(layer.attn.source.split_1.output.save())
            attended.append(layer.attn.source.attention_interface_1.output.save())
    assert all(isinstance(each, tuple) for each in (*splits, *attended))
    same(splits[1][0], split_of(reference, ids(gpt2, "_"), 1)[0])


@needs_source
def test_the_output_of_an_operation_is_replaced(gpt2: Any) -> None:
    with gpt2.trace("_"):
        out = gpt2.transformer.h[0].attn.source.split_1.output
        out = (torch.zeros_like(out[0]), *out[1:])
        gpt2.transformer.h[1].attn.source.split_1.output = out
        found = gpt2.transformer.h[1].attn.source.split_1.output.save()
    assert isinstance(found, tuple)
    assert not found[0].any()


@needs_source
def test_an_operation_inside_an_operation_is_read(gpt2: Any) -> None:
    with gpt2.trace("_"):
        inside = gpt2.transformer.h[0].attn.source.attention_interface_1.source
        found = inside.nn_functional_softmax_0.output.save()  # with nnsight, of the fused kernel: it has no inside
    assert isinstance(found, Tensor)


@needs_source
def test_looking_into_a_builtin_does_not_disturb_it(gpt2: Any) -> None:
    with gpt2.trace("_"):
        with contextlib.suppress(PatchwireError):  # there is nothing inside it
            gpt2.transformer.h[0].attn.source.split_1.source  # noqa: B018
        out = gpt2.transformer.h[0].attn.source.split_1.output.save()
    assert isinstance(out, tuple)


@needs_source
def test_an_unknown_operation_is_an_attribute_error(gpt2: Any) -> None:
    with pytest.raises(AttributeError), gpt2.trace("_"):
        gpt2.transformer.h[0].attn.source.my_function.output.save()


@needs_source
def test_an_operation_is_kept_outside_of_a_block(address: str) -> None:
    gpt2 = LanguageModel("gpt2", server=address, progress=False)
    operation = gpt2.transformer.h[0].attn.source.split_1
    with gpt2.trace(GARDEN):
        out = operation.output.save()
    assert isinstance(out, tuple)


@needs_source
def test_the_output_of_an_operation_moves_between_invokes(gpt2: Any) -> None:
    attention = gpt2.transformer.h[0].attn.source.attention_interface_1
    with gpt2.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(TOWER):
            taken = attention.output[0].save()
            barrier()
        with tracer.invoke(GARDEN):
            barrier()
            attention.output[0][:, -1, 0, :] = taken[:, -1, 0, :]
            put = attention.output[0].save()
    assert torch.equal(taken[:, -1, 0, :], put[:, -1, 0, :])


# --- skipping -------------------------------------------------------------------------------------------------------


def test_a_skipped_layer_returns_what_is_given(gpt2: Any, reference: Any) -> None:
    with gpt2.trace("_"):
        before = gpt2.transformer.h[0].output.save()
        gpt2.transformer.h[1].skip(before)
        after = gpt2.transformer.h[1].output.save()
        logits = gpt2.lm_head.output.save()
    assert torch.equal(before, after)
    replaced = Pass(reference, ids(gpt2, "_"))["transformer.h.0"]
    same(logits, Pass(reference, ids(gpt2, "_"), **{"transformer.h.1": lambda _: replaced}).logits)


def test_a_skip_wins_over_a_changed_input(gpt2: Any) -> None:
    with gpt2.trace("_"):
        before = gpt2.transformer.h[0].output.save()
        inputs = gpt2.transformer.h[1].inputs
        gpt2.transformer.h[1].inputs = ((torch.zeros_like(gpt2.transformer.h[1].input),), *inputs[1:])
        changed = gpt2.transformer.h[1].input.save()
        gpt2.transformer.h[1].skip(before)
        after = gpt2.transformer.h[1].output.save()
    assert not changed.any()
    assert torch.equal(after, before)


def test_one_argument_is_set_without_its_tuple(gpt2: Any, reference: Any) -> None:
    layer = gpt2.transformer.h[1]
    with gpt2.trace("_"):
        layer.inputs = (layer.input * 2, *layer.inputs[1:])
        logits = gpt2.lm_head.output.save()
    changed = Pass(reference, ids(gpt2, "_"), **{"transformer.h.0": lambda value: value * 2})
    same(logits, changed.logits)


def test_several_layers_are_skipped(gpt2: Any) -> None:
    with gpt2.trace("_"):
        first = gpt2.transformer.h[0].output
        gpt2.transformer.h[1].skip(first)
        second = gpt2.transformer.h[1].output
        gpt2.transformer.h[2].skip(second)
        third = gpt2.transformer.h[2].output.save()
        gpt2.transformer.h[3].skip(third)
        last = gpt2.transformer.h[3].output.save()
    assert torch.equal(last, third)


def test_the_inside_of_a_skipped_layer_is_refused(gpt2: Any) -> None:
    with pytest.raises(patchwire.SiteError) as caught, gpt2.trace("hello world"):
        gpt2.transformer.h[1].skip(gpt2.transformer.h[0].output)
        gpt2.transformer.h[1].attn.output[0].save()
    assert "is skipped" in refused(caught.value)


def test_a_skip_is_of_one_invoke(gpt2: Any) -> None:
    with gpt2.trace() as tracer:
        with tracer.invoke(TOWER):
            one = gpt2.transformer.h[0].output.save()
            gpt2.transformer.h[1].skip(one)
            after_one = gpt2.transformer.h[1].output.save()
        with tracer.invoke(GARDEN):
            two = gpt2.transformer.h[0].output.save()
            gpt2.transformer.h[1].skip(two)
            after_two = gpt2.transformer.h[1].output.save()
    assert torch.equal(after_one, one)
    assert torch.equal(after_two, two)


# --- steps ----------------------------------------------------------------------------------------------------------


def steps_of(reference: Any, tokens: Tensor) -> list[Tensor]:
    """The likeliest token of each step."""
    return [logits[0, -1].argmax() for logits in Generated(reference, tokens).outputs["lm_head"]]


def test_all_steps_are_gone_through_in_either_spelling(gpt2: Any, reference: Any) -> None:
    found = []
    for spelling in ("all", "iter"):
        with gpt2.generate(GARDEN, max_new_tokens=STEPS) as tracer:
            tokens = [].save()
            for _ in tracer.all() if spelling == "all" else tracer.iter[:]:
                tokens.append(gpt2.lm_head.output[0][-1].argmax(dim=-1))
        found.append(tokens)
    assert found[0] == found[1] == steps_of(reference, ids(gpt2, GARDEN))
    assert len(gpt2.tokenizer.batch_decode(found[0])[0].split()) == STEPS


def test_a_with_block_over_several_steps_is_refused(gpt2: Any) -> None:
    """On purpose: a block of Python runs once."""
    with (
        pytest.raises(patchwire.GraphError) as caught,
        gpt2.generate(GARDEN, max_new_tokens=STEPS) as tracer,
        tracer.iter[:],
    ):
        pass
    assert "for step in tracer.iter" in refused(caught.value)


def test_a_with_block_over_one_step_is_of_that_step(gpt2: Any, reference: Any) -> None:
    with gpt2.generate(GARDEN, max_new_tokens=STEPS) as tracer:
        with tracer.iter[2]:
            late = gpt2.lm_head.output.save()
        early = gpt2.lm_head.output.save()
    expected = Generated(reference, ids(gpt2, GARDEN)).outputs["lm_head"]
    same(late, expected[2])
    same(early[:, -1:], expected[0][:, -1:])


def test_a_slice_of_steps(gpt2: Any, reference: Any) -> None:
    with gpt2.generate(GARDEN, max_new_tokens=STEPS) as tracer:
        tokens = [].save()
        for _ in tracer.iter[1:3]:
            tokens.append(gpt2.lm_head.output[0][-1].argmax(dim=-1))
    assert tokens == steps_of(reference, ids(gpt2, GARDEN))[1:3]


def test_steps_by_their_number(gpt2: Any) -> None:
    with gpt2.generate(GARDEN, max_new_tokens=STEPS) as tracer:
        one = [].save()
        for layer in range(STEPS):
            for _ in tracer.iter[layer]:
                one.append(gpt2.transformer.h[layer].output)
    with gpt2.generate(GARDEN, max_new_tokens=STEPS) as tracer:
        other = [].save()
        for step in tracer.iter[:STEPS]:
            other.append(gpt2.transformer.h[step].output)
    assert len(one) == STEPS
    assert all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def test_every_invoke_goes_through_its_own_steps(gpt2: Any, reference: Any) -> None:
    with gpt2.generate(max_new_tokens=STEPS) as tracer:
        with tracer.invoke(GARDEN):
            one = [].save()
            for _ in tracer.iter[1:3]:
                one.append(gpt2.lm_head.output[0][-1].argmax(dim=-1))
        with tracer.invoke(GARDEN):
            other = [].save()
            for _ in tracer.iter[:3]:
                other.append(gpt2.lm_head.output[0][-1].argmax(dim=-1))
    expected = steps_of(reference, ids(gpt2, GARDEN))
    assert one == expected[1:3]
    assert other == expected


def test_a_layer_is_skipped_in_one_step(gpt2: Any) -> None:
    with gpt2.generate("_", max_new_tokens=STEPS) as tracer:
        found = [].save()
        for step in tracer.iter[:]:
            if step == 1:
                gpt2.transformer.h[1].skip(torch.zeros_like(gpt2.transformer.h[0].output))
            found.append(gpt2.transformer.h[1].output)
    assert [bool(each.any()) for each in found] == [True, False, True]


def test_invokes_without_a_prompt_follow_each_other(gpt2: Any) -> None:
    with gpt2.trace() as tracer:
        with tracer.invoke(TOWER):
            pass
        with tracer.invoke():
            before = gpt2.transformer.h[0].output.clone().save()
        with tracer.invoke():
            for _ in tracer.iter[0]:
                gpt2.transformer.h[0].output[:] = 0
        with tracer.invoke():
            after = gpt2.transformer.h[0].output.save()
    assert before.any()
    assert not after.any()


def test_steps_after_a_read_of_the_first(gpt2: Any) -> None:
    logits = []
    with gpt2.generate("_", max_new_tokens=5) as tracer:
        first = gpt2.transformer.h[0].output.clone().save()
        for _ in tracer.iter[2:4]:
            logits.append(gpt2.lm_head.output.save())
    assert isinstance(first, Tensor)
    assert [each.shape for each in logits] == [(1, 1, tiny.VOCABULARY)] * 2


def test_invokes_of_different_prompts_generate_side_by_side(gpt2: Any, reference: Any) -> None:
    with gpt2.generate(max_new_tokens=STEPS) as tracer:
        with tracer.invoke(TOWER):
            one = [].save()
            for _ in tracer.iter[:]:
                one.append(gpt2.lm_head.output[0][-1].argmax(dim=-1))
        with tracer.invoke(GARDEN):
            other = [].save()
            for _ in tracer.iter[0:3]:
                other.append(gpt2.lm_head.output[0][-1].argmax(dim=-1))
    assert one == steps_of(reference, ids(gpt2, TOWER))
    assert other == steps_of(reference, ids(gpt2, GARDEN))


def test_a_trace_has_one_step_and_says_that_it_generates_nothing(gpt2: Any) -> None:
    with pytest.warns(patchwire.PatchwireWarning, match=r"Write `model.generate"):
        trace = gpt2.trace(GARDEN, max_new_tokens=3)
    with trace as tracer:
        logits = [].save()
        for _ in tracer.iter[:]:
            logits.append(gpt2.lm_head.output[0][-1].argmax(dim=-1))
    assert len(logits) == 1


def test_next_goes_on_to_the_next_step(gpt2: Any, reference: Any) -> None:
    with gpt2.generate(GARDEN, max_new_tokens=STEPS) as tracer:
        first = gpt2.lm_head.output.save()
        second = gpt2.lm_head.next().output.save()
        tracer.next()
        third = gpt2.lm_head.output.save()
    expected = Generated(reference, ids(gpt2, GARDEN)).outputs["lm_head"]
    for found, step in zip((first, second, third), expected, strict=True):
        same(found[:, -1], step[:, -1])


# --- caches ---------------------------------------------------------------------------------------------------------


def test_a_cache_has_every_output(gpt2: Any, reference: Any) -> None:
    with gpt2.trace(GARDEN) as tracer:
        cache = tracer.cache()
    expected = Pass(reference, ids(gpt2, GARDEN))
    for index in range(LAYERS):
        same(cache[f"model.transformer.h.{index}"].output, expected[f"transformer.h.{index}"])
    assert cache["model.transformer.h.0"].inputs is None


def test_a_cache_is_read_after_its_block(gpt2: Any) -> None:
    with pytest.raises(patchwire.GraphError) as caught, gpt2.trace(GARDEN) as tracer:
        print(tracer.cache()["model.lm_head"])
    assert "Read it after it" in refused(caught.value)


def test_a_cache_has_outputs_and_inputs(gpt2: Any) -> None:
    with gpt2.trace(GARDEN) as tracer:
        cache = tracer.cache(include_inputs=True)
    assert torch.equal(cache["model.transformer.h.0"].output, cache["model.transformer.h.1"].inputs[0][0])


def test_a_cache_has_inputs_only(gpt2: Any) -> None:
    with gpt2.trace(GARDEN) as tracer:
        cache = tracer.cache(include_inputs=True, include_output=False)
    assert cache["model.transformer.h.0"].inputs is not None
    assert cache["model.transformer.h.0"].output is None


def test_a_cache_of_a_generation_has_every_step(gpt2: Any, reference: Any) -> None:
    with gpt2.generate(GARDEN, max_new_tokens=STEPS) as tracer:
        cache = tracer.cache(modules=[gpt2.transformer.h[0].attn.c_attn])
    found = cache["model.transformer.h.0.attn.c_attn"]
    assert len(found) == STEPS
    expected = Generated(reference, ids(gpt2, GARDEN)).outputs["transformer.h.0.attn.c_attn"]
    for one, other in zip(found.output, expected, strict=True):
        same(one, other)


def test_a_cache_shows_interventions(gpt2: Any) -> None:
    with gpt2.trace(GARDEN) as tracer:
        cache = tracer.cache()
        gpt2.transformer.h[0].attn.c_attn.output = torch.zeros_like(gpt2.transformer.h[0].attn.c_attn.output)
    assert not cache["model.transformer.h.0.attn.c_attn"].output.any()


def test_a_cache_is_of_its_invoke(gpt2: Any) -> None:
    with gpt2.trace() as tracer:
        with tracer.invoke(GARDEN):
            pass
        with tracer.invoke(TOWER):
            cache = tracer.cache()
            attended = gpt2.transformer.h[0].attn.c_attn.output.cpu().save()
    assert torch.equal(cache["model.transformer.h.0.attn.c_attn"].output, attended)


def test_a_cache_after_an_intervention_is_of_the_whole_pass(gpt2: Any, reference: Any) -> None:
    """On purpose: what happens in a block has the order of the modules, not of the lines."""
    with gpt2.trace(GARDEN) as tracer:
        gpt2.transformer.h[1].attn.c_attn.output = torch.zeros_like(gpt2.transformer.h[1].attn.c_attn.output)
        cache = tracer.cache(include_inputs=True)
    expected = Pass(reference, ids(gpt2, GARDEN), **{"transformer.h.1.attn.c_attn": zeros})
    same(cache["model.transformer.h.0"].output, expected["transformer.h.0"])
    assert torch.equal(cache["model.transformer.h.2"].output, cache["model.transformer.h.3"].inputs[0][0])
    same(cache["model.transformer"].output.last_hidden_state, expected["transformer"].last_hidden_state)


def test_a_cache_of_a_skipped_layer_has_what_it_was_replaced_with(gpt2: Any) -> None:
    with gpt2.trace(GARDEN) as tracer:
        cache = tracer.cache()
        out = gpt2.transformer.h[0].output.save()
        gpt2.transformer.h[1].skip(gpt2.transformer.h[0].output)
    assert torch.equal(cache["model.transformer.h.1"].output, out.cpu())
    assert "model.transformer.h.1.attn" not in cache


@pytest.mark.parametrize("steps", [0, 2])
def test_a_cache_of_some_modules_by_their_paths(gpt2: Any, steps: int) -> None:
    paths = [f"model.transformer.h.{index}" for index in range(3)]
    block = gpt2.generate(GARDEN, max_new_tokens=steps) if steps else gpt2.trace(GARDEN)
    with block as tracer:
        cache = tracer.cache(modules=paths, include_inputs=True)
    assert cache.keys() == paths
    if steps:
        assert len(cache[paths[0]]) == steps
    else:
        assert torch.equal(cache[paths[0]].output, cache[paths[1]].inputs[0][0])


def test_a_cache_of_modules_themselves(gpt2: Any) -> None:
    with gpt2.trace(GARDEN) as tracer:
        cache = tracer.cache(modules=list(gpt2.transformer.h), include_inputs=True)
    assert len(cache.keys()) == LAYERS
    assert torch.equal(cache["model.transformer.h.0"].output, cache["model.transformer.h.1"].inputs[0][0])


def test_several_caches(gpt2: Any) -> None:
    with gpt2.trace(GARDEN) as tracer:
        attention = tracer.cache(modules=[layer.attn for layer in gpt2.transformer.h])
        mlp = tracer.cache(modules=[layer.mlp for layer in gpt2.transformer.h])
    assert len(attention.keys()) == len(mlp.keys()) == LAYERS
    assert "model.transformer.h.0.attn" in attention
    assert "model.transformer.h.0.mlp" not in attention
    assert "model.transformer.h.0.mlp" in mlp
    assert "model.transformer.h.0.attn" not in mlp


def test_a_cache_is_gone_through_by_attributes(gpt2: Any) -> None:
    with gpt2.trace(GARDEN) as tracer:
        cache = tracer.cache(modules=[*gpt2.transformer.h, gpt2.lm_head])
    assert len(cache) == LAYERS + 1
    output = cache["model.transformer.h.0"].output
    assert torch.equal(output, cache.model.transformer.h[0].output)
    assert torch.equal(output, cache.model.transformer["h.0"].output)
    assert cache.model.lm_head.output is not None
    with pytest.raises(IndexError):
        cache.model.transformer.h[LAYERS]
    with pytest.raises(AttributeError):
        cache.model.transformer.h[0].mlp  # noqa: B018
    with pytest.raises(KeyError):
        cache.model.transformer[0]


def test_a_cache_without_inputs_has_no_input(gpt2: Any) -> None:
    with gpt2.trace(GARDEN) as tracer:
        cache = tracer.cache(modules=[gpt2.transformer.h[0]])
    assert cache["model.transformer.h.0"].input is None


def test_a_cache_knows_other_names(address: str) -> None:
    rename = {"transformer": "model", "h.0": "first_layer", "1": "second_layer"}
    gpt2: Any = LanguageModel("gpt2", server=address, rename=rename, progress=False)
    with gpt2.trace(GARDEN) as tracer:
        cache = tracer.cache()
    first, second = cache["model.transformer.h.0"].output, cache["model.transformer.h.1"].output
    assert torch.equal(first, cache.model.model.first_layer.output)
    assert torch.equal(first, cache.model.transformer.h[0].output)
    assert torch.equal(first, cache["model.model.first_layer"].output)
    assert torch.equal(second, cache.model.model.h["second_layer"].output)
    assert torch.equal(second, cache["model.model.h.second_layer"].output)


# --- other names ----------------------------------------------------------------------------------------------------


def named(address: str, rename: dict[str, Any]) -> Any:
    return LanguageModel("gpt2", server=address, rename=rename, progress=False)


def test_a_name_of_a_module_is_another_in_every_layer(address: str) -> None:
    gpt2 = named(address, {"mlp": "my_mlp"})
    with gpt2.trace(GARDEN):
        one = gpt2.transformer.h[1].mlp.output.save()
        other = gpt2.transformer.h[1].my_mlp.output.save()
    assert torch.equal(one, other)


def test_a_path_gets_a_name_where_it_starts(address: str) -> None:
    gpt2 = named(address, {"transformer.h.3.mlp": "my_mlp"})
    with gpt2.trace(GARDEN):
        one = gpt2.transformer.h[3].mlp.output.save()
        other = gpt2.my_mlp.output.save()
    assert torch.equal(one, other)


def test_a_list_of_modules_gets_another_name(address: str) -> None:
    gpt2 = named(address, {".h": "blocks"})
    with gpt2.trace(GARDEN):
        one = gpt2.transformer.blocks[1].mlp.output.save()
        other = gpt2.transformer.h[1].mlp.output.save()
    assert torch.equal(one, other)


def test_a_list_of_modules_gets_a_name_at_the_model(address: str) -> None:
    gpt2 = named(address, {"transformer.h": ["layers", "blocks"]})
    with gpt2.trace(GARDEN):
        one = gpt2.layers[1].mlp.output.save()
        other = gpt2.blocks[1].mlp.output.save()
    assert torch.equal(one, other)


def test_a_name_that_is_taken_is_refused(address: str) -> None:
    with pytest.raises(patchwire.SiteError, match="Choose another name"):
        named(address, {"mlp": "attn"})


@pytest.mark.parametrize(
    ("rename", "says"),
    [
        ({nn.Linear: "linear"}, "classes are on the server"),
        ({"transformer.h.0.mlp": "lm_head"}, "is something else already"),
        ({"transformer.wte": "lm_head.embedding"}, "under another module"),
        ({"transformer.h.*": "block"}, f"means {LAYERS} modules"),
    ],
)
def test_a_name_that_cannot_be_given_is_refused(address: str, rename: dict[Any, Any], says: str) -> None:
    with pytest.raises(patchwire.SiteError) as caught:
        named(address, rename)
    assert says in refused(caught.value)


# --- what else scripts do -------------------------------------------------------------------------------------------


def test_a_model_on_this_machine_behaves_the_same(directory: Path, reference: Any) -> None:
    gpt2: Any = LanguageModel(str(directory), device_map="cpu", dispatch=False, progress=False)
    with gpt2.generate(GARDEN, max_new_tokens=1):
        output = gpt2.generator.output.save()
    assert torch.equal(output, reference.generate(output[:, :-1], max_new_tokens=1, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("before", [False, True])
def test_the_streamer_gives_the_tokens_of_a_step(gpt2: Any, before: bool) -> None:
    with gpt2.generate(GARDEN, max_new_tokens=8, min_new_tokens=8) as tracer:
        hidden, streamed = [].save(), [].save()
        if before:
            streamed.append(gpt2.generator.streamer.output)
        for steps in (slice(2, 6), slice(6, 8)):
            for _ in tracer.iter[steps]:
                hidden.append(gpt2.transformer.h[-2].output)
                streamed.append(gpt2.generator.streamer.output)
        tokens = tracer.result.save()
    assert len(hidden) == 6
    assert len(streamed) == 6 + before
    prompt = len(GARDEN.split())
    assert torch.equal(torch.cat(streamed[-6:]), tokens[0, prompt + 1 : prompt + 7])


def test_containers_and_numbers_are_saved_by_their_own_method(gpt2: Any) -> None:
    with gpt2.trace("fish") as tracer:
        kept = {"h": gpt2.transformer.h[0].output, "more": [gpt2.lm_head.output]}.save()
        width = gpt2.transformer.h[0].output.shape[-1].save()
        function = nnsight.save(gpt2.transformer.h[1].output)
        tracer.stop()
    assert type(kept["h"]) is type(kept["more"][0]) is type(function) is Tensor
    assert width == tiny.WIDTH


def test_save_outside_of_a_block_is_refused() -> None:
    with pytest.raises(patchwire.GraphError) as caught:
        nnsight.save([])
    assert "model.trace" in refused(caught.value)


def test_a_value_is_a_tensor_to_isinstance_inside_the_block(gpt2: Any) -> None:
    with gpt2.trace("fish", remote=True):
        hidden = gpt2.transformer.h[0].output
        assert isinstance(hidden, Tensor)
        assert hidden.shape == (1, 1, tiny.WIDTH)
        assert hidden.device == gpt2.device
        with pytest.raises(patchwire.BranchError):
            hidden.sum().item()
        unsaved = hidden * 2
        hidden.save()
    assert type(hidden) is Tensor
    with pytest.raises(patchwire.GraphError, match=r"Write `.save\(\)` inside the block"):
        unsaved + 1


def test_a_module_that_does_not_exist_is_an_error_of_python(gpt2: Any) -> None:
    with pytest.raises(IndexError), gpt2.trace("fish"):
        gpt2.transformer.h[99].output.save()
    with pytest.raises(AttributeError), gpt2.trace("fish"):
        gpt2.transformer.nothing.output.save()


def test_an_unknown_argument_of_generate_is_refused_by_name(gpt2: Any) -> None:
    with pytest.raises(patchwire.InputError) as caught:
        gpt2.generate("fish", num_beams=4)
    assert "num_beams" in refused(caught.value)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda gpt2: LanguageModel("gpt2", task="fill-mask"), "The task 'fill-mask' is not known"),
        (lambda gpt2: gpt2.to(torch.float16), "chosen where it was loaded"),
        (lambda gpt2: gpt2.session(pause=True), "A session takes no pause"),
        (lambda gpt2: gpt2.edit(pause=True), "An edit takes no pause"),
        (lambda gpt2: gpt2.trace("fish", "hi"), "takes no more than a prompt"),
        (lambda gpt2: gpt2.trace(pixel_values=1), "takes no `pixel_values`"),
        (lambda gpt2: gpt2.tokenizer("fish", truncation=True), "takes no truncation"),
        (lambda gpt2: gpt2.tokenizer(["fish", "a b"], return_tensors="pt"), "different lengths"),
    ],
)
def test_what_is_asked_for_in_vain_is_refused_by_name(gpt2: Any, ask: Any, says: str) -> None:
    with pytest.raises(patchwire.InputError) as caught:
        ask(gpt2)
    assert says in refused(caught.value)


def test_a_dtype_that_the_model_is_not_loaded_in_is_refused(address: str) -> None:
    with pytest.raises(patchwire.InputError) as caught:
        LanguageModel("gpt2", server=address, torch_dtype=torch.bfloat16, progress=False)
    assert "loaded in torch.float32, not in torch.bfloat16" in refused(caught.value)


def test_a_tuple_is_unpacked_with_what_is_no_tensor_in_it(gpt2: Any, reference: Any) -> None:
    with gpt2.trace("fish"):
        hidden, weights = gpt2.transformer.h[0].attn.output
        hidden.save()
    expected, no_weights = Pass(reference, ids(gpt2, "fish"))["transformer.h.0.attn"]
    same(hidden, expected)
    assert weights is no_weights is None


def test_a_model_output_is_a_mapping_with_attributes(gpt2: Any, reference: Any) -> None:
    with gpt2.trace("fish") as tracer:
        logits = gpt2.output.logits.save()
        result = tracer.result.save()
    assert torch.equal(logits, result[0])
    assert torch.equal(logits, result["logits"])
    same(logits, Pass(reference, ids(gpt2, "fish")).logits)
