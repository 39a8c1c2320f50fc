"""Stand-ins: functions that compute step by step what transformers computes in another order, so that all steps exist.

They take the place of the function of the same name in passes that look inside it, and in no others. Their results
differ from the original's by rounding only, which the tests hold them to.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN


def mamba2_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Any:
    """The recurrence of Mamba-2, token by token; transformers computes it in chunks, in which most states never exist.

    `h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t`, `y_t = C_t h_t + D x_t` (Dao and Gu 2024, "Transformers are
    SSMs"). Shapes: `hidden_states` `[batch, seq, head, d_head]`, `dt` `[batch, seq, head]`, `B` and `C` `[batch, seq,
    group, d_state]`.
    """
    _, seq, heads, _ = hidden_states.shape
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    x = hidden_states.float()
    group_B = B.float().repeat_interleave(heads // B.shape[2], dim=2)
    group_C = C.float().repeat_interleave(heads // C.shape[2], dim=2)
    decay = torch.exp(A.float() * dt.float())
    update = (x * dt[..., None].float())[..., None] * group_B[..., None, :]
    first = torch.zeros_like(update[:, 0])
    state = first if initial_states is None else initial_states.to(first)
    outputs = []
    for index in range(seq):
        state = decay[:, index, :, None, None] * state + update[:, index]
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, group_C[:, index]))
    output = torch.stack(outputs, dim=1)
    if D is not None:
        output = output + x * D[:, None]
    return (output, state) if return_final_states else output


def mamba2_selective_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """One token of the same recurrence; transformers hands over each head's `delta` once for each of its channels.

    Here it is one number for each head, as in the paper. Shapes: `state` `[batch, head, d_head, d_state]`, which
    becomes the new one; `hidden_states`, `dt` and the gate `z` `[batch, head, d_head]`, `B` and `C` `[batch, group,
    d_state]`.
    """
    heads, groups = hidden_states.shape[1], B.shape[1]
    delta = dt[..., 0]
    if dt_bias is not None:
        delta = delta + dt_bias[..., 0].to(delta.dtype)
    delta = F.softplus(delta) if dt_softplus else delta
    decay = torch.exp(delta[..., None, None].float() * A.float())
    group_B = B.repeat_interleave(heads // groups, dim=1)
    group_C = C.repeat_interleave(heads // groups, dim=1)
    update = delta[..., None, None] * group_B[:, :, None, :] * hidden_states[..., None]
    new_state = state * decay + update
    state.copy_(new_state.to(state.dtype))
    output = torch.matmul(new_state.to(C.dtype), group_C[..., None]).squeeze(-1)
    if D is not None:
        output = (output + hidden_states * D).to(output.dtype)
    scan = output.flatten(1)
    if z is not None:
        gate_act = F.silu(z).flatten(1)
        return (scan * gate_act).view_as(hidden_states).to(hidden_states.dtype)
    return scan.view_as(hidden_states).to(hidden_states.dtype)


def causal_conv1d_fn(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **kwargs: Any
) -> Tensor:
    """The convolution `[batch, channel, seq]` of the tokens of the pass.

    A cache puts zeros before a prompt that is shorter than the convolution, and transformers returns values of these
    too, which nobody uses.
    """
    _, channels, seq = hidden_states.shape
    tokens = _TOKENS.get() or seq
    whole = F.conv1d(
        hidden_states.to(weight.dtype), weight.unsqueeze(1), bias, padding=weight.shape[-1] - 1, groups=channels
    )
    out = whole[:, :, :seq][:, :, -tokens:]
    if activation is not None:
        out = ACT2FN[activation](out)
    return out.to(hidden_states.dtype)


def rnn_scan(
    self: Any,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The recurrence of an RG-LRU (De et al. 2024, "Griffin"), the same for one token as for many.

    `h_t = a_t h_{t-1} + x_t`, all of shape `[batch, seq, channel]`; transformers adds in place in the steps of a
    generation, so that what is before is lost.
    """
    decay = (recurrent_gate * ~reset).to(acc_dtype)
    state = torch.zeros_like(decay[:, 0]) if recurrent_states is None else recurrent_states.to(decay.device)
    outputs = []
    for index in range(hidden_states.shape[1]):
        state = decay[:, index] * state + hidden_states[:, index].to(acc_dtype)
        outputs.append(state.to(hidden_states.dtype))
    # In memory as the input is: how a product rounds depends on that.
    return torch.empty_like(hidden_states).copy_(torch.stack(outputs, dim=1)), state


_TOKENS: contextvars.ContextVar[int] = contextvars.ContextVar("tokens", default=0)


@contextlib.contextmanager
def prompts_of(tokens: int) -> Iterator[None]:
    """Say how many tokens the prompts of a pass, or of a generation, have."""
    before = _TOKENS.set(tokens)
    try:
        yield
    finally:
        _TOKENS.reset(before)


STAND_INS: Mapping[str, Callable[..., Any]] = {
    "mamba2_chunk_scan": mamba2_chunk_scan,
    "mamba2_selective_state_update": mamba2_selective_state_update,
    "causal_conv1d_fn": causal_conv1d_fn,
    "RecurrentGemmaRglru._rnn_scan": rnn_scan,
}
"""By the name of the function of transformers."""
