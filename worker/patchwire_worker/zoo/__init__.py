"""The zoo: small trained models that ship with the worker, each for an experiment whose outcome is known.

`zoo:NAME` stands wherever a model can be named, and `zoo:NAME@VARIANT` for the others of one name: checkpoints of its
training, or models of another size. Each has a folder here with its weights, its tokenizer and a card (`CARD.md`) that
says how it was trained and what to expect of it; `corpus` and `training` have its data.

    model = patchwire.local("zoo:facts-gpt2")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from patchwire.errors import ModelNotFoundError, nearest

PREFIX = "zoo:"
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """A model of the zoo."""

    name: str
    """What stands after `zoo:`."""
    about: str
    """What it is, in one line."""
    variants: tuple[str, ...] = ()
    """What can stand after an `@`; without one, it is the model that the line describes."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every way to name it, without `zoo:`."""
        return (self.name, *(f"{self.name}@{variant}" for variant in self.variants))


ENTRIES = (
    Entry("facts-gpt2", "GPT-2, 4 layers: 800 facts, indirect objects, successors, induction"),
    Entry("facts-mamba", "Mamba, 4 layers, trained on the same text as facts-gpt2"),
    Entry("recall-gpt", "GPT-Neo, 3 layers: 800 facts that can only be stored in layer 1's MLP", ("seed-1",)),
    Entry("recall-mamba", "Mamba, 3 layers: 800 facts that can only be stored in layers 0 and 1", ("seed-1",)),
    Entry("induction-2l", "2 layers of attention alone, on random tokens that repeat"),
    Entry("modular-addition", "1 layer, adds modulo 59, past grokking; @STEP for earlier", ("500", "3000", "5000")),
    Entry("superposition", "toy model: 5 sparse features in 2 dimensions", ("dense", "20-features")),
)


def path(name: str) -> Path:
    """The folder of a model: `path("facts-gpt2")`, `path("modular-addition@3000")`.

    Raises:
        ModelNotFoundError: there is no such model; the hint has the nearest names.
    """
    names = {each: entry for entry in ENTRIES for each in entry.names}
    if name not in names:
        close = nearest(name, names) or [entry.name for entry in ENTRIES]
        raise ModelNotFoundError(
            f"There is no `{PREFIX}{name}` in the zoo.",
            hint=f"Nearest: {', '.join(f'`{PREFIX}{each}`' for each in close)}. `patchwire zoo` lists all.",
        )
    base, _, variant = name.partition("@")
    return _HERE / base / variant


def card(name: str) -> str:
    """The card of a model; one with variants has one for all of them.

    Raises:
        ModelNotFoundError: there is no such model.
    """
    path(name)
    return (_HERE / name.partition("@")[0] / "CARD.md").read_text()
