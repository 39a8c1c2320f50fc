"""Train `zoo:superposition`: toy models that keep more features than they have dimensions, if features are sparse.

Elhage et al. (2022), "Toy Models of Superposition", https://arxiv.org/abs/2209.10652

Many models are trained at once from different beginnings, and the one with the lowest loss is kept, as the authors
advise: some get stuck.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchwire_worker.zoo import toy
from patchwire_worker.zoo.training import common

RESTARTS = 32
BATCH = 1024


@dataclass(frozen=True)
class Variant:
    """One toy model."""

    features: int
    hidden: int
    density: float
    """How probable it is that a feature is not zero; then it is uniform between 0 and 1."""
    expected: str
    """What becomes of it."""
    importance: float = 1.0
    """How much less an error of a feature counts than one of the feature before."""


VARIANTS = {
    "": Variant(5, 2, 0.05, "a regular pentagon: every feature has dimensionality 2/5, neighbours are 72° apart"),
    "dense": Variant(5, 2, 1.0, "the two that matter most have a dimension each, the others none", 0.9),
    "20-features": Variant(20, 5, 0.3, "ten features share a dimension in antipodal pairs (1/2), and ten have none"),
}
"""By what stands after the `@`."""


def dimensionality(weight: Tensor) -> Tensor:
    """The share of a dimension that each feature has, `[…, features]`: `‖Wᵢ‖² / Σⱼ (Ŵᵢ · Wⱼ)²`.

    Args:
        weight: `[…, hidden, features]`.
    """
    norms: Tensor = torch.linalg.vector_norm(weight, dim=-2)
    overlaps = (weight / norms.clamp_min(1e-9)[..., None, :]).mT @ weight
    return norms.square() / overlaps.square().sum(-1).clamp_min(1e-9)


def sample(variant: Variant, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Features `[*shape, features]`."""
    size = (*shape, variant.features)
    present = torch.rand(size, generator=generator) < variant.density
    return torch.rand(size, generator=generator) * present


def train(variant: Variant, steps: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """W `[hidden, features]`, b `[features]` and the loss of the best of `RESTARTS` models."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(RESTARTS, variant.hidden, variant.features, generator=generator) / variant.features**0.5
    weight.requires_grad_()
    bias = torch.zeros(RESTARTS, variant.features, requires_grad=True)
    importance = variant.importance ** torch.arange(variant.features)
    optimizer = torch.optim.Adam([weight, bias], lr=1e-2)
    log = common.Log()

    def losses(x: Tensor) -> Tensor:
        """The loss of each model, `[RESTARTS]`, on examples `[RESTARTS, batch, features]`."""
        return ((torch.relu(x @ weight.mT @ weight + bias[:, None]) - x) ** 2 @ importance).mean(-1)

    for step in common.paced(optimizer, steps):
        loss = losses(sample(variant, (RESTARTS, BATCH), generator)).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        log(step, loss.item() / RESTARTS)
    with torch.no_grad():
        found = torch.stack([losses(sample(variant, (1, 8 * BATCH), generator)) for _ in range(16)]).mean(0)
        best = int(found.argmin())
        return weight[best].detach(), bias[best].detach(), found[best].item()


def main() -> None:
    options = common.options(__doc__, steps=3000).parse_args()
    common.begin(options)
    toy.register()
    log, rows = common.Log(), []
    for name, variant in VARIANTS.items():
        weight, bias, loss = train(variant, options.steps, options.seed)
        model = toy.ToyModel(toy.ToyConfig(features=variant.features, hidden=variant.hidden))
        with torch.no_grad():
            model.get_parameter("layers.0.weight").copy_(weight)
            model.get_parameter("lm_head.bias").copy_(bias)
        common.write(model, options.out / name, tokenizer=None)
        shares = ", ".join(f"{each:.2f}" for each in dimensionality(weight).sort(descending=True).values.tolist())
        print(f"{name or 'pentagon'}: loss {loss:.5f}, dimensionality {shares}", flush=True)
        rows.append(
            f"| `zoo:superposition{'@' if name else ''}{name}` | {variant.features} in {variant.hidden} "
            f"| {variant.density:g} | {variant.importance:g}ⁱ | {loss:.4f} | {shares} | {variant.expected} |"
        )
    common.write_card(
        options.out,
        "superposition",
        restarts=RESTARTS,
        batch=BATCH,
        rows="\n".join(rows),
        steps=options.steps,
        seed=options.seed,
        seconds=log.seconds,
    )


if __name__ == "__main__":
    main()
