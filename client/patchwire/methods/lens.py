"""The logit lens: what the model would say if it stopped after each layer.

nostalgebraist (2020), "interpreting GPT: the logit lens",
https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchwire.errors import InputError, PatchwireWarning, here
from patchwire.methods.grids import At, value_at
from patchwire.methods.measured import LAYER, TOKEN, Measured, depths
from patchwire.methods.prompts import prompt_of, token_of
from patchwire.methods.result import Axis, Origin, Result, tokens_axis
from patchwire.model import Model
from patchwire.results import Stats

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


EMBEDDINGS = "embed"
"""The row of the residual stream before the first layer."""
Translate = Callable[[int, Any], Any]
"""What is done to the state of a row, `[1, tokens, width]`, before it is read."""


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What each layer would say next, at every position of a prompt.

    The first axis of the tensors is `layers`, the second `tokens`, the third the `top` likeliest tokens, best first.
    """

    layers: tuple[str, ...]
    """"embed", "0", "1", …: the residual stream before the first layer, then after each layer. Another place has no
    "embed"."""
    prompt: Any
    """The prompt."""
    tokens: tuple[str, ...]
    """The prompt's tokens; a lens at a position says what would come after it."""
    probabilities: Tensor = field(repr=False)
    """`[layers, tokens, top]` float32."""
    ids: Tensor = field(repr=False)
    """`[layers, tokens, top]` int64: the token ids."""
    words: tuple[tuple[tuple[str, ...], ...], ...] = field(repr=False)
    """The same as text."""
    likeliest: Result
    """`[layer, token]`: the probability of the likeliest token."""
    divergence: Result
    """`[layer, token]`: D(model ‖ lens) in nats, how far the lens is from what the model itself says in the end."""
    answer: Result | None
    """`[layer, token]`: the probability of the answer; None if none was asked for."""
    rank: Result | None
    """`[layer, token]`: how many tokens the lens puts before the answer; None if none was asked for."""
    gap: float
    """The largest difference of a logit between the lens after the last layer and the model itself; 0 for models whose
    logits are `lm_head(norm(h))` and nothing more, and where something else than the residual stream is read."""
    stats: Stats
    """What the run cost."""

    @property
    def best(self) -> Tensor:
        """The probability of the likeliest token, `[layers, tokens]` float32."""
        return self.likeliest.values

    @property
    def measured(self) -> Measured:
        """The probability of the likeliest token, by layer and token; the embeddings are at depth 0."""
        layers = [each for each in self.layers if each != EMBEDDINGS]
        at_depth = (*[0.0] * (len(self.layers) - len(layers)), *depths(len(layers)))
        return Measured(self.best, (LAYER, TOKEN), self.prompt, at_depth, "probability")

    def at(self, position: int = -1, layer: int = -1) -> list[tuple[str, float]]:
        """The likeliest tokens after a position, as (text, probability), best first."""
        return list(zip(self.words[layer][position], self.probabilities[layer, position].tolist(), strict=True))

    def table(self, *, width: int | None = None, percent: bool = False) -> Table:
        """A table for the terminal: the likeliest token of each layer and position, shaded by its probability.

        Args:
            width: How many characters wide; the last positions that fit are shown.
            percent: Write the probability beside the token, for terminals without colours.
        """
        from patchwire import plots

        return plots.grid(
            self.best,
            rows=self.layers,
            columns=[plots.visible(each) for each in self.tokens],
            texts=self._texts(percent),
            full=1.0,
            width=width,
        )

    def plot(self, *, title: str = "Logit lens: the likeliest next token") -> Figure:
        """A heatmap: the likeliest token of each layer and position, coloured by its probability.

        Raises:
            PatchwireError: matplotlib is not installed.
        """
        from patchwire import plots

        return plots.heatmap(
            self.best,
            rows=self.layers,
            columns=[plots.visible(each) for each in self.tokens],
            annotate=self._texts(percent=False),
            title=title,
            unit="probability",
            full=1.0,
        )

    def _texts(self, percent: bool) -> list[list[str]]:
        from patchwire import plots

        texts = [[plots.visible(words[0]) for words in row] for row in self.words]
        if not percent:
            return texts
        return [
            [f"{plots.fit(text, 7)} {value:.0%}" for text, value in zip(row, values, strict=True)]
            for row, values in zip(texts, self.best.tolist(), strict=True)
        ]


def logit_lens(
    model: Model, prompt: Any, *, at: At = "resid", answer: str | int | None = None, top: int = 5
) -> LogitLens:
    """Read the residual stream after each layer as if it were the last (nostalgebraist 2020, "the logit lens").

    At layer l and position t the lens is `softmax(lm_head(norm(h[l, t])))`, where `h[l]` `[seq, width]` is the residual
    stream, `norm` the model's last norm and `lm_head` its unembedding. One forward pass; softmax and top-k are computed
    on the server, so that `[layers, seq, top]` numbers come back and no logits.

    The last row is the model's own output, `softmax(model.logits)`. For most models that is the lens of the last
    layer too. Some change their logits after `lm_head` (a soft cap in Gemma 2, a scale in Granite): then the earlier
    rows are without that change, `gap` says how large it is, and a `PatchwireWarning` is given. Neither changes which
    tokens are the likeliest, only how likely they are.

    Args:
        model: Any model with `layers`, `norm` and `lm_head`: attention or SSM alike.
        prompt: One prompt: a text, token ids, or chat messages.
        at: What is read: the residual stream, or any other value of a layer as wide: one of `patchwire.methods.PLACES`,
            the name of a site ("attn.output"), or a function of a layer. Then each row is a layer's, the last too.
        answer: A token whose probability and rank are measured: how the text goes on, or a token id.
        top: How many tokens to keep at each place; all if the vocabulary is smaller.

    Raises:
        InputError: there are several prompts, or the model cannot take this one.
        SiteError: the model has no such parts under these names.
        ShapeError: what is read is not as wide as the residual stream.
        ValueError: `top` is not positive.

    Example:
        >>> lens = logit_lens(model, "The Eiffel Tower is located in the city of", answer=" Paris")
        >>> lens.probabilities.shape  # 30 layers and the embeddings, 10 tokens, 5 likeliest
        torch.Size([31, 10, 5])
        >>> lens.at(position=-1)[0]
        (' Paris', 0.7015)
        >>> lens.rank.at(token=-1).values
    """
    return read_lens(model, prompt, "logit_lens", at=at, answer=answer, top=top)


def lens_rows(model: Model, at: At = "resid") -> tuple[str, ...]:
    """What the rows of a lens are called."""
    layers = tuple(map(str, range(model.num_layers)))
    return (EMBEDDINGS, *layers) if at == "resid" else layers


def lens_states(model: Model, at: At = "resid") -> list[Any]:
    """What is read in each row, `[rows, tokens, width]`, in the trace that is being recorded."""
    if at == "resid":
        return [model.layers[0].input, *(layer.output for layer in model.layers)]
    return [value_at(model, layer, at) for layer in range(model.num_layers)]


def unembed(model: Model, state: Any) -> Any:
    """The logits of a state: `lm_head(norm(h))`."""
    return model.lm_head(model.norm(state).to(model.lm_head.weight.dtype))


def waiting(value: Any, other: Any) -> Any:
    """A value that is there only when another one is: then the logits of each layer are made one after the other in the
    end, and not all of them wait in memory for what the model says."""
    return torch.where(other.flatten()[0] > 0, value, value)


def read_lens(
    model: Model,
    prompt: Any,
    method: str,
    *,
    at: At,
    answer: str | int | None,
    top: int,
    translate: Translate | None = None,
) -> LogitLens:
    """A lens of a prompt; `logit_lens` and `TunedLens` say what it is.

    Args:
        model: The model.
        prompt: One prompt.
        method: The function that was asked.
        at: What is read.
        answer: The token that is measured.
        top: How many tokens to keep.
        translate: What is done to a state before it is read; not to the last of the residual stream, which is the
            model's own.
    """
    if top < 1:
        raise ValueError(f"top is the number of tokens to keep, not {top}")
    rows = model.tokenize(prompt)
    if len(rows) != 1:
        raise InputError(f"The lens takes one prompt, not {len(rows)}.", hint="Call it once for each.", lines=here())
    given = prompt_of(model, rows[0]) if not isinstance(prompt, str) else prompt_of(model, prompt)
    token = None if answer is None else token_of(model, given, answer)

    with model.trace(rows) as trace:
        states = lens_states(model, at)
        own = at == "resid"  # the last row is the model itself
        changed = [
            state if translate is None or (own and index == len(states) - 1) else translate(index, state)
            for index, state in enumerate(states)
        ]
        count = min(top, model.logits.shape[-1])
        final = model.logits[0].float()
        lenses = [unembed(model, waiting(state, final)) for state in changed]
        expected = final.log_softmax(-1)
        saved = []
        for logits in (*(lenses[:-1] if own else lenses), *([model.logits] if own else [])):
            said = logits[0].float()
            best = said.softmax(-1).topk(count)
            far = (expected.exp() * (expected - said.log_softmax(-1))).sum(-1)
            parts = [best[0], best[1], far]
            if token is not None:
                parts += [said.softmax(-1)[:, token], (said > said[:, token][:, None]).sum(-1)]
            saved.append([each.save() for each in parts])
        gap = (lenses[-1] - model.logits).float().abs().max().save() if own else None
        largest = final.abs().max().save()
        rounding = max(1e-3, 4 * torch.finfo(lenses[-1].dtype).eps)

    if gap is not None and gap > rounding * largest:
        warnings.warn(
            PatchwireWarning(
                f"{model.name} changes its logits after `lm_head` (by up to {float(gap):.3g}): the lens's last row is "
                "the model's own output, the rows above it are without that change."
            ),
            stacklevel=3,
        )
    assert trace.stats is not None
    stats = trace.stats
    probabilities, ids, far, *of_answer = (
        torch.stack([each.value for each in column]) for column in zip(*saved, strict=True)
    )
    tokens = tuple(_text(model, each) for each in rows[0])
    axes = Axis(LAYER, lens_rows(model, at)), tokens_axis(tokens)
    origin = Origin.of(method, model, prompt=prompt, at=at, answer=token, top=count)

    def result(values: Tensor, unit: str) -> Result:
        return Result(values.float(), axes, unit, origin, stats=stats)

    return LogitLens(
        layers=axes[0].labels,
        prompt=prompt,
        tokens=tokens,
        probabilities=probabilities,
        ids=ids,
        words=_texts(model, ids),
        likeliest=result(probabilities[:, :, 0], "probability of the likeliest next token"),
        divergence=result(far, "KL from the model (nats)"),
        answer=result(of_answer[0], "probability") if of_answer else None,
        rank=result(of_answer[1], "rank") if of_answer else None,
        gap=0.0 if gap is None else float(gap),
        stats=stats,
    )


def _texts(model: Model, ids: Tensor) -> tuple[tuple[tuple[str, ...], ...], ...]:
    known = {each: _text(model, each) for each in set(ids.flatten().tolist())}
    return tuple(tuple(tuple(known[each] for each in place) for place in row) for row in ids.tolist())


def _text(model: Model, token: int) -> str:
    """A token's text; its id where the model has no tokenizer here, or none for it."""
    if model.tokenizer.backend is None:
        return f"#{token}"
    return model.tokenizer.decode(token) or f"#{token}"
