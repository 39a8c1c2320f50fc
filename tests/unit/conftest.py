"""What the unit tests share: the catalogue of a model with two layers that nobody has to load."""

from __future__ import annotations

import pytest
import torch

from patchwire.sites import INPUT, OUTPUT, Axis, Catalogue, Dim, Leaf, Module, Name, Parameter, Path

BATCH, SEQ, WIDTH, IDS = Dim(Axis.BATCH), Dim(Axis.SEQ), Dim(Axis.CONSTANT, 8), Dim(Axis.CONSTANT, 50)
HIDDEN = (BATCH, SEQ, WIDTH)
FIRST: Path = ("args", 0)


@pytest.fixture
def catalogue() -> Catalogue:
    """A small transformer: `body.blocks.<i>.attn` returns a tuple, `body.spare` is never called."""
    order = iter((position,) for position in range(100))
    modules: dict[str, Module] = {}

    def add(path: str, kind: str, *outputs: Path, parameters: tuple[Parameter, ...] = (), shape=HIDDEN) -> None:
        entered, left = next(order), next(order)
        leaves = [Leaf(path, INPUT, FIRST, HIDDEN, torch.float32, entered)]
        leaves += [Leaf(path, OUTPUT, each, shape, torch.float32, left) for each in outputs]
        modules[path] = Module(path, kind, parameters, tuple(leaves), calls=1)

    ids = Leaf("", INPUT, ("kwargs", "input_ids"), (BATCH, SEQ), torch.int64, next(order))
    modules[""] = Module("", "TinyLM", calls=1)
    modules["body"] = Module("body", "Body", calls=1)
    add("body.embed", "Embedding", (), parameters=(Parameter("weight", (50, 8), torch.float32),))
    modules["body.blocks"] = Module("body.blocks", "ModuleList")
    for layer in range(2):
        add(f"body.blocks.{layer}", "Block", ())
        add(f"body.blocks.{layer}.attn", "Attention", (0,), (1,))
        add(f"body.blocks.{layer}.mlp", "MLP", ())
    add("body.norm", "LayerNorm", (), parameters=(Parameter("weight", (8,), torch.float32),))
    modules["body.spare"] = Module("body.spare", "Linear")
    add("head", "Linear", (), shape=(BATCH, SEQ, IDS), parameters=(Parameter("weight", (50, 8), torch.float32),))
    logits = Leaf("", OUTPUT, ("logits",), (BATCH, SEQ, IDS), torch.float32, next(order))
    modules[""] = Module("", "TinyLM", leaves=(ids, logits), calls=1)
    names = [
        Name("embed", "body.embed"),
        *(
            name
            for layer in range(2)
            for name in (
                Name(f"layers.{layer}", f"body.blocks.{layer}"),
                Name(f"layers.{layer}.mixer", f"body.blocks.{layer}.attn", role="attention"),
                Name(f"layers.{layer}.attn", f"body.blocks.{layer}.attn", role="attention"),
                Name(f"layers.{layer}.mlp", f"body.blocks.{layer}.mlp", role="mlp"),
            )
        ),
        Name("norm", "body.norm"),
        Name("lm_head", "head"),
        Name("logits", "", value=logits),
    ]
    return Catalogue("tiny", modules, {name.name: name for name in names})
