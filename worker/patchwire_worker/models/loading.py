"""Loading a model: a hub id, a local directory, a `.gguf` file, `zoo:NAME`, or a Hugging Face model that is loaded.

Hugging Face's `transformers` loads it; code that comes with a checkpoint is never run (`trust_remote_code=False`).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchwire.errors import ModelNotFoundError, first_line
from patchwire_worker import zoo
from patchwire_worker.models.products import AUTO, check
from patchwire_worker.zoo import toy

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "auto": "auto",
}

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True)
class Loaded:
    """A model that is in memory."""

    name: str
    module: nn.Module
    tokenizer: Any | None
    matmul: str = AUTO


def load(
    spec: str | nn.Module,
    *,
    name: str | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    tokenizer: Any | None = None,
    attention: str | None = None,
    matmul: str = AUTO,
) -> Loaded:
    """Load a model.

    Args:
        spec: A hub id, a directory, a `.gguf` file, `zoo:NAME`, or a loaded model, which is taken as it is.
        name: What clients call it; the last part of the path or id if left out.
        device: "cpu", "cuda", "cuda:1", "auto" (a GPU if there is one), or "balanced" (spread over all GPUs).
        dtype: "float32", "bfloat16", "float16", "float64", or "auto" (as the checkpoint has it).
        tokenizer: A tokenizer to use instead of the checkpoint's.
        attention: How attention is computed: one of `ATTENTION`. "eager" goes step by step, so that scores and
            probabilities exist; the others hand everything to one kernel, which is faster and rounds differently. What
            transformers prefers for this model if left out.
        matmul: What multiplies float32 matrices on a CPU: "pytorch" does so as everywhere in PyTorch, "onednn" calls
            another of its libraries, which rounds differently, and "auto" whichever is faster on this processor.

    Raises:
        ModelNotFoundError: it cannot be found or loaded; the message says why.
    """
    if attention is not None and attention not in ATTENTION:
        raise ModelNotFoundError(f"`{attention}` is no attention.", hint=f"Write one of {', '.join(ATTENTION)}.")
    check(matmul)
    if isinstance(spec, nn.Module):
        if attention is not None:
            raise ModelNotFoundError(
                "A loaded model computes attention as it was loaded.",
                hint=f'Load it with `attn_implementation="{attention}"`, or give its directory.',
            )
        called = name or getattr(spec, "name_or_path", "") or type(spec).__name__
        spec.eval()
        return Loaded(_name_of(called), spec, tokenizer, matmul)
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted is None:
        raise ModelNotFoundError(f"`{dtype}` is not a dtype.", hint=f"Write one of {', '.join(DTYPES)}.")
    source, options = _source(spec)
    options |= {"trust_remote_code": False}
    chosen = {} if attention is None else {"attn_implementation": attention}
    place = _place(device)
    toy.register()
    try:
        module = AutoModelForCausalLM.from_pretrained(
            source, dtype=wanted, **options, **chosen, **({"device_map": "auto"} if place == "balanced" else {})
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelNotFoundError(
            f"`{spec}` cannot be loaded: {first_line(error)}",
            hint="Give a hub id, a directory with config.json and weights, or a .gguf file.",
        ) from error
    if place != "balanced":
        module = module.to(place)  # type: ignore[arg-type]
    found = tokenizer or _tokenizer(source, options)
    return Loaded(name or _name_of(spec), module.eval(), found, matmul)  # type: ignore[no-untyped-call]


def _source(spec: str) -> tuple[str, dict[str, Any]]:
    if spec.startswith(zoo.PREFIX):
        return str(zoo.path(spec.removeprefix(zoo.PREFIX))), {}
    path = Path(spec).expanduser()
    if spec.endswith(".gguf"):
        if not path.is_file():
            raise ModelNotFoundError(f"There is no file {path}.", hint="Give the path of a .gguf file.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = [each.name for each in path.glob("*.gguf")]
            hint = f"Name the file: `{path / files[0]}`." if files else "A model's directory has a config.json."
            raise ModelNotFoundError(f"There is no model in {path}.", hint=hint)
        return str(path), {}
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise ModelNotFoundError(f"There is no directory {path}.", hint="Give a hub id or a directory that is there.")
    return spec, {}


def _place(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelNotFoundError("There is no CUDA device here.", hint="`patchwire doctor` shows what there is.")
    return device


def _name_of(spec: str) -> str:
    spec = spec.removeprefix(zoo.PREFIX)
    name = (
        os.path.basename(spec.rstrip("/")).removesuffix(".gguf") if os.sep in spec or spec.endswith(".gguf") else spec
    )
    return re.sub(r"[^\w.\-/]", "-", name) or "model"


def _tokenizer(source: str, options: dict[str, Any]) -> Any | None:
    """The checkpoint's tokenizer; None if it has none, so that only token ids can be given."""
    local = os.path.isdir(source)
    if local and "gguf_file" not in options and not _has_tokenizer(Path(source)):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if local:
            raise ModelNotFoundError(
                f"The tokenizer in {source} cannot be loaded: {first_line(error)}",
                hint="Save it there again with `tokenizer.save_pretrained`, or remove its files.",
            ) from error
        return None


def _has_tokenizer(directory: Path) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    return any((directory / name).is_file() for name in names)
