"""TransformerLens: `TransformerBridge` over the Hugging Face model, weights as they are, batched by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tasks import KEPT, NEW_TOKENS, ROWS, Inputs, Result
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

Patch = Callable[[Tensor, int, int, int], None]


class Library:
    """See `tasks.Library`."""

    packages = ("transformer-lens", "torch", "transformers")

    def __init__(self, directory: Path, inputs: Inputs) -> None:
        self.model = TransformerBridge.boot_transformers(str(directory), device="cpu", dtype=torch.float32)
        self.model.eval()
        self.model.requires_grad_(False)
        self.layers: int = self.model.cfg.n_layers
        self.inputs = inputs

    def tasks(self) -> Mapping[str, Callable[[], Result]]:
        return {
            "read": self.read,
            "read_all": self.read_all,
            "sweep": self.sweep,
            "sweep_one_by_one": lambda: self.sweep(rows=1),
            "heads": self.heads,
            "attribution": self.attribution,
            "generation": self.generation,
        }

    def close(self) -> None:
        pass

    def cache(self, ids: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Values at hook points."""
        _, cache = self.model.run_with_cache(ids, names_filter=list(names), use_cache=False, stop_at_layer=self.layers)
        return [cache[name] for name in names]

    def residual(self, layer: int) -> str:
        return f"blocks.{layer}.hook_resid_post"

    def read(self) -> Tensor:
        return self.cache(self.inputs.short, [self.residual(self.layers - 1)])[0]

    def read_all(self) -> list[Tensor]:
        return self.cache(self.inputs.long, [self.residual(layer) for layer in range(self.layers)])

    def sweep(self, rows: int = ROWS) -> Tensor:
        names = [self.residual(layer) for layer in range(self.layers)]
        states = self.cache(self.inputs.clean, names)

        def patch(value: Tensor, row: int, layer: int, token: int) -> None:
            value[row, token] = states[layer][0, token]

        return self.patched(names, self.inputs.clean.shape[1], patch, rows)

    def heads(self) -> Tensor:
        names = [f"blocks.{layer}.attn.hook_z" for layer in range(self.layers)]
        values = self.cache(self.inputs.clean, names)

        def patch(value: Tensor, row: int, layer: int, head: int) -> None:
            value[row, :, head] = values[layer][0, :, head]

        return self.patched(names, self.model.cfg.n_heads, patch, ROWS)

    def patched(self, names: Sequence[str], across: int, patch: Patch, rows: int) -> Tensor:
        """The logits of the corrupt run with each cell patched in turn, so many of them in a batch."""
        cells = [(layer, which) for layer in range(self.layers) for which in range(across)]
        found = []
        for start in range(0, len(cells), rows):
            part = cells[start : start + rows]

            def edit(at: int, part: Sequence[tuple[int, int]] = part) -> Any:
                def hook(value: Tensor, hook: Any) -> Tensor:
                    for row, (layer, which) in enumerate(part):
                        if layer == at:
                            patch(value, row, layer, which)
                    return value

                return hook

            hooks = [(names[at], edit(at)) for at in sorted({layer for layer, _ in part})]
            ids = self.inputs.corrupt.expand(len(part), -1)
            logits = self.model.run_with_hooks(ids, fwd_hooks=hooks, use_cache=False, logits_to_keep=1)
            found.append(logits[:, -1, :KEPT])
        return torch.cat(found)

    def attribution(self) -> Tensor:
        names = [self.residual(layer) for layer in range(self.layers)]
        clean = self.cache(self.inputs.clean, names)
        states: list[Tensor] = []

        def follow(value: Tensor, hook: Any) -> Tensor:
            states.append(value if states else value.detach().requires_grad_())
            return states[-1]

        hooks = [(name, follow) for name in names]
        logits = self.model.run_with_hooks(self.inputs.corrupt, fwd_hooks=hooks, use_cache=False, logits_to_keep=1)
        right, wrong = self.inputs.answers
        gradients = torch.autograd.grad(logits[0, -1, right] - logits[0, -1, wrong], states)
        found = zip(clean, states, gradients, strict=True)
        return torch.cat([((one - other.detach()) * gradient).sum(-1) for one, other, gradient in found])

    def generation(self) -> Tensor:
        def steer(value: Tensor, hook: Any) -> Tensor:
            return value + self.inputs.steering

        with self.model.hooks(fwd_hooks=[(self.residual(self.inputs.steered_layer), steer)]):
            return self.model.generate(
                self.inputs.prompt, max_new_tokens=NEW_TOKENS, do_sample=False, return_type="tokens", verbose=False
            )
