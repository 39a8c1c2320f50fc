"""nnsight, in the process of its user.

What batches invokes is `TransformersModel`, given the loaded model: `NNsight` refuses several invokes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import nnsight
import torch
from tasks import KEPT, NEW_TOKENS, ROWS, Inputs, Result
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


class Library:
    """See `tasks.Library`."""

    packages = ("nnsight", "torch", "transformers")

    def __init__(self, directory: Path, inputs: Inputs) -> None:
        module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = nnsight.TransformersModel(module, tokenizer=tokenizer, task="text-generation")
        self.heads_of_a_layer = module.config.num_attention_heads
        self.head_dim = module.config.hidden_size // module.config.num_attention_heads
        self.layers = module.config.num_hidden_layers
        self.inputs = inputs

    def tasks(self) -> Mapping[str, Callable[[], Result]]:
        return {
            "read": self.read,
            "read_all": self.read_all,
            "sweep": self.sweep,
            "sweep_one_by_one": self.sweep_one_by_one,
            "heads": self.heads,
            "attribution": self.attribution,
            "generation": self.generation,
        }

    def close(self) -> None:
        pass

    def read(self) -> Tensor:
        with self.model.trace(self.inputs.short, use_cache=False) as tracer:
            hidden = self.model.transformer.h[-1].output.save()
            tracer.stop()
        return hidden

    def read_all(self) -> list[Tensor]:
        with self.model.trace(self.inputs.long, use_cache=False) as tracer:
            states = [].save()
            for layer in self.model.transformer.h:
                states.append(layer.output)
            tracer.stop()
        return states

    def states(self, ids: Tensor) -> list[Tensor]:
        with self.model.trace(ids, use_cache=False) as tracer:
            states = [].save()
            for layer in self.model.model.layers:
                states.append(layer.output.clone())
            tracer.stop()
        return states

    def cells(self, across: int) -> list[tuple[int, int]]:
        return [(layer, which) for layer in range(self.layers) for which in range(across)]

    def sweep(self) -> Tensor:
        model, corrupt = self.model, self.inputs.corrupt
        states = self.states(self.inputs.clean)
        cells = self.cells(corrupt.shape[1])
        found = []
        for start in range(0, len(cells), ROWS):
            with model.trace(use_cache=False, logits_to_keep=1) as tracer:
                logits = [].save()
                for layer, token in cells[start : start + ROWS]:
                    with tracer.invoke(corrupt):
                        model.model.layers[layer].output[:, token] = states[layer][:, token]
                        logits.append(model.lm_head.output[:, -1, :KEPT])
            found += logits
        return torch.cat(found)

    def sweep_one_by_one(self) -> Tensor:
        model, corrupt = self.model, self.inputs.corrupt
        states = self.states(self.inputs.clean)
        found = []
        for layer, token in self.cells(corrupt.shape[1]):
            with model.trace(corrupt, use_cache=False, logits_to_keep=1):
                model.model.layers[layer].output[:, token] = states[layer][:, token]
                logits = model.lm_head.output[:, -1, :KEPT].save()
            found.append(logits)
        return torch.cat(found)

    def heads(self) -> Tensor:
        model, corrupt, width = self.model, self.inputs.corrupt, self.head_dim
        with model.trace(self.inputs.clean, use_cache=False) as tracer:
            values = [].save()
            for layer in model.model.layers:
                values.append(layer.self_attn.o_proj.input.clone())
            tracer.stop()
        cells = self.cells(self.heads_of_a_layer)
        found = []
        for start in range(0, len(cells), ROWS):
            with model.trace(use_cache=False, logits_to_keep=1) as tracer:
                logits = [].save()
                for layer, head in cells[start : start + ROWS]:
                    with tracer.invoke(corrupt):
                        its = slice(head * width, (head + 1) * width)
                        model.model.layers[layer].self_attn.o_proj.input[:, :, its] = values[layer][:, :, its]
                        logits.append(model.lm_head.output[:, -1, :KEPT])
            found += logits
        return torch.cat(found)

    def attribution(self) -> Tensor:
        model = self.model
        right, wrong = self.inputs.answers
        clean = self.states(self.inputs.clean)
        with model.trace(self.inputs.corrupt, use_cache=False, logits_to_keep=1):
            states, gradients = [].save(), [].save()
            for layer in model.model.layers:
                if not states:
                    layer.output.requires_grad_()
                states.append(layer.output)
            logits = model.lm_head.output[0, -1]
            metric = logits[right] - logits[wrong]
            with metric.backward():
                for state in reversed(states):
                    gradients.append(state.grad)
        found = zip(clean, states, reversed(gradients), strict=True)
        return torch.cat([((one - other.detach()) * gradient).sum(-1) for one, other, gradient in found])

    def generation(self) -> Tensor:
        model, steering = self.model, self.inputs.steering
        with model.generate(self.inputs.prompt, max_new_tokens=NEW_TOKENS, do_sample=False) as tracer:
            for _ in tracer.iter[:NEW_TOKENS]:
                model.model.layers[self.inputs.steered_layer].output[:] += steering
            tokens = tracer.result.save()
        return tokens
