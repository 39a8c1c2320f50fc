"""State space models in plain PyTorch: each layer by the formulas of its paper, from the Hugging Face module's weights.

`mixed(mixer, hidden)` is what a mixer returns for its input `[batch, seq, d_model]`, computed token by token, and every
value on the way under its canonical name. A change of any of them goes on into all that is computed from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Change = Callable[[str, int | None, Tensor], Tensor]
"""What a value becomes: its name, the position if it is the state after one token, and the value."""


@dataclass
class Values:
    """What was computed on the way, by canonical name."""

    change: Change
    found: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, name: str, value: Tensor, position: int | None = None) -> Tensor:
        value = self.change(name, position, value)
        if position is None:
            self.found[name] = value
        else:
            self.found[name] = torch.cat([self.found[name], value[:, None]], 1) if position else value[:, None]
        return value


def unchanged(name: str, position: int | None, value: Tensor) -> Tensor:
    """No change."""
    return value


def mixed(mixer: nn.Module, hidden: Tensor, change: Change = unchanged) -> tuple[Tensor, dict[str, Tensor]]:
    """What a mixer returns, and all values on the way."""
    values = Values(change)
    if hasattr(mixer, "rg_lru"):
        return _rg_lru(mixer, hidden, values), values.found
    if hasattr(mixer, "x_proj"):
        return _mamba(mixer, hidden, values), values.found
    return _mamba2(mixer, hidden, values), values.found


def _convolved(conv: nn.Module, x: Tensor) -> Tensor:
    """Each channel's own convolution, over this token and those before."""
    width = conv.kernel_size[0]
    padded = F.pad(x, (0, 0, width - 1, 0))
    taps = [padded[:, tap : tap + x.shape[1]] * conv.weight[:, 0, tap] for tap in range(width)]
    return sum(taps) + (0 if conv.bias is None else conv.bias)  # type: ignore[no-any-return]


def _mamba(mixer: Any, hidden: Tensor, values: Values) -> Tensor:
    x, gate = mixer.in_proj(hidden).chunk(2, dim=-1)
    x, gate = values("x_in", x), values("gate", gate)
    u = values("u", F.silu(values("conv", _convolved(mixer.conv1d, x))))
    sizes = [mixer.dt_proj.in_features, mixer.A_log.shape[1], mixer.A_log.shape[1]]
    dt, B, C = (u @ mixer.x_proj.weight.T).split(sizes, dim=-1)
    if hasattr(mixer, "b_layernorm"):
        dt, B, C = mixer.dt_layernorm(dt), mixer.b_layernorm(B), mixer.c_layernorm(C)
    B, C = values("B", B), values("C", C)
    delta = values("delta", F.softplus(dt @ mixer.dt_proj.weight.T + mixer.dt_proj.bias))
    A = -torch.exp(mixer.A_log)
    state = torch.zeros(hidden.shape[0], *A.shape)
    outputs = []
    for t in range(hidden.shape[1]):
        d = delta[:, t, :, None]
        state = values("state", torch.exp(d * A) * state + d * B[:, t, None, :] * u[:, t, :, None], t)
        outputs.append((state * C[:, t, None, :]).sum(-1) + mixer.D * u[:, t])
    scan, gate_act = values("scan", torch.stack(outputs, 1)), values("gate_act", F.silu(gate))
    return mixer.out_proj(scan * gate_act)  # type: ignore[no-any-return]


def _mamba2(mixer: Any, hidden: Tensor, values: Values) -> Tensor:
    heads, groups, d_inner = mixer.A_log.shape[0], mixer.n_groups, mixer.out_proj.in_features
    d_state = (mixer.conv1d.in_channels - d_inner) // (2 * groups)
    projected = mixer.in_proj(hidden * getattr(mixer, "ssm_in_multiplier", 1)) * getattr(mixer, "mup_vector", 1)
    gate, x, BC, dt = projected.split([d_inner, d_inner, 2 * groups * d_state, heads], dim=-1)
    gate, x = values("gate", gate), values("x_in", x)
    convolved = _convolved(mixer.conv1d, torch.cat([x, BC], -1))
    conv = values("conv", convolved[..., :d_inner])
    B, C = F.silu(convolved[..., d_inner:]).unflatten(-1, (2, groups, d_state)).unbind(2)
    u, B, C = values("u", F.silu(conv)), values("B", B), values("C", C)
    delta = values("delta", F.softplus(dt + mixer.dt_bias).clamp(*mixer.time_step_limit))
    A, by_head = -torch.exp(mixer.A_log), u.unflatten(-1, (heads, -1))
    state = torch.zeros(hidden.shape[0], heads, d_inner // heads, d_state)
    outputs = []
    for t in range(hidden.shape[1]):
        d = delta[:, t, :, None, None]
        b, c = (each[:, t].repeat_interleave(heads // groups, 1)[:, :, None] for each in (B, C))
        state = values("state", torch.exp(d * A[:, None, None]) * state + d * by_head[:, t, ..., None] * b, t)
        outputs.append(((state * c).sum(-1) + mixer.D[:, None] * by_head[:, t]).flatten(1))
    scan, gate_act = values("scan", torch.stack(outputs, 1)), values("gate_act", F.silu(gate))
    return mixer.out_proj(_gated(mixer.norm, scan, gate_act, groups))  # type: ignore[no-any-return]


def _gated(norm: Any, scan: Tensor, gate: Tensor, groups: int) -> Tensor:
    """The scan times the gate, with a norm of each group before or after, or without."""
    if isinstance(norm, nn.Identity):
        return scan * gate
    before = getattr(norm, "norm_before_gate", False)
    x = (scan if before else scan * gate).unflatten(-1, (groups, -1))
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * x.flatten(-2) * (gate if before else 1)  # type: ignore[no-any-return]


def _rg_lru(mixer: Any, hidden: Tensor, values: Values) -> Tensor:
    lru = mixer.rg_lru
    x, gate = values("x_in", mixer.linear_x(hidden)), values("gate", mixer.linear_y(hidden))
    u = values("u", values("conv", _convolved(mixer.conv_1d, x)))
    blocks = u.unflatten(-1, (lru.num_attention_heads, -1))
    through = [
        torch.sigmoid(torch.einsum("bshi,hij->bshj", blocks, weight) + bias).flatten(-2)
        for weight, bias in (
            (lru.input_gate_weight, lru.input_gate_bias),
            (lru.recurrent_gate_weight, lru.recurrent_gate_bias),
        )
    ]
    decay = torch.exp(-8.0 * through[1] * F.softplus(lru.recurrent_param))
    first = torch.arange(hidden.shape[1])[:, None] == 0
    scale = torch.sqrt(1 - decay**2).masked_fill(first, 1)  # the first token starts with its input as it is
    state = torch.zeros_like(u[:, 0])
    outputs = []
    for t in range(hidden.shape[1]):
        state = values("state", decay[:, t] * state + scale[:, t] * through[0][:, t] * u[:, t], t)
        outputs.append(state)
    scan = values("scan", torch.stack(outputs, 1))
    return mixer.linear_out(scan * values("gate_act", F.gelu(gate, approximate="tanh")))  # type: ignore[no-any-return]


@contextlib.contextmanager
def by_formula(mixer: Any, change: Change) -> Iterator[None]:
    """Have the model compute a mixer by its formulas, with a change; without a cache."""

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        output, _ = mixed(mixer, hidden_states, change)
        return (output, None) if hasattr(mixer, "rg_lru") else output

    mixer.forward = forward
    try:
        yield
    finally:
        del mixer.forward
