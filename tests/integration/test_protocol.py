"""The protocol as any gRPC client sees it: handshake, listings, checks, health, reflection, tokens, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import patchwire
import tiny
from integration import messages
from patchwire import ops
from patchwire.status import error_from_call
from patchwire.v1 import model_pb2, service_pb2, service_pb2_grpc, tensor_pb2
from patchwire.version import PROTOCOL_VERSION
from patchwire_worker import server as worker
from patchwire_worker.config import ServerConfig
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.models.loading import Loaded

SERVICE = "patchwire.v1.PatchwireService"


def refused(call, *args, **kwargs) -> patchwire.PatchwireError:
    """The error of a call, as our client would raise it."""
    with pytest.raises(grpc.RpcError) as caught:
        list(result) if hasattr(result := call(*args, **kwargs), "__next__") else None
    return error_from_call(caught.value, "here")


class TestHandshake:
    def test_tells_versions_and_limits(self, strict_client, limits):
        answer = strict_client.connection.server

        assert answer.server_version == patchwire.__version__
        assert answer.protocol_version == PROTOCOL_VERSION
        assert answer.operations_version == ops.VERSION
        assert answer.libraries["torch"] == metadata.version("torch")
        told = {name: getattr(answer.limits, name) for name in limits if name != "stored_bytes"}
        assert told == {name: value for name, value in limits.items() if name != "stored_bytes"}

    @pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1, 2**32 - 1])
    def test_with_another_protocol_names_both_versions(self, stub, version):
        request = service_pb2.HandshakeRequest(client_version="9.9", protocol_version=version)

        error = refused(stub.Handshake, request)

        assert type(error) is patchwire.VersionError
        assert f"protocol {PROTOCOL_VERSION}" in error.message
        assert f"(version 9.9) protocol {version}" in error.message
        assert patchwire.__version__ in error.message
        assert "same version" in error.hint

    def test_with_a_server_of_another_kind_is_refused(self, strict_client):
        """A server that has no such method: gRPC's own health service."""
        server = grpc.server(thread_pool())
        health_pb2_grpc.add_HealthServicer_to_server(health_pb2_grpc.HealthServicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with pytest.raises(patchwire.VersionError, match="not a Patchwire server, or an older one"):
                patchwire.connect(f"127.0.0.1:{port}")
        finally:
            server.stop(None)


def thread_pool():
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(max_workers=1)


class TestListings:
    def test_name_every_model(self, client):
        listed = {each.name: each for each in client.models()}

        assert list(listed)[: len(tiny.CORE)] == list(tiny.CORE)
        assert listed["gpt2"].architecture == "GPT2LMHeadModel"
        assert listed["gpt2"].layers == tiny.LAYERS
        assert listed["gpt2"].dtype == tensor_pb2.DTYPE_FLOAT32
        assert listed["gpt2"].device == "cpu"

    def test_describe_a_model_in_full(self, client, references):
        described = client.connection.describe("gpt2")

        assert [each.path for each in described.modules] == [name for name, _ in references["gpt2"].named_modules()]
        assert described.vocabulary == tiny.VOCABULARY
        assert described.max_positions == 64
        assert len(described.fingerprint) == 32
        assert not described.tokenizes_text
        assert described.summary.parameters == sum(each.numel() for each in references["gpt2"].parameters())

    def test_describe_every_parameter(self, client, references):
        described = client.connection.describe("mamba")
        found = {
            f"{module.path}.{each.name}".removeprefix("."): tuple(each.shape)
            for module in described.modules
            for each in module.parameters
        }

        for name, parameter in references["mamba"].named_parameters():
            assert found[name] == tuple(parameter.shape)

    def test_give_another_fingerprint_for_another_model(self, client):
        prints = {client.connection.describe(name).fingerprint for name in tiny.CORE}

        assert len(prints) == len(tiny.CORE)

    @pytest.mark.parametrize("name", ["gpt", "", "x" * 10_000])
    def test_refuse_a_model_that_is_not_there_with_those_that_are(self, stub, name):
        error = refused(stub.DescribeModel, service_pb2.DescribeModelRequest(model=name))

        assert type(error) is patchwire.ModelNotFoundError
        assert "`gpt2`" in error.hint
        assert len(str(error)) < 1000

    def test_refuse_it_on_the_laptop_too(self, client):
        with pytest.raises(patchwire.ModelNotFoundError, match="no model `gpt3`") as caught:
            client.model("gpt3")
        assert "`gpt2`" in caught.value.hint

    def test_ask_which_model_is_meant_if_there_are_several(self, client):
        with pytest.raises(patchwire.ModelNotFoundError, match="Say which model"):
            client.model()

    def test_say_that_a_leaf_has_a_symbolic_shape(self, client):
        described = client.connection.describe("llama")
        embed = next(each for each in described.modules if each.path == "model.embed_tokens")
        output = next(each for each in embed.leaves if each.side == model_pb2.SIDE_OUTPUT)

        assert [(each.axis, each.size) for each in output.shape] == [
            (model_pb2.AXIS_BATCH, 0),
            (model_pb2.AXIS_SEQ, 0),
            (model_pb2.AXIS_UNSPECIFIED, tiny.WIDTH),
        ]


class TestCheck:
    def test_tells_shapes_and_dtypes_without_running(self, stub):
        nodes = [messages.read("layers.1.output"), messages.call("operator.gt", messages.node(0), 0.0)]
        nodes += [messages.save(0), messages.save(1)]
        graph = messages.graph("gpt2", *nodes, rows=[[1, 2, 3], [4, 5, 6]])

        saved = stub.Check(service_pb2.CheckRequest(graph=graph)).saved

        assert [(list(each.shape), each.dtype) for each in saved] == [
            ([2, 3, 24], tensor_pb2.DTYPE_FLOAT32),
            ([2, 3, 24], tensor_pb2.DTYPE_BOOL),
        ]

    def test_tells_the_dtype_that_is_sent(self, stub):
        graph = messages.graph("gpt2", messages.read("logits"), messages.save(0))
        graph.nodes[1].save.dtype = tensor_pb2.DTYPE_BFLOAT16

        assert stub.Check(service_pb2.CheckRequest(graph=graph)).saved[0].dtype == tensor_pb2.DTYPE_BFLOAT16

    def test_tells_nothing_of_a_shape_that_depends_on_values(self, stub):
        nodes = [messages.read("logits"), messages.call("operator.gt", messages.node(0), 0.0)]
        nodes.append(messages.call("torch.masked_select", messages.node(0), messages.node(1)))
        graph = messages.graph("gpt2", *nodes, messages.save(2))

        assert stub.Check(service_pb2.CheckRequest(graph=graph)).saved[0].dtype == tensor_pb2.DTYPE_UNSPECIFIED

    @pytest.mark.parametrize(
        ("nodes", "kind", "says"),
        [
            ([messages.save(0)], patchwire.GraphError, "not before it"),
            ([messages.read("layers.9.output")], patchwire.SiteError, "layers[9]"),
            ([messages.read("logits"), messages.write("layers.0.output", 0)], patchwire.ShapeError, "cannot become"),
            (
                [messages.read("layers.2.output"), messages.write("layers.0.output", 0)],
                patchwire.OrderError,
                "later in the forward pass",
            ),
            (
                [messages.read("logits"), messages.write("logits", 0), messages.write("logits", 0)],
                patchwire.GraphError,
                "written twice",
            ),
            (
                [messages.read("logits"), messages.call("torch.load", messages.node(0))],
                patchwire.OperationError,
                "load",
            ),
            ([messages.parameter("lm_head.wait")], patchwire.SiteError, "not a parameter"),
            (
                [messages.read("logits"), messages.apply("lm_hed", messages.node(0))],
                patchwire.SiteError,
                "not a module",
            ),
        ],
    )
    @pytest.mark.parametrize("method", ["Check", "Run"])
    def test_and_run_refuse_the_same(self, stub, nodes, kind, says, method):
        request = {"Check": service_pb2.CheckRequest, "Run": service_pb2.RunRequest}[method]

        error = refused(getattr(stub, method), request(graph=messages.graph("gpt2", *nodes)))

        assert type(error) is kind
        assert says in error.message

    def test_refuses_at_its_line_what_gives_no_tensor(self, stub):
        item = messages.call("operator.getitem", (messages.node(0), 7), 1)
        graph = messages.at_a_line(messages.graph("gpt2", messages.read("logits"), item))

        error = refused(stub.Check, service_pb2.CheckRequest(graph=graph))

        assert type(error) is patchwire.OperationError
        assert "which is not a tensor" in error.message
        assert "value[0]" in error.hint
        assert [(each.file, each.line) for each in error.lines] == [("user.py", 3)]

    def test_refuses_a_model_that_is_not_there(self, stub):
        error = refused(stub.Check, service_pb2.CheckRequest(graph=messages.graph("gpt3", messages.read("logits"))))

        assert type(error) is patchwire.ModelNotFoundError

    @pytest.mark.parametrize(
        ("rows", "kind"),
        [
            ([], patchwire.InputError),
            ([[]], patchwire.InputError),
            ([[1], []], patchwire.InputError),
            ([[61]], patchwire.InputError),
            ([[-1]], patchwire.InputError),
            ([[2**62]], patchwire.InputError),
            ([[1] * 65], patchwire.InputError),
        ],
        ids=repr,
    )
    def test_refuses_rows_that_the_model_cannot_take(self, stub, rows, kind):
        graph = messages.graph("gpt2", messages.read("logits"), messages.save(0), rows=rows)

        assert type(refused(stub.Check, service_pb2.CheckRequest(graph=graph))) is kind

    def test_refuses_a_graph_without_traces(self, stub):
        assert type(refused(stub.Check, service_pb2.CheckRequest())) is patchwire.GraphError

    def test_refuses_a_graph_one_of_whose_models_is_not_there(self, stub):
        mixed = messages.graph("gpt2", messages.read("logits"))
        mixed.traces.extend(messages.graph("nobody").traces)

        error = refused(stub.Check, service_pb2.CheckRequest(graph=mixed))

        assert type(error) is patchwire.ModelNotFoundError


def test_an_operation_that_the_server_does_not_know_is_named_with_the_server_s_version(stub):
    graph = messages.graph("gpt2", messages.read("logits"), messages.call("torch.brand_new", messages.node(0)))

    error = refused(stub.Run, service_pb2.RunRequest(graph=graph))

    assert type(error) is patchwire.OperationError
    assert "`torch.brand_new`" in error.message
    assert patchwire.__version__ in str(error)


@pytest.mark.parametrize(
    "nodes",
    [
        [messages.call("\u6f22" * 5000)],
        [messages.read("\u6f22" * 1024)],
        [messages.read("layers.2.output"), messages.write("layers.0.output", 0)],
    ],
    ids=["operation", "site", "order"],
)
def test_an_error_of_long_words_in_any_script_is_that_error(stub, nodes):
    graph = messages.graph("gpt2", *nodes)
    graph.lines.add()
    graph.lines.add(file="\u6f22" * 5000, line=1, code="\u6f22" * 5000)
    for node in graph.nodes:
        node.line = 1

    error = refused(stub.Check, service_pb2.CheckRequest(graph=graph))

    assert type(error) in (patchwire.OperationError, patchwire.SiteError, patchwire.OrderError)
    assert "\u6f22" in str(error)


def test_no_error_shows_the_inside_of_the_server(stub):
    graph = messages.graph("gpt2", messages.read("logits"), messages.call("torch.reshape", messages.node(0), [7, 7]))

    error = refused(stub.Run, service_pb2.RunRequest(graph=graph))

    assert "Traceback" not in str(error)
    assert ".py" not in str(error)


class TestWeights:
    """Nobody changes the weights of anybody else's model."""

    @pytest.mark.parametrize(
        "change",
        [
            [messages.call("torch.nn.functional.relu", messages.node(0), inplace=True)],
            [messages.call("torch.nn.functional.relu", messages.node(0), True)],
            [messages.call("torch.nn.functional.leaky_relu", messages.node(0), 0.1, True)],
            [messages.call("torch.norm", messages.node(0), "fro", 0, False, messages.node(0))],
            [messages.call("torch.nn.functional.normalize", messages.node(0), 2.0, 1, 1e-12, messages.node(0))],
            [messages.call("torch.add", messages.node(0), messages.node(0), out=messages.node(0))],
            [
                messages.call("torch.Tensor.long", messages.node(0)),
                messages.call("torch.nn.functional.embedding", messages.node(1), messages.node(0), None, 0.01),
            ],
            [messages.apply("layers.0", messages.node(0))],
            [messages.apply("norm", messages.node(0))],
        ],
        ids=["keyword", "position", "leaky", "norm", "normalize", "out", "embedding", "layer", "module"],
    )
    def test_stay_what_they_are_whatever_a_graph_does_with_them(self, stub, served, references, change):
        graph = messages.graph("gpt2", messages.parameter("lm_head.weight"), *change)
        graph.nodes.append(messages.save(len(change)))

        with contextlib.suppress(grpc.RpcError):  # it may be refused
            list(stub.Run(service_pb2.RunRequest(graph=graph)))
        with served["gpt2"].trace([1, 2, 3]):
            weight = served["gpt2"].lm_head.weight.save()
        assert torch.equal(weight.value, references["gpt2"].lm_head.weight)


class TestStandardServices:
    @pytest.mark.parametrize("service", ["", SERVICE])
    def test_health_says_that_it_serves(self, server, service):
        with grpc.insecure_channel(server.address) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))

        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    def test_health_needs_no_token(self, strict):
        with grpc.insecure_channel(strict.address) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())

        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    def test_reflection_lists_the_service(self, server):
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        with grpc.insecure_channel(server.address) as channel:
            answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
            listed = {each.name for each in next(answers).list_services_response.service}

        assert listed >= {SERVICE, "patchwire.v1.JobService", "grpc.health.v1.Health"}


class TestToken:
    @pytest.mark.parametrize(("token", "says"), [(None, "asks for a token"), ("wrong", "token is wrong"), ("", "asks")])
    def test_that_is_missing_or_wrong_is_refused(self, strict, token, says):
        with pytest.raises(patchwire.AuthenticationError, match=says) as caught:
            patchwire.connect(strict.address, token=token)
        assert "token=" in caught.value.hint

    @pytest.mark.parametrize(
        "method", ["Handshake", "ListModels", "DescribeModel", "DescribeSource", "Tokenize", "Upload", "Check", "Run"]
    )
    @pytest.mark.parametrize("given", [(), (("authorization", "Bearer wrong"),), (("authorization", "correct"),)])
    def test_is_asked_for_by_every_method(self, strict_stub, method, given):
        request = iter([]) if method == "Upload" else getattr(service_pb2, f"{method}Request")()

        error = refused(getattr(strict_stub, method), request, metadata=given)

        assert type(error) is patchwire.AuthenticationError

    def test_never_stands_in_an_error(self, strict, token):
        with pytest.raises(patchwire.AuthenticationError) as caught:
            patchwire.connect(strict.address, token=token[:-1])

        assert token[:-1] not in str(caught.value)
        assert token not in strict.log


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@pytest.fixture(scope="module", params=[False, True], ids=["one side", "both sides"])
def encrypted(request, files) -> Iterator[tuple[str, patchwire.TLS]]:
    """The address of a server that encrypts, and what a client has to know."""
    certificate, key = files
    ca = certificate if request.param else None
    config = ServerConfig(certificate=certificate, key=key, client_ca=ca)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    model = HostedModel(Loaded("gpt2", tiny.build("gpt2"), None))
    server = worker.Server({"gpt2": model}, config)
    asyncio.run_coroutine_threadsafe(server.start(), loop).result()
    own = {"certificate": certificate, "key": key} if request.param else {}
    yield server.address, patchwire.TLS(ca=certificate, **own)
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
class TestTls:
    def test_gives_the_same_values(self, encrypted, served):
        address, tls = encrypted
        with patchwire.connect(address, tls=tls, progress=False) as client:
            model = client.model("gpt2")
            with model.trace([1, 2, 3]):
                logits = model.logits.save()
        with served["gpt2"].trace([1, 2, 3]):
            plain = served["gpt2"].logits.save()

        torch.testing.assert_close(logits.value, plain.value)

    def test_is_not_spoken_to_without_it(self, encrypted):
        with pytest.raises(patchwire.ConnectionFailedError) as caught:
            patchwire.connect(encrypted[0])
        assert "TLS" in caught.value.hint

    def test_does_not_trust_a_certificate_that_nobody_vouches_for(self, encrypted):
        with pytest.raises(patchwire.ConnectionFailedError):
            patchwire.connect(encrypted[0], tls=True)

    def test_asks_for_the_client_s_certificate_if_told_to(self, encrypted, files):
        address, tls = encrypted
        anonymous = patchwire.TLS(ca=files[0])
        if tls == anonymous:
            patchwire.connect(address, tls=anonymous).close()
            return
        with pytest.raises(patchwire.ConnectionFailedError):
            patchwire.connect(address, tls=anonymous)


def test_the_service_has_a_method_for_everything_that_the_protocol_says():
    methods = service_pb2.DESCRIPTOR.services_by_name["PatchwireService"].methods_by_name

    assert all(hasattr(service_pb2_grpc.PatchwireServiceServicer, name) for name in methods)
