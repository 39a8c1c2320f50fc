"""Looks at models and at this machine: `patchwire sites`, `verify`, `zoo`, `demo` and `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

import patchwire
from patchwire.cli.terminal import (
    Device,
    Dtype,
    ModelName,
    ServerAddress,
    Tls,
    TlsCa,
    Token,
    app,
    loading,
    no_worker,
    opened,
    out,
    show,
    tls_of,
)


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

    proxy = opened(model, server, token, tls_of(tls, tls_ca), device, dtype)
    verification = patchwire.verify(proxy) if checked else None
    found = listing(proxy.catalogue, verification)
    show(*found.table())
    for each in found.notes():
        out.print(Text(each, style="yellow"), soft_wrap=True)
    if verification is not None:
        out.print(Text(f"\n{verification.summary}", "green" if verification.passed else "bold red"), soft_wrap=True)


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
    found = patchwire.verify(opened(model, server, token, tls_of(tls, tls_ca), device, dtype), prompt)
    show(*found.table())
    out.print(Text(f"\n{found.summary}", style="green" if found.passed else "bold red"), soft_wrap=True)
    if not found.passed:
        raise typer.Exit(1)


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
        raise no_worker(error) from None
    if name is not None:
        out.print(Text(zoo.card(name.removeprefix(zoo.PREFIX))), soft_wrap=True)
        return
    show(
        ("model", "about"),
        [
            (f"{zoo.PREFIX}{each}", entry.about if each == entry.name else "")
            for entry in zoo.ENTRIES
            for each in entry.names
        ],
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The folder for the figures.")] = Path("demo-output"),
) -> None:
    """Run an experiment on a real model, on this machine, and the same one on a Mamba."""
    try:
        import patchwire_worker.embedded  # noqa: F401
    except ModuleNotFoundError as error:
        raise no_worker(error) from None
    from patchwire import demo as script

    script.run(output, out, loading)


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

    if not report(out, address, token=token, tls=tls_of(tls, tls_ca)):
        raise typer.Exit(1)
