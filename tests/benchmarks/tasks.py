"""What is measured: every task, its model, and the inputs that every library gets.

A library computes a task as its own users would write it, from the same checkpoint and the same token ids, and returns
the same numbers, which are compared with those of plain PyTorch hooks before anything is timed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from tokenizers import Tokenizer
from torch import Tensor

GPT2, SMOLLM2 = "gpt2-124m", "smollm2-135m"
RAW, MATMUL, PLANNING = "raw", "matmul", ("patchwire", "patchwire_pytorch")
KEPT = 5
"""How many logits of the last token a sweep gives back for each run."""
ROWS = 60
"""How many runs share a batch where a library leaves batching to its user."""
NEW_TOKENS = 32
USERS = 16
REQUESTS = 5
"""How many requests every user makes, one after the other."""
MATMUL_ROWS, MATMUL_REPEATS = 2048, 8
"""How many tokens go through a layer's MLP, and how often, to learn how fast this machine multiplies matrices: a thing
that plain hooks do beside their tasks."""


@dataclass(frozen=True)
class Task:
    """One thing that is measured."""

    model: str
    """The checkpoint."""
    says: str
    """What it is, for the table."""
    tolerance: float = 1e-3
    """By how much a number may differ from that of plain hooks."""
    relative: bool = False
    """Whether that is meant as a share of the largest number."""
    requests: int = 0
    """How many requests it is made of, if it is measured as their number in a second."""
    sweep: bool = False
    """Whether it is a sweep, whose operations are planned."""
    beside: str = ""
    """The task in whose rounds it has its turns, too: the two are compared, and a machine is not always as fast."""
    slow: bool = False
    """Whether it is so many runs that one time, without any before, has to be enough."""


TASKS: Mapping[str, Task] = {
    "read": Task(GPT2, "read one hidden state, 16 tokens"),
    "read_all": Task(GPT2, "read the residual stream after every layer, 512 tokens"),
    "sweep": Task(SMOLLM2, "patch the residual stream, every layer × token", sweep=True),
    "sweep_one_by_one": Task(SMOLLM2, "the same, one run after the other", slow=True),
    "heads": Task(SMOLLM2, "patch what every head gives, layer × head", sweep=True),
    "attribution": Task(SMOLLM2, "attribution patching, every layer × token", relative=True),
    "generation": Task(SMOLLM2, f"generate {NEW_TOKENS} tokens, steered at every step", tolerance=0),
    "users": Task(SMOLLM2, f"{USERS} users at once, {REQUESTS} short requests each", requests=USERS * REQUESTS),
    "users_one_by_one": Task(
        SMOLLM2, "the same requests, one after the other", requests=USERS * REQUESTS, beside="users"
    ),
}
"""By name. Plain hooks do all of them; another library leaves out what it cannot do."""


@dataclass(frozen=True)
class Request:
    """What a user asks for: the last token's logits, with a layer's mixer ablated there."""

    ids: Tensor
    """`[1, tokens]`."""
    layer: int


@dataclass(frozen=True)
class Inputs:
    """The same for every library. All token ids are `[1, tokens]`."""

    short: Tensor
    long: Tensor
    clean: Tensor
    corrupt: Tensor
    """As many tokens as `clean`."""
    answers: tuple[int, int]
    """The tokens that go on after the clean and the corrupt prompt: their logits' difference is the metric."""
    prompt: Tensor
    steering: Tensor
    """`[width]`, added to the residual stream."""
    steered_layer: int
    """After which layer."""
    requests: tuple[Request, ...]
    """One for each user, all of them different."""


Result = Tensor | list[Tensor]


class Library(Protocol):
    """A library with one model loaded."""

    packages: tuple[str, ...]
    """The packages whose versions matter."""

    def __init__(self, directory: Path, inputs: Inputs) -> None:
        """Load the checkpoint in a directory."""

    def tasks(self) -> Mapping[str, Callable[[], Result]]:
        """What it can do, by the names of `TASKS`."""

    def close(self) -> None:
        """End what it has started."""


@runtime_checkable
class Planning(Protocol):
    """A library that says beforehand what it computes."""

    def planned(self, task: str) -> float:
        """The floating-point operations of a task that is a sweep."""


def make_inputs(root: Path) -> Inputs:
    """The inputs.

    Args:
        root: The directory of the checkpoints: SmolLM2 is a directory there, named `SMOLLM2`.
    """
    encode = Tokenizer.from_file(str(root / SMOLLM2 / "tokenizer.json")).encode
    config = json.loads((root / SMOLLM2 / "config.json").read_text())
    layers = config["num_hidden_layers"]
    clean, corrupt = (encode(f"The {place} is located in the city of").ids for place in ("Eiffel Tower", "Colosseum"))
    assert len(clean) == len(corrupt), (clean, corrupt)
    answers = tuple(encode(f" {city}").ids[0] for city in ("Paris", "Rome"))
    words = encode("In the old days people who lived by the sea would go out every morning to look for new land").ids
    requests = tuple(Request(torch.tensor([words[n % 5 : n % 5 + 5 + n % 8]]), layer=n % layers) for n in range(USERS))
    generator = torch.Generator().manual_seed(0)
    return Inputs(
        short=torch.arange(16)[None],
        long=torch.randint(50000, (1, 512), generator=generator),
        clean=torch.tensor([clean]),
        corrupt=torch.tensor([corrupt]),
        answers=(answers[0], answers[1]),
        prompt=torch.tensor([encode("Once upon a time there was a girl who").ids]),
        steering=torch.randn(config["hidden_size"], generator=generator),
        steered_layer=layers // 3,
        requests=requests,
    )
