"""What one read costs beyond the forward pass: a hidden state of a 12-layer, 128-wide GPT-2, 16 tokens.

- `wire`: client, gRPC and a worker in another process, against a raw PyTorch hook on the same model here; `call` is
  what gRPC itself takes for a call with nothing in it.
- `worker`: inside the worker, from the request's message to the saved tensor, against a raw hook in the same process.

The last layer is read, so that ending the pass early saves next to nothing.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from measuring import alternate, report

import patchwire
from patchwire import graph as g
from patchwire_worker.admission import Admission, Admitted
from patchwire_worker.config import Limits
from patchwire_worker.executor import Execution
from patchwire_worker.interleaving import Stopping
from patchwire_worker.kept import KeptStore
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.models.loading import load
from patchwire_worker.planner import Plan, plan
from patchwire_worker.store import TensorStore
from serving import Server

IDS = list(range(16))
ROUNDS = int(os.environ.get("ROUNDS", "300"))


def tiny() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=12, n_embd=128, n_head=4, vocab_size=1000, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def raw_hook(model: GPT2LMHeadModel) -> torch.Tensor:
    found = []
    handle = model.transformer.h[-1].register_forward_hook(lambda module, args, output: found.append(output.clone()))
    with torch.no_grad():
        model(torch.tensor([IDS]), use_cache=False)
    handle.remove()
    return found[0]


def wire(directory: str) -> None:
    plain = tiny()
    with Server({"gpt2": directory}) as server:
        model = patchwire.connect(server.address, progress=False).model("gpt2")

        def through_the_wire() -> torch.Tensor:
            with model.trace(IDS):
                hidden = model.layers[-1].output.save()
            return hidden.value

        assert torch.equal(raw_hook(plain), through_the_wire())
        cases = {"raw": lambda: raw_hook(plain), "patchwire": through_the_wire, "call": model.connection.models}
        seconds = alternate(cases, rounds=ROUNDS)
    extra = (seconds["patchwire"] - seconds["raw"]) * 1e3
    ratio = seconds["patchwire"] / seconds["raw"]
    report(
        "one_read_wire",
        raw_ms=round(seconds["raw"] * 1e3, 2),
        call_ms=round(seconds["call"] * 1e3, 2),
        extra_ms=round(extra, 2),
        ratio=round(ratio, 3),
    )


def worker(directory: str) -> None:
    plain = tiny()
    hosted = HostedModel(load(directory, name="gpt2"))
    limits = Limits()
    admission = Admission({"gpt2": hosted}, limits, TensorStore(limits.stored_bytes), KeptStore(limits.kept_bytes))
    graph = g.Graph(traces=[g.Trace("gpt2", [g.Invoke((tuple(IDS),))])])
    read = graph.fx.call_function(g.read, (g.Site(0, 0, g.Address("layers.11.output")),))
    graph.fx.call_function(g.save, (read, None))
    message = g.graph_to_proto(graph)

    def from_message() -> torch.Tensor:
        admitted = admission.admit(message)
        return run(admitted, plan(admitted))

    admitted = admission.admit(message)
    planned = plan(admitted)

    def pass_only() -> torch.Tensor:
        return run(admitted, planned)

    assert torch.equal(raw_hook(plain), from_message())
    cases = {"raw": lambda: raw_hook(plain), "patchwire": from_message, "pass": pass_only}
    seconds = alternate(cases, rounds=ROUNDS)
    report(
        "one_read_worker",
        raw_ms=round(seconds["raw"] * 1e3, 2),
        ratio=round(seconds["patchwire"] / seconds["raw"], 3),
        ratio_pass_only=round(seconds["pass"] / seconds["raw"], 3),
    )


class _Taker:
    """Takes the value that is saved."""

    tensor: torch.Tensor

    def running(self, number: int, passes: int) -> None:
        pass

    def saved(self, node: int, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def absent(self, node: int) -> None:
        raise AssertionError("nothing is generated")

    def logged(self, node: int, text: str) -> None:
        raise AssertionError("nothing is logged")

    def tokens(self, trace: int, invoke: int, ids: list[int]) -> None:
        raise AssertionError("nothing is generated")


def run(admitted: Admitted, planned: Plan) -> torch.Tensor:
    taker = _Taker()
    Execution(admitted, planned, taker, Stopping()).run()
    return taker.tensor


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as directory:
        tiny().save_pretrained(directory)
        worker(directory)
        wire(directory)
