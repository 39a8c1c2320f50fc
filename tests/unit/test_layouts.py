"""Layouts: words that say how a tensor is laid out become views that give the canonical form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patchwire.errors import GraphError
from patchwire.views import View, views_from_proto, views_to_proto
from patchwire_worker.models import layouts

SIZES = {
    "head": 6,
    "kv_head": 2,
    "q_per_kv": 3,
    "d_head": 5,
    "qkv": 3,
    "d_model": 7,
    "q": 30,
    "k": 10,
    "v": 10,
    "half": 2,
}
QUERIES, KEYS = "batch seq head d_head", "batch seq kv_head d_head"


def taken(tensor: Tensor, layout: str, canonical: str, rows: int = 2, sizes: dict[str, int] = SIZES) -> Tensor:
    for view in layouts.views(layout, canonical, sizes):
        name, args = view.call(rows)
        tensor = getattr(torch, name.removeprefix("torch."))(tensor, *args)
    return tensor


def test_heads_side_by_side_are_split() -> None:
    tensor = torch.randn(2, 4, 30)

    assert torch.equal(taken(tensor, "batch seq (head d_head)", QUERIES), tensor.view(2, 4, 6, 5))


def test_one_of_three_is_taken_from_each_head() -> None:
    tensor = torch.randn(2, 4, 6 * 3 * 5)

    assert torch.equal(taken(tensor, "batch seq (head qkv=1 d_head)", QUERIES), tensor.view(2, 4, 6, 3, 5)[..., 1, :])


def test_parts_of_unequal_length_are_taken_one_by_one() -> None:
    tensor = torch.randn(2, 4, 50)

    found = taken(tensor, "batch seq q|k|v!(kv_head d_head)", KEYS)

    assert torch.equal(found, tensor[..., 40:].view(2, 4, 2, 5))


def test_keys_after_the_queries_that_share_them_are_taken() -> None:
    tensor = torch.randn(2, 4, 2 * 5 * 5)
    whole = tensor.view(2, 4, 2, 5, 5)

    assert torch.equal(taken(tensor, "batch seq (kv_head q_per_kv+2=-2 d_head)", KEYS), whole[..., -2, :])
    assert torch.equal(taken(tensor, "batch seq (kv_head q_per_kv+2=-1 d_head)", KEYS), whole[..., -1, :])


def test_queries_that_are_apart_are_put_together_which_is_a_copy() -> None:
    layout, weight = "(kv_head q_per_kv+2<q_per_kv d_head) d_model", torch.randn(50, 7)

    views = layouts.views(layout, "head d_model d_head", SIZES)
    found = taken(weight, layout, "head d_model d_head")

    assert torch.equal(found, weight.view(2, 5, 5, 7)[:, :3].reshape(6, 5, 7).transpose(1, 2))
    assert any(view.copies for view in views)


@pytest.mark.parametrize(("kv_head", "q_per_kv"), [(1, 6), (6, 1)])
def test_queries_that_are_not_apart_are_views(kv_head: int, q_per_kv: int) -> None:
    layout, weight = "(kv_head q_per_kv+2<q_per_kv d_head) d_model", torch.randn(kv_head * (q_per_kv + 2) * 5, 7)
    sizes = SIZES | {"kv_head": kv_head, "q_per_kv": q_per_kv}

    found = taken(weight, layout, "head d_model d_head", sizes=sizes)

    assert found.shape == (6, 7, 5)
    assert found.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def test_rows_whose_tokens_are_in_one_dimension_are_told_apart() -> None:
    tensor = torch.randn(8, 9)

    assert torch.equal(taken(tensor, "(batch seq) d_mlp", "batch seq d_mlp"), tensor.view(2, 4, 9))


def test_the_one_length_that_is_not_known_is_learnt_from_the_tensor() -> None:
    assert layouts.learnt("(half=0 d_mlp)", 44, SIZES) == {"d_mlp": 22}
    assert layouts.learnt("d_mlp", 44, SIZES) == {"d_mlp": 44}
    assert layouts.learnt("(head d_head)", 30, SIZES) == {}
    with pytest.raises(ValueError, match="a dimension of 45"):
        layouts.learnt("(half=0 d_mlp)", 45, SIZES)


def test_another_form_than_the_layout_has_is_refused() -> None:
    with pytest.raises(ValueError, match="is wanted"):
        layouts.views("batch seq (kv_head d_head)", QUERIES, SIZES)


@pytest.mark.parametrize(
    "view",
    [
        View("rows", ()),
        View("rows", (1, 2)),
        View("unflatten", (0,)),
        View("narrow", (1,)),
        View("permute", ()),
        View("select", (0, 1, 2)),
        View("index", (0,)),
        View("permute", tuple(range(17))),
    ],
)
def test_views_of_a_strange_server_are_refused(view: View) -> None:
    with pytest.raises(GraphError, match="does not know"):
        views_from_proto(views_to_proto([view]))
