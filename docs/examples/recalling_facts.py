"""How is a fact recalled? Cutting what flows to the last token, and where the answer is extracted.

Geva, Bastings, Filippova and Globerson (2023), "Dissecting Recall of Factual Associations in Auto-Regressive Language
Models", sections 4 and 6.

    python docs/examples/recalling_facts.py
    python docs/examples/recalling_facts.py --server gpu-box:50051 --model gpt2 --model mamba-130m-hf --window 9 \\
        --prompt "The Eiffel Tower is in the city of" --subject "The Eiffel Tower" --answer " Paris"

The last token has to find out what was asked of whom. Cut it off from some of the other tokens, in some layers: if the
answer becomes improbable, something that it needs went that way, just there. Attention is cut by its mask; in a Mamba
the last token gets a scan in which those tokens never were.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import print

import patchwire
from patchwire.methods import Result, extraction_events, information_flow, side_by_side


def experiment(model: patchwire.Model, prompt: str, subject: str, answer: str | None, window: int) -> Result:
    """By how many percent the answer's probability changes without each flow: `[sources, layers]`.

    The sources are the subject, its last token, and all other tokens before the last one. All cells are rows of a few
    passes.
    """
    sources = ("subject", "last subject", "non-subject")
    return information_flow(model, prompt, subject, answer=answer, sources=sources, window=window)


def main(
    server: str | None = None,
    model: Annotated[list[str] | None, typer.Option()] = None,
    prompt: str = "Ada Barlow lives in the city of",
    subject: str = "Ada Barlow",
    answer: str | None = None,
    window: int = 2,
    out: Path = Path("recalling-facts.png"),
) -> None:
    """Cut flows in two models; they are those of --server, or run in this program."""
    names = model or (["facts-gpt2", "facts-mamba"] if server else ["zoo:facts-gpt2", "zoo:facts-mamba"])
    models = [patchwire.connect(server).model(name) if server else patchwire.local(name) for name in names]
    flows = {each.name: experiment(each, prompt, subject, answer, window) for each in models}

    for name, flow in flows.items():
        print(f"{name}: the answer's probability is {flow.numbers['base']:.2f}; without a flow it changes by percent:")
        print(flow.table())

    # In the GPT the last token reads the subject itself, in the late layers. In the Mamba the fact has moved into the
    # words between by then, so that cutting the subject off from the last token alone costs little, and cutting off
    # those words costs nearly everything: the causal trace of both shows the same.

    # Where is the answer written? An event is a layer whose mixer's output, read as words, says what the model says.
    for each in models:
        events = extraction_events(each, [prompt]).at(prompt=0).values.tolist()
        print(f"{each.name}: the answer is extracted in layers", [at for at, found in enumerate(events) if found])

    side_by_side(flows, title=f"Cut off from the last token, in {window} layers around each").savefig(out, dpi=100)
    print(f"The figure is in {out}.")


if __name__ == "__main__":
    typer.run(main)
