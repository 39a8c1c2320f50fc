"""One experiment, two architectures: the same causal trace of a GPT and of a Mamba.

    python docs/examples/two_architectures.py
    python docs/examples/two_architectures.py --server gpu-box:50051 --model gpt2 --model mamba-130m-hf \\
        --prompt "The Eiffel Tower is in the city of" --subject "The Eiffel Tower" --answer " Paris"

Two models of different design learnt the same sentences in the same order. Do they keep a fact in the same place?
"""

from __future__ import annotations

from pathlib import Path

import typer
from rich import print

import patchwire
from patchwire.methods import Result, causal_trace, side_by_side


def experiment(model: patchwire.Model, prompt: str, subject: str, answer: str | None) -> Result:
    """By how much each restored state raises the answer's probability, `[layers, tokens]`.

    Nothing here is of one architecture: `model.embed`, where the noise is, and `layers[i].output`, which is restored,
    are there in both.
    """
    return causal_trace(model, prompt, subject, answer=answer).effect()


def main(
    server: str | None = None,
    model: list[str] = ["zoo:facts-gpt2", "zoo:facts-mamba"],  # noqa: B006
    prompt: str = "Ada Barlow lives in the city of",
    subject: str = "Ada Barlow",
    answer: str | None = None,
    out: Path = Path("two-architectures.png"),
) -> None:
    """Trace a fact in each model; they are of --server, or run in this program."""
    client = patchwire.connect(server) if server else None
    proxies = [client.model(each) if client else patchwire.local(each) for each in model]
    found = {each.name: experiment(each, prompt, subject, answer) for each in proxies}

    # In both, the fact is at the subject's last token early, and at the end late. In between they differ: the GPT's
    # attention carries it from the one to the other in layers 2 and 3, while the Mamba, which reads from left to right
    # and has but a state to remember by, has put it into the words of the relation after layer 2.
    for name, each in found.items():
        print(f"{name}: {each.stats.rows} rows in {each.stats.passes} pass")
        print(each.table())
    side_by_side(found, title="Which state brings the answer back?").savefig(out, dpi=110)
    print(f"The figure is in {out}.")


if __name__ == "__main__":
    typer.run(main)
