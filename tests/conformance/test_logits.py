"""Logits are computed at the positions where somebody looks at them, and are what they are when all are computed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForCausalLM

import patchwire
import tiny
from conformance.hooks import assert_same, forward

SHORT, LONG = tiny.prompt(6), tiny.prompt(9)
DEFAULT = (*tiny.CORE, "gemma2", "falcon_h1")
FAMILIES = [
    pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.slow]) for name in tiny.CONFIGS if name != "odd"
]


class Watched:
    """A model, its proxy, and to how many positions of all rows the unembedding was applied in each pass."""

    def __init__(self, name: str) -> None:
        self.reference: Any = tiny.build(name).requires_grad_(False)
        served: Any = tiny.build(name).requires_grad_(False)
        self.model = patchwire.local(served, progress=False)
        self.positions: list[int] = []
        head = served.get_submodule(self.model.catalogue.raw("lm_head"))
        with self.model.trace(SHORT):  # whatever is found out when it is first asked
            self.model.logits[0, -1].save()
        head.register_forward_hook(lambda _, __, output: self.positions.append(output[..., 0].numel()))

    def expected(self, prompt: list[int]) -> torch.Tensor:
        return forward(self.reference, prompt).logits


@pytest.fixture(scope="module")
def gpt2() -> Watched:
    return Watched("gpt2")


@pytest.mark.parametrize("name", FAMILIES)
def test_of_the_last_token_alone(name: str) -> None:
    watched = Watched(name)
    model = watched.model
    with model.trace(LONG):
        last = model.logits[0, -1].save()

    assert watched.positions == [1]
    assert_same(last.value, watched.expected(LONG)[0, -1])


INDICES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "a position": (lambda logits: logits[0, 2], 1),
    "one from the end": (lambda logits: logits[:, -3, 5:9], 1),
    "some": (lambda logits: logits[:, 1:4], 3),
    "every third": (lambda logits: logits[0, 2::3], 3),
    "most": (lambda logits: logits[:, 1:6], 5),
    "each of them": (lambda logits: logits[:, 0:9], 9),
    "all": (lambda logits: logits * 1, 9),
    "a row": (lambda logits: logits[0], 9),
    "from the end of all": (lambda logits: logits[..., 4], 9),
    "of a list": (lambda logits: logits[:, [2, 3]], 9),
    "of a mask": (lambda logits: logits[logits > 0], 9),
    "a view": (lambda logits: logits.flatten(0, 1)[3], 9),
}


@pytest.mark.parametrize("index", INDICES)
def test_where_an_index_says(gpt2: Watched, index: str) -> None:
    take, positions = INDICES[index]
    gpt2.positions.clear()
    with gpt2.model.trace(LONG):
        found = take(gpt2.model.logits).save()

    assert gpt2.positions == [positions]
    assert_same(found.value, take(gpt2.expected(LONG)))


def test_of_prompts_of_several_lengths(gpt2: Watched) -> None:
    model, found = gpt2.model, []
    gpt2.positions.clear()
    with model.trace() as trace:
        for prompt in (SHORT, LONG, SHORT):
            with trace.invoke(prompt):
                found.append((model.logits[0, -1].save(), model.logits[:, -1].argmax(-1).save()))
    assert gpt2.positions == [2]  # equal prompts share a row

    for prompt, (last, best) in zip((SHORT, LONG, SHORT), found, strict=True):
        expected = gpt2.expected(prompt)[0, -1]
        assert_same(last.value, expected)
        assert best.value.item() == expected.argmax().item()


@pytest.mark.parametrize("name", FAMILIES)
def test_each_row_has_its_own_last_token(name: str) -> None:
    watched = Watched(name)
    model, prompts = watched.model, [SHORT, LONG, SHORT[:3]]
    with model.trace() as trace:
        with trace.invoke(prompts):
            last, before = model.logits[:, -1].save(), model.logits[1:, -3:-1].save()
        with trace.invoke(LONG[::-1]):
            other = model.logits[0, 4].save()
    if name in ("gpt2", "llama", "mamba"):  # which take prompts of several lengths in one pass
        assert watched.positions == [3 * 3 + 1]
    assert_same(last.value, torch.stack([watched.expected(each)[0, -1] for each in prompts]))
    assert_same(before.value, torch.stack([watched.expected(each)[0, -3:-1] for each in prompts[1:]]))
    assert_same(other.value, watched.expected(LONG[::-1])[0, 4])


def test_positions_that_some_rows_do_not_have_are_padding(gpt2: Watched) -> None:
    gpt2.positions.clear()
    with gpt2.model.trace([SHORT, LONG]):
        found = gpt2.model.logits[:, 2].save()
    assert gpt2.positions == [2 * 9]
    assert found.value[0].isnan().all()
    assert_same(found.value[1], gpt2.expected(LONG)[0, 2])


def test_forks_of_one_prompt_have_the_positions_that_each_looks_at(gpt2: Watched) -> None:
    model, found = gpt2.model, []
    gpt2.positions.clear()
    with model.trace() as trace:
        for position in range(9):
            with trace.invoke(LONG):
                model.layers[1].mlp.output[:, position] = 0
                found.append(model.logits[:, position].save())
        with trace.invoke(LONG):
            none, some = model.logits[:, 3:3].save(), model.layers[0].output.save()
        with trace.invoke(LONG):
            clean = model.logits[0, 4:6].save()
    assert gpt2.positions == [9 + 2]

    expected = gpt2.expected(LONG)
    assert_same(clean.value, expected[0, 4:6])
    assert none.value.shape == (1, 0, tiny.VOCABULARY)
    assert some.value.shape == (1, 9, some.value.shape[-1])
    mlp = gpt2.reference.transformer.h[1].mlp
    for position, each in enumerate(found):

        def ablate(_: Any, __: Any, output: torch.Tensor, position: int = position) -> None:
            output[:, position] = 0

        handle = mlp.register_forward_hook(ablate)
        assert_same(each.value, gpt2.expected(LONG)[:, position])
        handle.remove()


def test_each_run_of_a_prompt_is_given_what_it_looks_at_and_no_more() -> None:
    """Their rows are one, so it has the positions of all; what one takes of it is a part, however many there are."""
    watched = Watched("gpt2")
    model, found = watched.model, []
    with model.session():
        for position in range(8):
            with model.trace(LONG):
                found.append((model.logits[:, position].save(), model.logits[0, position : position + 2].save()))
        with model.trace(LONG):
            both = (model.logits[:, -1] - model.logits[:, 2]).save()
    assert watched.positions == [9]
    expected = watched.expected(LONG)
    for position, (one, two) in enumerate(found):
        assert_same(one.value, expected[:, position])
        assert_same(two.value, expected[0, position : position + 2])
    assert_same(both.value, expected[:, -1] - expected[:, 2])


def test_an_exact_run_has_what_the_model_has_to_the_last_bit() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=192, n_head=2, n_positions=64, vocab_size=5000)
    module = GPT2LMHeadModel(config).eval()
    model = patchwire.local(module, progress=False)
    prompts = [list(range(30, 52)), list(range(9, 40))]
    with torch.no_grad():
        expected = [module(torch.tensor([each])).logits[0] for each in prompts]
    with model.trace(prompts[0], exact=True):
        last = model.logits[0, -1].save()
        some = model.logits[0, -4:-2, :5].save()
    assert torch.equal(last.value, expected[0][-1])
    assert torch.equal(some.value, expected[0][-4:-2, :5])


MEMORY = """
import resource, torch, patchwire
from transformers import GPT2Config, GPT2LMHeadModel
module = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=256, vocab_size=20_000)).eval()
model, prompt, found = patchwire.local(module, progress=False), list(range(200)), []
with model.trace(prompt):
    model.logits[:, -1].argmax(-1).save()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with model.session():
    for position in range(0, 180, 4):
        with model.trace(prompt):
            one, other = model.logits[0, position].argmax(-1), model.logits[0, position + 1 : position + 3].argmax(-1)
            found.append((one.save(), other.save()))
with torch.no_grad():
    best = module(torch.tensor([prompt])).logits[0].argmax(-1).tolist()
assert [[int(one), *other.tolist()] for one, other in found] == [best[at : at + 3] for at in range(0, 180, 4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_runs_that_share_a_row_hold_what_each_looks_at() -> None:
    """All logits would be 16 MB for each of them, those of three positions are a quarter of one."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150 * 1024


@pytest.mark.parametrize("what", ["whole", "head", "written"])
def test_all_of_them_if_something_needs_all(gpt2: Watched, what: str) -> None:
    model = gpt2.model
    gpt2.positions.clear()
    with model.trace(LONG):
        match what:
            case "whole":
                model.logits.save()
            case "head":
                model.lm_head.output[0, 0].save()
            case "written":
                model.logits[:, 3] = 0
        last = model.logits[0, -1].save()

    assert gpt2.positions == [9]
    assert_same(last.value, gpt2.expected(LONG)[0, -1])


def test_of_an_edited_slice(gpt2: Watched) -> None:
    model = gpt2.model
    with model.trace(LONG):
        last = model.logits[:, -1]
        last[:, 4] = -100.0
        edited, whole = last.save(), model.logits.save()

    expected = gpt2.expected(LONG)
    expected[:, -1, 4] = -100.0
    assert_same(edited.value, expected[:, -1])
    assert_same(whole.value, expected)


def test_of_gradients_as_ever(gpt2: Watched) -> None:
    model = gpt2.model
    with model.trace(LONG):
        state = model.layers[1].output
        gradient = patchwire.grad(model.logits[0, -1, 3], state).save()

    hidden: list[torch.Tensor] = []
    layer = gpt2.reference.transformer.h[1]

    def keep(_: Any, __: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        hidden.append(value.detach().requires_grad_())
        return (hidden[0], *output[1:]) if isinstance(output, tuple) else hidden[0]

    handle = layer.register_forward_hook(keep)
    loss = gpt2.reference(torch.tensor([LONG])).logits[0, -1, 3]
    handle.remove()
    assert_same(gradient.value, torch.autograd.grad(loss, hidden[0])[0])


@pytest.mark.parametrize("rows", [[0, 0], [0, -1], [1, 0]], ids=repr)
def test_rows_that_are_named_by_a_list_are_no_positions(gpt2: Watched, rows: list[int]) -> None:
    prompts = [LONG, tiny.prompt(9, seed=1)]
    with gpt2.model.trace(prompts):
        found = gpt2.model.logits[rows].save()
    whole = torch.cat([gpt2.expected(each) for each in prompts])
    assert_same(found.value, whole[rows])


def test_none_of_them_is_a_tensor_too(gpt2: Watched) -> None:
    with gpt2.model.trace(LONG):
        nothing = gpt2.model.logits[:, 3:3].save()
    assert nothing.value.shape == (1, 0, tiny.VOCABULARY)


def test_what_is_between_the_layers_and_the_logits_is_whole() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes |= {"vocab_size": tiny.VOCABULARY, "max_position_embeddings": 40}
    module = RobertaForCausalLM(RobertaConfig(is_decoder=True, **sizes)).eval()
    model = patchwire.local(module, progress=False)
    with model.trace(LONG):
        dense = model.lm_head.dense.output.save()
        last = model.logits[:, -1].save()
    seen: list[torch.Tensor] = []
    module.lm_head.dense.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        logits = module(torch.tensor([LONG])).logits
    assert_same(dense.value, seen[0])
    assert_same(last.value, logits[:, -1])


def test_an_operation_that_is_given_them_is_given_all() -> None:
    watched = Watched("llama")
    model = watched.model
    with model.trace(LONG):
        given = model.source.self_lm_head_0.input.save()
        last = model.logits[:, -1].save()
    assert given.value.shape[1] == len(LONG)
    assert_same(last.value, watched.expected(LONG)[:, -1])
