"""Where is a fact in a Mamba? Causal tracing of its scan and of its gate.

Sharma, Atkinson and Bau (2024), "Locating and Editing Factual Associations in Mamba", section 4.

    python docs/examples/causal_tracing_mamba.py
    python docs/examples/causal_tracing_mamba.py --server gpu-box:50051 --model mamba-2.8b-hf --window 10 \\
        --prompt "The Space Needle is in the city of" --subject "The Space Needle" \\
        --other "The Colosseum is in the city of" --answer " Seattle"

A layer of a Mamba adds `o = W_o (s * g)` to the residual stream: s comes from the selective scan, which is all that
moves information from token to token, and g is a gate that sees its own token only. The paper corrupts with another
subject of as many tokens, and not with noise.
"""

from __future__ import annotations

from pathlib import Path

import typer
from rich import print

import patchwire
from patchwire.methods import Replacement, Result, causal_trace, side_by_side

PLACES = {"states": "resid", "what layers add: o": "mixer", "scan: s": "scan", "gate: g": "gate"}


def experiment(
    model: patchwire.Model, prompt: str, subject: str, other: str, answer: str | None, window: int
) -> dict[str, Result]:
    """Restore one place at a time; the modules in `window` layers around each at once.

    `normalised()` is the paper's measure: 0 is the run about the other subject, 1 the undisturbed run.
    """
    found = {}
    for name, place in PLACES.items():
        around = 1 if place == "resid" else window
        trace = causal_trace(model, prompt, subject, Replacement(other), answer=answer, at=place, window=around)
        found[name] = trace.normalised()
    return found


def blocked(model: patchwire.Model, prompt: str, subject: str, other: str, answer: str | None) -> dict[str, Result]:
    """What a restored state does while one path out of it, in all layers at its token, stays as it was."""
    return {
        f"without {path}": causal_trace(
            model, prompt, subject, Replacement(other), answer=answer, severed=path
        ).normalised()
        for path in ("scan", "gate")
    }


def main(
    server: str | None = None,
    model: str = "zoo:facts-mamba",
    prompt: str = "Victor Crane lives in the city of",
    subject: str = "Victor Crane",
    other: str = "Wanda Rowe lives in the city of",
    answer: str | None = None,
    window: int = 1,
    out: Path = Path("causal-tracing-mamba.png"),
) -> None:
    """Trace a fact in a Mamba of --server, or in one that runs in this program."""
    proxy = patchwire.connect(server).model(model) if server else patchwire.local(model)
    found = experiment(proxy, prompt, subject, other, answer, window)

    # The paper's picture, in four layers: states matter at the subject's last token early, and at the end late; what
    # layers add matters in both places; the scan only where information has moved, which is late; and the gate hardly
    # anywhere. On its way to the end the fact is in a word of the relation: this model writes it there after layer 2.
    for name, each in found.items():
        print(f"[bold]{name}[/]")
        print(each.table())

    # The other way round: without scan, or gate, at the restored token, what is left of the early site? In layer 0 next
    # to nothing, as the later layers still work on the subject; after that it is complete, and only read by other
    # tokens.
    paths = blocked(proxy, prompt, subject, other, answer)
    last = found["states"].axes[1].marked[-1]
    for name, each in ({"states": found["states"]} | paths).items():
        by_layer = each.at(token=last).values.tolist()
        print(f"{name:>13}, at the subject's last token:", *(f"{value:.2f}" for value in by_layer))
    side_by_side(found | paths, title=f"{proxy.name}: what is restored").savefig(out, dpi=100)
    print(f"The figure is in {out}.")


if __name__ == "__main__":
    typer.run(main)
