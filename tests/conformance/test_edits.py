"""Edits that stay: what rides along with an edited model, compared with a copy of the model that is edited itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import patchwire
import tiny

IDS = [3, 5, 7, 9, 11]
ARCHITECTURES = ["gpt2", "gpt2_untied", "llama", "mamba"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request) -> tuple[patchwire.Model, nn.Module]:
    """A model, embedded, and the same one as it is."""
    return patchwire.local(tiny.build(request.param), progress=False), tiny.build(request.param)


def logits(module: nn.Module, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return module(torch.tensor([ids]), use_cache=False).logits


def traced(model: patchwire.Model, ids: list[int]) -> Tensor:
    with model.trace(ids):
        found = model.logits.save()
    return found.value


def directions() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tiny.VOCABULARY, generator=generator), torch.randn(tiny.WIDTH, generator=generator)


def steered(module: nn.Module, path: str, direction: Tensor) -> nn.Module:
    """A copy of a model to one of whose modules' last position something is added."""
    module = copy.deepcopy(module)

    def hook(_: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        tensor = (output[0] if isinstance(output, tuple) else output).clone()
        tensor[:, -1] += direction
        return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

    module.get_submodule(path).register_forward_hook(hook)
    return module


def test_an_intervention_rides_along_with_every_trace(pair):
    model, plain = pair
    direction = directions()[1]
    with model.edit() as edited:
        model.layers[1].output[:, -1] += direction
    expected = steered(plain, model.layers[1].path, direction)

    for ids in (IDS, IDS[:2]):
        torch.testing.assert_close(traced(edited, ids), logits(expected, ids))
    with edited.trace() as trace:
        saved = []
        for ids in (IDS, IDS[:3]):
            with trace.invoke(ids):
                saved.append((ids, model.logits.save()))
    for ids, found in saved:
        torch.testing.assert_close(found.value, logits(expected, ids))


def test_others_see_the_model_as_it_is(pair):
    model, plain = pair
    with model.edit() as edited:
        model.layers[0].output[:] = 0
        model.lm_head.weight[:] = 0

    traced(edited, IDS)

    torch.testing.assert_close(traced(model, IDS), logits(plain, IDS))


def test_a_weight_is_changed_as_if_it_were_in_place(pair):
    model, plain = pair
    left, right = directions()
    with model.edit() as edited:
        edited.lm_head.weight += 0.1 * torch.outer(left, right)
    changed = copy.deepcopy(plain)
    with torch.no_grad():
        changed.get_output_embeddings().weight += 0.1 * torch.outer(left, right)  # and what is tied to it

    torch.testing.assert_close(traced(edited, IDS), logits(changed, IDS))
    with edited.trace(IDS):
        applied = edited.lm_head(edited.layers[1].output).save()
        hidden, weight = edited.layers[1].output.save(), edited.lm_head.weight.save()
    torch.testing.assert_close(weight.value, changed.get_output_embeddings().weight.detach())
    torch.testing.assert_close(applied.value, hidden.value @ weight.value.T)


def test_a_weight_of_one_trace_is_that_of_no_other(pair):
    model, plain = pair
    with model.session():
        with model.trace(IDS):
            model.lm_head.weight = model.lm_head.weight * 2
            double = model.logits.save()
        with model.trace(IDS):
            single = model.logits.save()

    changed = copy.deepcopy(plain)
    with torch.no_grad():
        changed.get_output_embeddings().weight *= 2
    torch.testing.assert_close(double.value, logits(changed, IDS))
    torch.testing.assert_close(single.value, logits(plain, IDS))


def test_a_module_applied_before_a_weight_is_changed_has_the_weight_of_then(pair):
    model, _ = pair
    with model.trace(IDS):
        hidden = model.layers[1].output
        before = model.lm_head(hidden).save()
        model.lm_head.weight *= 2
        after = model.lm_head(hidden).save()

    torch.testing.assert_close(after.value, before.value * 2)


def test_edits_of_an_edited_model_add_up(pair):
    model, plain = pair
    direction = directions()[1]
    with model.edit() as once:
        model.layers[1].output[:, -1] += direction
    with once.edit() as twice:
        once.layers[1].output[:, -1] += direction

    expected = steered(plain, model.layers[1].path, 2 * direction)
    torch.testing.assert_close(traced(twice, IDS), logits(expected, IDS))
    torch.testing.assert_close(traced(once, IDS), logits(steered(plain, model.layers[1].path, direction), IDS))


def test_a_trace_sees_the_edit_before_its_own(pair):
    model, _ = pair
    with model.edit() as edited:
        model.layers[1].output[:] = 1
    with edited.trace(IDS):
        seen = edited.layers[1].output.clone().save()
        edited.layers[1].output[:] = 2
        changed = edited.layers[1].output.save()

    assert (seen.value == 1).all()
    assert (changed.value == 2).all()


def test_a_generation_is_edited_at_every_step(pair):
    model, plain = pair
    direction = directions()[1]
    with model.edit() as edited:
        model.layers[1].output[:, -1] += direction
    with edited.generate(IDS, max_new_tokens=4) as gen:
        tokens = gen.output.save()

    expected = steered(plain, model.layers[1].path, direction)
    assert tokens.value.tolist() == expected.generate(torch.tensor([IDS]), max_new_tokens=4, do_sample=False).tolist()


def test_the_gradient_of_a_weight_is_that_of_the_changed_one(pair):
    model, plain = pair
    with model.trace(IDS):
        delta = torch.zeros(tiny.VOCABULARY, tiny.WIDTH)
        model.lm_head.weight += delta
        loss = model.logits[0, -1, 4]
        found = patchwire.grad(loss, delta).save()

    changed = copy.deepcopy(plain)
    changed.get_output_embeddings().weight.requires_grad_()
    changed(torch.tensor([IDS]), use_cache=False).logits[0, -1, 4].backward()
    torch.testing.assert_close(found.value, changed.get_output_embeddings().weight.grad)


class TestRefused:
    def test_a_weight_of_another_shape(self, pair):
        words = r"lm_head\.weight` is \[61, 24\].*cannot become \[24\]"
        with pytest.raises(patchwire.ShapeError, match=words), pair[0].trace(IDS):
            pair[0].lm_head.weight = torch.zeros(24)

    def test_a_weight_that_depends_on_its_own_trace(self, pair):
        model, _ = pair
        with pytest.raises(patchwire.OrderError, match="exists only when the model runs"), model.trace(IDS):
            model.lm_head.weight += model.layers[0].output.sum()

    def test_a_save_in_the_block_of_an_edit(self, pair):
        with pytest.raises(patchwire.GraphError, match="cannot be saved"), pair[0].edit():
            pair[0].layers[0].output.save()

    def test_an_edit_of_a_position_that_a_prompt_does_not_have(self, pair):
        model, _ = pair
        with model.edit() as edited:
            model.layers[0].output[:, 9] = 0  # this line
        with pytest.raises(patchwire.ShapeError) as caught, edited.trace(IDS):
            pass
        assert any("this line" in each.code for each in caught.value.lines)

    def test_a_module_in_the_place_of_a_value(self, pair):
        with pytest.raises(patchwire.SiteError, match="cannot be assigned"), pair[0].trace(IDS):
            pair[0].lm_head = torch.zeros(3)
