"""What multiplies matrices changes the last bits of a number, and nothing else.

oneDNN is asked for by name here, so that it is tested on processors where it is not the faster one, too.
"""

from __future__ import annotations

import itertools
import resource
import threading
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import patchwire
import tiny

MIB = 1 << 20
STATM = Path("/proc/self/statm")
IDS = [5, 17, 3, 41, 8, 29]


@pytest.fixture(scope="module", params=["gpt2", "llama", "mamba"])
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def reference(name: str) -> PreTrainedModel:
    return tiny.build(name).requires_grad_(False)


@pytest.fixture(scope="module")
def model(name: str) -> patchwire.Model:
    return patchwire.local(tiny.build(name), name=name, matmul="onednn", progress=False)


def logits(reference: PreTrainedModel, ids: list[int] = IDS) -> Tensor:
    found: Tensor = reference(torch.tensor([ids])).logits
    return found


def resident() -> int:
    """How many bytes of memory this process has."""
    return int(STATM.read_text().split()[1]) * resource.getpagesize()


def at(model: patchwire.Model, path: str) -> Any:
    """What has a path in the Hugging Face model."""
    return reduce(
        lambda owner, part: owner[int(part)] if part.isdigit() else getattr(owner, part), path.split("."), model
    )


def test_numbers_are_the_same_up_to_rounding(model: patchwire.Model, reference: PreTrainedModel) -> None:
    with model.trace(IDS):
        found = model.logits.save()

    torch.testing.assert_close(found.value, logits(reference), atol=1e-5, rtol=1e-5)


def test_those_of_exact_runs_to_the_last_bit(model: patchwire.Model, reference: PreTrainedModel) -> None:
    with model.trace(IDS, exact=True):
        found = model.logits.save()

    assert torch.equal(found.value, logits(reference))


def test_and_those_of_a_server_that_was_told_so(name: str, reference: PreTrainedModel) -> None:
    model = patchwire.local(tiny.build(name), name=name, matmul="pytorch", progress=False)
    with model.trace(IDS):
        found = model.logits.save()

    assert torch.equal(found.value, logits(reference))


def test_who_looks_changes_not_a_bit(model: patchwire.Model, reference: PreTrainedModel) -> None:
    """Where somebody waits, another forward stands in the module's place."""
    products = [path for path, each in reference.named_modules() if type(each).__name__ in ("Linear", "Conv1D")]
    inner = [path for path in products if not path.endswith("dt_proj")]  # Mamba takes its weights, and calls it never
    with model.trace(IDS):
        alone = model.logits.save()
    with model.trace(IDS):
        for path in inner:
            at(model, path).output.save()
        watched = model.logits.save()

    assert torch.equal(alone.value, watched.value)


def test_gradients_are_pytorchs(model: patchwire.Model, reference: PreTrainedModel) -> None:
    """Also where what they come from is one number everywhere, which is not laid out in memory."""
    with model.trace(IDS):
        states = model.embed.output
        found = [patchwire.grad(each, states).save() for each in (model.logits.sum(), model.logits[0, -1, 7])]

    embedded = reference.get_input_embeddings()(torch.tensor([IDS])).requires_grad_()
    whole = reference(inputs_embeds=embedded).logits
    for one, of in zip(found, (whole.sum(), whole[0, -1, 7]), strict=True):
        (expected,) = torch.autograd.grad(of, embedded, retain_graph=True)
        torch.testing.assert_close(one.value, expected, atol=1e-4, rtol=1e-4)


def test_gradients_pass_edits_in_place(model: patchwire.Model, reference: PreTrainedModel) -> None:
    head = reference.get_output_embeddings()

    def edited(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output[:, 2:, :9] *= 3
        return output

    with model.trace(IDS):
        states = model.embed.output
        model.lm_head.output[:, 2:, :9] *= 3
        gradient = patchwire.grad(model.logits.pow(2).sum(), states).save()

    embedded = reference.get_input_embeddings()(torch.tensor([IDS])).requires_grad_()
    handle = head.register_forward_hook(edited)
    (expected,) = torch.autograd.grad(reference(inputs_embeds=embedded).logits.pow(2).sum(), embedded)
    handle.remove()
    torch.testing.assert_close(gradient.value, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("path", ["transformer.h.1.mlp.c_fc", "transformer.h.2.attn.c_proj"])
def test_gradients_of_weights(path: str) -> None:
    module = tiny.build("gpt2")
    model = patchwire.local(module, name="gpt2", matmul="onednn", progress=False)
    with model.trace(IDS):
        owner = at(model, path)
        found = [each.save() for each in patchwire.grad(model.logits[0, -1].max(), [owner.weight, owner.bias])]

    own = module.get_submodule(path).requires_grad_()
    expected = torch.autograd.grad(logits(module)[0, -1].max(), [own.weight, own.bias])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.value, other, atol=1e-5, rtol=1e-5)


def test_generations(model: patchwire.Model, reference: PreTrainedModel) -> None:
    with model.generate(IDS, max_new_tokens=8) as generation:
        found = generation.output.save()

    expected = reference.generate(torch.tensor([IDS]), max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(found.value, expected)


def test_a_model_of_ours_is_left_as_it_was() -> None:
    """Also while a pass runs: another thread of the program may have the model, too."""
    module = tiny.build("llama").requires_grad_(False)
    before, seen, done = logits(module), list[bool](), threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.append(torch.equal(logits(module), before))

    model = patchwire.local(module, name="llama", matmul="onednn", progress=False)
    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(20):
        with model.trace(IDS * 5):
            model.logits.save()
    done.set()
    thread.join()

    assert seen
    assert all(seen)
    assert not any("forward" in vars(each) for each in module.modules())


WEIGHTS = {
    "expanded": lambda whole: whole[:1].expand(whole.shape),
    "every other": lambda whole: torch.stack([whole, whole + 1], 1)[:, 0],
    "turned": lambda whole: whole.flip(0),
}


@pytest.mark.parametrize(("how", "which"), [*itertools.product(WEIGHTS, ("weight", "bias"))])
def test_weights_of_any_layout(how: str, which: str) -> None:
    """oneDNN takes other numbers for those of a bias that are not next to each other, and says nothing."""
    module = tiny.build("gpt2").requires_grad_(False)
    own = module.get_submodule("transformer.h.1.mlp.c_proj")
    setattr(own, which, nn.Parameter(WEIGHTS[how](getattr(own, which)), requires_grad=False))

    model = patchwire.local(module, name="gpt2", matmul="onednn", progress=False)
    with model.trace(IDS):
        found = model.logits.save()

    torch.testing.assert_close(found.value, logits(module), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not STATM.exists(), reason="nobody says how much memory this process has")
def test_prompts_of_many_sizes_take_no_more_memory() -> None:
    """oneDNN keeps the code that it makes for each number of tokens: 0.6 MiB for each matrix."""
    model = patchwire.local(tiny.build("llama"), name="llama", matmul="onednn", progress=False)
    sizes = {rows * length: (rows, length) for rows in range(1, 12) for length in range(1, 60)}
    before = resident()
    for rows, length in sizes.values():
        with model.trace([[7] * length] * rows):
            model.layers[-1].output[0, 0].save()

    assert len(sizes) > 200
    assert resident() - before < 256 * MIB


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(patchwire.ModelNotFoundError, match="`blis` is no matmul") as caught:
        patchwire.local(tiny.build("gpt2"), matmul="blis")
    assert "onednn" in str(caught.value)
