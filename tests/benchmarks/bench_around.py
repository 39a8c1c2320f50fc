"""What a session of 300 traces costs around the passes: recording, encoding, checking and planning, against running it.

A patching sweep over every layer and ten tokens of SmolLM2-135M, each cell a trace of its own, about 2,000 nodes. All
parts run in this process, one after the other, on what the part before made:

- `recording`: the block of user code, to the graph (checked on fakes as it is recorded);
- `encoding`: the graph to its bytes;
- `checking`: the bytes to a graph that may run;
- `planning`: that graph to its passes;
- `running`: the passes, to the saved tensors.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import gc
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from measuring import report

import patchwire
from patchwire import demo
from patchwire import graph as g
from patchwire.background import Cancellation
from patchwire.garbage import rarely
from patchwire.session import Session
from patchwire.v1 import graph_pb2
from patchwire_worker.admission import Admission
from patchwire_worker.config import Limits
from patchwire_worker.embedded import EmbeddedServer
from patchwire_worker.executor import Execution
from patchwire_worker.interleaving import Stopping
from patchwire_worker.kept import KeptStore
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.models.loading import load
from patchwire_worker.planner import plan
from patchwire_worker.running import run
from patchwire_worker.store import TensorStore

ROUNDS = int(os.environ.get("ROUNDS", "5"))
TOKENS = 10
KEPT = 5


class Recorded(Session):
    """A session that is recorded and not sent."""

    graph: g.Graph

    def _run(self, graph: g.Graph, cancellation: Cancellation) -> None:
        self.graph = graph


class Taker:
    """Takes the values that are saved."""

    def __init__(self) -> None:
        self.taken = 0

    def running(self, number: int, passes: int) -> None:
        pass

    def saved(self, node: int, tensor: torch.Tensor) -> None:
        self.taken += 1

    def absent(self, node: int) -> None:
        raise AssertionError("nothing is generated")

    def logged(self, node: int, text: str) -> None:
        raise AssertionError("nothing is logged")

    def tokens(self, trace: int, invoke: int, ids: list[int]) -> None:
        raise AssertionError("nothing is generated")


def sweep(model: patchwire.Model, clean: str, corrupt: str) -> Recorded:
    with Recorded(model.connection, progress=False, model=model) as session:
        with model.trace(clean):
            states = [layer.output for layer in model.layers]
        for layer, state in zip(model.layers, states, strict=True):
            for token in range(TOKENS):
                with model.trace(corrupt):
                    layer.output[:, token] = state[:, token]
                    model.logits[:, -1, :KEPT].save()
    return session


def prompts(model: patchwire.Model) -> list[str]:
    """The clean and the corrupt prompt, of ten tokens each."""
    return [model.tokenizer.decode(model.tokenizer.encode(each)[-TOKENS:]) for each in (demo.CLEAN, demo.CORRUPT)]


def main() -> None:
    weights = demo.weights()
    hosted = HostedModel(load(str(weights)))
    server = EmbeddedServer(hosted)
    model = patchwire.connect(server.address, token=server.token, progress=False).model(hosted.name)
    limits = Limits()
    admission = Admission({hosted.name: hosted}, limits, TensorStore(limits.stored_bytes), KeptStore(limits.kept_bytes))
    texts = prompts(model)
    seconds: dict[str, list[float]] = {}
    nodes = 0

    def lap(part: str, since: float) -> float:
        now = time.perf_counter()
        seconds.setdefault(part, []).append(now - since)
        return now

    for _ in range(ROUNDS + 1):
        gc.collect()
        at = time.perf_counter()
        graph = sweep(model, *texts).graph
        at = lap("recording", at)
        message = g.graph_to_proto(graph).SerializeToString()
        at = lap("encoding", at)
        with rarely():  # as the server does
            admitted = admission.admit(graph_pb2.Graph.FromString(message))
            at = lap("checking", at)
            planned = plan(admitted)
            at = lap("planning", at)
        taker = Taker()
        run(Execution(admitted, planned, taker, Stopping()))
        lap("running", at)
        nodes = len(admitted.graph.nodes)
        assert taker.taken == TOKENS * model.num_layers
    typical = {part: statistics.median(each[1:]) for part, each in seconds.items()}
    around = sum(typical.values()) - typical["running"]
    report(
        "around",
        nodes=nodes,
        **{f"{part}_ms": round(each * 1e3, 1) for part, each in typical.items()},
        around_ms=round(around * 1e3, 1),
        ratio=round(around / typical["running"], 3),
    )
    server.stop()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    main()
