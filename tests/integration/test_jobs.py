"""Detached jobs: they run while nobody waits, and their results are there for whoever comes back."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import torch

import patchwire
from integration import messages
from integration.refusals import refused
from patchwire.status import error_from_call
from patchwire.v1 import graph_pb2, job_pb2, job_pb2_grpc
from serving import Server

IDS = [1, 2, 3, 4]
# Longer than anything here takes, and shorter than what is cancelled would have taken.
PATIENCE = 120


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of jobs of the module's server."""
    return tmp_path_factory.mktemp("kept") / "jobs"


@pytest.fixture(scope="module")
def office(checkpoints: dict[str, str], kept: Path) -> Iterator[Server]:
    """A server that keeps its jobs in a directory. Tests must leave it alive."""
    with Server({name: checkpoints[name] for name in ("gpt2", "mamba")}, jobs=kept) as server:
        yield server
        assert "in a way that it must not" not in server.log


@pytest.fixture(scope="module")
def desk(office: Server) -> Iterator[patchwire.Client]:
    """A connection to it."""
    with patchwire.connect(office.address, progress=False) as client:
        yield client


@pytest.fixture
def model(desk: patchwire.Client) -> Iterator[patchwire.Model]:
    """Its GPT-2; whatever a test has submitted is gone after it."""
    yield desk.model("gpt2")
    for each in desk.jobs():
        each.forget()


@pytest.fixture
def jobs(office: Server) -> Iterator[job_pb2_grpc.JobServiceStub]:
    """The bare methods."""
    with grpc.insecure_channel(office.address) as channel:
        yield job_pb2_grpc.JobServiceStub(channel)


def detached(model: patchwire.Model, ids: list[int] = IDS) -> patchwire.Job:
    """A short job: two saved values."""
    with model.trace(ids, blocking=False) as trace:
        model.layers[1].mlp.output[:, -1] = 0
        model.layers[1].output.save()
        model.logits.save()
    return trace.job


def endless(model: patchwire.Model) -> patchwire.Job:
    """A job of many minutes of work."""
    with model.trace(IDS, blocking=False, exact=True) as trace:
        value = model.layers[0].output.save().new_ones(2048, 2048)
        for _ in range(3_000):
            value = value @ value
        value.sum().save()
    return trace.job


def expected(reference: torch.nn.Module, ids: list[int] = IDS) -> list[torch.Tensor]:
    """What `detached` saves, from a plain hook."""

    def ablate(module, args, output):
        output[:, -1] = 0

    handle = reference.transformer.h[1].mlp.register_forward_hook(ablate)
    with torch.no_grad():
        found = reference(torch.tensor([ids]), output_hidden_states=True)
    handle.remove()
    return [found.hidden_states[2], found.logits]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_close(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def error_of(call: Callable[[], object]) -> patchwire.PatchwireError:
    def finish() -> None:
        answer = call()
        _ = list(answer) if hasattr(answer, "__next__") else answer

    with pytest.raises(grpc.RpcError) as caught:
        finish()
    assert caught.value.code() not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    return error_from_call(caught.value, "here")


class TestResults:
    def test_are_those_of_a_blocking_run_to_the_last_bit(self, model, references):
        with model.trace(IDS):
            model.layers[1].mlp.output[:, -1] = 0
            hidden, logits = model.layers[1].output.save(), model.logits.save()

        found = detached(model).fetch()

        assert torch.equal(found[0], hidden.value)
        assert torch.equal(found[1], logits.value)
        assert_close(found, expected(references["gpt2"]))

    def test_become_the_values_of_the_block_when_they_are_fetched(self, model, references):
        with model.trace(IDS, blocking=False) as trace:
            logits = model.logits.save()
        assert not logits.ready
        assert trace.stats is None

        trace.job.fetch()

        with torch.no_grad():
            torch.testing.assert_close(logits.value, references["gpt2"](torch.tensor([IDS])).logits)
        assert (logits > 0).dtype is torch.bool
        assert trace.stats.passes == 1
        assert trace.job.stats == trace.stats

    def test_that_were_not_fetched_say_how(self, model):
        with model.trace(IDS, blocking=False):
            logits = model.logits.save()

        assert "not fetched" in repr(logits)
        assert logits.shape == (1, 4, 61)
        with refused(patchwire.GraphError, "not here yet", hint="trace.job.fetch()"):
            logits.value  # noqa: B018  # this line

    def test_come_in_the_order_of_their_saves_to_another_program(self, desk, model, references):
        found = desk.job(detached(model).id).fetch()

        assert_close(found, expected(references["gpt2"]))

    def test_can_be_fetched_again(self, model):
        job = detached(model)

        first, second = job.fetch(), job.fetch()

        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))

    @pytest.mark.parametrize("compression", [None, "zstd"])
    def test_of_many_mebibytes_and_of_every_dtype_are_kept_as_they_are(self, office, model, compression):
        with patchwire.connect(office.address, compression=compression, progress=False) as client:
            other = client.model("gpt2")
            with other.trace(IDS, blocking=False) as trace:
                large = torch.arange(3 << 18).reshape(3, -1).float()
                shifted = (other.logits.sum() * 0 + large).save()
                half = shifted.save(dtype=torch.bfloat16)
                (shifted > 7).save()
                other.logits[:0].save()
                shifted.long().sum().save()
            trace.job.fetch()
        found = model.connection.fetch(trace.job.id, None, patchwire.results.Progress(False)).saved

        assert torch.equal(shifted.value, large)
        assert torch.equal(half.value, large.bfloat16())
        assert torch.equal(found[2], large > 7)
        assert found[3].shape == (0, 4, 61)
        assert found[4].item() == large.long().sum().item()

    def test_are_kept_before_the_run_has_ended(self, model):
        job = endless(model)

        until(lambda: job.status == "running" and job.result_bytes > 0)

        assert job.cancel() == "cancelled"
        assert job.status == "cancelled"
        assert job.result_bytes == 0


class TestStatus:
    def test_tells_who_waits_and_what_runs(self, desk, model):
        running, waiting, last = endless(model), detached(model), detached(model)
        until(lambda: running.status == "running")

        assert (waiting.status, waiting.seen.position) == ("queued", 1)
        assert (last.status, last.seen.text) == ("queued", "queued behind 2")
        until(lambda: running.status.text == "running, pass 1 of 1")
        assert [each.id for each in desk.jobs()] == [last.id, waiting.id, running.id]
        running.cancel()
        assert waiting.wait(PATIENCE) == last.wait(PATIENCE) == "done"
        assert desk.job(last.id).status == "done"

    def test_says_when_it_expires(self, model):
        before = datetime.now(UTC)
        job = detached(model)
        job.wait()

        assert timedelta(hours=23) < job.expires - before < timedelta(hours=25)
        assert before - timedelta(seconds=1) < job.submitted < job.expires

    def test_waiting_is_given_up_in_time_and_the_job_goes_on(self, model):
        job = endless(model)

        with refused(patchwire.TimeoutError, "not ended within 0.2 seconds", hint="cancel", line=False):
            job.wait(0.2)

        assert not job.status.ended

    def test_a_job_does_not_hold_up_another_model(self, desk, model, references):
        endless(model)
        mamba = desk.model("mamba")

        with mamba.trace(IDS):
            logits = mamba.logits.save()

        with torch.no_grad():
            torch.testing.assert_close(logits.value, references["mamba"](torch.tensor([IDS]), use_cache=False).logits)


class TestErrors:
    def test_of_the_run_come_with_the_fetch_and_name_the_line(self, model):
        with model.trace(IDS, blocking=False) as trace:
            zero = model.layers[0].output.new_zeros(3, 3)
            torch.linalg.inv(zero).save()  # this line

        assert trace.job.wait() == "failed"
        assert "singular" in trace.job.seen.text
        with pytest.raises(patchwire.ExecutionError, match="singular") as caught:
            trace.job.fetch()
        line = next(
            number
            for number, code in enumerate(Path(__file__).read_text().splitlines(), 1)
            if code.endswith("torch.linalg.inv(zero).save()  # this line")
        )
        assert [(each.file, each.line) for each in caught.value.lines] == [(__file__, line)]

    def test_that_can_be_known_before_come_at_once(self, model, desk):
        message = messages.graph("gpt2", messages.read("layers.99.output"), messages.save(0))

        with pytest.raises(patchwire.ShapeError), model.trace(IDS, blocking=False):
            model.layers[0].output @ model.layers[0].output
        error = error_of(lambda: self.submit(desk, message))

        assert type(error) is patchwire.SiteError
        assert desk.jobs() == []

    @staticmethod
    def submit(desk: patchwire.Client, message) -> object:
        with grpc.insecure_channel(desk.connection.address) as channel:
            return job_pb2_grpc.JobServiceStub(channel).SubmitJob(job_pb2.SubmitJobRequest(graph=message))


@pytest.mark.skipif(sys.platform != "linux", reason="only there a program may lower the limits of another")
class TestAFullDisk:
    """As the server finds it, whose files may be no larger than this."""

    ROOM = 1 << 20

    @pytest.fixture(autouse=True)
    def full(self, office) -> Iterator[None]:
        import resource

        before = resource.prlimit(office.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(office.process.pid, resource.RLIMIT_FSIZE, (self.ROOM, before[1]))
        yield
        resource.prlimit(office.process.pid, resource.RLIMIT_FSIZE, before)

    @pytest.mark.parametrize("last", [1_000, ROOM], ids=["at the end", "on the way"])
    def test_a_job_that_does_not_fit_says_so_and_the_next_one_is_kept(self, model, last):
        with model.trace(IDS, blocking=False) as trace:
            large = model.logits.new_zeros(self.ROOM // 4 - 100).save()
            (large[:1].expand(last // 4) + 1).save()

        assert trace.job.wait(PATIENCE) == "failed"
        with refused(patchwire.ExecutionError, "its disk: File too large", hint="room", line=False):
            trace.job.fetch()
        assert detached(model).wait(PATIENCE) == "done"


class TestEnding:
    def test_cancelling_stops_the_pass(self, model):
        job = endless(model)
        until(lambda: job.status == "running")

        assert job.cancel() == "cancelled"

        assert detached(model).wait(PATIENCE) == "done"
        with pytest.raises(patchwire.CancelledError):
            job.fetch()

    def test_cancelling_takes_a_job_out_of_the_queue(self, model):
        running, waiting = endless(model), endless(model)

        assert waiting.cancel() == "cancelled"
        assert running.cancel() == "cancelled"

        assert detached(model).wait(PATIENCE) == "done"

    def test_cancelling_what_is_done_changes_nothing(self, model):
        job = detached(model)
        job.wait()

        assert job.cancel() == "done"
        assert len(job.fetch()) == 2

    def test_forgetting_removes_everything(self, desk, model, kept):
        running, done = endless(model), detached(model)
        running.cancel()
        done.wait()

        running.forget()
        done.forget()

        assert desk.jobs() == []
        until(lambda: [each.name for each in kept.iterdir()] == ["lock"])
        with refused(patchwire.JobError, "no job", hint=r"client\.jobs\(\)", line=False):
            done.fetch()
        with pytest.raises(patchwire.JobError):
            done.forget()

    def test_forgetting_stops_the_pass(self, model):
        job = endless(model)
        until(lambda: job.status == "running")

        job.forget()

        assert detached(model).wait(PATIENCE) == "done"


CLOSED_LAPTOP = """
    import sys, time
    import patchwire
    model = patchwire.connect(sys.argv[1], progress=False).model("gpt2")
    with model.trace([1, 2, 3, 4], blocking=False) as trace:
        model.layers[1].mlp.output[:, -1] = 0
        model.layers[1].output.save()
        model.logits.save()
    print(trace.job.id, flush=True)
    time.sleep(1000)
"""


def test_a_job_survives_the_program_that_submitted_it(office, desk, model, references):
    first = endless(model)  # so that it has not run when the program dies
    program = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CLOSED_LAPTOP), office.address], stdout=subprocess.PIPE, text=True
    )
    with program:
        name = program.stdout.readline().strip()
        assert desk.job(name).status == "queued"
        program.send_signal(signal.SIGKILL)
    first.cancel()

    assert_close(desk.job(name).fetch(), expected(references["gpt2"]))


class TestRestarting:
    @pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
    def test_keeps_what_was_done_and_says_what_was_not(self, checkpoints, tmp_path, references, end):
        specs = {"gpt2": checkpoints["gpt2"]}
        with Server(specs, jobs=tmp_path) as server, patchwire.connect(server.address, progress=False) as client:
            model = client.model()
            done = detached(model)
            done.wait()
            running, waiting = endless(model), detached(model)
            until(lambda: running.status == "running")
            server.process.send_signal(end)
            server.process.wait(PATIENCE)

        with Server(specs, jobs=tmp_path) as server, patchwire.connect(server.address, progress=False) as client:
            assert [each.id for each in client.jobs()] == [waiting.id, running.id, done.id]
            assert_close(client.job(done.id).fetch(), expected(references["gpt2"]))
            for each in (running, waiting):
                assert client.job(each.id).status == "failed"
                with refused(patchwire.ExecutionError, "stopped before", hint="again", line=False):
                    client.job(each.id).fetch()
            client.job(done.id).forget()
            assert "Traceback" not in server.log

    def test_leaves_alone_what_it_cannot_read_and_says_what_is_damaged(self, checkpoints, tmp_path):
        specs = {"gpt2": checkpoints["gpt2"]}
        with Server(specs, jobs=tmp_path) as server, patchwire.connect(server.address, progress=False) as client:
            damaged, lost = detached(client.model()), detached(client.model())
            damaged.wait()
            lost.wait()
            cut, garbled = (next(tmp_path.glob(f"{digest(each.id)}")) for each in (damaged, lost))
        (cut / "results").write_bytes((cut / "results").read_bytes()[:-5])
        (garbled / "record").write_bytes(b"\xff" * 100)
        (tmp_path / "notes.txt").write_text("mine")

        with Server(specs, jobs=tmp_path) as server, patchwire.connect(server.address, progress=False) as client:
            assert [each.id for each in client.jobs()] == [damaged.id]
            with pytest.raises(patchwire.ExecutionError, match="damaged"):
                client.job(damaged.id).fetch()
            assert detached(client.model()).wait() == "done"
            assert "left alone" in server.log
        assert (tmp_path / "notes.txt").exists()
        assert garbled.exists()

    def test_two_servers_do_not_share_a_directory(self, office, kept, checkpoints):
        with pytest.raises(RuntimeError, match="Another server keeps its jobs"):
            Server({"gpt2": checkpoints["gpt2"]}, jobs=kept).start()


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


@pytest.fixture(scope="module")
def narrow(checkpoints, tmp_path_factory) -> Iterator[patchwire.Client]:
    """A server that keeps few and small jobs."""
    limits = {"jobs": 3, "job_bytes": 20_000, "queued": 1}
    specs = {"gpt2": checkpoints["gpt2"]}
    with (
        Server(specs, limits=limits, jobs=tmp_path_factory.mktemp("narrow")) as server,
        patchwire.connect(server.address, progress=False) as client,
    ):
        yield client


class TestLimits:
    @pytest.fixture(autouse=True)
    def empty(self, narrow) -> Iterator[None]:
        yield
        for each in narrow.jobs():
            each.forget()

    def test_of_their_number(self, narrow):
        model = narrow.model()
        first, *others = (detached(model) for _ in range(2))
        others[0].wait()
        detached(model).wait()

        with refused(patchwire.LimitError, "3 jobs", hint="forget", line=False):
            detached(model)

        first.forget()
        assert detached(model).wait() == "done"

    def test_of_their_bytes_before_they_run(self, narrow):
        model = narrow.model()

        with (
            refused(patchwire.LimitError, "20,400 bytes", "20,000", hint="forget", line=False),
            model.trace(IDS, blocking=False),
        ):
            model.logits.new_zeros(5_100).save()
        with model.trace(IDS, blocking=False):
            value = model.logits.new_ones(2048, 2048)
            model.logits.new_zeros(4_000).save()
            for _ in range(3_000):
                value = value @ value
            value.sum().save()
        with (
            refused(patchwire.LimitError, "20,000", hint="forget", line=False),
            model.trace(IDS, blocking=False),
        ):
            model.logits.new_zeros(4_000).save()
        assert len(narrow.jobs()) == 1

    def test_of_their_bytes_when_these_depend_on_values(self, narrow):
        model = narrow.model()
        with model.trace(IDS, blocking=False) as trace:
            torch.nonzero(model.logits.new_ones(5_000)).save()

        assert trace.job.wait() == "failed"
        with refused(patchwire.LimitError, "20,000", hint="forget", line=False):
            trace.job.fetch()
        assert detached(model).wait() == "done"

    def test_of_the_requests_that_wait(self, narrow):
        model = narrow.model()
        endless(model)
        detached(model)

        with refused(patchwire.BusyError, "full", line=False):
            detached(model)
        assert len(narrow.jobs()) == 2

    def test_of_their_age(self, checkpoints, tmp_path):
        specs = {"gpt2": checkpoints["gpt2"]}
        limits = {"job_seconds": 2.0}
        with (
            Server(specs, limits=limits, jobs=tmp_path) as server,
            patchwire.connect(server.address, progress=False) as client,
        ):
            model = client.model()
            done, running = detached(model), endless(model)
            until(lambda: gone(done) or done.seen == "expired")

            if not gone(done):
                assert not (tmp_path / digest(done.id) / "results").exists()
                with pytest.raises(patchwire.JobError, match=r"expired|no job"):
                    done.fetch()
            until(lambda: client.jobs() == [])
            until(lambda: [each.name for each in tmp_path.iterdir()] == ["lock"])
            assert gone(running)
            with model.trace(IDS):  # the pass has been stopped
                logits = model.logits.save()
            assert logits.value.shape == (1, 4, 61)


def gone(job: patchwire.Job) -> bool:
    try:
        return not job.status
    except patchwire.JobError:
        return True


HOSTILE = ["", "job-", "..", "../../../etc/passwd", "\0", "job-" + "A" * 43, "x" * 1_000_000, "é\u2028", "lock", "%s%n"]


class TestStrangers:
    @pytest.mark.parametrize("method", ["GetJob", "FetchJob", "CancelJob", "ForgetJob"])
    @pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
    def test_a_guess_is_no_job(self, jobs, method, name):
        request = getattr(job_pb2, f"{method}Request")(id=name)

        error = error_of(lambda: getattr(jobs, method)(request))

        assert type(error) is patchwire.JobError
        assert len(str(error)) < 1000

    def test_an_id_with_one_letter_changed_is_no_job(self, desk, model):
        name = detached(model).id

        for changed in (name[:-1], name + "A", name.swapcase(), name[:-1] + chr(ord(name[-1]) ^ 1), f" {name}"):
            with pytest.raises(patchwire.JobError):
                desk.job(changed)

    def test_ids_are_long_and_differ(self, model):
        names = {detached(model).id for _ in range(3)}

        assert len(names) == 3
        assert all(len(each) > 24 for each in names)

    @pytest.mark.parametrize("seconds", [float("nan"), -1.0, float("-inf")])
    def test_a_wait_of_no_number_of_seconds_is_refused(self, jobs, model, seconds):
        request = job_pb2.GetJobRequest(id=detached(model).id, wait_seconds=seconds)

        assert type(error_of(lambda: jobs.GetJob(request))) is patchwire.GraphError

    def test_a_job_that_has_not_ended_cannot_be_fetched(self, jobs, model):
        name = endless(model).id

        error = error_of(lambda: jobs.FetchJob(job_pb2.FetchJobRequest(id=name)))

        assert type(error) is patchwire.JobError
        assert "not ended" in error.message

    @pytest.mark.parametrize("what", ["a loop", "a kept value"])
    def test_what_somebody_has_to_wait_for_is_no_job(self, jobs, what):
        graph = messages.graph("gpt2", messages.read("logits"), messages.save(0))
        if what == "a loop":
            graph.traces.add(model="gpt2", loop=graph_pb2.Loop(body=graph, count=2))
            graph.nodes.add(loop=graph_pb2.RunLoop(trace=1))
        else:
            graph.nodes.add(keep=graph_pb2.Keep(value=0, seconds=1.0))

        error = error_of(lambda: jobs.SubmitJob(job_pb2.SubmitJobRequest(graph=graph)))

        assert type(error) is patchwire.GraphError
        assert "cannot loop, or keep values" in error.message
        assert "ordinary request" in error.hint

    def test_an_unknown_compression_is_refused(self, jobs):
        graph = messages.graph("gpt2", messages.read("logits"), messages.save(0))

        error = error_of(lambda: jobs.SubmitJob(job_pb2.SubmitJobRequest(graph=graph, compression=7)))

        assert type(error) is patchwire.GraphError

    @pytest.mark.parametrize("method", ["SubmitJob", "GetJob", "ListJobs", "FetchJob", "CancelJob", "ForgetJob"])
    def test_without_the_token_nothing_is_told(self, strict, method):
        with grpc.insecure_channel(strict.address) as channel:
            call = getattr(job_pb2_grpc.JobServiceStub(channel), method)
            error = error_of(lambda: call(getattr(job_pb2, f"{method}Request")()))

        assert type(error) is patchwire.AuthenticationError

    def test_whoever_has_another_token_does_not_see_them(self, checkpoints, kept, model, tmp_path):
        job = detached(model)
        job.wait()
        shutil.copytree(kept, tmp_path / "copy")

        with (
            Server({"gpt2": checkpoints["gpt2"]}, token="another", jobs=tmp_path / "copy") as server,
            patchwire.connect(server.address, token="another", progress=False) as client,
        ):
            assert client.jobs() == []
            with pytest.raises(patchwire.JobError):
                client.job(job.id)

    def test_nobody_else_on_the_machine_can_read_the_files(self, kept, model):
        job = detached(model)
        job.wait()

        assert kept.stat().st_mode & 0o077 == 0
        assert (kept / digest(job.id)).stat().st_mode & 0o077 == 0
        content = b"".join(each.read_bytes() for each in (kept / digest(job.id)).iterdir())
        assert b"pickle" not in content
        assert b"torch" not in content
