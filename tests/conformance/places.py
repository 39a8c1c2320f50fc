"""The same places through Patchwire's public API, and what a person who knows an architecture calls its parts."""

from __future__ import annotations

from typing import Any

import patchwire
from conformance.hooks import Place
from patchwire.sites import Leaf

PARTS: dict[str, dict[str, str]] = {
    # What `embed`, `layers[i]`, its `mixer` and `mlp`, `norm` and `lm_head` are, by the source of each architecture.
    "gpt2": {
        "embed": "transformer.wte",
        "layer": "transformer.h.{}",
        "mixer": "transformer.h.{}.attn",
        "mlp": "transformer.h.{}.mlp",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
    },
    "llama": {
        "embed": "model.embed_tokens",
        "layer": "model.layers.{}",
        "mixer": "model.layers.{}.self_attn",
        "mlp": "model.layers.{}.mlp",
        "norm": "model.norm",
        "lm_head": "lm_head",
    },
    "gpt_neox": {
        "embed": "gpt_neox.embed_in",
        "layer": "gpt_neox.layers.{}",
        "mixer": "gpt_neox.layers.{}.attention",
        "mlp": "gpt_neox.layers.{}.mlp",
        "norm": "gpt_neox.final_layer_norm",
        "lm_head": "lm_head",
    },
    "mamba": {
        "embed": "backbone.embeddings",
        "layer": "backbone.layers.{}",
        "mixer": "backbone.layers.{}.mixer",
        "norm": "backbone.norm_f",
        "lm_head": "lm_head",
    },
    "mamba2": {
        "embed": "backbone.embeddings",
        "layer": "backbone.layers.{}",
        "mixer": "backbone.layers.{}.mixer",
        "norm": "backbone.norm_f",
        "lm_head": "lm_head",
    },
    "odd": {"embed": "embed", "layer": "blocks.{}", "norm": "norm", "lm_head": "lm_head"},
}


def read(model: patchwire.Model, place: Place) -> Any:
    """The value at a place, inside a block."""
    path, side, steps = place
    module = model.module(path)
    if side == "input":
        value = module.inputs[("args", "kwargs").index(steps[0])]
        steps = steps[1:]
    else:
        value = module.output
    for step in steps:
        value = value[step]
    return value


def write(model: patchwire.Model, place: Place, value: Any) -> None:
    """Assign the value at a place, inside a block."""
    path, side, steps = place
    if not steps:
        model.module(path).output = value
    else:
        outer: Any = model.module(path).inputs if side == "input" else model.module(path).output
        steps = (("args", "kwargs").index(steps[0]), *steps[1:]) if side == "input" else steps
        for step in steps[:-1]:
            outer = outer[step]
        outer[steps[-1]] = value


def every_place(model: patchwire.Model) -> list[Place]:
    """Every tensor that the catalogue knows and an address can name, in the order of a forward pass."""
    leaves = [leaf for module in model.catalogue.modules.values() if module.calls == 1 for leaf in module.leaves]
    return [(leaf.module, leaf.side, leaf.path) for leaf in sorted(leaves, key=lambda leaf: leaf.order)]


def leaf_of(model: patchwire.Model, place: Place) -> Leaf:
    """What the catalogue says of a place."""
    path, side, steps = place
    return next(leaf for leaf in model.catalogue.modules[path].side(side) if leaf.path == steps)
