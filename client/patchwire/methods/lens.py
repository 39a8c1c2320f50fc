"""The logit lens: what the model would say if it stopped after each layer.

nostalgebraist (2020), "interpreting GPT: the logit lens",
https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchwire.errors import InputError, PatchwireWarning, here
from patchwire.methods.measured import LAYER, TOKEN, Measured, depths
from patchwire.model import Model
from patchwire.results import Stats

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What each layer would say next, at every position of a prompt.

    The first axis of the tensors is `layers`, the second `tokens`, the third the `top` likeliest tokens, best first.
    """

    layers: tuple[str, ...]
    """"embed", "0", "1", …: the residual stream before the first layer, then after each layer."""
    prompt: Any
    """The prompt."""
    tokens: tuple[str, ...]
    """The prompt's tokens; a lens at a position says what would come after it."""
    probabilities: Tensor
    """`[layers, tokens, top]` float32."""
    ids: Tensor
    """`[layers, tokens, top]` int64: the token ids."""
    words: tuple[tuple[tuple[str, ...], ...], ...]
    """The same as text."""
    gap: float
    """The largest difference of a logit between the lens after the last layer and the model itself; 0 for models whose
    logits are `lm_head(norm(h))` and nothing more."""
    stats: Stats
    """What the run cost."""

    @cached_property
    def best(self) -> Tensor:
        """The probability of the likeliest token, `[layers, tokens]` float32."""
        return self.probabilities[:, :, 0]

    @property
    def measured(self) -> Measured:
        """The probability of the likeliest token, by layer and token; the embeddings are at depth 0."""
        return Measured(self.best, (LAYER, TOKEN), self.prompt, (0.0, *depths(len(self.layers) - 1)), "probability")

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


def logit_lens(model: Model, prompt: Any, *, top: int = 5) -> LogitLens:
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
        top: How many tokens to keep at each place; all if the vocabulary is smaller.

    Raises:
        InputError: there are several prompts, or the model cannot take this one.
        SiteError: the model has no such parts under these names.
        ValueError: `top` is not positive.

    Example:
        >>> lens = logit_lens(model, "The Eiffel Tower is located in the city of")
        >>> lens.probabilities.shape  # 30 layers and the embeddings, 10 tokens, 5 likeliest
        torch.Size([31, 10, 5])
        >>> lens.at(position=-1)[0]
        (' Paris', 0.7015)
    """
    if top < 1:
        raise ValueError(f"top is the number of tokens to keep, not {top}")
    rows = model.tokenize(prompt)
    if len(rows) != 1:
        raise InputError(f"The lens takes one prompt, not {len(rows)}.", lines=here())

    with model.trace(rows) as trace:
        states = [model.layers[0].input, *(layer.output for layer in model.layers)]
        dtype = model.lm_head.input.dtype  # some residual streams are wider
        *lenses, last = [model.lm_head(model.norm(state).to(dtype)) for state in states]
        count = min(top, model.logits.shape[-1])
        likeliest = [logits[0].float().softmax(-1).topk(count) for logits in (*lenses, model.logits)]
        probabilities = [each[0].save() for each in likeliest]
        ids = [each[1].save() for each in likeliest]
        gap = (last - model.logits).float().abs().max().save()
        largest = model.logits.float().abs().max().save()
        rounding = max(1e-3, 4 * torch.finfo(last.dtype).eps)

    if gap > rounding * largest:
        warnings.warn(
            PatchwireWarning(
                f"{model.name} changes its logits after `lm_head` (by up to {float(gap):.3g}): the lens's last row is "
                "the model's own output, the rows above it are without that change."
            ),
            stacklevel=2,
        )
    assert trace.stats is not None
    best = torch.stack([each.value for each in ids])
    return LogitLens(
        layers=("embed", *map(str, range(model.num_layers))),
        prompt=prompt,
        tokens=tuple(_text(model, each) for each in rows[0]),
        probabilities=torch.stack([each.value for each in probabilities]),
        ids=best,
        words=_texts(model, best),
        gap=float(gap),
        stats=trace.stats,
    )


def _texts(model: Model, ids: Tensor) -> tuple[tuple[tuple[str, ...], ...], ...]:
    known = {each: _text(model, each) for each in set(ids.flatten().tolist())}
    return tuple(tuple(tuple(known[each] for each in place) for place in row) for row in ids.tolist())


def _text(model: Model, token: int) -> str:
    """A token's text; its id where the model has no tokenizer here, or none for it."""
    if model.tokenizer.backend is None:
        return f"#{token}"
    return model.tokenizer.decode(token) or f"#{token}"
