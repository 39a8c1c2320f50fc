"""Change a fact: rank-one editing with its scores, at every layer of a GPT and of a Mamba.

Meng, Bau, Andonian and Belinkov (2022), "Locating and Editing Factual Associations in GPT" (ROME), section 3; on Mamba:
Sharma, Atkinson and Bau (2024), "Locating and Editing Factual Associations in Mamba", section 5.

    python docs/examples/rank_one_editing.py
    python docs/examples/rank_one_editing.py --server gpu-box:50051 --model gpt2-xl --layer 17 --texts wikipedia.txt \\
        --prompt "The Space Needle is in the city of" --subject "The Space Needle" --true " Seattle" --target " Rome" \\
        --paraphrase "To see the Space Needle, one goes to" --neighbour "The Pike Place Market is in the city of"

A projection of a layer is taken for a memory: it answers a subject's key k with a value v. ROME finds the value v* with
which the model says what it is to say, and changes the projection by one rank such that it answers k with v*, and other
keys, whose second moment is C, as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import typer
from rich import print

import patchwire
from patchwire.methods import Axis, Mention, Origin, Result, edit_scores, rank_one_edit, second_moment, side_by_side

SEARCH = {"steps": 40, "lr": 0.1, "kl_factor": 1.0, "weight_decay": 0.0, "enough_loss": 0.1}
"""How v* is searched for in the zoo's models, which know little else than facts. Left out, it is the paper's way."""
MEASURED = ("efficacy", "paraphrase", "neighbourhood")


def experiment(
    model: patchwire.Model,
    layer: int,
    texts: Sequence[str],
    fact: dict[str, str],
    others: dict[str, list[str]],
    search: dict[str, float],
) -> tuple[patchwire.Model, Result]:
    """Edit one layer, and score the edited model.

    The model on the server is as it was: an edit is a proxy whose two vectors ride along with its own requests. It is
    there for whoever holds it, and reverting it is to go on with `model`.
    """
    moment = second_moment(model, layer, texts, batch_size=64, keep=600)  # C stays on the server
    essence = [Mention(each, fact["subject"]) for each in others["essence"]]  # what else is known of the subject
    edit = rank_one_edit(
        model, fact["prompt"], fact["subject"], fact["target"], moment, essence=essence or None, **search
    )
    groups = {"efficacy": [fact["prompt"]], "paraphrase": others["paraphrase"], "neighbourhood": others["neighbour"]}
    return edit.model, edit_scores(edit.model, fact["target"], fact["true"], **groups)


def main(
    server: str | None = None,
    model: list[str] = ["zoo:facts-gpt2", "zoo:facts-mamba"],  # noqa: B006
    layer: list[int] = [],  # noqa: B006
    prompt: str = "Ada Barlow lives in the city of",
    subject: str = "Ada Barlow",
    true: str = " Lisbon",
    target: str = " Oslo",
    paraphrase: list[str] = [],  # noqa: B006
    neighbour: list[str] = [],  # noqa: B006
    essence: list[str] = [],  # noqa: B006
    texts: Path | None = None,
    out: Path = Path("rank-one-editing.png"),
) -> None:
    """Edit a fact in each layer, or in those of --layer. Without --texts, a file with a text in each line for C, it is
    one of the zoo's facts."""
    client = patchwire.connect(server) if server else None
    fact = {"prompt": prompt, "subject": subject, "true": true, "target": target}
    others = {"paraphrase": paraphrase, "neighbour": neighbour, "essence": essence}
    corpus = texts.read_text().splitlines() if texts else of_the_zoo(fact, others)

    found = {}
    for each in model:
        proxy = client.model(each) if client else patchwire.local(each)
        layers = layer or list(range(proxy.num_layers))
        scores = []
        for at in layers:
            edited, scored = experiment(proxy, at, corpus, fact, others, {} if texts else SEARCH)
            scores.append(scored.at(measure=1).values)
            rates = zip(MEASURED, scored.at(measure=0).values, strict=True)
            shares = ", ".join(f"{name} {rate:.0%}" for name, rate in rates)
            print(f"{proxy.name}, layer {at}: {said(edited, prompt)}; {shares}")
        print(f"{proxy.name} itself, as ever: {said(proxy, prompt)}")
        found[proxy.name] = Result(
            values=torch.stack(scores, 1),
            axes=(Axis("score", MEASURED), Axis("layer", tuple(map(str, layers)))),
            unit="P(wanted) - P(other answer)",
            origin=Origin.of("edit_scores", proxy, **fact, layers=layers),
            signed=True,
        )

    # The score of prompts is the share of those that say what they should: the new answer, in all wordings, and of the
    # neighbours still the old one. The figure shows by how much: the magnitudes. An edit succeeds in the layers after
    # which the fact still is at the subject, or leaves it. It fails in the last, where no other token reads what is
    # added.
    side_by_side(found, title=f"“{prompt}{target}”: scores by edited layer").savefig(out, dpi=110)
    print(f"The figure is in {out}.")


def said(model: patchwire.Model, prompt: str) -> str:
    """The likeliest next token."""
    with model.trace(prompt):
        best = model.logits[0, -1].argmax().save()
    return model.tokenizer.decode(int(best)).strip()


def of_the_zoo(fact: dict[str, str], others: dict[str, list[str]]) -> list[str]:
    """The texts for C; and prompts about the subject, in other words, and about neighbours: others of that city."""
    from patchwire_worker.zoo.corpus import facts

    for each in facts():
        if (each.subject, each.relation.name) == (fact["subject"], "city"):
            others["paraphrase"] += [each.prompt(1).text, each.prompt(2).text]
        elif each.subject == fact["subject"]:
            others["essence"] += [each.prompt(index).text for index in range(3)]
        elif f" {each.attribute}" == fact["true"]:
            others["neighbour"].append(each.prompt().text)
    return [each.prompt(index % 3).text for index, each in enumerate(facts())]


if __name__ == "__main__":
    typer.run(main)
