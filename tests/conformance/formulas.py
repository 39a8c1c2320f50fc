"""The reference for what is inside a forward: attention and the scan of Mamba, written out once more.

Each function here has the arguments of the one in transformers whose place it takes while a plain model runs. It shows
what it computes on the way to `visit`, which gives what to go on with. Nothing here knows anything of Patchwire.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.mamba import modeling_mamba

from conformance import hooks

Visit = Callable[[str, int, Tensor], Tensor]
"""Takes what a value is, the layer or the step that it is of, and the value; gives the value to go on with."""

_ATTENTION = {"gpt2": modeling_gpt2, "llama": modeling_llama}


@contextlib.contextmanager
def attention(name: str, visit: Visit) -> Iterator[None]:
    """Show the queries, scores and probabilities of every layer of GPT-2 or Llama, loaded with eager attention."""

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, Tensor]:
        layer = module.layer_idx
        query = visit("query", layer, query)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = visit("scores", layer, query @ key.mT * scaling)
        length = query.shape[2]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        probabilities = visit("probabilities", layer, scores.masked_fill(~causal, float("-inf")).softmax(-1))
        return (probabilities @ value).transpose(1, 2).contiguous(), probabilities

    with _replaced(_ATTENTION[name], "eager_attention_forward", forward):
        yield


@contextlib.contextmanager
def scan(visit: Visit, layer: int) -> Iterator[None]:
    """Show the convolution's output of one layer of Mamba ("conv"), and its state after every step ("state")."""
    conv, full = modeling_mamba.causal_conv1d_fn, modeling_mamba.mamba_selective_scan
    convs, scans = iter(range(100)), iter(range(100))

    def convolution(hidden: Tensor, weight: Tensor, bias: Tensor, activation: str, **more: Any) -> Tensor:
        if next(convs) != layer:
            return conv(hidden, weight, bias, activation=activation, **more)
        kernel = weight.shape[1]
        padded = nn.functional.pad(hidden, (kernel - 1, 0)).unfold(2, kernel, 1)  # [batch, channels, seq, kernel]
        return visit("conv", layer, nn.functional.silu((padded * weight[None, :, None]).sum(-1) + bias[None, :, None]))

    def recurrence(
        hidden: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor,
        delta_bias: Tensor,
        **more: Any,
    ) -> Tensor:
        if next(scans) != layer:
            return full(hidden, dt, A, B, C, D=D, z=z, delta_bias=delta_bias, **more)
        dt = nn.functional.softplus(dt + delta_bias[:, None])
        state, outputs = torch.zeros(*hidden.shape[:2], A.shape[1]), []
        for step in range(hidden.shape[2]):
            now = dt[:, :, step, None]
            state = (A * now).exp() * state + now * B[:, None, :, step] * hidden[:, :, step, None]
            state = visit("state", step, state)
            outputs.append((state * C[:, None, :, step]).sum(-1))
        return (torch.stack(outputs, -1) + hidden * D[:, None]) * nn.functional.silu(z)

    with (
        _replaced(modeling_mamba, "causal_conv1d_fn", convolution),
        _replaced(modeling_mamba, "mamba_selective_scan", recurrence),
    ):
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, function: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)


class Run:
    """One prompt through a plain model, with some of what it computes changed.

    Attributes:
        values: What was shown, by what it is and the layer or step that it is of.
        logits: What the model gave.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Sequence[int],
        shown: Callable[[Visit], contextlib.AbstractContextManager[None]],
        changes: dict[tuple[str, int], Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self.values: dict[tuple[str, int], Tensor] = {}

        def visit(what: str, index: int, value: Tensor) -> Tensor:
            value = (changes or {}).get((what, index), lambda same: same)(value)
            self.values[what, index] = value.clone()
            return value

        with shown(visit):
            self.logits: Tensor = hooks.forward(model, ids).logits
