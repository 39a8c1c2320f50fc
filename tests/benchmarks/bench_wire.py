"""How fast large results travel, and what memory they take on their way.

- `wire`: a saved value of 512 MiB through a real server process, as one tensor, as 32, and as one that is received in
  memory that is there before (`save(to=…)`), against plain TCP on loopback from another process into such memory, and
  against a server of gRPC's alone whose messages nobody keeps; in turn, as all of it shares one machine.
- `stream`: a session over batches that saves all residual streams, 2 GiB, each given to a function as it arrives; the
  most memory that the worker and the client had, beyond what they had before.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import asyncio
import multiprocessing
import re
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import grpc
import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from measuring import alternate, report

import patchwire
from serving import Server

MIB = 1 << 20
BYTES = 512 * MIB
MESSAGE = 512 * 1024
PARTS = 32
ROUNDS = int(os.environ.get("ROUNDS", "5"))

WIDTH, LAYERS, ROWS, LENGTH = 64, 8, 64, 128
BATCHES = int(os.environ.get("BATCHES", "128"))


def large(directory: Path) -> Path:
    """A model with a weight of as many bytes as are sent: to read it takes no pass."""
    config = GPT2Config(n_layer=1, n_embd=1024, n_head=4, vocab_size=BYTES // 4096, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def narrow(directory: Path) -> Path:
    """A model that computes little for each byte of its residual stream."""
    config = GPT2Config(
        n_layer=LAYERS,
        n_embd=WIDTH,
        n_inner=WIDTH,
        n_head=1,
        n_positions=LENGTH,
        vocab_size=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def _send(pipe: Connection) -> None:
    """Send as many bytes to everybody who connects."""
    content = memoryview(bytearray(os.urandom(MIB)) * (BYTES // MIB))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(content)


def _send_messages(pipe: Connection) -> None:
    """Send as many bytes to everybody who calls, as messages of `MESSAGE` bytes."""
    content = os.urandom(MESSAGE)

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            async def stream(request: bytes, context: object) -> AsyncIterator[bytes]:
                for _ in range(BYTES // MESSAGE):
                    yield content

            return grpc.unary_stream_rpc_method_handler(stream)

    async def serve() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((Handler(),))
        pipe.send(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


def _started(work: Callable[[Connection], None]) -> tuple[BaseProcess, int]:
    """A process that sends, and its port."""
    context = multiprocessing.get_context("spawn")
    pipe, its = context.Pipe()
    process = context.Process(target=work, args=(its,), daemon=True)
    process.start()
    return process, pipe.recv()


def wire(directory: Path) -> None:
    sender, port = _started(_send)
    bare, its_port = _started(_send_messages)
    options = [("grpc.max_receive_message_length", -1), ("grpc.http2.max_frame_size", MIB)]
    stream = grpc.insecure_channel(f"127.0.0.1:{its_port}", options).unary_stream("/bare/Stream")
    buffer = memoryview(bytearray(BYTES))

    def tcp() -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            filled = 0
            while filled < BYTES:
                filled += connection.recv_into(buffer[filled:])

    def messages() -> None:
        assert sum(map(len, stream(b""))) == BYTES

    with Server({"large": large(directory)}) as server:
        model = patchwire.connect(server.address, progress=False).model("large")

        def one() -> torch.Tensor:
            with model.trace([1]):
                weight = model.lm_head.weight.save()
            return weight.value

        def parts() -> list[torch.Tensor]:
            with model.trace([1]):
                saved = [each.save() for each in model.lm_head.weight.chunk(PARTS)]
            return [each.value for each in saved]

        into = torch.zeros(BYTES // 4096, 1024)

        def there() -> None:
            with model.trace([1]):
                model.lm_head.weight.save(to=into)

        assert torch.equal(torch.cat(parts()), one())
        assert one().nbytes == BYTES
        cases = {"tcp": tcp, "grpc": messages, "one": one, "parts": parts, "into": there}
        seconds = alternate(cases, rounds=ROUNDS, warm_up=1)
    sender.kill()
    bare.kill()
    speed = {name: BYTES / each / 1e9 for name, each in seconds.items()}
    report(
        "wire",
        tcp_gb_s=round(speed["tcp"], 2),
        grpc_gb_s=round(speed["grpc"], 2),
        one_gb_s=round(speed["one"], 2),
        parts_gb_s=round(speed["parts"], 2),
        into_gb_s=round(speed["into"], 2),
        ratio_grpc=round(speed["grpc"] / speed["tcp"], 3),
        ratio_one=round(speed["one"] / speed["tcp"], 3),
        ratio_parts=round(speed["parts"] / speed["tcp"], 3),
        ratio_into=round(speed["into"] / speed["tcp"], 3),
    )


def memory(pid: int, what: str) -> int:
    """Bytes of memory of a process: VmRSS has them now, VmHWM at their most."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def reset_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def stream(directory: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 256, (BATCHES * ROWS, LENGTH), generator=generator)
    with Server({"narrow": narrow(directory)}) as server:
        model = patchwire.connect(server.address, progress=False).model("narrow")
        arrived = 0

        def take(tensor: torch.Tensor) -> None:
            nonlocal arrived
            arrived += tensor.nbytes

        def run(rows: torch.Tensor) -> None:
            with (
                model.session() as session,
                session.over(rows, batch_size=ROWS) as batches,
                model.trace(batches.prompt),
            ):
                for layer in model.layers:
                    layer.output.save(to=take)

        run(prompts[:ROWS])
        arrived = 0
        processes = {"worker": server.process.pid, "client": os.getpid()}
        before = {name: memory(pid, "VmRSS") for name, pid in processes.items()}
        for pid in processes.values():
            reset_peak(pid)
        start = time.perf_counter()
        run(prompts)
        seconds = time.perf_counter() - start
        more = {f"{name}_more_mib": (memory(pid, "VmHWM") - before[name]) // MIB for name, pid in processes.items()}
    report(
        "stream",
        gib=round(arrived / 2**30, 2),
        seconds=round(seconds, 1),
        gb_s=round(arrived / seconds / 1e9, 2),
        **more,
    )


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as directory:
        wire(Path(directory) / "large")
        stream(Path(directory) / "narrow")
