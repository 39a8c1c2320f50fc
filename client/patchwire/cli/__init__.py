"""The command line. Every command works on what the library offers to any program.

`serving.py` has `serve`, `models` and `jobs`; `experiments.py` has `trace`, `lens` and `compare`; `looking.py` has
`sites`, `verify`, `zoo`, `demo` and `doctor`. What takes long to import is imported by the command that needs it.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import Annotated

import typer
from rich.text import Text

import patchwire

from patchwire.cli import serving, experiments, looking  # isort: skip  # help lists commands in this order
from patchwire.cli.terminal import app, err, out
from patchwire.errors import PatchwireError, PatchwireWarning

__all__ = ["app", "experiments", "looking", "main", "out", "serving"]


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
    "patchwire trace gpt2 --prompt 'The Eiffel Tower is in the city of' --subject 'The Eiffel Tower'\n\n"
    "patchwire doctor gpu-box:50051  [dim]# why does it not work?[/]"
)
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Causal experiments inside language models that live somewhere else."""
