"""What the training scripts share: their options, the pace of learning, and what is written in the end."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

_CARDS = Path(__file__).with_name("cards")
_LOG_SECONDS = 15.0
_WARM_UP = 100


def options(doc: str | None, *, steps: int) -> argparse.ArgumentParser:
    """The options that every script has.

    Args:
        doc: What the script does.
        steps: How many steps it takes if it is not told.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the checkpoint is written")
    parser.add_argument("--steps", type=int, default=steps, help=f"optimiser steps ({steps})")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (0)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (1)")
    return parser


def begin(options: argparse.Namespace) -> None:
    """Seed PyTorch, and take as many threads as was said."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)


def adamw(model: nn.Module, *, rate: float, decay: float) -> torch.optim.AdamW:
    """AdamW, which decays matrices and leaves norms and biases alone."""
    learnt = [each for each in model.parameters() if each.requires_grad]
    groups = [
        {"params": [each for each in learnt if each.ndim >= 2], "weight_decay": decay},
        {"params": [each for each in learnt if each.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step down a loss, by gradients of norm 1 at most."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def paced(optimizer: torch.optim.Optimizer, steps: int) -> Iterator[int]:
    """Count steps, while the rate rises over the first hundred and falls along half a cosine to a twentieth."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        pace = min(1.0, (step + 1) / _WARM_UP) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * pace
        yield step


class Log:
    """Prints now and then how training goes.

    Attributes:
        seconds: Since it was made.
    """

    def __init__(self) -> None:
        self._began = self._told = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def __call__(self, step: int, loss: float) -> None:
        """Tell a loss, unless that was done a moment ago."""
        if time.monotonic() - self._told >= _LOG_SECONDS:
            self._told = time.monotonic()
            print(f"step {step}  loss {loss:.4f}  {self.seconds:.0f} s", flush=True)


def word_tokenizer(words: Iterable[str], unknown: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are words between spaces, numbered in their order."""
    table = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown)  # type: ignore[no-untyped-call]


def write(
    model: PreTrainedModel, out: Path, *, dtype: torch.dtype = torch.float32, tokenizer: PreTrainedTokenizerFast | None
) -> PreTrainedModel:
    """Write a checkpoint and give back what anybody gets who loads it, in float32."""
    out.mkdir(parents=True, exist_ok=True)
    copy = deepcopy(model)
    nn.Module.to(copy, dtype).save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    (out / "model.safetensors").chmod(0o644)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    loaded.train(False)
    return loaded


def write_card(out: Path, template: str, **values: Any) -> None:
    """Fill in a card of `cards/`, and put it beside the checkpoint."""
    (out / "CARD.md").write_text((_CARDS / f"{template}.md").read_text().format(**values))
