"""Is knowing a linear map? Relations as affine functions of the subject's state.

Hernandez et al. (2023), "Linearity of Relation Decoding in Transformer Language Models", sections 3 and 4; on Mamba:
Sharma, Atkinson and Bau (2024), "Locating and Editing Factual Associations in Mamba".

    python docs/examples/linear_relations.py
    python docs/examples/linear_relations.py --server gpu-box:50051 --model gpt-j-6b --layer 10 --layer 15 --layer 20 \\
        --prompt "The capital of {} is" --subjects "France,Peru,Kenya,Japan,Norway,Chile,Egypt,Italy"

What a model says at the end of "The capital of {} is" depends on the subject's state s after some layer: o = F(s).
Expanded around a few examples it is `o = b + β J s`. If for other subjects that says what the model says, the relation
is linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import typer
from rich import print

import patchwire
from patchwire.methods import Axis, Mention, Origin, Result, linear_relation, side_by_side


def experiment(model: patchwire.Model, prompt: str, subjects: Sequence[str], layer: int, examples: int = 5) -> float:
    """The faithfulness of a relation: for which share of held-out subjects the map says what the model says.

    J is a mean of Jacobians. The server computes them, some rows in a pass; J and b are all that comes back. The mean
    of several makes a map that is too short, and β makes it longer.
    """
    mentions = [Mention(prompt.format(each), each) for each in subjects]
    relation = linear_relation(model, mentions[:examples], layer, rows=128)
    return relation.faithfulness(mentions[examples:], beta=2.25).numbers["faithfulness"]


def main(
    server: str | None = None,
    model: list[str] = ["zoo:facts-gpt2", "zoo:facts-mamba"],  # noqa: B006
    layer: list[int] = [],  # noqa: B006
    prompt: str | None = None,
    subjects: str = "",
    out: Path = Path("linear-relations.png"),
) -> None:
    """Measure how linear relations are, at each layer or at those of --layer; without --prompt, those of the zoo."""
    client = patchwire.connect(server) if server else None
    relations = {"relation": (prompt, subjects.split(","))} if prompt else of_the_zoo()
    found = {}
    for each in model:
        proxy = client.model(each) if client else patchwire.local(each)
        layers = layer or list(range(proxy.num_layers - 1))  # after the last, other tokens do not see the subject
        values = [[experiment(proxy, text, about, at) for at in layers] for text, about in relations.values()]
        found[proxy.name] = Result(
            values=torch.tensor(values),
            axes=(Axis("relation", tuple(relations)), Axis("layer", tuple(map(str, layers)))),
            unit="faithfulness",
            origin=Origin.of("linear_relation", proxy, relations=relations, layers=layers),
        )
        print(f"[bold]{proxy.name}[/]")
        print(found[proxy.name].table())

    # Of 16 attributes, chance is 1/16. For most relations the maps are best in the middle: before, the two names are
    # not joined yet, and later the fact has left the subject.
    side_by_side(found, title="How linear is what follows the subject?").savefig(out, dpi=110)
    print(f"The figure is in {out}.")


def of_the_zoo() -> dict[str, tuple[str, list[str]]]:
    """The first wording of each relation, and 25 subjects of all first names."""
    from patchwire_worker.zoo.corpus import RELATIONS, subjects

    return {each.name: (each.templates[0], list(subjects()[::8])) for each in RELATIONS}


if __name__ == "__main__":
    typer.run(main)
