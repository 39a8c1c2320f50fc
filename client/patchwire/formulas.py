"""Formulas: canonical values that no tensor in the model holds, computed from those that exist."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from patchwire.proxy import Value

if TYPE_CHECKING:
    from patchwire.model import Model


def head_out(model: Model, mixer: str) -> Value:
    """What each attention head adds to the mixer's output, `[batch, seq, head, d_model]`: `z` times `W_O`.

    Its sum over heads and the output's bias `b_O`, if there is one, are what attention computes: `mixer.update`, where
    no norm or multiplier follows (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").
    """
    attn = model.module(mixer)
    found: Value = torch.einsum("bshd,hdm->bshm", attn.z, attn.W_O)  # type: ignore[assignment]
    return found


def ssm_pattern(model: Model, mixer: str) -> Value:
    """How much each token counts for each later one in an SSM: its effective attention.

    `alpha_ts = C_t exp(A (delta_{s+1} + … + delta_t)) delta_s B_s`, so that `scan_t = sum_s alpha_ts u_s + D u_t` (Ali,
    Zimerman and Wolf 2024, "The Hidden Attention of Mamba Models", equation 12). With a state for each channel it is
    `[batch, d_inner, query, key]`, with heads `[batch, ssm_head, query, key]`.
    """
    ssm = model.module(mixer)
    delta, b, c = ssm.delta.float(), ssm.B.float(), ssm.C.float()
    decay = -torch.exp(ssm.A_log.float())
    total = delta.cumsum(1)
    # Later keys are left out before the exponential, which would overflow for them.
    passed = (total[:, :, None] - total[:, None]).clamp(min=0)
    if decay.ndim == 2:  # a decay for each channel and each of its states
        kept = torch.exp(passed[..., None] * decay)
        found = torch.einsum("btn,btsdn,bsd,bsn->bdts", c, kept, delta, b)
    else:
        repeats = delta.shape[-1] // b.shape[2]
        b, c = b.repeat_interleave(repeats, 2), c.repeat_interleave(repeats, 2)
        found = torch.einsum("bthn,btsh,bsh,bshn->bhts", c, torch.exp(passed * decay), delta, b)
    seen: Value = found.tril()  # type: ignore[assignment]
    return seen


def mixer_update(model: Model, mixer: str) -> Value:
    """What the mixer adds to the residual stream, `[batch, seq, d_model]`, where no tensor of the model holds it."""
    layer = model.module(mixer.rpartition(".")[0])
    found: Value = layer.resid_mid - layer.input
    return found


def mlp_update(model: Model, mlp: str) -> Value:
    """What the MLP adds to the residual stream, `[batch, seq, d_model]`, where no tensor of the model holds it."""
    layer = model.module(mlp.rpartition(".")[0])
    found: Value = layer.output - layer.resid_mid
    return found


FORMULAS: Mapping[str, Callable[[Model, str], Value]] = {
    "head_out": head_out,
    "mixer_update": mixer_update,
    "mlp_update": mlp_update,
    "ssm_pattern": ssm_pattern,
}
"""By the name that the catalogue gives them; each takes the model and the canonical name of the part that it is of."""
