"""What would the model say if it stopped here? The logit lens, the tuned lens, and patchscopes.

nostalgebraist (2020), "interpreting GPT: the logit lens"; Belrose et al. (2023), "Eliciting Latent Predictions from
Transformers with the Tuned Lens"; Ghandeharioun et al. (2024), "Patchscopes: A Unifying Framework for Inspecting Hidden
Representations of Language Models".

    python docs/examples/lenses.py
    python docs/examples/lenses.py --server gpu-box:50051 --model gpt2 \\
        --prompt "The Eiffel Tower is in the city of" --answer " Paris" --texts texts.txt

The logit lens reads a state of the residual stream as if it were the last. Early layers say things in their own way,
and the tuned lens learns a translation for each; a patchscope instead puts the state into another prompt, and lets the
model itself go on.
"""

from __future__ import annotations

from pathlib import Path

import typer
from rich import print

import patchwire
from patchwire.methods import Result, logit_lens, patchscope, side_by_side, tuned_lens


def experiment(model: patchwire.Model, prompt: str, answer: str | None, texts: list[str]) -> dict[str, Result]:
    """How far each lens is from what the model says, at every layer and token: D(model ‖ lens) in nats.

    The translators are trained on the server, in a loop over the texts, and come back when they are done.
    """
    tuned = tuned_lens(model, texts, batch_size=16, lr=3e-3)
    lenses = {"logit lens": logit_lens(model, prompt, answer=answer), "tuned lens": tuned(model, prompt, answer=answer)}
    for name, lens in lenses.items():
        print(f"{name}, the likeliest next token:", lens.table(width=100))
    return {name: lens.divergence for name, lens in lenses.items()}


def main(
    server: str | None = None,
    model: str = "zoo:facts-gpt2",
    prompt: str = "Ada Barlow lives in the city of",
    answer: str | None = None,
    target: str = "Hugo Crane lives in the city of",
    texts: Path | None = None,
    out: Path = Path("lenses.png"),
) -> None:
    """Read a prompt's states; without --texts, a text in each line, the tuned lens is trained on texts of the zoo."""
    proxy = patchwire.connect(server).model(model) if server else patchwire.local(model)
    found = experiment(proxy, prompt, answer, texts.read_text().splitlines() if texts else of_the_zoo())

    # Each state of the prompt, put into the last token of another prompt: where does the model carry on with it?
    scope = patchscope(proxy, prompt, target)
    for layer in range(proxy.num_layers):
        (word, probability), *_ = scope.tokens.at(layer, -1)
        print(f"“{target}” with the last state of layer {layer} in its place: {word!r} ({probability:.2f})")

    side_by_side(found, title=f"{proxy.name}: how far a lens is from the model").savefig(out, dpi=100)
    print(f"The figure is in {out}.")


def of_the_zoo() -> list[str]:
    """The texts that the zoo's models learnt facts from."""
    from patchwire_worker.zoo import corpus

    return [fact.prompt().text for fact in corpus.facts()]


if __name__ == "__main__":
    typer.run(main)
