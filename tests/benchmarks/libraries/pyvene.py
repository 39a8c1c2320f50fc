"""pyvene: interventions as configurations.

An intervention is at one layer, and rows may differ in the position that it touches: the runs of one layer share a
batch. Gradients of a metric by what a layer returns are not among the things that it does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyvene
import torch
from tasks import KEPT, NEW_TOKENS, Inputs, Result
from torch import Tensor
from transformers import AutoModelForCausalLM


class Library:
    """See `tasks.Library`."""

    packages = ("pyvene", "torch", "transformers")

    def __init__(self, directory: Path, inputs: Inputs) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
        self.layers: int = self.model.config.num_hidden_layers
        self.inputs = inputs

    def tasks(self) -> Mapping[str, Callable[[], Result]]:
        return {
            "read": self.read,
            "read_all": self.read_all,
            "sweep": self.sweep,
            "sweep_one_by_one": lambda: self.sweep(rows=1),
            "heads": self.heads,
            "generation": self.generation,
        }

    def close(self) -> None:
        pass

    def collected(self, ids: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """What layers return: `[1, tokens, width]` each."""
        return self.collected_units(ids, layers, "block_output", "pos", ids.shape[1])

    def collected_units(
        self, ids: Tensor, layers: Sequence[int], component: str, unit: str, count: int
    ) -> list[Tensor]:
        """All units of a component, of each of these layers."""
        collecting = [
            {
                "layer": layer,
                "component": component,
                "unit": unit,
                "max_number_of_units": count,
                "intervention_type": pyvene.CollectIntervention,
            }
            for layer in layers
        ]
        everywhere = [[list(range(count))]] * len(layers)
        (_, values), _ = self.run(pyvene.IntervenableModel(collecting, self.model), ids, everywhere)
        return values

    def run(self, intervening: Any, ids: Tensor, units: list[list[list[int]]], **options: Any) -> Any:
        """A forward pass with interventions.

        Args:
            units: Of each intervention and row, the positions or heads that it is at.
        """
        base = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
        return intervening(base, unit_locations={"sources->base": (None, units)}, **options)

    def read(self) -> Tensor:
        return self.collected(self.inputs.short, [self.layers - 1])[0]

    def read_all(self) -> list[Tensor]:
        return self.collected(self.inputs.long, range(self.layers))

    def sweep(self, rows: int | None = None) -> Tensor:
        length = self.inputs.clean.shape[1]
        states = self.collected(self.inputs.clean, range(self.layers))
        sources = [state[0, :, None] for state in states]  # [row, unit, width]
        return self.patched("block_output", "pos", sources, rows or length)

    def heads(self) -> Tensor:
        component, count = "head_attention_value_output", self.model.config.num_attention_heads
        values = self.collected_units(self.inputs.clean, range(self.layers), component, "h", count)
        sources = [value[0][:, None] for value in values]  # [row, unit, token, width]
        return self.patched(component, "h", sources, count)

    def patched(self, component: str, unit: str, sources: Sequence[Tensor], rows: int) -> Tensor:
        """The logits of the corrupt run with each unit of each layer patched in turn, so many of a layer in a batch."""
        found = []
        for layer, source in enumerate(sources):
            patching = {
                "layer": layer,
                "component": component,
                "unit": unit,
                "intervention_type": pyvene.VanillaIntervention,
            }
            intervening = pyvene.IntervenableModel([patching], self.model)
            (key,) = intervening.interventions
            for start in range(0, len(source), rows):
                part = source[start : start + rows]
                units = [[[start + row] for row in range(len(part))]]
                ids = self.inputs.corrupt.expand(len(part), -1)
                _, output = self.run(intervening, ids, units, source_representations={key: part})
                found.append(output.logits[:, -1, :KEPT])
        return torch.cat(found)

    def generation(self) -> Tensor:
        steering = {
            "layer": self.inputs.steered_layer,
            "component": "block_output",
            "intervention": lambda base, _: base + self.inputs.steering,
        }
        intervening = pyvene.IntervenableModel([steering], self.model)
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        _, tokens = intervening.generate({"input_ids": self.inputs.prompt}, intervene_on_prompt=True, **options)
        return tokens
