"""Which states carry an answer? Activation patching, both ways, and what gradients say of it.

Zhang and Nanda (2024), "Towards Best Practices of Activation Patching in Language Models: Metrics and Methods"; Nanda
(2023) and Syed, Rager and Conmy (2024) on attribution patching; Hanna, Pezzelle and Belinkov (2024) on gradients
between the two runs.

    python docs/examples/activation_patching.py
    python docs/examples/activation_patching.py --model zoo:facts-mamba --at ssm.gate_act
    python docs/examples/activation_patching.py --server gpu-box:50051 --model gpt2-medium \\
        --clean "The Eiffel Tower is in the city of" --corrupt "The Brandenburg Gate is in the city of" \\
        --answer " Paris" --foil " Berlin"

Two prompts of as many tokens have different answers. Write a state of one run into the other: denoising asks which
states are enough for the clean answer, noising which of them it needs.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import typer
from rich import print

import patchwire
from patchwire.methods import (
    Agreement,
    Blocks,
    Result,
    activation_patching,
    agreement,
    attribution_patching,
    integrated_gradients,
    side_by_side,
)


def experiment(model: patchwire.Model, clean: str, corrupt: str, answer: str, foil: str) -> dict[str, Result]:
    """Patch the residual stream at each layer and token, in both directions, with both metrics.

    With a foil the metric is the difference of two logits, and else a probability, which hardly moves before the answer
    is ahead of all others. `normalised()` is 0 without a patch, and 1 where the patch does all that lies between the
    two runs.
    """
    found = {}
    for metric, direction in product(("P", "LD"), ("denoising", "noising")):
        other = foil if metric == "LD" else None
        patched = activation_patching(model, clean, corrupt, answer=answer, foil=other, direction=direction)
        found[f"{direction}, {metric}"] = patched.normalised()
    return found


def components(
    model: patchwire.Model, clean: str, corrupt: str, answer: str, foil: str, at: str
) -> tuple[dict[str, Result], list[Agreement]]:
    """Patch parts of a site, in all tokens at once: heads, or blocks of channels; then estimate the same by gradients.

    The exact effects take a row for each part and layer. Each estimate takes two passes, however many there are.
    """
    over = {"head": None, "layer": None} if at.startswith("attn.") else {"channel": Blocks(32), "layer": None}
    exact, *estimates = (
        method(model, clean, corrupt, answer=answer, foil=foil, at=at, over=over)
        for method in (activation_patching, attribution_patching, integrated_gradients)
    )
    agreements = [agreement(each, exact) for each in estimates]
    names = [f"{at}, exact", "attribution", "integrated"]
    return {name: each.normalised() for name, each in zip(names, [exact, *estimates], strict=True)}, agreements


def main(
    server: str | None = None,
    model: str = "zoo:facts-gpt2",
    clean: str = "Ada Barlow lives in the city of",
    corrupt: str = "Hugo Crane lives in the city of",
    answer: str = " Lisbon",
    foil: str = " Quito",
    at: str | None = None,
    out: Path = Path("activation-patching.png"),
) -> None:
    """Patch a pair of prompts, then the parts of --at: the heads of "attn.z", or channels of a Mamba's "ssm.scan"."""
    proxy = patchwire.connect(server).model(model) if server else patchwire.local(model)
    found = experiment(proxy, clean, corrupt, answer, foil)

    # Both directions and both metrics find two sites in facts-gpt2: the subject's last token early, and the last token
    # late. They differ in the first name. Alone it moves the logits a third of the way, which the probability hardly
    # sees; but nothing is lost without it, as the last name has read it by then.
    for name, each in found.items():
        print(f"[bold]{name}[/]")
        print(each.table())

    # Which parts of the mixers bring it there? Mind the signs: where `agreement` says that an estimate has some wrong,
    # it calls what works for the answer something that works against it. Look at several pairs, and at their mean.
    parts, agreements = components(
        proxy, clean, corrupt, answer, foil, at or ("attn.z" if hasattr(proxy.layers[0], "attn") else "ssm.scan")
    )
    for each in agreements:
        print(each.table())
    found |= parts
    side_by_side(found, title=f"{proxy.name}: “{clean}{answer}”, not “{foil.strip()}”").savefig(out, dpi=85)
    print(f"The figure is in {out}.")


if __name__ == "__main__":
    typer.run(main)
