"""The two checkpoints, as directories that every library can load: float32 weights in safetensors.

A GPT-2 of 124 M parameters with random weights, and SmolLM2-135M, made from the file that `patchwire demo` uses.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from tasks import GPT2, SMOLLM2
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from patchwire import demo

_HOME = Path(__file__).resolve().parents[2] / "build" / "benchmark-checkpoints"


def directory() -> Path:
    """Where they are, below `build/` or where `CHECKPOINTS` in the environment says; made if they are not there."""
    root = Path(os.environ.get("CHECKPOINTS") or _HOME)
    for name, write in {GPT2: _gpt2, SMOLLM2: _smollm2}.items():
        if not (root / name).exists():
            unfinished = root / f"{name}.unfinished"
            unfinished.mkdir(parents=True, exist_ok=True)
            write(unfinished)
            unfinished.rename(root / name)
    return root


def _gpt2(directory: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(directory)


def _smollm2(directory: Path) -> None:
    file = demo.weights()
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # What was read from a quantized file counts as quantized and cannot be saved; the same weights in a new model can.
    config = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = type(read)(type(read.config)(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)
