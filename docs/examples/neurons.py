"""What do neurons know? Their triggers, their words, and what is lost without them.

Geva, Schuster, Berant and Levy (2021), "Transformer Feed-Forward Layers Are Key-Value Memories"; Geva, Caciularu, Wang
and Goldberg (2022), "Transformer Feed-Forward Layers Build Predictions by Promoting Concepts in the Vocabulary Space";
Dar, Geva, Gupta and Berant (2023), "Analyzing Transformers in Embedding Space".

    python docs/examples/neurons.py
    python docs/examples/neurons.py --server gpu-box:50051 --model gpt2 --model mamba-130m-hf --layer 8 \\
        --prompt "The Eiffel Tower is in the city of" --subject "The Eiffel Tower" --answer " Paris" --texts texts.txt

An MLP adds `Σ m_i v_i`: neuron i is on, with m_i, at some inputs, and has a vector v_i that it then writes. What the
SSM of a Mamba adds is the same sum, of channels; all functions here take either.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch
import typer
from rich.console import Console

import patchwire
from patchwire.methods import (
    Axis,
    Origin,
    Result,
    project_to_vocabulary,
    scale_coefficients,
    side_by_side,
    sub_updates,
    triggers,
    value_projections,
)
from patchwire.methods.prompts import prompt_of, span, token_of

CONSOLE = Console(soft_wrap=True, highlight=False)


def experiment(model: patchwire.Model, prompt: str, answer: int, count: int) -> torch.Tensor:
    """The answer's logit without the `count` neurons of a layer that add most at a token: `[layers, tokens]`.

    What a neuron adds is as long as |m_i| ‖v_i‖. All cells, a layer and a token each, are rows of one pass.
    """
    found, tokens = [], range(len(prompt_of(model, prompt)))
    strongest = [sub_updates(model, prompt, token, top=count).neurons for token in tokens]
    with model.trace() as trace:
        for layer, token in product(range(model.num_layers), tokens):
            with trace.invoke(prompt):
                scale_coefficients(model.layers[layer], strongest[token][layer].tolist(), by=0, tokens=token)
                found.append(model.logits[0, -1, answer].save())
    return torch.stack([each.value for each in found]).view(-1, len(tokens))


def described(model: patchwire.Model, layer: int, prompt: str, position: int, texts: list[str]) -> None:
    """Print the neurons that add most at a token: when they are on, and which words they read and write."""
    found = triggers(model, layer, texts, top=3, batch_size=64)
    values = value_projections(model, layer, triggers=found, top=5)
    keys = project_to_vocabulary(model, layer, "mlp_in" if hasattr(model.layers[0], "mlp") else "ssm_in", top=5)
    assert values.agreement is not None
    agreement, chance = (values.agreement.numbers[each] for each in ("agreement", "chance"))
    CONSOLE.print(f"layer {layer}: {agreement:.1%} of values say how the first trigger goes on; by chance {chance:.1%}")
    for neuron in sub_updates(model, prompt, position, layers=[layer], top=3).neurons[0].tolist():
        on = ", ".join(f"“{''.join(found.prefix(neuron, rank))}”" for rank in range(3))
        reads, writes = ("".join(word for word, _ in each.at(neuron)) for each in (keys, values.tokens))
        CONSOLE.print(f"{neuron:>5} is on at {on}\n      and reads {reads}; writes {writes}", markup=False)


def main(
    server: str | None = None,
    model: list[str] = ["zoo:facts-gpt2", "zoo:facts-mamba"],  # noqa: B006
    prompt: str = "Ada Barlow lives in the city of",
    subject: str = "Ada Barlow",
    answer: str | None = None,
    count: int = 32,
    layer: list[int] = [],  # noqa: B006
    texts: Path | None = None,
    out: Path = Path("neurons.png"),
) -> None:
    """Leave neurons out, and describe those of --layer; without --texts, a text in each line, by texts of the zoo."""
    client = patchwire.connect(server) if server else None
    found, corpus = {}, texts.read_text().splitlines() if texts else of_the_zoo()
    for each in model:
        proxy = client.model(each) if client else patchwire.local(each)
        given = prompt_of(proxy, prompt)
        marked = tuple(span(given, subject))
        with proxy.trace(prompt):
            whole = proxy.logits[0, -1].save()
        right = int(whole.argmax()) if answer is None else token_of(proxy, given, answer)
        found[proxy.name] = Result(
            values=experiment(proxy, prompt, right, count) - whole.value[right],
            axes=(Axis("layer", tuple(map(str, range(proxy.num_layers)))), Axis("token", given.tokens, marked)),
            unit="change of the answer's logit",
            origin=Origin.of("sub_updates", proxy, prompt=prompt, answer=right, count=count),
            signed=True,
        )

        # Early, at the subject, neurons are on at names; late, at the end, in prompts about cities, and some of them
        # write cities. Values that say what comes next are in the Mamba's last layer, 1 in 3: what it adds is nearly
        # what is said. In the GPT they are 1 in 16, in its first layer as in its last.
        CONSOLE.print(f"[bold]{proxy.name}[/]")
        CONSOLE.print(found[proxy.name].table())
        for at in layer or range(proxy.num_layers):
            described(proxy, at, prompt, marked[-1] if at < proxy.num_layers // 2 else len(given) - 1, corpus)

    # In the Mamba an eighth of a layer's channels carry the fact all the way: at the subject, at a word of the
    # relation, and at the end. In the GPT no layer has it in so few neurons.
    side_by_side(found, title=f"Without the {count} strongest neurons of a layer at a token").savefig(out, dpi=110)
    CONSOLE.print(f"The figure is in {out}.")


def of_the_zoo() -> list[str]:
    """All facts, each in one wording."""
    from patchwire_worker.zoo.corpus import facts

    return [f"{each.prompt(index % 3).text} {each.attribute}" for index, each in enumerate(facts())]


if __name__ == "__main__":
    typer.run(main)
