"""A server, and what it has: `patchwire serve`, `models` and `jobs`."""

from __future__ import annotations

import gc
import ipaddress
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

import patchwire
from patchwire.cli.terminal import (
    DEFAULT_ADDRESS,
    DEFAULT_PORT,
    Device,
    Dtype,
    Tls,
    TlsCa,
    Token,
    app,
    count,
    err,
    loading,
    log_to_stderr,
    no_worker,
    out,
    tls_of,
)
from patchwire.errors import PatchwireError

if TYPE_CHECKING:
    from patchwire_worker.models.hosted import HostedModel
    from patchwire_worker.server import Server


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "patchwire serve gpt2\n\n"
    "patchwire serve small=./my-checkpoint EleutherAI/pythia-70m --device cuda --dtype bfloat16\n\n"
    "PATCHWIRE_TOKEN=… patchwire serve model.gguf --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem"
)
def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL…",
            help="A hub id, a directory, a .gguf file or zoo:NAME; NAME=MODEL gives it another name.",
        ),
    ],
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = DEFAULT_PORT,
    device: Device = "auto",
    dtype: Dtype = "float32",
    attention: Annotated[
        str | None,
        typer.Option(
            help="How attention is computed: eager, whose probabilities can be read, sdpa, …; if not given, as "
            "transformers prefers.",
            show_default=False,
        ),
    ] = None,
    matmul: Annotated[
        str,
        typer.Option(
            help="What multiplies float32 matrices on a CPU: pytorch, as everywhere; onednn, which rounds differently; "
            "or auto, whichever is faster on this processor."
        ),
    ] = "auto",
    token: Annotated[
        str | None,
        typer.Option(envvar="PATCHWIRE_TOKEN", help="What clients have to present.", show_default=False),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="The server's certificate (PEM).", show_default=False)] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key (PEM).", show_default=False)] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option(help="Let in only clients with a certificate from this file (PEM).", show_default=False),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of all rows of one trace, at most.", show_default="262144"),
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds that a request may run.", show_default="600")
    ] = None,
    max_queued: Annotated[
        int | None, typer.Option(min=1, help="Requests of one model that may wait.", show_default="256")
    ] = None,
    max_memory: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            metavar="GIB",
            help="GiB of activations that a pass may hold; more is split.",
            show_default="0.25 on a CPU; on a GPU four fifths of what is left",
        ),
    ] = None,
    jobs: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep detached jobs in this directory, past the end of the server.", show_default=False
        ),
    ] = None,
) -> None:
    """Serve models, until Ctrl-C."""
    import asyncio

    log_to_stderr()
    specs = _named(models)
    for option, file in (("--tls-cert", tls_cert), ("--tls-key", tls_key), ("--client-ca", client_ca)):
        if file is not None and not file.is_file():
            raise PatchwireError(f"There is no file {file} ({option}).")
    if (tls_cert is None) != (tls_key is None):
        raise PatchwireError("A certificate and its key belong together.", hint="Give --tls-cert and --tls-key.")
    if client_ca is not None and tls_cert is None:
        raise PatchwireError(
            "Clients show certificates only on encrypted connections.", hint="Give --tls-cert and --tls-key too."
        )
    _check_port(host, port)
    if jobs is not None:
        try:
            jobs.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise PatchwireError(f"Jobs cannot be kept in {jobs}: {error.strerror} (--jobs).") from error
    with loading("the worker", remark=False):
        try:
            from patchwire_worker.config import Limits, ServerConfig
            from patchwire_worker.models.hosted import host as host_model
            from patchwire_worker.server import serve as serve_until_told
        except ModuleNotFoundError as error:
            raise no_worker(error) from None
    config = ServerConfig(
        host=f"[{host}]" if ":" in host and not host.startswith("[") else host,
        port=port,
        token=token or None,
        certificate=tls_cert,
        key=tls_key,
        client_ca=client_ca,
        limits=Limits(
            tokens=max_tokens or Limits.tokens,
            seconds=max_seconds or Limits.seconds,
            queued=max_queued or Limits.queued,
        ),
        jobs=jobs,
    )
    hosted: dict[str, HostedModel] = {}
    for name, spec in specs:
        with loading(spec):
            model = host_model(spec, name=name, device=device, dtype=dtype, attention=attention, matmul=matmul)
        if model.name in hosted:
            raise PatchwireError(f"Two models are called `{model.name}`.", hint=f"Name one of them: `other={spec}`.")
        if max_memory is not None:
            model.pass_bytes = int(max_memory * (1 << 30))
        hosted[model.name] = model
    _warn_if_open(host, token=token, encrypted=tls_cert is not None)
    gc.freeze()  # what is loaded stays, and need not be looked through whenever a request leaves garbage behind
    with suppress(KeyboardInterrupt):
        asyncio.run(serve_until_told(hosted, config, lambda server: _announce(server, hosted)))
    out.print("Stopped.")


def _named(models: list[str]) -> list[tuple[str | None, str]]:
    """The name, if one is given, and the rest of each "NAME=MODEL"."""
    named: list[tuple[str | None, str]] = []
    for each in models:
        match = re.fullmatch(r"([\w.\-]+)=(.+)", each)
        named.append((None, each) if match is None or Path(each).exists() else (match[1], match[2]))
    return named


def _check_port(host: str, port: int) -> None:
    """Find out before the models are loaded, which may take long, that the port cannot be had."""
    import socket

    try:
        family, *_, place = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise PatchwireError(
            f"The server cannot listen on {host}:{port}: {error.strerror}.",
            hint="Take another port with --port; 0 takes a free one.",
        ) from error


def _warn_if_open(host: str, *, token: str | None, encrypted: bool) -> None:
    try:
        here_only = host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name of this machine
        here_only = False
    if here_only:
        return
    if not token:
        err.print(
            Text(f"Warning: anyone who reaches {host} may use these models. Give a token with --token.", "yellow"),
            soft_wrap=True,
        )
    if not encrypted:
        err.print(
            Text(
                "Warning: connections are not encrypted, so prompts, results and the token can be read on the way. "
                "Give --tls-cert and --tls-key.",
                "yellow",
            ),
            soft_wrap=True,
        )


def _announce(server: Server, hosted: dict[str, HostedModel]) -> None:
    """Say where the server is and how to use it; the first line is for programs too."""
    config = server.config
    out.print(f"Serving on {server.address}", style="bold green", markup=False, soft_wrap=True)
    for name, model in hosted.items():
        summary = model.summary
        out.print(
            f"  {name}: {summary.architecture}, {count(summary.parameters)} parameters, {summary.layers} layers, "
            f"{_dtype(model)} on {summary.device}",
            markup=False,
            soft_wrap=True,
        )
    place = server.address
    if config.host in ("0.0.0.0", "[::]"):
        import socket

        place = f"{socket.gethostname()}:{server.port}"
    options = (', token="…"' if config.token else "") + (", tls=True" if config.certificate else "")
    out.print("\nIn Python:\n", markup=False)
    out.print(f'  client = patchwire.connect("{place}"{options})', markup=False, soft_wrap=True)
    for name in hosted:
        out.print(f'  model = client.model("{name}")', markup=False, soft_wrap=True)
    out.print("\nCtrl-C ends it.", style="dim")
    out.file.flush()


def _dtype(model: HostedModel) -> str:
    return str(max(model.module.parameters(), key=lambda each: each.numel()).dtype).removeprefix("torch.")


@app.command()
def models(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The server's address.")] = DEFAULT_ADDRESS,
    token: Token = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
) -> None:
    """List the models of a server."""
    from patchwire.tensors import dtype_from_proto

    with patchwire.connect(address, token=token, tls=tls_of(tls, tls_ca)) as client:
        found = client.models()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("model", "architecture", "parameters", "layers", "dtype", "device"):
        table.add_column(name, justify="right" if name in ("parameters", "layers") else "left", overflow="fold")
    for each in found:
        dtype = str(dtype_from_proto(each.dtype)).removeprefix("torch.") if each.dtype else "quantized"
        table.add_row(
            Text(each.name, style="bold"),
            each.architecture,
            count(each.parameters),
            str(each.layers),
            dtype,
            each.device,
        )
    out.print(table if found else "The server holds no models.")


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "patchwire jobs gpu-box:50051\n\n"
    "patchwire jobs gpu-box:50051 --cancel 7JkTz…  [dim]# --forget removes its results too[/]"
)
def jobs(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The server's address.")] = DEFAULT_ADDRESS,
    cancel: Annotated[list[str], typer.Option(metavar="ID", help="Stop this job.", show_default=False)] = [],  # noqa: B006
    forget: Annotated[
        list[str], typer.Option(metavar="ID", help="Remove this job and its results.", show_default=False)
    ] = [],  # noqa: B006
    token: Token = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
) -> None:
    """List the detached jobs that a server keeps for you, the newest first."""
    with patchwire.connect(address, token=token, tls=tls_of(tls, tls_ca)) as client:
        for each in cancel:
            client.job(each).cancel()
        for each in forget:
            client.job(each).forget()
        found = client.jobs()
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for name in ("job", "model", "status", "submitted", "bytes"):
            table.add_column(
                name, justify="right" if name == "bytes" else "left", overflow="fold", no_wrap=name == "job"
            )
        for job in found:
            submitted = f"{job.submitted.astimezone():%Y-%m-%d %H:%M}"
            table.add_row(job.id, job.model, Text(job.seen.text), submitted, f"{job.result_bytes:,}")
    out.print(table if found else "The server keeps no jobs.")
