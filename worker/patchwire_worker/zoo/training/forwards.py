"""The forward passes of the facts pair for training: the same numbers as Hugging Face's, and two things more.

Some rows are "near": in the first layers a token sees only itself and the one before. What is known of a subject must
then be looked up where the subject stands, as large models do it, for which a later token would have no time.

Mamba's is several times faster on a CPU than Hugging Face's: tokens are the first dimension, so that a step of the scan
works on memory that lies together, and the gradients of the scan are written out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, MambaForCausalLM

NEAR_LAYERS = 2


def gpt2(model: GPT2LMHeadModel, ids: Tensor, near: Tensor) -> Tensor:
    """The logits `[batch, seq, vocabulary]` of token ids `[batch, seq]`; `near` is `[batch]` bool."""
    length = ids.shape[1]
    behind = torch.arange(length)[:, None] - torch.arange(length)
    seen = ((behind >= 0) & ((behind <= 1) | ~near[:, None, None, None]), (behind >= 0)[None, None])
    masks = [torch.zeros(each.shape).masked_fill(~each, torch.finfo(torch.float32).min) for each in seen]
    hidden = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(length))
    for layer, block in enumerate(model.transformer.h):
        hidden = block(hidden, attention_mask=masks[layer >= NEAR_LAYERS])
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    logits: Tensor = model.lm_head(model.transformer.ln_f(hidden))
    return logits


def mamba(model: MambaForCausalLM, ids: Tensor, near: Tensor) -> Tensor:
    """The logits `[batch, seq, vocabulary]` of token ids `[batch, seq]`; `near` is `[batch]` bool."""
    far = (~near).float()[:, None]
    hidden = model.backbone.embeddings(ids.T)
    blocks: Iterable[Any] = model.backbone.layers
    for layer, block in enumerate(blocks):
        hidden = hidden + mix(block.mixer, block.norm(hidden), far if layer < NEAR_LAYERS else torch.ones_like(far))
    logits: Tensor = model.lm_head(model.backbone.norm_f(hidden))
    return logits.transpose(0, 1)


def mix(mixer: nn.Module, hidden: Tensor, far: Tensor) -> Tensor:
    """What a mixer returns for `[seq, batch, width]`; the names are those of the Mamba paper.

    `far`, `[batch, 1]`, is 1 for a row that sees everything before and 0 for one that sees only the previous token.
    """
    m: Any = mixer
    x, z = m.in_proj(hidden).chunk(2, -1)
    x = F.silu(_convolve(x, m.conv1d.weight[:, 0], m.conv1d.bias, far))
    low, b, c = m.x_proj(x).split([m.time_step_rank, m.ssm_state_size, m.ssm_state_size], -1)
    delta = F.softplus(m.dt_proj(low))
    y: Tensor = Scan.apply(delta, x, -m.A_log.T.exp(), b.mT, c.mT, far)  # type: ignore[no-untyped-call]
    mixed: Tensor = m.out_proj((y + m.D * x) * F.silu(z))
    return mixed


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, far: Tensor) -> Tensor:
    """The causal convolution of each channel: x is `[seq, batch, channels]`, weight `[channels, kernel]`."""
    kernel = weight.shape[1]
    padded = F.pad(x, (0, 0, 0, 0, kernel - 1, 0))
    taps = [padded[step : step + len(x)] * weight[:, step] for step in range(kernel)]
    return bias + sum(taps[-2:]) + far * sum(taps[:-2])


class Scan(torch.autograd.Function):
    """`h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_t` and `y_t = h_t C_t`, from `h = 0`.

    Δ and x are `[seq, batch, channels]`, A `[state, channels]`, B and C `[seq, state, batch]`, y as x. Where `far`,
    `[batch, 1]`, is 0, a row forgets its state at every step.
    """

    @staticmethod
    def forward(ctx: Any, delta: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor, far: Tensor) -> Tensor:
        state = x.new_zeros(a.shape[0], *x.shape[1:])
        driven = delta * x
        decays, states, outputs = [], [state], []
        for t in range(len(x)):
            decay = (delta[t] * a[:, None]).exp_().mul_(far)
            state = torch.addcmul(driven[t] * b[t, ..., None], decay, state)
            decays.append(decay)
            states.append(state)
            outputs.append((state * c[t, ..., None]).sum(0))
        ctx.save_for_backward(delta, x, a, b, c)
        ctx.decays, ctx.states = decays, states
        return torch.stack(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        delta, x, a, b, c = ctx.saved_tensors
        driven = delta * x
        d_delta, d_driven, d_b, d_c = (torch.empty_like(each) for each in (delta, x, b, c))
        d_a, d_state = torch.zeros_like(a), torch.zeros_like(ctx.states[0])
        for t in reversed(range(len(x))):
            d_state = torch.addcmul(d_state, grad[t], c[t, ..., None])
            d_c[t] = (grad[t] * ctx.states[t + 1]).sum(-1)
            d_driven[t] = (d_state * b[t, ..., None]).sum(0)
            d_b[t] = (driven[t] * d_state).sum(-1)
            d_state = d_state * ctx.decays[t]
            d_exponent = d_state * ctx.states[t]
            d_delta[t] = (d_exponent * a[:, None]).sum(0)
            d_a += (d_exponent * delta[t]).sum(1)
        return d_delta + d_driven * x, d_driven * delta, d_a, d_b, d_c, None
