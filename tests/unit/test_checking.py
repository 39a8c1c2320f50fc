"""Checking: what does not fit is found on tensors without memory, and nothing that is asked makes the checker work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx

from patchwire import graph as g
from patchwire import ops
from patchwire.checking import Checker, TookLongError, fake_of
from patchwire.errors import GraphError, LimitError, OperationError, OrderError, ShapeError, SiteError, SourceLine
from patchwire.sites import Address, Catalogue

VALUE_BYTES = 1 << 20


class Request:
    """A graph of one trace with rows of these lengths, and what a checker says about it."""

    def __init__(self, catalogue: Catalogue, *lengths: int) -> None:
        self.graph = g.Graph(traces=[g.Trace("tiny", [g.Invoke(tuple((1,) * each for each in lengths or (3,)))])])
        self.checker = Checker(self.graph, lambda name: catalogue, value_bytes=VALUE_BYTES)

    def add(self, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
        operation = ops.OPERATIONS.get(target) if isinstance(target, str) else None
        node = self.graph.fx.call_function(operation.function if operation else target, args, kwargs)
        node.meta |= {"operation": operation, "line": SourceLine("user.py", len(self.graph.nodes), "code")}
        self.checker.node(node)
        return node

    def read(self, name: str, *path: Any) -> torch.fx.Node:
        return self.add(g.read, g.Site(0, 0, Address(name, path)))

    def write(self, name: str, value: torch.fx.Node) -> torch.fx.Node:
        return self.add(g.write, g.Site(0, 0, Address(name)), value)

    def zeros(self, *shape: int) -> torch.fx.Node:
        return self.add("torch.Tensor.new_zeros", self.read("layers.0.output"), shape)


@pytest.fixture
def asked(catalogue) -> Request:
    return Request(catalogue, 3, 3)


class TestFakes:
    def test_of_a_read_has_the_shape_of_its_site_for_these_rows(self, asked):
        fake = fake_of(asked.read("logits"))

        assert (fake.shape, fake.dtype) == ((2, 3, 50), torch.float32)

    def test_of_an_operation_has_the_shape_of_its_result(self, asked):
        hidden = asked.read("layers.0.output")

        assert fake_of(asked.add("torch.sum", hidden, -1, dtype=torch.float64)).shape == (2, 3)

    def test_of_a_module_that_is_applied_has_its_output_s_last_dimension(self, asked):
        last = asked.add("operator.getitem", asked.read("layers.0.output"), (slice(None), -1))

        assert fake_of(asked.add(g.apply, 0, "lm_head", (last,), {}, {})).shape == (2, 50)

    def test_of_what_depends_on_values_is_unknown_and_stays_so(self, asked):
        mask = asked.add("operator.gt", asked.read("layers.0.output"), 0)
        chosen = asked.add("torch.masked_select", asked.read("layers.0.output"), mask)

        assert fake_of(chosen) is None
        assert fake_of(asked.add("torch.neg", chosen)) is None

    def test_takes_no_memory(self, catalogue):
        request = Request(catalogue, 3)
        request.checker.value_bytes = None

        assert fake_of(request.zeros(1 << 40)).is_meta


class TestWords:
    def test_of_a_gradient_of_whole_numbers_names_the_line(self, asked):
        hidden = asked.read("layers.0.output")
        where = asked.add("torch.argmax", hidden)

        with pytest.raises(ShapeError, match="of a floating-point value, not of") as caught:
            asked.add(g.grad, where, (hidden,), None)
        assert caught.value.lines

    def test_of_the_tokens_of_a_trace_that_generates_none(self, asked):
        with pytest.raises(GraphError, match="generates no tokens") as caught:
            asked.add(g.generated, 0, 0)
        assert "model.generate" in caught.value.hint

    def test_of_a_tuple_as_one_value_names_the_line(self, asked):
        pair = asked.add("torch.topk", asked.read("layers.0.output"), 2)

        for kind, says, add in (
            (GraphError, "one tensor each", lambda: asked.add(g.log, ("pair", pair))),
            (GraphError, "cannot be saved as one value", lambda: asked.add(g.save, pair)),
        ):
            with pytest.raises(kind, match=says) as caught:
                add()
            assert caught.value.lines
            assert "value[0]" in caught.value.hint

    def test_of_a_source_that_nobody_can_describe(self, catalogue):
        with pytest.raises(SiteError, match="is not known here") as caught:
            catalogue.source("head")
        assert "Ask a server" in caught.value.hint


class TestOrder:
    def test_a_value_may_be_written_where_it_was_read_and_later(self, asked):
        early = asked.read("layers.0.output")
        asked.write("layers.0.output", early)
        asked.write("layers.1.output", early)

    def test_a_value_of_a_later_site_is_refused_naming_both_lines(self, asked):
        late = asked.read("layers.1.output")
        doubled = asked.add("operator.mul", late, 2)

        with pytest.raises(OrderError) as caught:
            asked.write("layers.0.output", doubled)
        assert [line.line for line in caught.value.lines] == [3, 1]
        assert "model.layers[1].output" in caught.value.message or "layers.1.output" in caught.value.message

    def test_a_value_that_depends_on_no_site_may_be_written_anywhere(self, asked):
        weight = asked.add(g.parameter, 0, "norm.weight")
        asked.write("layers.0.output", asked.add("torch.Tensor.expand", weight, 2, 3, 8))


class TestWrites:
    @pytest.mark.parametrize("index", [(slice(None), -1), (0,), (..., slice(0, 4))])
    def test_of_another_shape_are_refused_with_both_shapes(self, asked, index):
        hidden = asked.read("layers.0.output")
        part = asked.add("operator.getitem", hidden, index)

        with pytest.raises(ShapeError, match=r"is \[2, 3, 8\] float32 \(\[batch, seq, 8\]\) and cannot become"):
            asked.write("layers.0.output", part)

    def test_of_another_dtype_are_refused_with_how_to_convert(self, asked):
        half = asked.add("torch.Tensor.half", asked.read("layers.0.output"))

        with pytest.raises(ShapeError) as caught:
            asked.write("layers.0.output", half)
        assert caught.value.hint == "Convert it: `.to(torch.float32)`."

    def test_of_a_tuple_are_refused(self, asked):
        pair = asked.add("torch.chunk", asked.read("layers.0.output"), 2, -1)

        with pytest.raises(ShapeError, match="cannot become a tuple"):
            asked.write("layers.0.output", pair)


class TestArguments:
    """What stands in the first place is a tensor, or tensors, or a number where PyTorch takes one."""

    @pytest.mark.parametrize(
        ("name", "args"),
        [
            ("operator.sub", (1, None)),
            ("operator.mul", (None, 2.5)),
            ("operator.and_", (None, None)),
            ("torch.add", (2, None)),
            ("torch.pow", (2, None)),
            ("torch.where", (None, 0, None)),
            ("torch.bucketize", (None, None)),
            ("torch.einsum", ("b,b->b", None, None)),
            ("torch.einsum", (None, [0], None, [0])),
            ("torch.stack", ([None, None],)),
            ("torch.cartesian_prod", (None, None)),
            ("torch.atleast_2d", ([None, None],)),
            ("torch.Tensor.mul", (None, 2)),
        ],
    )
    def test_are_what_an_operation_takes(self, asked, name, args):
        values = asked.add("operator.gt", asked.add("torch.Tensor.new_zeros", asked.read("logits"), (4,)), 1)
        if name == "torch.einsum":
            values = asked.add("torch.Tensor.float", values)
        filled = [[values for _ in each] if each == [None, None] else values if each is None else each for each in args]

        assert fake_of(asked.add(name, *filled)) is not None

    def test_may_all_be_given_by_name(self, asked):
        hidden = asked.read("layers.0.output")

        assert fake_of(asked.add("torch.cat", tensors=[hidden, hidden], dim=0)).shape == (4, 3, 8)
        assert fake_of(asked.add("torch.sum", input=hidden, dim=0)).shape == (3, 8)

    def test_may_be_of_unknown_shape(self, asked):
        hidden = asked.read("layers.0.output")
        chosen = asked.add("torch.masked_select", hidden, asked.add("operator.gt", hidden, 0))

        assert fake_of(asked.add("torch.stack", [chosen, chosen])) is None
        with pytest.raises(OperationError, match="not a list"):
            asked.add("operator.mul", [chosen], 10**8)


class TestRefusals:
    """What is refused, with the line that asked for it."""

    def refused(self, request: Request, kind: Any, target: Any, *args: Any, **kwargs: Any) -> str:
        """What the checker says about a node that it refuses; it always names the node's line."""
        with pytest.raises(kind) as caught:
            request.add(target, *args, **kwargs)
        assert caught.value.lines[0] == SourceLine("user.py", len(request.graph.nodes), "code")
        return str(caught.value)

    @pytest.mark.parametrize(
        ("name", "args"),
        [
            ("operator.pow", (9, 10**9)),
            ("operator.lshift", (1, 10**12)),
            ("operator.mul", ([1], 10**12)),
            ("operator.mul", ("a", 10**12)),
            ("operator.mod", ("%999999999d", 1)),
            ("operator.add", (1, 2)),
            ("torch.stack", ([None] * 1000,)),
            ("operator.floordiv", (1, 0)),
        ],
    )
    def test_python_without_a_tensor(self, asked, name, args):
        assert "is given no tensor" in self.refused(asked, GraphError, name, *args)

    @pytest.mark.parametrize(
        ("kind", "name", "args"),
        [
            (ShapeError, "patchwire.random.normal", ("abc", 1)),
            (ShapeError, "patchwire.random.normal", ((2, -3), 1)),
            (ShapeError, "patchwire.random.normal", ((1,) * 100, 1)),
            (ShapeError, "patchwire.random.normal", ((2, 3), "1")),
            (ShapeError, "patchwire.random.normal", ((2, 3), [1, None])),
            (ShapeError, "patchwire.random.normal", ((2, 3), True)),
            (ShapeError, "patchwire.random.normal", ((2, 3), 1, "float32")),
            (ShapeError, "patchwire.random.normal", ((2, 3), [1, 2], torch.float32, ["a", 2])),
            (ShapeError, "patchwire.random.bernoulli", ((2, 3), 2.0, 1)),
            (ShapeError, "patchwire.random.randint", ((2, 3), 5, 5, 1)),
            (ShapeError, "patchwire.random.randperm", (-1, 1)),
            (LimitError, "patchwire.random.normal", ((1 << 62, 1 << 62), 1)),
            (LimitError, "patchwire.random.randperm", (1 << 62, 1)),
        ],
    )
    def test_noise_of_impossible_arguments(self, asked, kind, name, args):
        self.refused(asked, kind, name, *args)

    @pytest.mark.parametrize(
        ("name", "args"),
        [
            ("operator.mul", ([None], 10**8)),
            ("operator.mul", ((None, None), 10**8)),
            ("operator.mod", ("%500000000s", None)),
            ("operator.add", (None, "text")),
            ("operator.getitem", ([None], 0)),
            ("torch.Tensor.repeat", ([None], 10**8)),
            ("torch.Tensor.sum", (1, None)),
            ("torch.split", ("text", None)),
            ("torch.softmax", ("text", None)),
            ("torch.stack", ([None, 1],)),
        ],
    )
    def test_python_values_in_the_place_of_a_tensor(self, asked, name, args):
        hidden = asked.read("layers.0.output")

        def filled(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(filled(each) for each in value)
            return hidden if value is None else value

        assert "takes tensors" in self.refused(asked, OperationError, name, *filled(args))

    def test_arithmetic_with_several_results_at_once(self, asked):
        pair = asked.add("torch.chunk", asked.read("layers.0.output"), 2, -1)

        assert "not a tuple" in self.refused(asked, OperationError, "operator.mul", pair, 10**8)

    def test_python_values_in_an_edit(self, asked):
        hidden = asked.read("layers.0.output")

        assert "not a str" in self.refused(asked, OperationError, g.edit, hidden, (), ("operator.imod", ("%s",), {}))

    @pytest.mark.parametrize(
        ("name", "shape", "args"),
        [
            ("torch.unbind", (1 << 40, 0), ()),
            ("torch.split", (1 << 40, 0), (1,)),
            ("torch.Tensor.split", (1 << 40, 0), (1,)),
            ("torch.chunk", (0,), (1 << 40,)),
            ("torch.tensor_split", (8,), (1 << 40,)),
            ("torch.hsplit", (0,), (1 << 40,)),
            ("torch.Tensor.vsplit", (0, 0), (1 << 40,)),
            ("torch.unbind", (4097, 0), ()),
            ("torch.unbind", (0, 4097), (-1,)),
            ("torch.Tensor.diff", (1 << 17,), (1 << 17,)),
            ("torch.linalg.matrix_power", (2, 2), (1025,)),
            ("torch.linalg.matrix_power", (2, 2), (-(1 << 40),)),
        ],
    )
    def test_more_results_than_can_be_counted(self, asked, name, shape, args):
        assert "is too many" in self.refused(asked, LimitError, name, asked.zeros(*shape), *args)

    @pytest.mark.parametrize("names", [{"dim": 30, "split_size": 1}, {"split_size": 1, "dim": 30}])
    def test_more_results_than_can_be_counted_whatever_the_order_of_names(self, asked, names):
        value = asked.zeros(*[1] * 30, 1 << 40, 0)

        assert "is too many" in self.refused(asked, LimitError, "torch.Tensor.split", value, **names)

    def test_more_results_than_can_be_counted_on_the_way_of_an_edit(self, asked):
        zeros = asked.zeros(200_000)
        views = (("torch.unbind", (), {}), ("operator.getitem", (0,), {}))

        assert "is too many" in self.refused(asked, LimitError, g.edit, zeros, views, ("torch.Tensor.zero_", (), {}))

    def test_a_place_of_an_edit_that_is_too_large(self, asked):
        views = (("torch.Tensor.expand", (1 << 40, 2, 3, 8), {}),)
        hidden = asked.read("layers.0.output")

        self.refused(asked, LimitError, g.edit, hidden, views, ("torch.Tensor.zero_", (), {}))

    def test_more_results_in_the_whole_graph_than_can_be_counted(self, asked):
        zeros = asked.zeros(4096)
        for _ in range(64):
            asked.add("torch.unbind", zeros)

        assert "262,144 pieces" in self.refused(asked, LimitError, "torch.unbind", zeros)

    @pytest.mark.parametrize(
        ("name", "shapes", "args"),
        [
            ("torch.dist", ((1000, 1), (1, 1000)), ()),
            ("torch.nn.functional.mse_loss", ((1000, 1), (1, 1000)), ()),
            ("torch.nn.functional.huber_loss", ((1000, 1), (1, 1000)), ()),
            ("torch.nn.functional.kl_div", ((1000, 1), (1, 1000)), ()),
            ("torch.nn.functional.cosine_similarity", ((100, 1, 100), (1, 100, 100)), ()),
            ("torch.linalg.vecdot", ((100, 1, 100), (1, 100, 100)), ()),
            ("operator.matmul", ((100, 1, 1, 100), (1, 100, 100, 1)), ()),
            ("torch.cdist", ((100, 1, 1, 100), (1, 100, 1, 100)), ()),
            ("torch.linalg.solve", ((100, 1, 50, 50), (1, 100, 50, 1)), ()),
            ("torch.isin", ((100_000,), (200,)), ()),
        ],
    )
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_what_is_too_large_on_the_way_to_a_small_result(self, asked, name, shapes, args):
        values = [asked.zeros(*shape) for shape in shapes]

        self.refused(asked, LimitError, name, *values, *args)

    def test_an_einsum_whose_first_product_is_too_large(self, asked):
        wide, deep = asked.zeros(600, 1), asked.zeros(1, 600)

        assert "einsum" in self.refused(asked, LimitError, "torch.einsum", "ab,bc,cd,da->", wide, deep, wide, deep)

    def test_a_list_that_no_message_may_have(self, asked):
        index = (slice(None), [0] * 4097)

        assert "4,097" in self.refused(asked, LimitError, "operator.getitem", asked.read("layers.0.output"), index)

    def test_positions_that_are_too_many(self, asked):
        mask = asked.add("torch.Tensor.bool", asked.zeros(200_000))

        self.refused(asked, LimitError, "torch.nonzero", mask)

    def test_an_index_that_picks_everything_again_and_again(self, asked):
        rows, columns = (asked.add("torch.Tensor.long", asked.zeros(*shape)) for shape in ((1000, 1), (1, 1000)))
        change = ("operator.setitem", ((rows, columns), 0.0), {})
        fill = ("torch.Tensor.index_fill_", (0, asked.add("torch.Tensor.flatten", rows), 0.0), {})

        self.refused(asked, LimitError, g.edit, asked.zeros(4, 4), (), change)
        self.refused(asked, LimitError, g.edit, asked.zeros(1, 1000), (), fill)

    @pytest.mark.parametrize(
        ("name", "args"),
        [
            ("torch.linalg.svd", ()),
            ("torch.linalg.eigh", ()),
            ("torch.inverse", ()),
            ("torch.det", ()),
            ("torch.matrix_exp", ()),
            ("torch.linalg.matrix_norm", ("nuc",)),
            ("torch.linalg.norm", (2,)),
        ],
    )
    def test_a_decomposition_that_takes_too_long(self, asked, name, args):
        asked.checker.value_bytes = None

        assert "8192 by 8192" in self.refused(asked, LimitError, name, asked.zeros(8193, 8193), *args)

    @pytest.mark.parametrize("name", ["torch.meshgrid", "torch.linalg.multi_dot"])
    def test_more_tensors_at_once_than_their_number_allows(self, asked, name):
        assert "is too many" in self.refused(asked, LimitError, name, [asked.zeros(1, 1)] * 65)

    def test_a_contraction_over_more_dimensions_than_exist(self, asked):
        zeros = asked.zeros(1, 1)

        assert "is too many" in self.refused(asked, LimitError, "torch.tensordot", zeros, zeros, 10**12)

    @pytest.mark.parametrize(
        ("name", "args"),
        [
            ("torch.Tensor.repeat", ((10**6, 10**6, 1),)),
            ("torch.Tensor.expand", (1 << 30, 2, 3, 8)),
            ("torch.tile", ((1, 1, 10**9),)),
            ("torch.Tensor.new_ones", ((1 << 19,),)),
            ("torch.repeat_interleave", (10**9,)),
            ("torch.nn.functional.pad", ((0, 10**9),)),
            ("torch.histc", (10**9,)),
            ("torch.diag_embed", (10**6,)),
            ("torch.Tensor.new_zeros", ((1 << 62, 1 << 62),)),
            ("torch.vander", (10**12,)),
        ],
    )
    def test_a_value_that_is_too_large(self, asked, name, args):
        value = asked.read("layers.0.output")
        if name == "torch.vander":
            value = asked.add("torch.flatten", value)

        self.refused(asked, (LimitError, ShapeError), name, value, *args)

    @pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
    @pytest.mark.parametrize(
        ("name", "args"),
        [
            ("operator.matmul", ("text",)),
            ("operator.getitem", (7,)),
            ("operator.getitem", ("text",)),
            ("torch.reshape", ((7, 7),)),
            ("torch.Tensor.view", ()),
            ("torch.sum", (9,)),
            ("torch.einsum", ("ij,jk->ik",)),
            ("torch.Tensor.sum", (0, 0, 0, 0, 0)),
        ],
    )
    def test_arguments_that_an_operation_does_not_take(self, asked, name, args):
        self.refused(asked, (ShapeError, OperationError), name, asked.read("layers.0.output"), *args)

    def test_an_edit_that_would_be_lost(self, asked):
        views = (("torch.Tensor.double", (), {}),)
        hidden = asked.read("layers.0.output")

        assert "would be lost" in self.refused(asked, ShapeError, g.edit, hidden, views, ("torch.Tensor.zero_", (), {}))

    def test_a_site_that_is_not_there(self, asked):
        site = g.Site(0, 0, Address("layers.9.output"))

        assert "indices 0 to 1" in self.refused(asked, SiteError, g.read, site)

    def test_a_module_that_does_not_take_the_value(self, asked):
        logits = asked.read("logits")

        text = self.refused(asked, ShapeError, g.apply, 0, "lm_head", (logits,), {}, {})
        assert "[..., 8]" in text
        assert "[2, 3, 50]" in text

    def test_a_tuple_saved_as_one_value(self, asked):
        pair = asked.add("torch.chunk", asked.read("layers.0.output"), 2, -1)

        assert "cannot be saved" in self.refused(asked, GraphError, g.save, pair, None)


def test_a_constant_that_was_not_looked_up_is_refused(catalogue):
    request = Request(catalogue)
    request.graph.constants.append(b"hash")

    with pytest.raises(GraphError, match="not looked up"):
        request.add(g.constant, 0)


def test_the_number_of_results_that_is_allowed_is_allowed(catalogue):
    request = Request(catalogue)

    assert len(fake_of(request.add("torch.unbind", request.zeros(4096)))) == 4096
    assert len(fake_of(request.add("torch.unbind", request.zeros(2, 100_000)))) == 2
    assert len(fake_of(request.add("torch.split", request.zeros(2, 100_000), 1))) == 2
    assert len(fake_of(request.add("torch.split", request.zeros(1000), 10**9))) == 1
    assert len(fake_of(request.add("torch.chunk", request.zeros(1 << 18), 2))) == 2


@pytest.mark.parametrize(
    ("name", "shapes", "args"),
    [
        ("torch.linalg.svd", ((50257, 768),), (False,)),
        ("torch.linalg.svdvals", ((12, 768, 768),), ()),
        ("torch.linalg.norm", ((8, 1000, 50257),), (2, -1)),
        ("torch.norm", ((8, 1000, 50257),), (2, -1)),
        ("torch.linalg.matrix_norm", ((50257, 50257),), ()),
        ("operator.matmul", ((64, 1000, 768), (768, 50257 // 4)), ()),
        ("operator.matmul", ((8, 12, 1000, 64), (8, 12, 64, 1000)), ()),
        ("torch.isin", ((8, 1000), (50257,)), ()),
        ("torch.diff", ((8, 1000),), ()),
    ],
)
def test_what_the_field_computes_is_not_too_large(catalogue, name, shapes, args):
    request = Request(catalogue)
    request.checker.value_bytes = 16 << 30

    request.add(name, *(request.zeros(*shape) for shape in shapes), *args)


def test_an_edit_of_a_value_of_unknown_shape_is_checked_once_its_shape_is_known(catalogue):
    request = Request(catalogue)
    hidden = request.read("layers.0.output")
    chosen = request.add("torch.masked_select", hidden, request.add("operator.gt", hidden, 0))
    views = (("torch.Tensor.expand", (1 << 40, -1), {}),)

    edited = request.add(g.edit, chosen, views, ("torch.Tensor.zero_", (), {}))

    assert edited.meta["unchecked"]
    with pytest.raises(LimitError):
        request.checker.check_edit(torch.empty(24, device="meta"), *edited.args[1:])


class TestTime:
    @pytest.mark.parametrize(
        ("shapes", "operation"),
        [
            (((46_000, 46_000), (46_000, 46_000)), "operator.matmul"),
            (((4, 20_000, 20_000), (20_000, 30_000)), "torch.matmul"),
            (((16, 11_000, 11_000), (16, 11_000, 11_000)), "torch.bmm"),
            (((46_000, 46_000), (46_000, 46_000)), "torch.nn.functional.linear"),
            (((46_000, 46_000), (46_000, 46_000)), "torch.cdist"),
        ],
    )
    def test_of_a_product_that_fits_is_bounded(self, asked, shapes, operation):
        asked.checker.value_bytes = 1 << 33
        values = [asked.zeros(*shape) for shape in shapes]

        with pytest.raises(LimitError, match="takes too long"):
            asked.add(operation, *values)

    def test_of_a_large_product_that_is_of_use_is_not(self, asked):
        asked.checker.value_bytes = 1 << 33
        hidden, unembedding = asked.zeros(16, 1024, 4096), asked.zeros(4096, 128_000)

        assert fake_of(asked.add("operator.matmul", hidden, unembedding)).shape == (16, 1024, 128_000)

    def test_of_checking_is_bounded_if_it_is_said_to_be(self, catalogue):
        request = Request(catalogue)
        hidden = request.read("layers.0.output")
        request.checker.until = 0.0

        with pytest.raises(TookLongError):
            request.add("torch.unbind", hidden)
        with pytest.raises(TookLongError):
            request.add(g.edit, hidden, (("torch.unbind", (), {}),), ("torch.Tensor.zero_", (), {}))
