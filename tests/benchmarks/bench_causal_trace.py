"""Causal tracing of facts and of indirect objects: `methods.causal_trace`, against a forward pass with plain hooks for
each cell, as the published code does it.

SmolLM2-135M in a server process, the same weights in this one. Every number is compared. `FACTS` in the environment:
how many of the prompts (1); `NOISE`: how many of these again with the paper's noise of ten samples (0).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import checkpoints
from libraries.patchwire import Library
from measuring import report
from tasks import SMOLLM2, make_inputs

from patchwire import methods

PROMPTS = [
    ("The capital of France is the city of", "France", "The capital of Italy is the city of", " Paris"),
    ("The capital of Japan is the city of", "Japan", "The capital of China is the city of", " Tokyo"),
    ("The capital of Germany is the city of", "Germany", "The capital of Russia is the city of", " Berlin"),
    ("The capital of England is the city of", "England", "The capital of Spain is the city of", " London"),
    ("The capital of Egypt is the city of", "Egypt", "The capital of India is the city of", " Cairo"),
    ("People in Brazil speak the language of", "Brazil", "People in Mexico speak the language of", " Portuguese"),
    ("The opposite of hot is", "hot", "The opposite of big is", " cold"),
    ("The Earth moves around the", "Earth", "The Moon moves around the", " Sun"),
    ("The color of grass is usually", "grass", "The color of snow is usually", " green"),
    ("A baby dog is called a", "dog", "A baby cat is called a", " puppy"),
    ("When Mary and John went to the store, John gave a drink to", (9, 10),
     "When Mary and John went to the store, Mary gave a drink to", " Mary"),
    ("When Tom and James went to the park, James gave a ball to", (9, 10),
     "When Tom and James went to the park, Tom gave a ball to", " Tom"),
]  # fmt: skip
"""A prompt, its subject (words, or from which token to which), the same with another, and the answer: ten facts, and
two sentences with an indirect object (Wang et al. 2022), whose second subject is replaced."""
COUNT = int(os.environ.get("FACTS") or 1)
NOISE = int(os.environ.get("NOISE") or 0)
NOISE_SEED, NOISE_STD = 1, 0.3

Change = Callable[[Tensor], None]


class Hooks:
    """The Hugging Face model, changed by plain hooks."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.layers = list(model.model.layers)

    def probability(self, rows: list[list[int]], answer: int, changes: dict[Any, Change]) -> float:
        """The answer's probability, the mean over rows."""

        def hook(module: Any, args: Any, output: Any) -> Any:
            changes[module](output[0] if isinstance(output, tuple) else output)

        handles = [module.register_forward_hook(hook) for module in changes]
        with torch.no_grad():
            logits = self._model(torch.tensor(rows), use_cache=False).logits[:, -1]
        for handle in handles:
            handle.remove()
        return float(logits.softmax(-1)[:, answer].mean())

    def trace(self, clean: list[int], rows: list[list[int]], answer: int, corrupt: dict[Any, Change]) -> Tensor:
        """Every state of the clean run in the corrupted one, a forward pass each: `[layers, tokens]`."""
        states: dict[Any, Tensor] = {}
        for layer in self.layers:
            self.probability([clean], answer, {layer: lambda value, layer=layer: states.update({layer: value.clone()})})
        values = torch.zeros(len(self.layers), len(clean))
        for index, layer in enumerate(self.layers):
            for token in range(len(clean)):

                def restore(value: Tensor, state: Tensor = states[layer], token: int = token) -> None:
                    value[:, token] = state[:, token]

                values[index, token] = self.probability(rows, answer, {**corrupt, layer: restore})
        return values

    def noise(self, subject: range, samples: int) -> dict[Any, Change]:
        """What adds noise to the embeddings of the subject."""
        embed = self._model.get_input_embeddings()
        shape = (samples, len(subject), embed.weight.shape[1])
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(NOISE_SEED))

        def corrupt(value: Tensor) -> None:
            value[:, subject.start : subject.stop] += NOISE_STD * drawn

        return {embed: corrupt}


def main() -> None:
    root = checkpoints.directory()
    served = Library(root / SMOLLM2, make_inputs(root))
    try:
        model = served.model
        hooks = Hooks(AutoModelForCausalLM.from_pretrained(root / SMOLLM2, dtype=torch.float32).eval())
        for noisy, prompts in ((False, PROMPTS[:COUNT]), (True, PROMPTS[:NOISE])):
            ours, theirs, difference, cells = 0.0, 0.0, 0.0, 0
            for prompt, words, other, word in prompts:
                (clean,), (replaced,) = model.tokenize([prompt]), model.tokenize([other])
                (answer,) = {row[len(clean)] for row in model.tokenize([prompt + word])}
                subject = words if isinstance(words, str) else range(*words)
                corruption = methods.Noise(std=NOISE_STD, seed=NOISE_SEED) if noisy else methods.Replacement(other)
                start = time.perf_counter()
                found = methods.causal_trace(model, prompt, subject, corruption, answer=answer)
                ours += time.perf_counter() - start
                marked = found.axes[1].marked
                rows = [clean] * corruption.samples if isinstance(corruption, methods.Noise) else [replaced]
                changes = hooks.noise(range(marked[0], marked[-1] + 1), len(rows)) if noisy else {}
                start = time.perf_counter()
                expected = hooks.trace(clean, rows, answer, changes)
                theirs += time.perf_counter() - start
                difference = max(difference, float((found.values - expected).abs().max()))
                cells += expected.numel()
            if prompts:
                report(
                    "causal_trace_noise" if noisy else "causal_trace",
                    prompts=len(prompts),
                    cells=cells,
                    difference=difference,
                    hooks_seconds=round(theirs, 2),
                    seconds=round(ours, 2),
                    times_faster=round(theirs / ours, 1),
                )
    finally:
        served.close()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    main()
