"""Metrics: what is measured of a run, computed on the server from the last token's logits.

A metric is a formula over logits `[rows, vocabulary]` that gives a number for each row, so that no logits travel. Some
compare with the clean run's logits. Zhang and Nanda (2024), "Towards Best Practices of Activation Patching", section 3,
say which to take: the logit difference sees parts of a model that work against the answer, a probability hardly does.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Protocol

from patchwire.errors import InputError, here


class Metric(Protocol):
    """A formula over the last token's logits."""

    @property
    def unit(self) -> str:
        """What its numbers are."""

    @property
    def signed(self) -> bool:
        """Whether they mean something below zero."""

    def __call__(self, logits: Any, clean: Any) -> Any:
        """A number for each row.

        Args:
            logits: `[rows, vocabulary]`, of the last token.
            clean: `[1, vocabulary]`, the clean run's.

        Returns:
            `[rows]` float32.
        """


def checked(metric: Metric | None) -> Metric | None:
    """A metric that was given, or None.

    Raises:
        InputError: it is no metric.
    """
    if isinstance(metric, type):
        needs = [each.name for each in fields(metric) if each.default is MISSING] if is_dataclass(metric) else ["…"]
        raise InputError(
            f"`{metric.__name__}` is a class: a metric is one of its objects.",
            hint=f"Write `{metric.__name__}({', '.join(needs)})`.",
            lines=here(),
        )
    if metric is None or (callable(metric) and hasattr(metric, "unit") and hasattr(metric, "signed")):
        return metric
    raise InputError(
        f"{metric!r} is no metric.",
        hint="Give one of `patchwire.methods`, such as `metric=LogitDifference(answer, foil)` with the ids of two "
        "tokens, or an object of yours like them (`methods.Metric`).",
        lines=here(),
    )


@dataclass(frozen=True)
class Probability:
    """The probability of a token: softmax(logits)[answer]."""

    answer: int
    signed: bool = False

    @property
    def unit(self) -> str:
        return "probability"

    def __call__(self, logits: Any, clean: Any) -> Any:
        return logits.float().softmax(-1)[:, self.answer]


@dataclass(frozen=True)
class LogProbability:
    """The natural logarithm of a token's probability."""

    answer: int
    signed: bool = True

    @property
    def unit(self) -> str:
        return "log probability (nats)"

    def __call__(self, logits: Any, clean: Any) -> Any:
        return logits.float().log_softmax(-1)[:, self.answer]


@dataclass(frozen=True)
class LogitDifference:
    """The logit of the answer less that of the foil."""

    answer: int
    foil: int
    signed: bool = True

    @property
    def unit(self) -> str:
        return "logit difference"

    def __call__(self, logits: Any, clean: Any) -> Any:
        return (logits[:, self.answer] - logits[:, self.foil]).float()


@dataclass(frozen=True)
class KL:
    """The Kullback-Leibler divergence of the run from the clean run, D(clean ‖ run), in nats."""

    signed: bool = False

    @property
    def unit(self) -> str:
        return "KL from the clean run (nats)"

    def __call__(self, logits: Any, clean: Any) -> Any:
        expected = clean.float().log_softmax(-1)
        return (expected.exp() * (expected - logits.float().log_softmax(-1))).sum(-1)


@dataclass(frozen=True)
class Rank:
    """How many tokens have a higher logit than the answer: 0 for the likeliest."""

    answer: int
    signed: bool = False

    @property
    def unit(self) -> str:
        return "rank"

    def __call__(self, logits: Any, clean: Any) -> Any:
        return (logits > logits[:, self.answer][:, None]).sum(-1).float()
