"""Experiments from a terminal: `patchwire trace`, `lens` and `compare`.

Each shows a table, and writes a figure and beside it the numbers, as `patchwire.methods.load` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
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
    ids_of,
    opened,
    out,
    tls_of,
)
from patchwire.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from patchwire.methods import Result

Prompt = Annotated[str, typer.Option(help="The prompt.", show_default=False)]
Ids = Annotated[bool, typer.Option("--ids", help="Prompts are token ids, separated by spaces.")]
Subject = Annotated[
    str,
    typer.Option(
        help="Its subject: words that stand in it once; with --ids, the positions of its tokens.", show_default=False
    ),
]
Answer = Annotated[
    str | None,
    typer.Option(
        help="How the prompt goes on, as “ Paris”; with --ids, a token id. What the model says, if not given.",
        show_default=False,
    ),
]
PlaceName = Annotated[
    str, typer.Option(help="What is restored: resid, mixer, mlp; of an SSM also scan or gate.", metavar="PLACE")
]
Window = Annotated[int, typer.Option(min=1, help="In how many layers around each.")]
Severed = Annotated[
    str | None,
    typer.Option(
        metavar="PLACE", help="Hold this place, at the restored token, as in the corrupted run.", show_default=False
    ),
]
NoiseScale = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Corrupt the subject's embeddings with noise of so many of their standard deviations.",
        show_default="3, without --replace",
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="How often noise is drawn.")]
Seed = Annotated[int, typer.Option(help="Another one draws other noise.")]
Replace = Annotated[
    str | None,
    typer.Option(
        metavar="PROMPT", help="Corrupt with a prompt of as many tokens, about another subject.", show_default=False
    ),
]
Normalised = Annotated[
    bool, typer.Option("--normalised", help="Show shares of the whole effect, 0 to 1, and not differences.")
]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="FILE",
        help="The figure (png, pdf, svg); the numbers stand beside it. A .safetensors file has the numbers alone.",
    ),
]


NUMBERS = ".safetensors"


# --- trace and compare ------------------------------------------------------------------------------------------------


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "patchwire trace gpt2 --prompt 'The Eiffel Tower is in the city of' --subject 'The Eiffel Tower' "
    "--answer ' Paris' --server gpu-box:50051\n\n"
    "patchwire trace zoo:facts-mamba --prompt 'Ada Barlow lives in the city of' --subject 'Ada Barlow' "
    "--replace 'Hugo Keller lives in the city of' --at scan --out scan.pdf"
)
def trace(
    model: ModelName,
    prompt: Prompt,
    subject: Subject,
    answer: Answer = None,
    at: PlaceName = "resid",
    window: Window = 1,
    severed: Severed = None,
    noise: NoiseScale = None,
    samples: Samples = 10,
    seed: Seed = 1,
    replace: Replace = None,
    normalised: Normalised = False,
    ids: Ids = False,
    to: Out = Path("trace.png"),
    server: ServerAddress = None,
    token: Token = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Trace where an answer comes from: corrupt the subject, and restore one state of the clean run at a time.

    A cell is what restoring a place after a layer, at a token, does to the probability of the answer.
    """
    experiment = _tracing(prompt, subject, answer, at, window, severed, noise, samples, seed, replace, ids)
    _check(to)
    proxy = opened(model, server, token, tls_of(tls, tls_ca), device, dtype)
    _side_by_side({proxy.name: experiment(proxy)}, to, f"{at} restored", normalised)


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "patchwire compare gpt2 pythia mamba --prompt 'The Eiffel Tower is in the city of' --subject 'The Eiffel Tower' "
    "--server gpu-box:50051\n\n"
    "patchwire compare zoo:facts-gpt2 zoo:facts-mamba --prompt 'Ada Barlow lives in the city of' "
    "--subject 'Ada Barlow' --at mixer --normalised --out mixers.png"
)
def compare(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL…", help="Models, as for the other commands; two or more.")
    ],
    prompt: Prompt,
    subject: Subject,
    answer: Answer = None,
    at: PlaceName = "resid",
    window: Window = 1,
    severed: Severed = None,
    noise: NoiseScale = None,
    samples: Samples = 10,
    seed: Seed = 1,
    replace: Replace = None,
    normalised: Normalised = False,
    ids: Ids = False,
    to: Out = Path("compare.png"),
    server: ServerAddress = None,
    token: Token = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Run the same causal trace on several models, side by side in one figure with one scale.

    Each has its own tokens and layers. The numbers of each model are in a file of their own.
    """
    if len(models) < 2:
        raise InputError("A comparison is of two models or more.", hint="`patchwire trace` is for one.")
    experiment = _tracing(prompt, subject, answer, at, window, severed, noise, samples, seed, replace, ids)
    _check(to)
    found: dict[str, Result] = {}
    for each in models:
        proxy = opened(each, server, token, tls_of(tls, tls_ca), device, dtype)
        name = proxy.name if proxy.name not in found else f"{proxy.name} ({len(found) + 1})"
        found[name] = experiment(proxy)
    _side_by_side(found, to, f"{at} restored", normalised)


def _tracing(
    prompt: str,
    subject: str,
    answer: str | None,
    at: str,
    window: int,
    severed: str | None,
    noise: float | None,
    samples: int,
    seed: int,
    replace: str | None,
    ids: bool,
) -> Callable[[patchwire.Model], Result]:
    """What the options of a causal trace say, to be done to a model."""
    from patchwire.methods import Noise, Replacement, causal_trace

    if noise is not None and replace is not None:
        raise InputError("A subject is corrupted by noise or replaced.", hint="Give --noise or --replace, not both.")
    given, other, wanted = (ids_of(each) if ids and each is not None else each for each in (prompt, replace, answer))
    corruption = Noise(scale=3.0 if noise is None else noise, samples=samples, seed=seed)

    def experiment(model: patchwire.Model) -> Result:
        return causal_trace(
            model,
            given,
            ids_of(subject) if ids else subject,
            corruption if other is None else Replacement(other),
            answer=wanted[0] if isinstance(wanted, list) else wanted,
            at=at,
            window=window,
            severed=severed,
        )

    return experiment


def _side_by_side(found: Mapping[str, Result], to: Path, title: str, normalised: bool) -> None:
    """Show and write traces of some models."""
    from patchwire.methods import side_by_side

    shown = {name: each.normalised() if normalised else each.effect() for name, each in found.items()}
    for name, each in shown.items():
        numbers = found[name].numbers
        out.print(Text(name, style="bold"))
        out.print(each.table(width=out.width))
        clean, corrupted = (f"{numbers[run]:.2f}" for run in ("source", "base"))
        out.print(Text(f"{each.unit}; clean {clean}, corrupted {corrupted}\n", style="dim"), soft_wrap=True)
    _write(found, to, lambda: side_by_side(shown, title=title))


# --- lens -------------------------------------------------------------------------------------------------------------


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "patchwire lens gpt2 --prompt 'The Eiffel Tower is in the city of'\n\n"
    "patchwire lens gpt2 --prompt 'Hello' --server gpu-box:50051 --out hello.svg\n\n"
    "patchwire lens ./checkpoint-without-tokenizer --prompt '5 17 4' --ids"
)
def lens(
    model: ModelName,
    prompt: Prompt,
    top: Annotated[int, typer.Option(min=1, help="How many tokens to list for the last position.")] = 5,
    ids: Ids = False,
    to: Out = Path("lens.png"),
    server: ServerAddress = None,
    token: Token = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Show the logit lens of a prompt: what the model would say if it stopped after each layer.

    Each row reads the residual stream after one layer as if it were the last; each column is a token of the prompt, and
    a cell says what would come after it, shaded by its probability.
    """
    from patchwire import plots
    from patchwire.methods import logit_lens

    _check(to)
    given = ids_of(prompt) if ids else prompt
    proxy = opened(model, server, token, tls_of(tls, tls_ca), device, dtype)
    found = logit_lens(proxy, given, top=top)
    out.print(found.table(width=out.width, percent=out.color_system is None))
    out.print()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("next", style="bold")
    table.add_column("probability", justify="right")
    for word, probability in found.at(-1):
        table.add_row(Text(plots.visible(word)), f"{probability:.4f}")
    out.print(table)
    _write({proxy.name: found.likeliest}, to, found.plot)


# --- what they write --------------------------------------------------------------------------------------------------


def _check(to: Path) -> None:
    """Say before the work that a figure cannot be drawn."""
    from patchwire import plots

    if to.suffix != NUMBERS:
        plots.require()


def _write(results: Mapping[str, Result], to: Path, figure: Callable[[], Figure]) -> None:
    """The figure, and each result beside it; the numbers alone if that is what the file is for."""
    from patchwire import plots

    written = [] if to.suffix == NUMBERS else [plots.save(figure(), to)]
    for name, each in results.items():
        own = "" if len(results) == 1 else "-" + re.sub(r"[^\w.]+", "-", name).strip("-")
        written.append(each.save(to.with_name(f"{to.stem}{own}{NUMBERS}")))
    out.print(Text(f"Saved {', '.join(map(str, written))}"), soft_wrap=True)
