"""Causal tracing: corrupt a prompt's subject, restore one state at a time, and see which of them bring the fact back.

Meng, Bau, Andonian and Belinkov (2022), "Locating and Editing Factual Associations in GPT", section 2; on Mamba:
Sharma, Atkinson and Bau (2024), "Locating and Editing Factual Associations in Mamba", section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from patchwire import random
from patchwire.errors import InputError, here
from patchwire.methods.metrics import Metric, Probability, checked
from patchwire.methods.places import Place, value_of, window_around
from patchwire.methods.prompts import Prompt, answer_of, prompt_of, span
from patchwire.methods.result import Origin, Result, layers_axis, tokens_axis
from patchwire.methods.sweeping import sweep
from patchwire.model import Model
from patchwire.tracing import Trace


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on the token embeddings of the subject, the same for every cell of an experiment."""

    std: float | None = None
    """Its standard deviation; None for `scale` times that of all numbers of the model's token embeddings. Meng et al.
    take three times that of the embeddings of their data's subjects: `embedding_std` measures it."""
    scale: float = 3.0
    samples: int = 10
    """How often noise is drawn; what is measured is the mean."""
    seed: int = 1


@dataclass(frozen=True)
class Replacement:
    """Another prompt of as many tokens, with another subject in the same place."""

    prompt: Any


@dataclass(frozen=True)
class _Corrupted:
    """The corrupted runs: one row for each sample."""

    rows: list[list[int]]
    noise: Noise | None
    subject: range

    def corrupt(self, model: Model) -> None:
        """Record the corruption of the rows of an invoke."""
        if self.noise is not None:
            embeddings = model.embed.output[:, self.subject.start : self.subject.stop]
            drawn = random.normal(tuple(embeddings.shape), seed=self.noise.seed)
            model.embed.output[:, self.subject.start : self.subject.stop] = embeddings + (self.noise.std or 0.0) * drawn


@dataclass(frozen=True)
class _Runs:
    """What the cells of one request need."""

    clean: dict[int, Any]
    """The states of each layer at the place, `[1, tokens, width]`."""
    logits: Any
    """The clean run's last logits, `[1, vocabulary]`."""
    streams: dict[int, Any]
    """The residual stream of the corrupted runs from which a layer's cells go on, `[samples, tokens, width]`."""
    frozen: dict[int, Any]
    """What is held at the corrupted runs, of each layer."""
    source: Any
    base: Any


def causal_trace(
    model: Model,
    prompt: Any,
    subject: str | Sequence[int],
    corruption: Noise | Replacement | None = None,
    *,
    answer: str | int | None = None,
    metric: Metric | None = None,
    at: Place = "resid",
    window: int = 1,
    severed: Place | None = None,
) -> Result:
    """Restore the clean run's state in the corrupted run, one (layer, token) at a time (Meng et al. 2022, section 2.2).

    The probability of the answer with the state restored, averaged over the samples of the noise. `result.effect()` is
    the indirect effect `P*, restored - P*`, `result.normalised()` the share of the total effect (Sharma et al. 2024).
    All cells are rows of a few passes: what a cell has in common with the corrupted run, all layers before the first
    that is restored, is computed once.

    Args:
        model: Any model with the place: attention or SSM alike.
        prompt: One prompt: a text, or token ids.
        subject: Its subject: words that stand in it once, or the positions of their tokens.
        corruption: How it is corrupted; `Noise()` if left out.
        answer: Whose probability is measured: how the text goes on, or a token id; what the model itself says if left
            out.
        metric: What is measured, instead of the answer's probability.
        at: What is restored: one of `patchwire.methods.PLACES`.
        window: In how many layers around each: `[l - window // 2, l + (window + 1) // 2)`, clipped.
        severed: Hold this place, in all layers, at the token that is restored, at what it is in the corrupted run
            (section 2.3: with "mlp", what the state does without the MLPs after it). What is restored is not held.

    Returns:
        `[layers, tokens]`; `numbers` has "base", the corrupted run, and "source", the clean run.

    Raises:
        InputError: the subject is not in the prompt, the replacement has another number of tokens, or the answer is no
            answer.
        SiteError: the model has nothing at that place.

    Example:
        >>> found = causal_trace(model, "The Eiffel Tower is in the city of", "The Eiffel Tower", answer=" Paris")
        >>> found.effect().plot().savefig("trace.png")
    """
    around = [window_around(model, layer, window) for layer in range(model.num_layers)]
    clean = prompt_of(model, prompt)
    where = span(clean, subject if isinstance(subject, str) else list(subject))
    corrupted = _corrupted(model, clean, where, corruption or Noise())
    metric = checked(metric) or Probability(answer_of(model, clean, answer))
    last = model.num_layers

    def before(trace: Trace) -> _Runs:
        with trace.invoke(clean.rows):
            states = {layer: value_of(model.layers[layer], at) for layer in range(last)}
            logits = model.logits[:, -1]
            source = metric(logits, logits).mean().save()
        with trace.invoke(corrupted.rows):
            corrupted.corrupt(model)
            # Every cell is the corrupted run until its first layer, and begins there.
            streams = {first: _begin(model, at, first) for first in {each.start for each in around}}
            frozen = {layer: value_of(model.layers[layer], severed) for layer in range(last)} if severed else {}
            base = metric(model.logits[:, -1], logits).mean().save()
        return _Runs(states, logits, streams, frozen, source, base)

    def measure(trace: Trace, runs: _Runs, cell: tuple[int, int]) -> Any:
        layer, token = cell
        restored = around[layer]
        first = restored.start
        with trace.invoke(corrupted.rows):
            if corrupted.noise is not None:
                _go_on(model, at, first, runs.streams[first])
            for each in range(first, last):
                if severed is not None and not (severed == at and each in restored):
                    value_of(model.layers[each], severed)[:, token] = runs.frozen[each][:, token]
                if each in restored:
                    value_of(model.layers[each], at)[:, token] = runs.clean[each][:, token]
            return metric(model.logits[:, -1], runs.logits).mean()

    cells = [(layer, token) for layer in range(last) for token in range(len(clean))]
    tokens = len(corrupted.rows) * len(clean)
    values, runs, stats = sweep(model, cells, tokens, before, measure, what="restored states")
    return Result(
        values=values.reshape(last, len(clean)),
        axes=(layers_axis(model), tokens_axis(clean.tokens, where)),
        unit=metric.unit,
        origin=Origin.of(
            "causal_trace",
            model,
            prompt=prompt,
            subject=list(where),
            corruption=repr(corruption or Noise()),
            metric=repr(metric),
            at=at,
            window=window,
            severed=severed,
        ),
        numbers={"base": float(runs[0].base), "source": float(runs[0].source)},
        signed=metric.signed,
        stats=stats,
    )


def embedding_std(model: Model, subjects: Sequence[str] | None = None) -> float:
    """The standard deviation of the numbers of token embeddings: of the tokens of some subjects, or of all tokens.

    Meng et al. (2022) corrupt with noise of three times that of the subjects of their data.

    Raises:
        InputError: there is no subject.
    """
    if subjects is None:
        with model.trace([[0]]):
            found = model.embed.weight.float().std(unbiased=False).save()
        return float(found)
    if not subjects:
        raise InputError("There is no subject.", lines=here())
    ids = [token for row in model.tokenize(list(subjects)) for token in row]
    with model.trace([ids]):
        found = model.embed.weight[ids].float().std(unbiased=False).save()
    return float(found)


def _corrupted(model: Model, clean: Prompt, subject: range, corruption: Noise | Replacement) -> _Corrupted:
    if isinstance(corruption, Noise):
        std = corruption.scale * embedding_std(model) if corruption.std is None else corruption.std
        noise = Noise(std, corruption.scale, corruption.samples, corruption.seed)
        return _Corrupted([list(clean.ids)] * noise.samples, noise, subject)
    other = prompt_of(model, corruption.prompt)
    if len(other) != len(clean):
        raise InputError(
            f"“{corruption.prompt}” has {len(other)} tokens, and “{clean.given}” has {len(clean)}.",
            hint="Take two prompts that differ in some tokens; `model.tokenizer.tokens(text)` shows them.",
            lines=here(),
        )
    return _Corrupted(other.rows, None, subject)


def _begin(model: Model, at: Place, layer: int) -> Any:
    """The residual stream from which a run can go on: after a layer if that is restored, or else before it."""
    found: Any = model.layers[layer].output if at == "resid" else model.layers[layer].input
    return found


def _go_on(model: Model, at: Place, layer: int, stream: Any) -> None:
    if at == "resid":
        model.layers[layer].output[:] = stream
    else:
        model.layers[layer].input[:] = stream
