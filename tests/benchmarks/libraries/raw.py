"""Plain PyTorch hooks on the Hugging Face model: what everything else is compared with.

Batched by hand wherever that is faster, and computing as little as hooks can: no logits, or the last token's, and no
gradients of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tasks import KEPT, MATMUL_REPEATS, MATMUL_ROWS, NEW_TOKENS, REQUESTS, ROWS, Inputs, Result
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

Hook = Callable[[Tensor], Tensor | None]
"""Takes a value, edits it in place or returns another."""


class Library:
    """See `tasks.Library`."""

    packages = ("torch", "transformers")

    def __init__(self, directory: Path, inputs: Inputs) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
        self.inputs = inputs
        decoder = self.model.base_model
        self.layers: Sequence[nn.Module] = decoder.h if hasattr(decoder, "h") else decoder.layers

    def tasks(self) -> Mapping[str, Callable[[], Result]]:
        return {
            "read": self.read,
            "read_all": self.read_all,
            "sweep": self.sweep,
            "sweep_one_by_one": lambda: self.sweep(rows=1),
            "heads": self.heads,
            "attribution": self.attribution,
            "generation": self.generation,
            "users": self.users_one_by_one,  # there is nobody to bring them together
            "users_one_by_one": self.users_one_by_one,
            "matmul": self.matmul,
        }

    def close(self) -> None:
        pass

    def read(self) -> Tensor:
        return self.states(self.inputs.short, self.layers[-1:])[0]

    def read_all(self) -> list[Tensor]:
        return self.states(self.inputs.long, self.layers)

    def sweep(self, rows: int = ROWS) -> Tensor:
        states = self.states(self.inputs.clean, self.layers)
        cells = [(layer, token) for layer in range(len(states)) for token in range(self.inputs.clean.shape[1])]

        def patch(value: Tensor, row: int, layer: int, token: int) -> None:
            value[row, token] = states[layer][0, token]

        return self.patched(cells, patch, outputs, self.layers, rows)

    def heads(self) -> Tensor:
        config = self.model.config
        projections = [layer.self_attn.o_proj for layer in self.layers]
        values: list[Tensor] = []
        with hooked([inputs(each, lambda value: values.append(value.clone())) for each in projections]):
            self.model.base_model(self.inputs.clean, use_cache=False)
        cells = [(layer, head) for layer in range(len(projections)) for head in range(config.num_attention_heads)]

        def patch(value: Tensor, row: int, layer: int, head: int) -> None:
            its = slice(head * config.head_dim, (head + 1) * config.head_dim)
            value[row, :, its] = values[layer][0, :, its]

        return self.patched(cells, patch, inputs, projections, ROWS)

    def attribution(self) -> Tensor:
        clean = torch.stack(self.states(self.inputs.clean, self.layers))
        states: list[Tensor] = []

        def follow(value: Tensor) -> Tensor:
            states.append(value if states else value.detach().requires_grad_())
            return states[-1]

        with hooked([outputs(each, follow) for each in self.layers]):
            logits = self.last_logits(self.inputs.corrupt)[0]
        right, wrong = self.inputs.answers
        gradients = torch.autograd.grad(logits[right] - logits[wrong], states)
        return ((clean - torch.stack(states).detach()) * torch.stack(gradients)).sum(-1)[:, 0]

    def generation(self) -> Tensor:
        with hooked([outputs(self.layers[self.inputs.steered_layer], lambda value: value + self.inputs.steering)]):
            return self.model.generate(self.inputs.prompt, max_new_tokens=NEW_TOKENS, do_sample=False)

    def users_one_by_one(self) -> list[Tensor]:
        found = []
        for request in self.inputs.requests * REQUESTS:

            def ablate(value: Tensor) -> None:
                value[:, -1] = 0

            with hooked([outputs(self.layers[request.layer].self_attn, ablate)]):
                found.append(self.last_logits(request.ids))
        return found

    def matmul(self) -> Tensor:
        mlp = self.layers[0].mlp
        tokens = torch.ones(MATMUL_ROWS, self.model.config.hidden_size)
        for _ in range(MATMUL_REPEATS):
            neurons = mlp.gate_proj(tokens)
            mlp.up_proj(tokens)
            mlp.down_proj(neurons)
        return neurons

    def states(self, ids: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
        """What layers return."""
        found: list[Tensor] = []
        with hooked([outputs(each, lambda value: found.append(value.clone())) for each in layers]):
            self.model.base_model(ids, use_cache=False)
        return found

    def last_logits(self, ids: Tensor) -> Tensor:
        """`[rows, vocabulary]`."""
        return self.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]

    def patched(
        self,
        cells: Sequence[tuple[int, int]],
        patch: Callable[[Tensor, int, int, int], None],
        place: Callable[[nn.Module, Hook], Any],
        modules: Sequence[nn.Module],
        rows: int,
    ) -> Tensor:
        """The logits of the corrupt run with each cell patched in turn, so many of them in a batch."""
        found = []
        for start in range(0, len(cells), rows):
            part = cells[start : start + rows]

            def edit(at: int, part: Sequence[tuple[int, int]] = part) -> Hook:
                def hook(value: Tensor) -> None:
                    for row, (layer, which) in enumerate(part):
                        if layer == at:
                            patch(value, row, layer, which)

                return hook

            with hooked([place(modules[at], edit(at)) for at in {layer for layer, _ in part}]):
                found.append(self.last_logits(self.inputs.corrupt.expand(len(part), -1))[:, :KEPT])
        return torch.cat(found)


def outputs(module: nn.Module, hook: Hook) -> Any:
    """Have a hook see what a module returns, or the first of several things."""

    def see(_: nn.Module, __: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return hook(output)
        replaced = hook(output[0])
        return None if replaced is None else (replaced, *output[1:])

    return module.register_forward_hook(see)


def inputs(module: nn.Module, hook: Hook) -> Any:
    """Have a hook see what a module is given."""
    return module.register_forward_pre_hook(lambda _, args: hook(args[0]))


@contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    """Remove the hooks afterwards."""
    try:
        yield
    finally:
        for each in handles:
            each.remove()
