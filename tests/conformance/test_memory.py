"""A site's value behaves as a PyTorch tensor: views share memory, and an edit is seen through every alias but no copy.

Each program below is run twice, as it stands: in a trace, and on real tensors inside hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from conformance.eager import EagerModel, Results, assert_invokes_agree, assert_program_agrees
from conformance.hooks import assert_same, changed_logits
from conformance.places import PARTS

PROMPT = tiny.prompt(9)
PROGRAMS: list[Callable[[Any], Results]] = []


def program(function: Callable[[Any], Results]) -> Callable[[Any], Results]:
    """Run the function both ways, on every architecture."""
    PROGRAMS.append(function)
    return function


def edits_of_the_middle_layer(edit: Callable[[Any], Any]) -> Callable[[Any], Results]:
    """Run an edit of one hidden state `[1, 9, 24]` both ways, and compare it and the logits."""

    def run(model: Any) -> Results:
        hidden = model.layers[1].output
        extra = edit(hidden)
        found = {"hidden": hidden, "logits": model.logits}
        return found if extra is None else found | {"extra": extra}

    run.__name__ = edit.__name__
    PROGRAMS.append(run)
    return run


# --- edits of one value -------------------------------------------------------------------------


@edits_of_the_middle_layer
def a_slice_is_set_to_a_number(h: Any) -> None:
    h[:, -1] = 0


@edits_of_the_middle_layer
def a_slice_with_a_step_is_multiplied(h: Any) -> None:
    h[..., 1::2] *= -1


@edits_of_the_middle_layer
def a_chain_of_indexing_ends_in_an_edit(h: Any) -> None:
    h[0][2][3:7] = 1.5


@edits_of_the_middle_layer
def every_augmented_assignment_edits_in_place(h: Any) -> Any:
    alias = h
    h += 1
    h -= 0.5
    h *= 2
    h /= 3
    h **= 2
    h %= 0.7
    h //= 0.1
    return alias


@edits_of_the_middle_layer
def augmented_assignment_of_a_slice_edits_once(h: Any) -> None:
    h[:, 2] += h[:, 1]
    h[:, 2] += h[:, 1]


@edits_of_the_middle_layer
def a_view_taken_before_an_edit_sees_it(h: Any) -> Any:
    row = h[:, 3]
    h[:] = h * 2
    return row


@edits_of_the_middle_layer
def an_edit_of_a_view_of_a_view_reaches_the_site(h: Any) -> Any:
    view = h.transpose(1, 2)
    part = view[:, 4:8]
    part[..., -1] = 7
    return view


@edits_of_the_middle_layer
def a_reshaped_view_is_edited(h: Any) -> None:
    h.reshape(1, 9, 4, 6)[:, :, 1] = 0
    h.view(-1, 24)[-1] += 1


@edits_of_the_middle_layer
def heads_are_split_transposed_and_edited(h: Any) -> Any:
    heads = h.unflatten(-1, (4, 6)).permute(0, 2, 1, 3)
    heads[:, 2] = heads[:, 1]
    return heads


@edits_of_the_middle_layer
def chunks_are_edited(h: Any) -> Any:
    first, second, third = h.chunk(3, dim=-1)
    first += second
    third.zero_()
    second[:, 0] = first[:, 1]
    return second


@edits_of_the_middle_layer
def splits_of_unequal_size_are_edited(h: Any) -> None:
    small, large = h.split([4, 20], dim=-1)
    large.mul_(0.5)
    small.copy_(large[..., :4])


@edits_of_the_middle_layer
def unbound_tokens_are_edited(h: Any) -> None:
    tokens = h.unbind(1)
    tokens[2].add_(tokens[5])
    tokens[5].fill_(0.25)


@edits_of_the_middle_layer
def rows_are_edited_while_iterating(h: Any) -> None:
    for index, token in enumerate(h[0]):
        token *= index


@edits_of_the_middle_layer
def the_diagonal_is_edited(h: Any) -> None:
    h[0].diagonal()[2:] = -3


@edits_of_the_middle_layer
def squeezed_and_unsqueezed_views_are_edited(h: Any) -> None:
    h.squeeze(0)[1] = 0
    h.unsqueeze(2)[:, 3] += 1
    h[None, ..., None][0, :, 4] -= 1


@edits_of_the_middle_layer
def flattened_views_are_edited(h: Any) -> None:
    h.flatten(1)[:, 24:30] = 9
    h.ravel()[-2:] = 8


@edits_of_the_middle_layer
def matrix_transposes_are_edited(h: Any) -> None:
    h.mT[:, 3] = 0
    h[0].T[:, 1] *= 2
    h.swapaxes(0, 1)[4] = 1
    h.movedim(-1, 0)[5] = 2


@edits_of_the_middle_layer
def narrow_and_select_are_edited(h: Any) -> None:
    h.narrow(1, 2, 3).mul_(2)
    h.select(1, 7).sub_(1)


@edits_of_the_middle_layer
def a_window_is_edited(h: Any) -> Any:
    windows = h.unfold(1, 3, 3)
    windows[:, 1] = 0
    return windows


@edits_of_the_middle_layer
def a_list_of_positions_is_set(h: Any) -> None:
    h[:, [0, 2]] = 0
    h[0, [1, 3], [4, 5]] = 1
    h[:, [0, 2]] += 1


@edits_of_the_middle_layer
def a_tensor_of_positions_is_set(h: Any) -> None:
    h[0, torch.tensor([1, 3])] = torch.arange(48.0).reshape(2, 24)
    h[:, torch.tensor([True] * 3 + [False] * 6)] *= 2


@edits_of_the_middle_layer
def a_mask_of_its_own_values_is_set(h: Any) -> None:
    h[h > 0.5] = 0
    h[h.abs() > 0.3] *= 0.5


@edits_of_the_middle_layer
def positions_found_in_the_value_are_set(h: Any) -> Any:
    loudest = h.norm(dim=-1).argmax(-1)
    h[:, loudest] = 0
    return loudest


@edits_of_the_middle_layer
def an_advanced_index_is_a_copy(h: Any) -> Any:
    copy = h[:, [1, 2]]
    copy[:] = 0
    h[:, 1] += 1
    return copy


@edits_of_the_middle_layer
def arithmetic_makes_a_copy(h: Any) -> Any:
    copy = h + 0
    copy[:] = 0
    h[:, 1] += 1
    return copy


@edits_of_the_middle_layer
def a_clone_keeps_what_was_there_before_the_edit(h: Any) -> Any:
    before = h.clone()
    h[:, 1] = 0
    return before - h


@edits_of_the_middle_layer
def a_clone_can_be_edited_alone(h: Any) -> Any:
    copy = h.clone()
    copy[:, 1] = 0
    h[:, 2] = copy[:, 1]
    return copy


@edits_of_the_middle_layer
def conversions_that_change_nothing_are_aliases(h: Any) -> None:
    h.float()[:, 1] = 0
    h.contiguous()[:, 2] = 0
    h.to(torch.float32)[:, 3] = 0
    h.type_as(h)[:, 4] = 0
    h.detach()[:, 5] = 0


@edits_of_the_middle_layer
def conversions_that_change_the_type_are_copies(h: Any) -> Any:
    copy = h.double()
    copy[:, 1] = 0
    return copy


@edits_of_the_middle_layer
def a_reshape_that_has_to_copy_is_a_copy(h: Any) -> Any:
    copy = h.transpose(1, 2).reshape(1, -1)
    copy[:] = 0
    return copy


@edits_of_the_middle_layer
def two_tokens_are_swapped(h: Any) -> None:
    h[:, 0], h[:, 1] = h[:, 1].clone(), h[:, 0].clone()


@edits_of_the_middle_layer
def two_tokens_are_swapped_wrongly_through_aliases(h: Any) -> None:
    h[:, 0], h[:, 1] = h[:, 1], h[:, 0]


@edits_of_the_middle_layer
def the_value_is_set_to_itself(h: Any) -> None:
    h[:] = h
    h[:, 1] = h[:, 1]


@edits_of_the_middle_layer
def in_place_methods_take_values(h: Any) -> None:
    h[:, 1].copy_(h[:, 2])
    h[:, 3].lerp_(h[:, 4], 0.3)
    h[:, 5].addcmul_(h[:, 6], h[:, 7], value=0.5)
    h.clamp_(-2, 2).tanh_()


@edits_of_the_middle_layer
def in_place_methods_with_indices(h: Any) -> None:
    h.index_fill_(1, torch.tensor([1]), 0.5)
    h.index_add_(1, torch.tensor([0, 2]), h[:, 3:5].clone())
    h.masked_fill_(h < -1, 0)
    h.scatter_(1, torch.zeros(1, 1, 24, dtype=torch.long), 2.0)


@edits_of_the_middle_layer
def an_edit_returns_the_same_tensor(h: Any) -> Any:
    same = h.add_(1)
    same[:, 0] = 0
    return same


@edits_of_the_middle_layer
def where_chooses_without_editing(h: Any) -> Any:
    return torch.where(h > 0, h, 0.1 * h)


@edits_of_the_middle_layer
def a_direction_is_projected_out(h: Any) -> None:
    direction = torch.linspace(-1, 1, 24)
    direction = direction / direction.norm()
    h -= (h @ direction)[..., None] * direction


@edits_of_the_middle_layer
def the_mean_is_taken_away_in_place(h: Any) -> None:
    h -= h.mean(-1, keepdim=True)
    h /= h.std(-1, keepdim=True)


@edits_of_the_middle_layer
def a_value_broadcasts_into_a_slice(h: Any) -> None:
    h[:, 2:5] = h[:, 7:8]
    h[..., :6] = torch.arange(6.0)


@edits_of_the_middle_layer
def an_expanded_value_is_read_only_material(h: Any) -> Any:
    wide = h[:, :1].expand(1, 4, 24)
    h[:, 0] = 3
    return wide


@edits_of_the_middle_layer
def a_new_tensor_is_filled_step_by_step(h: Any) -> Any:
    new = h.new_zeros(3, 24)
    for index in range(3):
        new[index] = h[0, index] * index
    h[:, 3:6] = new
    new[:] = 0
    return new


@edits_of_the_middle_layer
def a_list_of_values_is_stacked_and_edited(h: Any) -> Any:
    stacked = torch.stack([h[:, 0], h[:, 1]])
    h[:, 0] = 0
    stacked[1] = 5
    return stacked


@edits_of_the_middle_layer
def the_results_of_topk_are_used(h: Any) -> Any:
    top = h.topk(3, dim=-1)
    h.scatter_(-1, top.indices, 0.0)
    return top.values


@edits_of_the_middle_layer
def one_position_found_in_the_value_is_a_view(h: Any) -> Any:
    loudest = h[0].norm(dim=-1).argmax()
    h[0, loudest][3:5] = 0
    h[0, loudest] *= 2
    return h[:, loudest]


@edits_of_the_middle_layer
def a_view_keeps_its_place_when_the_index_is_edited(h: Any) -> Any:
    order = h[0].norm(dim=-1).argsort()
    token = h[:, order[0]]
    order[0] = order[1]
    token[:] = 7
    return order


@edits_of_the_middle_layer
def what_a_mask_collects_is_a_tensor_of_its_own(h: Any) -> Any:
    positive = h[h > 0]
    positive += 1
    positive[:3][1:] = 0
    h[:, 0] = positive.mean()
    return positive


@edits_of_the_middle_layer
def a_copy_of_transposed_memory_stays_transposed_after_an_edit(h: Any) -> Any:
    turned = h.transpose(1, 2) * 2
    turned[:, 0] = 0
    flat = turned.reshape(-1)
    flat[:] = 5
    h[:, :] = turned.transpose(1, 2)
    return flat


@edits_of_the_middle_layer
def views_may_be_asked_for_by_keyword(h: Any) -> None:
    torch.transpose(input=h, dim0=1, dim1=2)[:, 3] = 0
    torch.select(h, dim=1, index=4).mul_(2)


@edits_of_the_middle_layer
def named_results_are_edited(h: Any) -> Any:
    largest, where = h.max(-1)
    largest[:, 0] = 3
    both = h.sort(-1, descending=True)
    both.values[..., 0] = 9
    h[:, :, 0] = largest
    h[:, :, 1] = where.float() + both.values[..., 0] + both.indices[..., 1]
    return largest


@edits_of_the_middle_layer
def an_element_is_a_view_too(h: Any) -> Any:
    element = h[0, 0, 0]
    element += 1
    total = h.sum()
    total += 1
    h[0, 1, 1] = element * 2
    return total


@edits_of_the_middle_layer
def overlapping_slices_are_edited_one_after_the_other(h: Any) -> Any:
    first, second = h[:, :3], h[:, 2:5]
    first += second.clone()
    second *= 2
    h[:, 1:3] += first[:, 1:3].clone()
    first = first + 1
    first[:] = 0
    return second


@edits_of_the_middle_layer
def rows_chosen_by_their_own_sum_are_set(h: Any) -> None:
    h[0][h[0].sum(-1) > 0] = 0.5
    h[:, h[0].sum(-1) > 3] += 0.5
    h[..., h[0, 0] > 0] = 0


@edits_of_the_middle_layer
def numbers_of_other_types_are_converted(h: Any) -> None:
    h[:, 1] = torch.arange(24)
    h[:, 2] = torch.ones(24, dtype=torch.float64)
    h[:, 3] = True
    h.mul_(torch.tensor(2, dtype=torch.float64))


@edits_of_the_middle_layer
def complex_parts_and_frequencies_are_edited(h: Any) -> Any:
    pair = torch.complex(h, h * 2)
    pair.real[:] = 1
    frequencies = torch.fft.rfft(h, dim=1)
    frequencies[:, 2:] = 0
    h[:] = torch.fft.irfft(frequencies, n=9, dim=1)
    return pair.imag - pair.real


@edits_of_the_middle_layer
def attention_is_computed_from_a_value(h: Any) -> Any:
    heads = h.unflatten(-1, (4, 6))
    scores = torch.einsum("bqhd,bkhd->bhqk", heads, heads)
    pattern = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf")).softmax(-1)
    h += torch.einsum("bhqk,bkhd->bqhd", pattern, heads).flatten(2)
    return pattern


@edits_of_the_middle_layer
def shapes_and_lengths_drive_ordinary_python(h: Any) -> Any:
    for index in range(len(h[0])):
        h[:, index, index] = index
    h[:, h.shape[1] // 2 :] *= h.size(-1) / h.numel()
    return sum(token.sum() for token in h[0])


# --- sites ------------------------------------------------------------------------------------------


@program
def a_site_is_edited_without_a_name(model: Any) -> Results:
    model.layers[0].output[:, -1] += 2
    model.layers[1].output[:] *= 0.5
    model.layers[2].output[:, 0, 3] = -4
    return {"logits": model.logits}


@program
def a_site_is_augmented_as_a_whole(model: Any) -> Results:
    model.layers[0].output += 1
    model.layers[1].output *= model.layers[1].output
    return {"logits": model.logits}


@program
def a_read_after_an_edit_sees_it(model: Any) -> Results:
    model.layers[1].output[:, 2] = 1
    again = model.layers[1].output
    again[:, 3] = again[:, 2] + 1
    return {"third": model.layers[1].output, "logits": model.logits}


@program
def a_read_after_an_assignment_sees_it(model: Any) -> Results:
    model.layers[1].output = model.layers[1].output * 2
    again = model.layers[1].output
    model.layers[1].output = again - 1
    return {"again": again, "now": model.layers[1].output, "logits": model.logits}


@program
def an_assigned_value_is_edited_afterwards(model: Any) -> Results:
    new = model.layers[0].output * 2
    model.layers[0].output = new
    new[:, 1] = 0
    return {"site": model.layers[0].output, "logits": model.logits}


@program
def the_site_is_edited_after_an_assignment_and_the_value_shows_it(model: Any) -> Results:
    new = model.layers[0].output * 2
    model.layers[0].output = new
    model.layers[0].output[:, 1] = 0
    return {"value": new, "logits": model.logits}


@program
def what_was_read_before_an_assignment_stays(model: Any) -> Results:
    old = model.layers[0].output
    model.layers[0].output = old * 3
    old[:, 1] = 100
    return {"old": old, "new": model.layers[0].output, "logits": model.logits}


@program
def a_view_is_assigned_and_its_base_edited(model: Any) -> Results:
    base = torch.cat([model.layers[0].output, model.layers[0].output], dim=-1)
    model.layers[0].output = base[..., 12:36]
    base[..., 20] = 0
    return {"site": model.layers[0].output, "logits": model.logits}


@program
def a_transposed_value_is_assigned(model: Any) -> Results:
    model.layers[0].output = (model.layers[0].output.transpose(1, 2) * 2).transpose(1, 2)
    return {"site": model.layers[0].output, "logits": model.logits}


@program
def an_expanded_value_is_assigned(model: Any) -> Results:
    model.layers[0].output = model.layers[0].output[:, 3:4].expand(1, 9, 24)
    return {"site": model.layers[0].output, "logits": model.logits}


@program
def a_constant_is_assigned_and_edited_through_the_site(model: Any) -> Results:
    constant = torch.linspace(-1, 1, 9 * 24).reshape(1, 9, 24)
    model.layers[0].output = constant.clone()
    model.layers[0].output[:, 4] += 1
    return {"site": model.layers[0].output, "logits": model.logits}


@program
def an_edit_of_an_input_leaves_the_output_before_it_alone(model: Any) -> Results:
    before = model.layers[0].output
    model.layers[1].input[:, -1] = 0
    return {"before": before, "input": model.layers[1].input, "logits": model.logits}


@program
def an_input_is_assigned(model: Any) -> Results:
    model.layers[1].input = model.layers[1].input.flip(1)
    return {"logits": model.logits}


@program
def the_input_and_the_output_of_a_layer_are_edited(model: Any) -> Results:
    incoming = model.layers[1].input
    incoming *= 1.1
    model.layers[1].output[:, 2] = incoming[:, 3]
    return {"incoming": incoming, "logits": model.logits}


@program
def the_mixer_is_edited_and_its_layer_shows_it(model: Any) -> Results:
    model.layers[1].mixer.output[:, 1:4] = 0
    return {"layer": model.layers[1].output, "logits": model.logits}


@program
def earlier_values_are_used_at_later_sites(model: Any) -> Results:
    first = model.layers[0].output
    second = model.layers[1].output
    second[:, 1] = first[:, 2] - second[:, 1]
    third = model.layers[2].output
    third += 0.5 * (first.clone() + second.clone())
    return {"first": first, "second": second, "third": third, "logits": model.logits}


@program
def a_whole_earlier_value_is_assigned_to_a_later_site(model: Any) -> Results:
    first = model.layers[0].output.clone()
    model.layers[2].output = first
    first[:, 1] = 0
    return {"first": first, "logits": model.logits}


@program
def the_embedding_is_edited(model: Any) -> Results:
    model.embed.output[:, 1] *= 2
    return {"layer": model.layers[0].output, "logits": model.logits}


@program
def the_logits_are_edited_after_they_were_computed(model: Any) -> Results:
    head = model.lm_head.output
    logits = model.logits
    logits[..., 5] = -100
    return {"head": head, "logits": model.logits}


@program
def the_logits_are_assigned(model: Any) -> Results:
    model.logits = torch.log_softmax(model.logits, -1)
    return {"logits": model.logits}


@program
def a_module_is_applied_to_an_edited_value(model: Any) -> Results:
    hidden = model.layers[1].output.clone()
    hidden[:, 0] = 0
    lens = model.lm_head(model.norm(hidden))
    lens[..., 0] = 0
    return {"lens": lens, "logits": model.logits}


@program
def operators_work_from_either_side(model: Any) -> Results:
    h, line = model.layers[1].output, torch.linspace(0, 1, 24)
    return {
        "difference": 1 - h,
        "power": 2**h,
        "tensor times value": line * h,
        "tensor minus value": line - h,
        "tensor at value": line @ h[0].T,
        "quotient": 5 // (h.abs() + 1),
        "rest": 3 % (abs(h) + 1),
        "tensor below value": line < h,
        "number above value": 0.3 > h,  # noqa: SIM300
        "promoted": h + torch.ones(24, dtype=torch.float64),
        "narrow and wide": h.bfloat16() + h,
        "mask times value": (h > 0) * h,
        "not": ~(h > 0) | (h < -1),
    }


@program
def nothing_is_edited(model: Any) -> Results:
    return {"hidden": model.layers[1].output, "logits": model.logits}


@pytest.fixture(params=tiny.CORE, scope="module")
def pair(request: pytest.FixtureRequest, served: Any, references: Any) -> tuple[Any, EagerModel]:
    """A proxy, and its model here."""
    return served[request.param], EagerModel(request.param, references[request.param])


@pytest.mark.parametrize("each", PROGRAMS, ids=[each.__name__ for each in PROGRAMS])
def test_a_trace_and_pytorch_agree_when(each: Any, pair: Any) -> None:
    model, reference = pair

    assert_program_agrees(each, model, reference, PROMPT)


# --- tuples, and several prompts --------------------------------------------------------------------


def test_a_value_is_contiguous_whatever_strides_the_model_gave_it(served: Any, references: Any) -> None:
    """Mamba hands its output projection a transposed tensor: `flatten` of that would be a copy, its edit lost."""
    model, reference = served["mamba"], references["mamba"]
    site = ("backbone.layers.1.mixer.out_proj", "input", ("args", 0))

    with model.trace(PROMPT):
        value = model.module(site[0]).input
        value.flatten(1)[:, 5:9] = 2.0
        seen, logits = value.save(), model.logits.save()

    def change(tensor: torch.Tensor) -> torch.Tensor:
        assert not tensor.is_contiguous()
        tensor = tensor.contiguous()
        tensor.flatten(1)[:, 5:9] = 2.0
        return tensor

    assert (seen[0, 0, 5:9] == 2.0).all()
    assert_same(logits.value, changed_logits(reference, PROMPT, {site: change}))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_an_item_of_a_tuple_is_edited_and_assigned(name: str, served: Any, references: Any) -> None:
    path = PARTS[name]["mixer"].format(1)

    def items(model: Any) -> Results:
        attention = model.module(path).output
        attention[0][:, 1] = 0
        attention[0] = attention[0] * 2
        attention[0][:, 2] += 1
        return {"item": model.module(path).output[0], "logits": model.logits}

    assert_program_agrees(items, served[name], EagerModel(name, references[name]), PROMPT)


def test_edited_views_flow_between_invokes_of_different_lengths(pair: Any) -> None:
    def flows(model: Any, trace: Any) -> Results:
        with trace.invoke(tiny.prompt(5)):
            hidden = model.layers[0].output
            last = hidden[:, -1]
            hidden *= 2
            kept = last.clone()
            last[:] = 1
            first_logits = model.logits
        with trace.invoke(tiny.prompt(12)):
            hidden = model.layers[0].output
            hidden[:, 2:4] = kept[:, None]
            part = hidden.transpose(1, 2)[:, :6]
            part += last[:, :6, None]
            second_logits = model.logits
        with trace.invoke(tiny.prompt(2)):
            model.layers[2].output[:, 0] = part[..., -1].repeat(1, 4)
            third_logits = model.logits
        return {"kept": kept, "first": first_logits, "second": second_logits, "third": third_logits, "part": part}

    assert_invokes_agree(flows, *pair)


# --- what is asked in another order than the forward pass -------------------------------------------


def test_sites_may_be_written_in_any_order(pair: Any) -> None:
    model, reference = pair

    def in_order(model: Any) -> Results:
        model.layers[0].output[:, 1] = 0
        model.layers[2].output[:, 2] += 1
        return {"logits": model.logits}

    with reference.trace(PROMPT):
        expected = in_order(reference)["logits"]
    with model.trace(PROMPT):
        logits = model.logits.save()
        model.layers[2].output[:, 2] += 1
        model.layers[0].output[:, 1] = 0

    assert torch.allclose(logits.value, expected, rtol=0, atol=1e-5)


def test_a_saved_value_shows_later_edits_and_a_saved_clone_does_not(pair: Any) -> None:
    model, reference = pair

    def look(model: Any) -> Results:
        hidden = model.layers[1].output
        before = hidden.clone()
        return {"before": before}

    with reference.trace(PROMPT):
        expected = look(reference)["before"]
    with model.trace(PROMPT):
        hidden = model.layers[1].output
        before = hidden.clone().save()
        row = hidden[:, 3].save()
        row[:] = 0
        shown = hidden.save()

    assert torch.allclose(before.value, expected, rtol=0, atol=1e-5)
    assert not row.value.any()
    assert not shown.value[:, 3].any()
