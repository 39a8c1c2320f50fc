"""Whatever is sent, the server answers with a result or a clear error, and goes on to serve everybody else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import patchwire
import tiny
from integration import messages
from patchwire import ops
from patchwire.status import error_from_call
from patchwire.v1 import graph_pb2 as pb
from patchwire.v1 import job_pb2, job_pb2_grpc, service_pb2, service_pb2_grpc, tensor_pb2
from serving import Server

SECONDS = 60
# Large enough for what is small, small enough that no example takes long.
LIMITS = {"value_bytes": 4 << 20, "result_bytes": 1 << 20, "constant_bytes": 1 << 20, "tokens": 200, "seconds": 20.0}

few = settings(
    deadline=None, max_examples=60, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink]
)
many = settings(few, max_examples=3000)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own: what is done to it here is nobody else's trouble."""
    directory = tiny.save("gpt2", tmp_path_factory.mktemp("fuzz") / "gpt2")
    with Server({"gpt2": directory}, limits=LIMITS) as server:
        yield server
        _, *failures = server.log.split("in a way that it must not")
        assert not failures, failures[0][:5000]


@pytest.fixture(scope="module")
def channel(target: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(target.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> service_pb2_grpc.PatchwireServiceStub:
    return service_pb2_grpc.PatchwireServiceStub(channel)


@pytest.fixture(autouse=True)
def unharmed(target: Server, channel: grpc.Channel) -> Iterator[None]:
    """After every test of this file the server lives, and computes what it computed before."""
    before = logits(target)
    yield
    assert target.process.poll() is None
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert torch.equal(logits(target), before)


def logits(target: Server) -> torch.Tensor:
    with patchwire.connect(target.address, timeout=SECONDS, progress=False) as client:
        model = client.model()
        with model.trace([1, 2, 3, 4]):
            found = model.logits.save()
    return found.value


def answer(target: Server, call, request) -> None:
    """Send a request; fail if the answer is neither a result nor a clear error."""
    failed = None
    try:
        answers = call(request, timeout=SECONDS)
        for _ in answers if hasattr(answers, "__next__") else ():
            pass
    except grpc.RpcError as error:
        failed = error
    if failed is not None:
        error = error_from_call(failed, "here")
        about = f"{failed.code()}: {error}\n{target.log[-3000:]}"
        assert failed.code() not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), about
        assert failed.code() is not grpc.StatusCode.UNAVAILABLE, about
        assert failed.code() is not grpc.StatusCode.DEADLINE_EXCEEDED or "server's" in error.message, about
        assert type(error) is not patchwire.PatchwireError, about
        assert len(str(error)) < 10_000
        assert "Traceback" not in str(error)


def everything(target: Server, stub: service_pb2_grpc.PatchwireServiceStub, graph: pb.Graph) -> None:
    answer(target, stub.Check, service_pb2.CheckRequest(graph=graph))
    answer(target, stub.Run, service_pb2.RunRequest(graph=graph))


# --- graphs that look like graphs -------------------------------------------------------------------------------------

ADDRESSES = ["logits", "embed.output", "layers.0.output", "layers.1.input", "layers.2.mixer.output", "norm.output"]
ODD_ADDRESSES = ["output", "input", "transformer.h.1.attn.output", "layers.1.mlp", "layers.9.output", "", ".", "x.y.z"]
MODULES = ["lm_head", "norm", "layers.0", "layers.1.mlp", "embed"]
ODD_MODULES = ["", "layers", "transformer", "nope"]
PARAMETERS = ["lm_head.weight", "norm.bias", "embed.weight", "layers.0.mlp.c_fc.weight"]
ODD_PARAMETERS = ["weight", "x", "", "lm_head"]
NAMES = {
    kind: sorted(name for name, each in ops.OPERATIONS.items() if each.kind == kind)
    for kind in ("pure", "view", "inplace", "draw")
}
ODD_NAMES = ["", "torch.load", "eval", "torch.Tensor.add_", "torch.nn.functional.dropout"]
KEYWORDS = ["dim", "keepdim", "dtype", "alpha", "p", "descending", "unbiased"]
ODD_KEYWORDS = ["out", "inplace", "device", "input", "x", ""]
TEXTS = ["", "sum", "fro", "ij,jk->ik", "cpu", "tanh", "mean", "meta", "reduce"]
INTEGERS = [*range(-3, 9)]
ODD_INTEGERS = [2**31, 2**40, -(2**40), 2**63 - 1, -(2**63)]
DTYPES = [value for value in tensor_pb2.Dtype.values() if value]
ODD_DTYPES = [0, 77]
IDS = [*range(20)]
ODD_IDS = [60, 61, -1, 2**62]


class Sender:
    """Draws what a client might send; a wild one draws what none should, now and then."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.wild = draw(st.integers(0, 3)) == 0

    def one(self, usual: list, odd: list = ()) -> object:
        """One of the usual; of a wild sender sometimes one of the odd."""
        return self.draw(st.sampled_from(odd if odd and self.wild and self.chance(6) else usual))

    def chance(self, of: int) -> bool:
        return self.draw(st.integers(1, of)) == 1

    def number(self, below: int) -> int:
        """A position of which there are so many; of a wild sender sometimes one too far."""
        return self.one([*range(max(below, 1))], [below, below + 1, 2**32 - 1])

    def argument(self, nodes: int, depth: int = 0) -> pb.Argument:
        kinds = ["node", "node", "integer", "integer", "real", "boolean", "slice", "list", "tuple", "dtype"]
        match self.one(kinds, ["none", "ellipsis", "text", "nothing"]) if depth < 3 else "integer":
            case "node":
                return pb.Argument(node=self.number(nodes))
            case "integer":
                return pb.Argument(integer=self.one(INTEGERS, ODD_INTEGERS))
            case "real":
                return pb.Argument(real=self.draw(st.floats()))
            case "boolean":
                return pb.Argument(boolean=self.draw(st.booleans()))
            case "dtype":
                return pb.Argument(dtype=self.one(DTYPES, ODD_DTYPES))
            case "text":
                return pb.Argument(text=self.one(TEXTS))
            case "none":
                return pb.Argument(none=pb.NoneValue())
            case "ellipsis":
                return pb.Argument(ellipsis=pb.EllipsisValue())
            case "slice":
                bounds = {name: pb.Argument(integer=self.one(INTEGERS, ODD_INTEGERS)) for name in ("start", "stop")}
                return pb.Argument(slice=pb.Slice(**{name: each for name, each in bounds.items() if self.chance(2)}))
            case "list" | "tuple" as kind:
                items = [self.argument(nodes, depth + 1) for _ in range(self.draw(st.integers(0, 3)))]
                return pb.Argument(**{kind: pb.Sequence(items=items)})
        return pb.Argument()

    def call(self, nodes: int, kind: str, *first: pb.Argument) -> pb.Call:
        count = self.one([0, 0, 0, 1, 1, 2, 3]) if kind != "inplace" else self.one([0, 1, 1, 2])
        call = pb.Call(
            op=self.one(NAMES[kind], ODD_NAMES), args=[*first, *(self.argument(nodes) for _ in range(count))]
        )
        if self.chance(6):
            call.kwargs[self.one(KEYWORDS, ODD_KEYWORDS)].CopyFrom(self.argument(nodes))
        return call

    def node(self, nodes: int) -> pb.Node:
        """A node after so many others."""
        earlier = self.number(nodes)
        site = pb.Site(trace=self.one([0], [1]), invoke=self.one([0], [1]), address=self.one(ADDRESSES, ODD_ADDRESSES))
        match self.one(
            ["read", "call", "call", "call", "call", "draw", "edit", "edit", "write", "apply", "parameter", "constant"]
        ):
            case "read":
                return pb.Node(read=pb.Read(site=site))
            case "write":
                return pb.Node(write=pb.Write(site=site, value=earlier))
            case "call":
                return pb.Node(call=self.call(nodes, self.one(["pure", "pure", "view"]), pb.Argument(node=earlier)))
            case "draw":
                lengths = [
                    pb.Argument(integer=self.one([0, 1, 2, 5], ODD_INTEGERS)) for _ in range(self.one([1, 2, 3]))
                ]
                size = pb.Argument(tuple=pb.Sequence(items=lengths))
                return pb.Node(call=self.call(nodes, "draw", size, pb.Argument(integer=self.one(INTEGERS))))
            case "edit":
                views = [self.call(nodes, "view") for _ in range(self.one([0, 0, 1, 2]))]
                return pb.Node(edit=pb.Edit(base=earlier, views=views, change=self.call(nodes, "inplace")))
            case "apply":
                module = self.one(MODULES, ODD_MODULES)
                return pb.Node(apply=pb.Apply(trace=site.trace, module=module, args=[pb.Argument(node=earlier)]))
            case "parameter":
                return pb.Node(parameter=pb.Parameter(trace=site.trace, path=self.one(PARAMETERS, ODD_PARAMETERS)))
        return pb.Node(constant=self.number(2))


@st.composite
def graphs(draw) -> pb.Graph:
    """A graph that is nearly sound, and saves every value that it has."""
    sender = Sender(draw)
    graph = pb.Graph()
    for _ in range(2):
        wrong = draw(st.binary(max_size=20)) if sender.wild and sender.chance(6) else None
        shape = [sender.one([0, 1, 2, 3, 24]) for _ in range(sender.one([0, 1, 2, 3]))]
        graph.constants.add().inline.CopyFrom(pb_tensor(sender.one(DTYPES, ODD_DTYPES), shape, wrong))
    rows = [
        [sender.one(IDS, ODD_IDS) for _ in range(sender.one([1, 3, 3, 3, 5]))] for _ in range(sender.one([1, 1, 2]))
    ]
    model = sender.one(["gpt2"], ["nobody"])
    graph.traces.add(model=model).invokes.add(rows=[pb.TokenRow(ids=row) for row in rows])
    graph.nodes.add().read.site.address = sender.one(ADDRESSES)
    for _ in range(sender.one([1, 2, 3, 4, 6])):
        valued = [index for index, node in enumerate(graph.nodes) if not node.HasField("write")]
        node = sender.node(len(valued))
        graph.nodes.append(renumbered(node, valued))
    for index, node in enumerate(list(graph.nodes)):
        if not node.HasField("write"):
            graph.nodes.add().save.value = index
            if sender.chance(4):
                graph.nodes.add().log.parts.extend([pb.Argument(text=sender.one(TEXTS)), pb.Argument(node=index)])
    return graph


def renumbered(node: pb.Node, valued: list[int]) -> pb.Node:
    """The same node, its references those to the nodes that have a value."""

    def number(index: int) -> int:
        return valued[index] if index < len(valued) else index

    def within(argument: pb.Argument) -> None:
        match argument.WhichOneof("kind"):
            case "node":
                argument.node = number(argument.node)
            case "list" | "tuple" as kind:
                for each in getattr(argument, kind).items:
                    within(each)

    match node.WhichOneof("body"):
        case "write":
            node.write.value = number(node.write.value)
        case "edit":
            node.edit.base = number(node.edit.base)
    for call in (node.call, node.edit.change, *node.edit.views, node.apply):
        for each in (*call.args, *call.kwargs.values()):
            within(each)
    return node


def pb_tensor(dtype: int, shape: list[int], data: bytes | None) -> tensor_pb2.Tensor:
    """A tensor: of the right number of bytes unless some are given."""
    size = {1: 1, 2: 1, 3: 1, 4: 2, 5: 4, 6: 8, 7: 2, 8: 2, 9: 4, 10: 8, 11: 8, 12: 16, 13: 1, 14: 1}.get(dtype, 1)
    for length in shape:
        size *= length
    header = tensor_pb2.TensorHeader(dtype=dtype, shape=shape)
    return tensor_pb2.Tensor(header=header, data=bytes(size) if data is None else data)


@few
@given(graph=graphs())
def test_a_random_graph_is_answered(target, stub, graph):
    everything(target, stub, graph)


@st.composite
def loops(draw) -> pb.Graph:
    """A loop that is nearly sound, whose body is a random graph."""
    sender, body, graph = Sender(draw), draw(graphs()), pb.Graph()
    inputs = sender.one([0, 1, 2])
    if sender.chance(2):
        rows = body.traces[0].invokes[0].rows
        batches = [pb.Batch(rows=rows[: sender.one([1, 1, 2], [0])]) for _ in range(sender.one([2, 2, 3]))]
        body.traces[0].invokes[0].CopyFrom(pb.Invoke(batches=batches))
        if sender.chance(2):
            body.nodes.add().token_ids.SetInParent()
            body.nodes.add().save.value = len(body.nodes) - 2
    for index in range(inputs):
        body.nodes.add().outside = sender.one([index], [inputs, 2**32 - 1])
        body.nodes.add().carry.CopyFrom(pb.Carry(outside=index, value=sender.one([len(body.nodes) - 2, 0])))
    graph.constants.extend(body.constants)
    graph.traces.add(model="gpt2").invokes.add(rows=[pb.TokenRow(ids=[1, 2])])
    graph.traces.add(model="gpt2", loop=pb.Loop(body=body, count=sender.one([2, 2, 3], [0, 2**32 - 1])))
    graph.nodes.add().read.site.address = sender.one(ADDRESSES)
    graph.nodes.add().constant = sender.number(2)
    graph.nodes.add().loop.CopyFrom(
        pb.RunLoop(trace=sender.one([1], [0, 2]), inputs=[sender.number(2) for _ in range(inputs)])
    )
    for index in range(inputs):
        result = [pb.Argument(node=2), pb.Argument(integer=index)]
        graph.nodes.add().call.CopyFrom(pb.Call(op="operator.getitem", args=result))
        graph.nodes.add().save.value = len(graph.nodes) - 2
        graph.nodes.add().keep.CopyFrom(pb.Keep(value=len(graph.nodes) - 3, seconds=sender.one([1e-3], [0.0, 1e300])))
    return graph


@few
@given(graph=loops())
def test_a_random_loop_is_answered(target, stub, graph):
    everything(target, stub, graph)


@pytest.mark.slow
@many
@given(graph=loops())
def test_many_random_loops_are_answered(target, stub, graph):
    everything(target, stub, graph)


@pytest.mark.slow
@many
@given(graph=graphs())
def test_many_random_graphs_are_answered(target, stub, graph):
    everything(target, stub, graph)


# --- bytes ------------------------------------------------------------------------------------------------------------


def valid() -> bytes:
    """A graph of all kinds of nodes that runs."""
    graph = pb.Graph()
    graph.traces.add(model="gpt2").invokes.add(rows=[pb.TokenRow(ids=[1, 2, 3]), pb.TokenRow(ids=[4])])
    graph.constants.add().inline.CopyFrom(pb_tensor(tensor_pb2.DTYPE_FLOAT32, [24], None))
    site = pb.Site(address="layers.1.output")
    graph.nodes.add().read.site.CopyFrom(site)
    graph.nodes.add().constant = 0
    add = pb.Call(op="torch.add", args=[pb.Argument(node=0), pb.Argument(node=1)])
    add.kwargs["alpha"].real = 0.5
    graph.nodes.add().call.CopyFrom(add)
    view = pb.Call(op="operator.getitem", args=[pb.Argument(tuple=pb.Sequence(items=[pb.Argument(integer=0)]))])
    graph.nodes.add().edit.CopyFrom(pb.Edit(base=2, views=[view], change=pb.Call(op="torch.Tensor.zero_")))
    graph.nodes.add().write.CopyFrom(pb.Write(site=site, value=3))
    graph.nodes.add().apply.CopyFrom(pb.Apply(module="norm", args=[pb.Argument(node=3)]))
    graph.nodes.add().parameter.path = "lm_head.weight"
    for value in (2, 3, 5, 6):
        graph.nodes.add().save.value = value
    graph.nodes.add().keep.CopyFrom(pb.Keep(value=2, seconds=1e-3))
    body = pb.Graph()
    batches = [pb.Batch(rows=[pb.TokenRow(ids=[1, 2, 3])]), pb.Batch(rows=[pb.TokenRow(ids=[4])])]
    body.traces.add(model="gpt2").invokes.add(batches=batches)
    body.nodes.add().token_ids.SetInParent()
    body.nodes.add().outside = 0
    body.nodes.add().carry.CopyFrom(pb.Carry(outside=0, value=1))
    body.nodes.add().save.value = 0
    graph.traces.add(model="gpt2", loop=pb.Loop(body=body, count=2))
    graph.nodes.add().loop.CopyFrom(pb.RunLoop(trace=1, inputs=[1]))
    graph.lines.add(file="user.py", line=3, code="x")
    return graph.SerializeToString()


VALID = valid()


@st.composite
def mutations(draw) -> pb.Graph | None:
    """A valid graph with some bytes changed, dropped or doubled; None if that is no message any more."""
    data = bytearray(VALID)
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["change", "change", "drop", "double"])):
            case "change":
                data[position] = draw(st.integers(0, 255))
            case "drop":
                del data[position : position + draw(st.integers(1, 8))]
            case "double":
                data[position:position] = data[position : position + draw(st.integers(1, 8))]
    graph = None
    with contextlib.suppress(Exception):
        graph = pb.Graph.FromString(bytes(data))
    return graph


def test_the_graph_that_is_mutated_runs(stub):
    *_, last = messages.events(stub.Run(service_pb2.RunRequest(graph=pb.Graph.FromString(VALID)), timeout=SECONDS))

    assert last.HasField("done")


@few
@given(graph=mutations())
def test_a_valid_graph_with_bytes_changed_is_answered(target, stub, graph):
    if graph is not None:
        everything(target, stub, graph)


@pytest.mark.slow
@many
@given(graph=mutations())
def test_many_valid_graphs_with_bytes_changed_are_answered(target, stub, graph):
    if graph is not None:
        everything(target, stub, graph)


METHODS = {
    "Handshake": "unary_unary",
    "ListModels": "unary_unary",
    "DescribeModel": "unary_unary",
    "DescribeSource": "unary_unary",
    "Tokenize": "unary_unary",
    "Upload": "stream_unary",
    "Check": "unary_unary",
    "Run": "unary_stream",
}


JOB_METHODS = ("SubmitJob", "GetJob", "ListJobs", "FetchJob", "CancelJob", "ForgetJob")


@few
@given(method=st.sampled_from(JOB_METHODS), data=st.binary(max_size=200))
def test_bytes_that_are_no_message_about_a_job_do_no_harm(channel, method, data):
    kind = "unary_stream" if method == "FetchJob" else "unary_unary"
    answers = getattr(channel, kind)(f"/patchwire.v1.JobService/{method}")
    with contextlib.suppress(grpc.RpcError):
        found = answers(data, timeout=SECONDS)
        _ = list(found) if kind == "unary_stream" else found


@few
@given(graph=graphs())
def test_a_random_graph_as_a_job_is_answered_and_ends(target, channel, graph):
    jobs = job_pb2_grpc.JobServiceStub(channel)
    name = None
    with contextlib.suppress(grpc.RpcError):  # what refuses it is the subject of other tests
        name = jobs.SubmitJob(job_pb2.SubmitJobRequest(graph=graph), timeout=SECONDS).job.id
    if name is not None:
        assert jobs.GetJob(job_pb2.GetJobRequest(id=name, wait_seconds=SECONDS)).job.state in (
            job_pb2.JOB_STATE_DONE,
            job_pb2.JOB_STATE_FAILED,
        )
        answer(target, jobs.FetchJob, job_pb2.FetchJobRequest(id=name))
        jobs.ForgetJob(job_pb2.ForgetJobRequest(id=name))


@few
@given(name=st.text(max_size=60), seconds=st.floats())
def test_a_random_name_of_a_job_is_answered(target, channel, name, seconds):
    jobs = job_pb2_grpc.JobServiceStub(channel)
    answer(target, jobs.GetJob, job_pb2.GetJobRequest(id=name, wait_seconds=seconds))
    answer(target, jobs.FetchJob, job_pb2.FetchJobRequest(id=name))
    answer(target, jobs.CancelJob, job_pb2.CancelJobRequest(id=name))
    answer(target, jobs.ForgetJob, job_pb2.ForgetJobRequest(id=name))


@few
@given(method=st.sampled_from(sorted(METHODS)), data=st.binary(max_size=200))
def test_bytes_that_are_no_message_do_no_harm(channel, method, data):
    call = getattr(channel, METHODS[method])(f"/patchwire.v1.PatchwireService/{method}")
    with contextlib.suppress(grpc.RpcError):  # gRPC itself refuses what it cannot read
        answers = call(iter([data]) if METHODS[method] == "stream_unary" else data, timeout=SECONDS)
        _ = list(answers) if METHODS[method] == "unary_stream" else answers


UPLOADS = st.lists(
    st.one_of(
        st.builds(
            lambda dtype, shape, packed: service_pb2.UploadRequest(
                header=tensor_pb2.TensorHeader(dtype=dtype, shape=shape, compression=packed)
            ),
            st.sampled_from([*DTYPES, *ODD_DTYPES]),
            st.lists(st.one_of(st.integers(0, 3), st.sampled_from([-1, 2**40, 2**63 - 1])), max_size=3),
            st.sampled_from([0, 0, 1, 7]),
        ),
        st.builds(lambda data: service_pb2.UploadRequest(chunk=data), st.binary(max_size=40)),
        st.builds(service_pb2.UploadRequest),
    ),
    max_size=4,
)


@few
@given(parts=UPLOADS)
def test_a_random_upload_is_answered(target, stub, parts):
    answer(target, stub.Upload, iter(parts))


@few
@given(
    model=st.sampled_from(["gpt2", "", "nobody", "\0"]),
    texts=st.lists(st.text(max_size=20), max_size=3),
    messages=st.lists(st.builds(service_pb2.ChatMessage, role=st.text(max_size=9), content=st.text()), max_size=3),
)
def test_a_random_text_is_answered(target, stub, model, texts, messages):
    answer(target, stub.Tokenize, service_pb2.TokenizeRequest(model=model, texts=texts, messages=messages))
    answer(target, stub.DescribeModel, service_pb2.DescribeModelRequest(model=model))


@few
@given(
    model=st.sampled_from(["gpt2", "", "nobody"]),
    module=st.sampled_from(["layers.0.mixer", "", "transformer.h.1.attn", "layers", "source", "x.source.y", "\0"]),
    path=st.lists(st.one_of(st.sampled_from(["attention_interface_1", "split_1", "source"]), st.text()), max_size=12),
)
def test_a_random_source_is_answered(target, stub, model, module, path):
    answer(target, stub.DescribeSource, service_pb2.DescribeSourceRequest(model=model, module=module, path=path))
