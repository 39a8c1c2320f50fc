"""The command line: `patchwire serve`, `models`, `jobs`, `lens`, `sites`, `verify`, `compare`, `zoo`, `demo`, `doctor`.

Every command works on what the library offers to any program. What takes long to import is imported by the command
that needs it.
"""

from __future__ import annotations

import gc
import io
import ipaddress
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import patchwire
from patchwire.errors import InputError, PatchwireError, PatchwireWarning

if TYPE_CHECKING:
    from patchwire_worker.models.hosted import HostedModel
    from patchwire_worker.server import Server

DEFAULT_PORT = 50051
DEFAULT_ADDRESS = f"127.0.0.1:{DEFAULT_PORT}"

app = typer.Typer(
    name="patchwire",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False)
err = Console(file=sys.stderr, highlight=False)  # stays this stderr while a library's is turned away

Token = Annotated[str | None, typer.Option(envvar="PATCHWIRE_TOKEN", help="The server's token.", show_default=False)]
Tls = Annotated[bool, typer.Option("--tls", help="Encrypt the connection; trusts the system's certificates.")]
TlsCa = Annotated[
    Path | None, typer.Option(help="Encrypt the connection; trusts the certificates in this file.", show_default=False)
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, auto (a GPU if there is one) or balanced (all GPUs).")]
ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A hub id, a directory, a .gguf file or zoo:NAME; with --server, the name of one of its models.",
    ),
]
ServerAddress = Annotated[
    str | None, typer.Option("--server", metavar="ADDRESS", help="Use this server.", show_default=False)
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, float64, or auto (as the checkpoint has it).")]


def main() -> None:
    """Run the command line: an error of ours is one message, without a traceback, and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a token shows something else
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", PatchwireWarning)
    warnings.showwarning = _show_warning
    try:
        app()
    except PatchwireError as error:
        _fail(error)


def _fail(error: PatchwireError) -> None:
    err.print(Text(error.message, style="bold red"), soft_wrap=True)
    if error.hint:
        err.print(Text(error.hint), soft_wrap=True)
    sys.exit(1)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    err.print(Text(str(message), style="yellow"), soft_wrap=True)


def _show_version(asked: bool) -> None:
    if asked:
        out.print(f"patchwire {patchwire.__version__}")
        raise typer.Exit


@app.callback(
    epilog="[bold]Examples[/]\n\n"
    "patchwire demo  [dim]# an experiment on a real model, on this machine[/]\n\n"
    "patchwire serve gpt2 --device cuda  [dim]# then: patchwire.connect('127.0.0.1:50051').model()[/]\n\n"
    "patchwire lens gpt2 'The Eiffel Tower is in the city of'\n\n"
    "patchwire doctor gpu-box:50051  [dim]# why does it not work?[/]"
)
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Causal experiments inside language models that live somewhere else."""


# --- serve ------------------------------------------------------------------------------------------------------------


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
        int | None, typer.Option(min=1, help="Tokens of all rows of one trace, at most.", show_default=False)
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds that a request may run.", show_default=False)
    ] = None,
    max_queued: Annotated[
        int | None, typer.Option(min=1, help="Requests of one model that may wait.", show_default=False)
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

    _log_to_stderr()
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
    with _loading("the worker", remark=False):
        try:
            from patchwire_worker.config import Limits, ServerConfig
            from patchwire_worker.models.hosted import host as host_model
            from patchwire_worker.server import serve as serve_until_told
        except ModuleNotFoundError as error:
            raise _no_worker(error) from None
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
        with _loading(spec):
            model = host_model(spec, name=name, device=device, dtype=dtype, attention=attention)
        if model.name in hosted:
            raise PatchwireError(f"Two models are called `{model.name}`.", hint=f"Name one of them: `other={spec}`.")
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
            f"  {name}: {summary.architecture}, {_count(summary.parameters)} parameters, {summary.layers} layers, "
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


# --- models -----------------------------------------------------------------------------------------------------------


@app.command()
def models(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The server's address.")] = DEFAULT_ADDRESS,
    token: Token = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
) -> None:
    """List the models of a server."""
    from patchwire.tensors import dtype_from_proto

    with patchwire.connect(address, token=token, tls=_tls(tls, tls_ca)) as client:
        found = client.models()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("model", "architecture", "parameters", "layers", "dtype", "device"):
        table.add_column(name, justify="right" if name in ("parameters", "layers") else "left", overflow="fold")
    for each in found:
        dtype = str(dtype_from_proto(each.dtype)).removeprefix("torch.") if each.dtype else "quantized"
        table.add_row(
            Text(each.name, style="bold"),
            each.architecture,
            _count(each.parameters),
            str(each.layers),
            dtype,
            each.device,
        )
    out.print(table if found else "The server holds no models.")


# --- jobs -------------------------------------------------------------------------------------------------------------


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
    with patchwire.connect(address, token=token, tls=_tls(tls, tls_ca)) as client:
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


# --- lens -------------------------------------------------------------------------------------------------------------


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "patchwire lens gpt2 'The Eiffel Tower is in the city of'\n\n"
    "patchwire lens model.gguf 'Hello' --png lens.png\n\n"
    "patchwire lens gpt2 'Hello' --server gpu-box:50051\n\n"
    "patchwire lens ./checkpoint-without-tokenizer '5 17 4' --ids"
)
def lens(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt.")],
    server: ServerAddress = None,
    token: Token = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    top: Annotated[int, typer.Option(min=1, help="How many tokens to list for the last position.")] = 5,
    ids: Annotated[bool, typer.Option("--ids", help="The prompt is token ids, separated by spaces.")] = False,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save a heatmap too (png, pdf, svg).", show_default=False)
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Show the logit lens of a prompt: what the model would say if it stopped after each layer.

    Each row reads the residual stream after one layer as if it were the last; each column is a token of the prompt, and
    a cell says what would come after it, shaded by its probability.
    """
    from patchwire import plots
    from patchwire.methods.lens import logit_lens

    if png is not None:
        plots.require()
    given = _ids(prompt) if ids else prompt
    found = logit_lens(_model(model, server, token, _tls(tls, tls_ca), device, dtype), given, top=top)
    out.print(found.table(width=out.width, percent=out.color_system is None))
    out.print()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("next", style="bold")
    table.add_column("probability", justify="right")
    for word, probability in found.at(-1):
        table.add_row(Text(plots.visible(word)), f"{probability:.4f}")
    out.print(table)
    if png is not None:
        out.print(Text(f"\nSaved {plots.save(found.plot(), png)}"), soft_wrap=True)


def _ids(prompt: str) -> list[int]:
    try:
        return [int(each) for each in prompt.replace(",", " ").split()]
    except ValueError:
        raise InputError(
            "With --ids the prompt is numbers, separated by spaces.", hint='Write for example "12 7 3".'
        ) from None


def _model(
    name: str, server: str | None, token: str | None, tls: bool | patchwire.TLS, device: str, dtype: str
) -> patchwire.Model:
    if server is not None:
        return patchwire.connect(server, token=token, tls=tls).model(name)
    with _loading(name):
        return patchwire.local(name, device=device, dtype=dtype)


# --- sites and verify -------------------------------------------------------------------------------------------------


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "patchwire verify gpt2\n\n"
    "patchwire verify ./my-checkpoint --dtype bfloat16 --prompt 'The Eiffel Tower is in the city of'\n\n"
    "patchwire verify gpt2 --server gpu-box:50051"
)
def verify(
    model: ModelName,
    server: ServerAddress = None,
    token: Token = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to check it with; random token ids if not given.", show_default=False)
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Check on a model itself that its canonical values are what their names say.

    Every equation between them, with the largest error of all layers; writes that must and must not change the logits;
    batches. The exit code is 1 if something does not hold.
    """
    found = patchwire.verify(_model(model, server, token, _tls(tls, tls_ca), device, dtype), prompt)
    _show(*found.table())
    out.print(Text(f"\n{found.summary}", style="green" if found.passed else "bold red"), soft_wrap=True)
    if not found.passed:
        raise typer.Exit(1)


@app.command(
    epilog="[bold]Examples[/]\n\npatchwire sites gpt2\n\npatchwire sites gpt2 --server gpu-box:50051 --no-verify"
)
def sites(
    model: ModelName,
    server: ServerAddress = None,
    token: Token = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    checked: Annotated[bool, typer.Option("--verify/--no-verify", help="Check them all first.")] = True,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """List the canonical names of a model: shapes, where each is in it, whether it can be written, how it was verified.

    Alike layers share a line. What the architecture has and this model lacks is told with the reason.
    """
    from patchwire.listing import listing

    proxy = _model(model, server, token, _tls(tls, tls_ca), device, dtype)
    verification = patchwire.verify(proxy) if checked else None
    found = listing(proxy.catalogue, verification)
    _show(*found.table())
    for each in found.notes():
        out.print(Text(each, style="yellow"), soft_wrap=True)
    if verification is not None:
        out.print(Text(f"\n{verification.summary}", "green" if verification.passed else "bold red"), soft_wrap=True)


# --- compare ----------------------------------------------------------------------------------------------------------


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "patchwire compare gpt2 state-spaces/mamba-130m-hf --clean 'The Eiffel Tower is in the city of' "
    "--corrupt 'The Colosseum is in the city of' --answer ' Paris' --save compare.png\n\n"
    "patchwire compare gpt2 pythia --clean 'The Eiffel Tower' --server gpu-box:50051  [dim]# two logit lenses[/]"
)
def compare(
    first: Annotated[str, typer.Argument(metavar="MODEL_A", help="A model, as for the other commands.")],
    second: Annotated[str, typer.Argument(metavar="MODEL_B", help="Another; from the same server with --server.")],
    clean: Annotated[str, typer.Option(help="The prompt.")],
    corrupt: Annotated[
        str | None,
        typer.Option(help="A prompt of as many tokens, into which states of the clean one go.", show_default=False),
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(
            help="How the clean prompt goes on, or with --ids a token id; what each model says, if not given.",
            show_default=False,
        ),
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Prompts are token ids, separated by spaces.")] = False,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the figure (png, pdf, svg).", show_default=False)
    ] = None,
    server: ServerAddress = None,
    token: Token = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Run one experiment on two models, side by side: layers by relative depth, tokens by the text that they stand for.

    With --corrupt, residual patching: the probability of the answer when one state of the clean run, after one layer at
    one token, is copied into the corrupt run. Without it, the logit lens: the probability of the likeliest next token.
    """
    from patchwire import plots
    from patchwire.methods import activation_patching, logit_lens

    if save is not None:
        plots.require()
    if corrupt is None and answer is not None:
        raise InputError("An answer belongs to a corrupt prompt.", hint="Give --corrupt too.")
    title = "Logit lens: the likeliest next token" if corrupt is None else "Residual stream patched"
    prompt: str | list[int] = _ids(clean) if ids else clean
    other = _ids(corrupt) if ids and corrupt is not None else corrupt
    wanted = _ids(answer)[0] if ids and answer is not None else answer

    def experiment(model: patchwire.Model) -> object:
        if other is None:
            return logit_lens(model, prompt, top=1)
        return activation_patching(model, prompt, other, answer=wanted)

    one, two = (_model(each, server, token, _tls(tls, tls_ca), device, dtype) for each in (first, second))
    found = patchwire.compare(one, two, experiment)
    out.print(Text(title, style="bold"))
    _show(*found.table())
    if save is not None:
        out.print(Text(f"\nSaved {plots.save(found.plot(title=title), save)}"), soft_wrap=True)


def _show(head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for index, each in enumerate(head):
        table.add_column(each, overflow="fold", style="bold" if index == 0 else None)
    for line in lines:
        table.add_row(*map(Text, line))
    out.print(table)


# --- zoo --------------------------------------------------------------------------------------------------------------


@app.command(name="zoo")
def zoo_(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show the card of this model.", show_default=False)
    ] = None,
) -> None:
    """List the small trained models that come with the worker, or tell all about one of them."""
    try:
        from patchwire_worker import zoo
    except ModuleNotFoundError as error:
        raise _no_worker(error) from None
    if name is not None:
        out.print(Text(zoo.card(name.removeprefix(zoo.PREFIX))), soft_wrap=True)
        return
    _show(
        ("model", "about"),
        [
            (f"{zoo.PREFIX}{each}", entry.about if each == entry.name else "")
            for entry in zoo.ENTRIES
            for each in entry.names
        ],
    )


# --- demo and doctor --------------------------------------------------------------------------------------------------


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The folder for the figures.")] = Path("demo-output"),
) -> None:
    """Run an experiment on a real model, on this machine, and the same one on a Mamba."""
    try:
        import patchwire_worker.embedded  # noqa: F401
    except ModuleNotFoundError as error:
        raise _no_worker(error) from None
    from patchwire import demo as script

    script.run(output, out, _loading)


@app.command()
def doctor(
    address: Annotated[
        str | None, typer.Argument(metavar="ADDRESS", help="A server to look at too: host:port.", show_default=False)
    ] = None,
    token: Token = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
) -> None:
    """Tell what is installed, what is missing, and whether a server can be used from here."""
    from patchwire.doctor import report

    if not report(out, address, token=token, tls=_tls(tls, tls_ca)):
        raise typer.Exit(1)


# --- what the commands share ------------------------------------------------------------------------------------------


def _tls(tls: bool, ca: Path | None) -> bool | patchwire.TLS:
    if ca is None:
        return tls
    if not ca.is_file():
        raise PatchwireError(f"There is no file {ca} (--tls-ca).")
    return patchwire.TLS(ca=ca)


def _no_worker(error: ModuleNotFoundError) -> PatchwireError:
    return PatchwireError(
        f"This needs the worker, which is not installed ({error}).",
        hint='Install it: `pip install "patchwire[worker]"`.',
    )


def _count(number: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)


class _LogHandler(logging.Handler):
    """Log lines to stderr, past a progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(
            Text(self.format(record), style="dim" if record.levelno < logging.WARNING else "yellow"), soft_wrap=True
        )


def _log_to_stderr() -> None:
    handler = _LogHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("patchwire_worker").setLevel(logging.INFO)


@contextmanager
def _loading(what: str, *, remark: bool = True) -> Iterator[None]:
    """Show that something loads: a spinner, and a bar while a library reports how far it is.

    Libraries report with bars and remarks of their own on stderr. The bars are read and shown as one; the remarks are
    left out. A remark stays on the screen, unless it is not wanted.
    """
    started = time.monotonic()
    what = Path(what).name if Path(what).exists() else what
    if not err.is_terminal and remark:
        err.print(Text(f"Loading {what}"), soft_wrap=True)
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task = progress.add_task(f"Loading {what}", total=None)
    with progress, redirect_stderr(_Bars(progress, task, what)), _quiet_libraries():
        yield
    seconds = time.monotonic() - started
    if remark and seconds > 1:
        err.print(Text(f"Loaded {what} in {seconds:.0f} s.", style="dim"), soft_wrap=True)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if sys.modules.get("transformers") is not None:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Bars(io.TextIOBase):
    """A stderr that turns the text of a library's progress bar into progress of our bar."""

    def __init__(self, progress: Progress, task: object, what: str) -> None:
        self._progress = progress
        self._task = task
        self._what = what

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for title, percent in re.findall(r"([^\r\n:]+):\s+(\d+)%\|", text):
            self._progress.update(
                self._task,  # type: ignore[arg-type]
                description=f"Loading {self._what}: {title.strip(' .').lower()}",
                completed=int(percent),
                total=100,
            )
            if int(percent) == 100:
                self._pulse()
        return len(text)

    def _pulse(self) -> None:
        """What comes next does not say how far it is."""
        for task in self._progress.tasks:
            task.total, task.description = None, f"Loading {self._what}"
