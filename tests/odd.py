"""A causal language model that does what real ones do rarely and a hook has to survive: for tests.

It changes activations in place, returns the tensor that it was given, returns one tensor twice, hands on views of a
buffer that it overwrites later, calls one module several times, and passes nested tuples and mappings, named arguments,
tensors without rows, tensors of flattened rows, and tensors that are longer than the prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

WIDTH = 12
KERNEL = 3


class OddConfig(PretrainedConfig):
    """Its configuration."""

    model_type = "odd"
    vocab_size = 61
    num_hidden_layers = 2
    initializer_range = 0.3


class Same(nn.Module):
    """Returns what it is given."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class Twice(nn.Module):
    """Returns one tensor in two places, and a view of it."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return hidden, {"again": hidden, "views": [hidden.transpose(1, 2), hidden[..., :2]]}


class Flat(nn.Module):
    """Works on rows and tokens in one dimension, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(tokens), tokens.argmax(-1)


class Layer(nn.Module):
    """A causal convolution and a mean over the past, with everything in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.conv = nn.Conv1d(WIDTH, WIDTH, KERNEL, padding=KERNEL - 1)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.act = nn.ReLU(inplace=True)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.flat = Flat()
        self.twice = Twice()

    def forward(self, hidden: Tensor, *, context: dict[str, Any], mask: Tensor) -> tuple[Tensor, Tensor]:
        length = hidden.shape[1]
        normed = self.dropout(self.norm(hidden))
        past = (mask / mask.sum(-1, keepdim=True)) @ normed
        hidden += self.conv(normed.transpose(1, 2))[..., :length].transpose(1, 2)
        hidden.add_(past)
        inner = self.act(self.up(hidden))
        hidden += self.down(inner.clamp_(max=3.0)) * context["scales"][0]
        tokens, _ = self.flat(hidden.flatten(0, 1))
        hidden += 0.3 * tokens.view_as(hidden)
        hidden, more = self.twice(hidden)
        more["views"][1].mul_(0.9)
        context["shared"] += 0.1
        return hidden, more["again"]


class OddForCausalLM(PreTrainedModel):
    """The model."""

    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, WIDTH)
        self.positions = nn.Embedding(64, WIDTH)
        self.same = Same()
        self.other = Same()
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Layer() for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        batch, length = input_ids.shape
        places = torch.arange(length)
        hidden = self.embed(input_ids) + self.positions(places[None])
        same = self.same(hidden)
        same += 1  # `hidden` too: they are one tensor
        hidden = self.other(hidden * 0.5 + same)
        mask = torch.ones(length, length).tril()[None]
        context = {"scales": (torch.full((1,), 0.7), torch.ones(batch)), "shared": torch.zeros(batch, 1)}
        for layer in self.blocks:
            hidden = self.shared(hidden)
            hidden, again = layer(hidden, context=context, mask=mask)
            hidden = hidden + 0.5 * again + context["shared"][..., None]
        return CausalLMOutput(logits=self.lm_head(self.norm(hidden)))


AutoConfig.register("odd", OddConfig)
AutoModelForCausalLM.register(OddConfig, OddForCausalLM)
