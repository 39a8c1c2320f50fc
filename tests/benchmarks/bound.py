"""How fast a sweep could be at best: what it has to compute, at the rate at which this machine multiplies matrices.

Counted are the products with weights, two operations for each weight and token; attention's own and everything
elementwise are a few percent of that at these lengths, and are left out, which makes the bound lower. Every run shares
what comes before its patch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tasks import MATMUL_REPEATS, MATMUL_ROWS

SWEEPS = ("sweep", "heads")
"""The tasks that are sweeps."""


@dataclass(frozen=True)
class Weights:
    """How many weights a token meets in a Llama."""

    layers: int
    heads: int
    mlp: int
    """In the MLP of one layer."""
    after_heads: int
    """In one layer, after what the heads give: the output projection and the MLP."""
    layer: int
    """In one layer."""
    head: int
    """In the unembedding, which only the last token meets."""

    @classmethod
    def of(cls, checkpoint: Path) -> Weights:
        """Of a checkpoint's directory."""
        config = json.loads((checkpoint / "config.json").read_text())
        width, heads = config["hidden_size"], config["num_attention_heads"]
        queries = heads * config["head_dim"]
        keys = config["num_key_value_heads"] * config["head_dim"]
        mlp = 3 * width * config["intermediate_size"]
        return cls(
            layers=config["num_hidden_layers"],
            heads=heads,
            mlp=mlp,
            after_heads=queries * width + mlp,
            layer=width * (queries + 2 * keys) + queries * width + mlp,
            head=width * config["vocab_size"],
        )


def needed(task: str, weights: Weights, tokens: int) -> float:
    """The operations of a sweep: one clean run, one corrupt run, and of each patched run what follows its patch.

    Args:
        task: One of `SWEEPS`.
        tokens: How long the prompts are.
    """
    each, within = (weights.heads, weights.after_heads) if task == "heads" else (tokens, 0)
    following = sum(within + weights.layer * (weights.layers - 1 - layer) for layer in range(weights.layers))
    patched = each * (following * tokens + weights.layers * weights.head)
    shared = 2 * weights.layers * weights.layer * tokens
    return 2.0 * (shared + patched)


def of_matmul(weights: Weights) -> float:
    """The operations of what plain hooks call `MATMUL`."""
    return 2.0 * weights.mlp * MATMUL_ROWS * MATMUL_REPEATS
