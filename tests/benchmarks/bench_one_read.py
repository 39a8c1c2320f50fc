"""What one read costs inside the worker, beyond the forward pass: a hidden state of a GPT-2 of 124 M parameters.

From the request's message to the saved tensor, against a raw PyTorch hook on the same model in the same process, in
turns, with the same products of matrices; `pass` is the pass alone, without reading the message and planning. The last
layer is read, and the hook's model has no unembedding either, so that ending the pass early saves next to nothing.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import checkpoints
from measuring import alternate, report
from tasks import GPT2

from patchwire import graph as g
from patchwire_worker import running
from patchwire_worker.admission import Admission, Admitted
from patchwire_worker.config import Limits
from patchwire_worker.executor import Execution
from patchwire_worker.interleaving import Stopping
from patchwire_worker.kept import KeptStore
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.models.loading import load
from patchwire_worker.planner import Plan, plan
from patchwire_worker.store import TensorStore

IDS = list(range(16))
ROUNDS = 12 * int(os.environ.get("ROUNDS") or 5)


def raw_hook(model: nn.Module) -> torch.Tensor:
    found = []
    handle = model.transformer.h[-1].register_forward_hook(lambda module, args, output: found.append(output.clone()))
    with torch.no_grad():
        model.base_model(torch.tensor([IDS]), use_cache=False)
    handle.remove()
    return found[0]


def main() -> None:
    directory = checkpoints.directory() / GPT2
    hosted = HostedModel(load(str(directory), name="gpt2", matmul="pytorch"))
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    last = f"layers.{len(plain.transformer.h) - 1}.output"
    limits = Limits()
    admission = Admission({"gpt2": hosted}, limits, TensorStore(limits.stored_bytes), KeptStore(limits.kept_bytes))
    graph = g.Graph(traces=[g.Trace("gpt2", [g.Invoke((tuple(IDS),))])])
    read = graph.fx.call_function(g.read, (g.Site(0, 0, g.Address(last)),))
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
    seconds = alternate(cases, rounds=ROUNDS, warm_up=3)
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
    running.run(Execution(admitted, planned, taker, Stopping()))
    return taker.tensor


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    main()
