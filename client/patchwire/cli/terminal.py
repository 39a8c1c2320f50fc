"""What all commands share: the application, its terminal, the options that many have, and models as they name them."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import patchwire
from patchwire.errors import InputError, PatchwireError

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


def ids_of(prompt: str) -> list[int]:
    """The numbers of a prompt.

    Raises:
        InputError: it is words.
    """
    try:
        return [int(each) for each in prompt.replace(",", " ").split()]
    except ValueError:
        raise InputError(
            "With --ids the prompt is numbers, separated by spaces.", hint='Write for example "12 7 3".'
        ) from None


def opened(
    name: str, server: str | None, token: str | None, tls: bool | patchwire.TLS, device: str, dtype: str
) -> patchwire.Model:
    """The model of that name of a server, or one that is loaded into this process."""
    if server is not None:
        return patchwire.connect(server, token=token, tls=tls).model(name)
    with loading(name):
        return patchwire.local(name, device=device, dtype=dtype)


def show(head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for index, each in enumerate(head):
        table.add_column(each, overflow="fold", style="bold" if index == 0 else None)
    for line in lines:
        table.add_row(*map(Text, line))
    out.print(table)


def tls_of(tls: bool, ca: Path | None) -> bool | patchwire.TLS:
    """How a connection is encrypted.

    Raises:
        PatchwireError: there is no such file of certificates.
    """
    if ca is None:
        return tls
    if not ca.is_file():
        raise PatchwireError(f"There is no file {ca} (--tls-ca).")
    return patchwire.TLS(ca=ca)


def no_worker(error: ModuleNotFoundError) -> PatchwireError:
    """What is said where a command needs what is not installed."""
    return PatchwireError(
        f"This needs the worker, which is not installed ({error}).",
        hint='Install it: `pip install "patchwire[worker]"`.',
    )


def count(number: int) -> str:
    """A number with three digits: "124 M"."""
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


def log_to_stderr() -> None:
    """Show what the worker logs."""
    handler = _LogHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("patchwire_worker").setLevel(logging.INFO)


@contextmanager
def loading(what: str, *, remark: bool = True) -> Iterator[None]:
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
