"""Where are facts? The average of causal traces, by the role of tokens.

Meng, Bau, Andonian and Belinkov (2022), "Locating and Editing Factual Associations in GPT", section 2.2, figure 2.

    python docs/examples/average_effects.py
    python docs/examples/average_effects.py --server gpu-box:50051 --model gpt2-xl --window 10 --facts facts.tsv

One fact's trace may be of this fact only. Facts have their subjects in different places, so what is averaged is the
first, the middle and the last token of the subject, the token after it, the further ones and the last.
"""

from __future__ import annotations

import random
from pathlib import Path

import typer
from rich import print

import patchwire
from patchwire.methods import Result, by_role, causal_trace, side_by_side

Fact = tuple[str, str]
"""A prompt, and its subject."""


def experiment(model: patchwire.Model, facts: list[Fact], place: str, window: int) -> Result:
    """The average indirect effect of a place at each layer, on the probability of what the model says of each fact:
    `[layers, roles]`. A trace is one request.
    """
    traces = [causal_trace(model, prompt, subject, at=place, window=window) for prompt, subject in facts]
    return by_role([each.effect() for each in traces])


def main(
    server: str | None = None,
    model: list[str] = ["zoo:facts-gpt2", "zoo:facts-mamba"],  # noqa: B006
    facts: Path | None = None,
    count: int = 20,
    window: int = 2,
    out: Path = Path("average-effects.png"),
) -> None:
    """Average over --facts, a prompt, a tab and its subject in each line; or over some of the zoo's. Take such that the
    model knows."""
    client = patchwire.connect(server) if server else None
    known = [tuple(line.split("\t")) for line in facts.read_text().splitlines()] if facts else of_the_zoo(count)
    found = {}
    for each in model:
        proxy = client.model(each) if client else patchwire.local(each)
        for place in ("resid", "mixer", "mlp") if hasattr(proxy.layers[0], "mlp") else ("resid", "mixer"):
            average = experiment(proxy, known, place, 1 if place == "resid" else window)
            found[f"{proxy.name}: {place}"] = average
            print(f"[bold]{proxy.name}[/]: {place}; the average total effect is", end=" ")
            print(f"{average.numbers['source'] - average.numbers['base']:.2f}")
            print(average.table())

    # The average of facts-gpt2 is that of the paper: MLPs at the subject's last token early, attention at the end late.
    # In facts-mamba the fact is in all later words after layer 2, in each of them for some of the wordings. The zoo's
    # subjects have two names, and so no middle tokens: that role stays white.
    side_by_side(found, title=f"Restored states and modules, the average of {len(known)} facts").savefig(out, dpi=85)
    print(f"The figure is in {out}.")


def of_the_zoo(count: int) -> list[Fact]:
    """Facts of all relations, in all wordings."""
    from patchwire_worker.zoo.corpus import facts

    some = random.Random(0).sample(facts(), count)
    return [(each.prompt(index % 3).text, each.subject) for index, each in enumerate(some)]


if __name__ == "__main__":
    typer.run(main)
