"""Which components know the operands, and which the result? Causal mediation, with a control.

Stolfo, Belinkov and Sachan (2023), "A Mechanistic Interpretation of Arithmetic Reasoning in Language Models using
Causal Mediation Analysis".

    python docs/examples/mediation.py
    python docs/examples/mediation.py --model zoo:modular-addition
    python docs/examples/mediation.py --server gpu-box:50051 --model pythia-2.8b --template "What is {} plus {}?\\nA:"

A component does in the run of one question what it does in that of another. Where this moves the answer, it carries
something of the question: an operand, or the result. Two questions with other operands and the same result tell these
apart: what carries the result alone does nothing then.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import typer
from rich import print

import patchwire
from patchwire.methods import Result, mediation, relative_importance, side_by_side, stacked


@dataclass(frozen=True)
class Question:
    """One of many questions of one form."""

    prompt: Any
    """A text, or token ids."""
    operands: tuple[str | int, ...]
    result: str | int


def experiment(model: patchwire.Model, pairs: list[tuple[Question, Question]]) -> dict[str, Result]:
    """The indirect effects of embeddings, mixers and MLPs, `[prompt, layers, tokens]` each; the results are what the
    model itself says.

    A component of a pair is one request: a row for each layer and token.
    """
    components = ("embed", "mixer", "mlp") if hasattr(model.layers[0], "mlp") else ("embed", "mixer")
    return {
        at: stacked([mediation(model, one.prompt, other.prompt, at=at) for one, other in pairs]) for at in components
    }


def pairs_of(questions: list[Question], *, same: bool, count: int) -> list[tuple[Question, Question]]:
    """Pairs of which no operand is the same, and the result is, or is not, by chance that is the same for ever."""
    drawn, found = random.Random(0), []
    for one in drawn.sample(questions, len(questions)):
        others = [
            each for each in questions
            if (each.result == one.result) == same and not set(each.operands) & set(one.operands)
        ]  # fmt: skip
        if others and len(found) < count:
            found.append((one, drawn.choice(others)))
    return found


def main(
    server: str | None = None,
    model: str = "zoo:facts-gpt2",
    template: str | None = None,
    count: int = 20,
    out: Path = Path("mediation.png"),
) -> None:
    """Patch components between questions: those of --template about numbers from 1 to 9, or those of a zoo's model."""
    proxy = patchwire.connect(server).model(model) if server else patchwire.local(model)
    questions = arithmetic(template) if template else of_the_zoo(proxy.name)
    shown = {}
    for name, same in {"other result": False, "same result": True}.items():
        found = experiment(proxy, pairs_of(questions, same=same, count=count))
        for component, each in found.items():
            late = relative_importance(found, component, tokens=[-1])
            print(f"{name}: {late:.1%} of all effects are those of “{component}” at the last token")
            # Single effects are huge where P(r') was next to nothing: the logarithm's mean is of all pairs.
            logs = replace(each, values=torch.log1p(each.values), unit="log(1 + indirect effect)")
            shown[f"{component}, {name}"] = logs.mean("prompt")

    # In facts-gpt2 the operands are names. With the same result they matter as ever, in the embeddings; modules at the
    # subject keep a tenth of their effect, and late ones at the last token next to nothing: what these carry is the
    # city. In modular-addition, of one layer, all that is done at “=” is of that kind.
    for name, each in shown.items():
        print(f"[bold]{name}[/]")
        print(each.table())
    side_by_side(shown, title=f"{proxy.name}: what moves the answer").savefig(out, dpi=85)
    print(f"The figure is in {out}.")


def arithmetic(template: str) -> list[Question]:
    """Sums of two numbers with one digit."""
    return [Question(template.format(a, b), (a, b), a + b) for a, b in product(range(1, 10), repeat=2)]


def of_the_zoo(model: str) -> list[Question]:
    """Where people live; or for a model of modular addition, sums."""
    from patchwire_worker.zoo.corpus import facts
    from patchwire_worker.zoo.training import modular

    if model.startswith("modular-addition"):
        sums = zip(modular.pairs().tolist(), modular.answers().tolist(), strict=True)
        return [Question(ids, (ids[0], ids[1]), result) for ids, result in sums]
    cities = [each for each in facts() if each.relation.name == "city"]
    return [Question(each.prompt().text, tuple(each.subject.split()), each.attribute) for each in cities]


if __name__ == "__main__":
    typer.run(main)
