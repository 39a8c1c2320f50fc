"""Stand-ins: functions that compute step by step what transformers computes in another order, so that all steps exist.

They take the place of the function of the same name in passes that look inside it, and in no others. Their results
differ from the original's by rounding only, which the tests hold them to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


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


STAND_INS: Mapping[str, Callable[..., Any]] = {"mamba2_chunk_scan": mamba2_chunk_scan}
"""By the name of the function of transformers."""
