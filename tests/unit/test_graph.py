"""Graphs and messages: a graph survives the way through its message, and a hostile message gets a clear error."""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any

import pytest
import torch
import torch.fx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchwire import graph as g
from patchwire import ops
from patchwire.errors import GraphError, LimitError, OperationError, PatchwireError, SourceLine
from patchwire.sites import Address
from patchwire.v1 import graph_pb2 as pb
from patchwire.v1 import tensor_pb2
from patchwire.version import VERSION

ADD = ops.OPERATIONS["torch.add"]


def rows(graph: g.Graph) -> g.Graph:
    graph.traces.append(g.Trace("gpt2", [g.Invoke(((1, 2, 3), (4, 5))), g.Invoke(((6,),))]))
    return graph


def call(graph: g.Graph, name: str, *args: Any, **kwargs: Any) -> torch.fx.Node:
    node = graph.fx.call_function(ops.OPERATIONS[name].function, args, kwargs)
    node.meta["operation"] = ops.OPERATIONS[name]
    return node


def everything() -> g.Graph:
    """A graph with every kind of node."""
    graph = rows(g.Graph(constants=[torch.arange(3.0), b"\x01" * 32]))
    create = graph.fx.call_function
    site = g.Site(0, 1, Address("layers.0.mixer.input", ("kwargs", "mask", 0)))
    read = create(g.read, (site,))
    inline, uploaded = create(g.constant, (0,)), create(g.constant, (1,))
    weight = create(g.parameter, (0, "lm_head.weight"))
    total = call(graph, "torch.add", read, inline, alpha=2)
    applied = create(g.apply, (0, "norm", (total,), {"scale": weight}, {}))
    views = (("operator.getitem", ((slice(None), -1),), {}), ("torch.Tensor.t", (), {}))
    edited = create(g.edit, (applied, views, ("torch.Tensor.add_", (uploaded,), {"alpha": 0.5})))
    create(g.write, (g.Site(0, 0, Address("logits")), edited))
    create(g.assign, (0, "lm_head.weight", inline))
    create(g.apply, (0, "lm_head", (total,), {}, {"lm_head.weight": inline}))
    create(g.grad, (total, (read, weight), None))
    create(g.grad, (total, (read,), inline))
    graph.traces.append(g.Trace("gpt2", [g.Invoke(((1, 2),))], g.Generation(4, do_sample=True, top_p=0.5, seed=3)))
    create(g.read, (g.Site(len(graph.traces) - 1, 0, Address("logits"), 2, open=True),))
    create(g.generated, (len(graph.traces) - 1, 0))
    create(g.save, (edited, torch.bfloat16))
    create(g.save, (total, None))
    create(g.log, (("total", total),))
    for number, node in enumerate(graph.nodes):
        node.meta["line"] = SourceLine("experiment.py", number // 2 + 1, f"line {number // 2}") if number else None
    return graph


def plain(graph: g.Graph) -> list[Any]:
    """A graph's nodes as data that can be compared."""
    positions = {node: index for index, node in enumerate(graph.nodes)}

    def data(value: Any) -> Any:
        match value:
            case torch.fx.Node():
                return ("node", positions[value])
            case tuple():
                return tuple(data(each) for each in value)
            case list():
                return [data(each) for each in value]
            case dict():
                return {name: data(each) for name, each in value.items()}
            case slice():
                return ("slice", data(value.start), data(value.stop), data(value.step))
            case float() if math.isnan(value):
                return "nan"
            case bool() | int() | float():
                return (type(value).__name__, value)
        return value

    return [(node.target, data(node.args), data(dict(node.kwargs)), g.line_of(node)) for node in graph.nodes]


class TestTheWayThroughAMessage:
    def test_keeps_every_kind_of_node_and_its_line(self):
        graph = everything()

        back = g.graph_from_proto(pb.Graph.FromString(g.graph_to_proto(graph).SerializeToString()))

        assert plain(back) == plain(graph)

    def test_keeps_the_rows_of_every_invoke(self):
        back = g.graph_from_proto(g.graph_to_proto(everything()))

        assert back.traces == everything().traces

    def test_keeps_constants_and_the_hashes_of_those_that_were_uploaded(self):
        inline, uploaded = g.graph_from_proto(g.graph_to_proto(everything())).constants

        assert torch.equal(inline, torch.arange(3.0))
        assert uploaded == b"\x01" * 32

    def test_gives_the_same_message_again(self):
        message = g.graph_to_proto(everything())

        assert g.graph_to_proto(g.graph_from_proto(message)) == message

    def test_names_a_line_once_however_many_nodes_it_made(self):
        message = g.graph_to_proto(everything())

        assert len(message.lines) == 1 + len({node.line for node in message.nodes} - {0})


def with_arguments(args: Any, kwargs: Any) -> g.Graph:
    graph = rows(g.Graph())
    for _ in range(3):
        graph.fx.call_function(g.read, (g.Site(0, 0, Address("logits")),))
    node = graph.fx.call_function(ADD.function, args, kwargs)
    node.meta["operation"] = ADD
    return graph


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=20),
    st.just(...),
    st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.int64]),
)
BOUNDS = st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1))
ARGUMENTS = st.recursive(
    st.one_of(LEAVES, st.builds(slice, BOUNDS, BOUNDS, BOUNDS)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple)),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(st.lists(ARGUMENTS, max_size=4), st.dictionaries(st.sampled_from(["dim", "alpha", "other"]), ARGUMENTS))
def test_any_plain_arguments_come_back_as_they_were(args, kwargs):
    graph = with_arguments(tuple(args), kwargs)

    assert plain(g.graph_from_proto(g.graph_to_proto(graph))) == plain(graph)


def test_references_to_nodes_come_back_inside_tuples_lists_and_slices():
    graph = with_arguments((), {})
    one, two, three, add = graph.nodes
    add.args = (one, [two, (three, 1)], slice(one, None, two))

    assert plain(g.graph_from_proto(g.graph_to_proto(graph))) == plain(graph)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_an_integer_that_does_not_fit_into_64_bits_is_refused(value):
    with pytest.raises(GraphError, match="does not fit into 64 bits"):
        g.graph_to_proto(with_arguments((value,), {}))


@pytest.mark.parametrize("value", [object(), b"bytes"])
def test_what_is_no_plain_data_is_refused(value):
    with pytest.raises(GraphError, match=f"A {type(value).__name__} cannot be an argument") as caught:
        g.graph_to_proto(with_arguments((value,), {}))
    assert "Numbers, strings" in caught.value.hint


# --- hostile messages -------------------------------------------------------------------------------------------------


def message(*nodes: pb.Node, constants: int = 0) -> pb.Graph:
    one = tensor_pb2.Tensor(header=tensor_pb2.TensorHeader(dtype=tensor_pb2.DTYPE_UINT8, shape=[1]), data=b"1")
    return pb.Graph(
        traces=[pb.Trace(model="gpt2", invokes=[pb.Invoke(rows=[pb.TokenRow(ids=[1])])])],
        nodes=nodes,
        constants=[pb.Constant(inline=one)] * constants,
        lines=[pb.SourceLine(), pb.SourceLine(file="user.py", line=7, code="bad()")],
    )


READ = pb.Node(read=pb.Read(site=pb.Site(address="logits")))
WRITE = pb.Node(write=pb.Write(site=pb.Site(address="logits"), value=0))
SAVE = pb.Node(save=pb.Save(value=0))


def operation(name: str, *args: pb.Argument, **kwargs: pb.Argument) -> pb.Node:
    return pb.Node(call=pb.Call(op=name, args=args, kwargs=kwargs), line=1)


def node(index: int) -> pb.Argument:
    return pb.Argument(node=index)


def nested(depth: int) -> pb.Argument:
    inner = pb.Argument(integer=1)
    for _ in range(depth):
        inner = pb.Argument(list=pb.Sequence(items=[inner]))
    return inner


def edit(views: list[pb.Call], change: pb.Call, base: int = 0) -> pb.Node:
    return pb.Node(edit=pb.Edit(base=base, views=views, change=change))


ZERO = pb.Call(op="torch.Tensor.zero_")


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ([SAVE], "refers to node 0, which is not before it"),
        ([READ, operation("torch.neg", node(1))], "refers to node 1, which is not before it"),
        ([READ, operation("torch.neg", node(2)), READ], "refers to node 2, which is not before it"),
        ([READ, operation("torch.neg", node(2**32 - 1))], "is not before it"),
        ([READ, operation("torch.neg", pb.Argument(list=pb.Sequence(items=[node(5)])))], "is not before it"),
        ([READ, WRITE, operation("torch.neg", node(1))], "Node 1 has no value"),
        ([READ, SAVE, operation("torch.neg", node(1))], "Node 1 has no value"),
        ([READ, SAVE, pb.Node(save=pb.Save(value=1))], "Node 1 has no value"),
        ([pb.Node(read=pb.Read(site=pb.Site(trace=1)))], "no trace 1"),
        ([pb.Node(read=pb.Read(site=pb.Site(invoke=1)))], "Trace 0 has no invoke 1"),
        ([pb.Node(read=pb.Read(site=pb.Site(path=[pb.Item(index=0)] * 17)))], "path of a site is too long"),
        ([READ, pb.Node(write=pb.Write(site=pb.Site(trace=9), value=0))], "no trace 9"),
        ([pb.Node(apply=pb.Apply(trace=1))], "no trace 1"),
        ([pb.Node(parameter=pb.Parameter(trace=1))], "no trace 1"),
        ([pb.Node(constant=0)], "no constant 0"),
        ([READ, operation("torch.neg", pb.Argument())], "of a kind that this version does not know"),
        ([READ, operation("torch.neg", dim=pb.Argument())], "of a kind that this version does not know"),
        ([pb.Node()], "Node 0 is of a kind"),
        ([READ, pb.Node(line=1)], "Node 1 is of a kind"),
        ([READ, operation("torch.Tensor.add_", node(0), node(0))], "belongs into an edit"),
        ([READ, operation("operator.iadd", node(0), node(0))], "belongs into an edit"),
        ([READ, operation("torch.neg", nested(17))], "nested too deeply"),
        ([READ, operation("torch.neg", pb.Argument(text="x" * 257))], "too long"),
        ([READ, edit([], pb.Call(op="torch.neg"))], "views and then one in-place operation"),
        ([READ, edit([ZERO], ZERO)], "views and then one in-place operation"),
        ([READ, edit([], ZERO, base=1)], "is not before it"),
        ([READ, WRITE, edit([], ZERO, base=1)], "Node 1 has no value"),
        ([READ, pb.Node(save=pb.Save(value=0, dtype=77))], "dtype 77 is not known"),
        ([READ, operation("torch.neg", pb.Argument(dtype=77))], "dtype 77 is not known"),
        ([READ, operation("torch.neg", pb.Argument(dtype=0))], "dtype 0 is not known"),
    ],
)
def test_a_malformed_graph_is_refused(nodes, says):
    with pytest.raises(GraphError, match=says):
        g.graph_from_proto(message(*nodes))


@pytest.mark.parametrize(
    "name",
    ["torch.load", "eval", "os.system", "", "torch.Tensor.__class__", "torch", "x" * 10_000, "torch.Tensor.add "],
)
@pytest.mark.parametrize("where", ["call", "view", "change"])
def test_an_operation_that_is_not_on_the_list_is_refused_by_name(name, where):
    wrong = pb.Call(op=name)
    nodes = {"call": pb.Node(call=wrong), "view": edit([wrong], ZERO), "change": edit([], wrong)}

    with pytest.raises(OperationError) as caught:
        g.graph_from_proto(message(READ, nodes[where]))
    assert f"`{name[:256]}` is not an operation of this server (version {VERSION})." in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("argument", sorted(ops.FORBIDDEN_ARGUMENTS))
@pytest.mark.parametrize("where", ["call", "change"])
def test_an_argument_that_says_where_to_write_or_run_is_refused(argument, where):
    kwargs = {argument: node(0)}
    nodes = {
        "call": operation("torch.add", node(0), node(0), **kwargs),
        "change": edit([], pb.Call(op="torch.Tensor.add_", args=[node(0)], kwargs=kwargs)),
    }
    with pytest.raises(OperationError, match=f"takes no `{argument}`"):
        g.graph_from_proto(message(READ, nodes[where]))


@pytest.mark.parametrize(
    ("name", "position", "argument"),
    [
        ("torch.norm", 4, "out"),
        ("torch.tensordot", 3, "out"),
        ("torch.nn.functional.normalize", 4, "out"),
        ("torch.nn.functional.relu", 1, "inplace"),
        ("torch.nn.functional.elu", 2, "inplace"),
        ("torch.nn.functional.hardtanh", 3, "inplace"),
        ("torch.nn.functional.embedding", 3, "max_norm"),
    ],
)
def test_an_argument_that_would_change_a_weight_is_refused_by_position_too(name, position, argument):
    none = pb.Argument(none=pb.NoneValue())
    weight = pb.Node(parameter=pb.Parameter(path="lm_head.weight"))
    args = [node(0), *[none] * (position - 1), pb.Argument(real=1.0)]

    with pytest.raises(OperationError, match=f"takes no `{argument}`"):
        g.graph_from_proto(message(weight, operation(name, *args)))


@pytest.mark.parametrize("place", ["cuda:0", "meta", "cpu"])
def test_a_value_cannot_be_moved_to_another_device(place):
    with pytest.raises(OperationError, match="takes no `device`"):
        g.graph_from_proto(message(READ, operation("torch.Tensor.to", node(0), pb.Argument(text=place))))


def test_a_list_argument_that_is_too_long_is_refused():
    items = [pb.Argument(integer=0)] * ((1 << 12) + 1)

    with pytest.raises(LimitError, match="4,097 arguments is too long"):
        g.graph_from_proto(message(READ, operation("torch.neg", pb.Argument(list=pb.Sequence(items=items)))))


def test_lists_that_are_too_many_together_are_refused():
    items = [pb.Argument(integer=0)] * (1 << 12)
    lists = [pb.Argument(list=pb.Sequence(items=items))] * 65

    with pytest.raises(LimitError, match="too many arguments"):
        g.graph_from_proto(message(READ, operation("torch.stack", *lists)))


@pytest.mark.parametrize("name", ["torch.neg", "torch.Tensor.new_zeros", "torch.Tensor.repeat", "torch.Tensor.zero_"])
def test_the_way_of_an_edit_leads_through_views_only(name):
    change = pb.Call(op="torch.Tensor.zero_")
    edit = pb.Node(edit=pb.Edit(base=0, views=[pb.Call(op=name)], change=change))

    with pytest.raises(GraphError, match="views and then one in-place operation"):
        g.graph_from_proto(message(READ, edit))


def test_the_deepest_argument_that_is_allowed_is_read():
    back = g.graph_from_proto(message(READ, operation("torch.neg", nested(16))))

    assert len(back.nodes) == 2


def test_a_slice_whose_parts_are_left_out_has_none_there():
    argument = pb.Argument(slice=pb.Slice(stop=pb.Argument(integer=3)))

    back = g.graph_from_proto(message(READ, operation("operator.getitem", node(0), argument)))

    assert back.nodes[1].args[1] == slice(None, 3, None)


def test_a_constant_without_content_is_refused():
    graph = message(READ)
    graph.constants.add()

    with pytest.raises(GraphError, match="no content"):
        g.graph_from_proto(graph)


def test_a_constant_over_the_limit_is_refused():
    with pytest.raises(LimitError, match="at most 0 are allowed"):
        g.graph_from_proto(message(constants=1), constant_bytes=0)


def test_the_error_names_the_line_that_the_node_came_from():
    with pytest.raises(OperationError) as caught:
        g.graph_from_proto(message(READ, operation("torch.load")))

    assert caught.value.lines == (SourceLine("user.py", 7, "bad()"),)
    assert "user.py:7    bad()" in str(caught.value)


@pytest.mark.parametrize("line", [2, 2**32 - 1])
def test_a_line_that_does_not_exist_is_unknown_and_nothing_more(line):
    back = g.graph_from_proto(message(pb.Node(read=READ.read, line=line)))

    assert g.line_of(back.nodes[0]) is None


def test_over_long_lines_are_cut():
    graph = message(READ)
    graph.lines[1].file, graph.lines[1].code = "f" * 10_000, "c" * 10_000
    graph.nodes[0].line = 1

    line = g.line_of(g.graph_from_proto(graph).nodes[0])

    assert (len(line.file), len(line.code)) == (1024, 256)


def test_an_empty_message_is_an_empty_graph():
    back = g.graph_from_proto(pb.Graph())

    assert (back.nodes, back.traces, back.constants) == ([], [], [])


VALID = g.graph_to_proto(everything()).SerializeToString()


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_valid_graph_with_bytes_changed_is_a_graph_or_a_clear_error(data):
    changed = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(changed) - 1))
        changed[position] = data.draw(st.integers(0, 255))
    parsed = pb.Graph()
    try:
        parsed.ParseFromString(bytes(changed))
    except Exception:  # protobuf refuses it before we see it
        return

    with contextlib.suppress(PatchwireError):
        g.graph_from_proto(parsed, constant_bytes=1 << 20)


# --- edits ------------------------------------------------------------------------------------------------------------

ROW = ("operator.getitem", (0,), {})
COLUMN = ("operator.getitem", ((slice(None), 0),), {})


def base() -> Tensor:
    return torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("views", "change", "expected"),
    [
        ((), ("torch.Tensor.zero_", (), {}), [[0, 0, 0], [0, 0, 0]]),
        ((ROW,), ("torch.Tensor.add_", (1.0,), {}), [[1, 2, 3], [3, 4, 5]]),
        ((("torch.Tensor.t", (), {}), ROW), ("torch.Tensor.mul_", (10.0,), {}), [[0, 1, 2], [30, 4, 5]]),
        ((COLUMN,), ("operator.setitem", (slice(None), 9.0), {}), [[9, 1, 2], [9, 4, 5]]),
        ((), ("operator.iadd", (1.0,), {}), [[1, 2, 3], [4, 5, 6]]),
    ],
)
def test_an_edit_is_a_copy_changed_at_the_place_that_the_views_lead_to(views, change, expected):
    original = base()

    assert g.edit(original, views, change).tolist() == expected
    assert torch.equal(original, base())


def test_an_edit_of_an_item_of_a_tuple_leaves_the_other_items_alone():
    one, two = base(), base()

    edited = g.edit((one, two), (("operator.getitem", (1,), {}), ROW), ("torch.Tensor.zero_", (), {}))

    assert edited[0] is one
    assert edited[1].tolist() == [[0, 0, 0], [3, 4, 5]]
    assert torch.equal(two, base())


@pytest.mark.parametrize("copying", [("torch.Tensor.double", (), {}), ("operator.getitem", ([0, 1],), {})])
def test_an_edit_through_a_copy_is_refused_because_it_would_be_lost(copying):
    with pytest.raises(ValueError, match="would be lost"):
        g.edit(base(), (copying,), ("torch.Tensor.zero_", (), {}))


def test_an_edit_of_an_expanded_tensor_changes_all_of_it():
    expanded = torch.zeros(1, 3).expand(2, 3)

    assert g.edit(expanded, (ROW,), ("torch.Tensor.add_", (1.0,), {})).tolist() == [[1, 1, 1], [0, 0, 0]]


def test_operators_are_not_looked_up_by_their_python_names():
    assert g.graph_from_proto(message(READ, operation("operator.neg", node(0)))).nodes[1].target is operator.neg
