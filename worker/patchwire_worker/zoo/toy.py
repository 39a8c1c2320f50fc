"""The architecture of `zoo:superposition`: `ReLU(Wᵀ W x + b)`, hosted like a language model.

Elhage et al. (2022), "Toy Models of Superposition", https://arxiv.org/abs/2209.10652

A position is one example, independent of all others. Its "embedding" is the vector of features x, which is what a
prompt of embeddings gives; the token i is the feature i alone at full strength. The logits are the reconstruction.

    with model.trace({"inputs_embeds": x}):                    # [batch, seq, features]
        hidden = model.layers[0].output.save()                 # W x: [batch, seq, hidden]
        reconstruction = model.logits.save()                   # [batch, seq, features]
        W = model.layers[0].weight.save()                      # [hidden, features]
        b = model.lm_head.bias.save()                          # [features]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class ToyConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """How many features, in how many dimensions."""

    model_type = "patchwire_toy"

    def __init__(self, features: int = 5, hidden: int = 2, **rest: Any) -> None:
        self.features = features
        self.hidden = hidden
        super().__init__(**rest)


class Unembed(nn.Module):
    """`Wᵀ h + b`, with the weight of the layer before: `[hidden, features]`."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden @ weight + self.bias


class ToyModel(PreTrainedModel):
    """`ReLU(Wᵀ W x + b)`."""

    config_class = ToyConfig
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.features, config.features)
        self.layers = nn.ModuleList([nn.Linear(config.features, config.hidden, bias=False)])
        self.lm_head = Unembed(config.features)
        self.relu = nn.ReLU()
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.embed:
            module.weight.data.copy_(torch.eye(self.config.features))
            module.weight.requires_grad_(False)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **_: Any) -> CausalLMOutput:
        """The reconstruction of features `[batch, seq, features]`, or of tokens `[batch, seq]`, as `logits`."""
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        (compress,) = self.layers
        return CausalLMOutput(logits=self.relu(self.lm_head(compress(x), compress.weight)))


def register() -> None:
    """Have `transformers` know it, as it knows the architectures of its own."""
    AutoConfig.register(ToyConfig.model_type, ToyConfig, exist_ok=True)
    AutoModelForCausalLM.register(ToyConfig, ToyModel, exist_ok=True)
