"""Formulas: canonical values that no tensor in the model holds, computed from those that exist."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from patchwire.errors import OperationError, here
from patchwire.proxy import Value
from patchwire.sites import spell
from patchwire.tracing import current

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

    Raises:
        OperationError: in a later step of a generation, where the tokens before have left nothing but the state.
    """
    name = f"{spell(mixer)}.pattern"
    if current(name, model).step:
        raise OperationError(
            f"`{name}` is of all tokens, and this pass has one: those before it are in the state alone.",
            hint="Generate first, and trace the generated tokens: `model.trace(ids)`.",
            lines=here(),
        )
    ssm = model.module(mixer)
    delta, b, c = ssm.delta.float(), ssm.B.float(), ssm.C.float()
    decay = -torch.exp(ssm.A_log.float())
    # Before a row that is shorter than others there are no tokens, and NaN in the place of their values.
    total = delta.nan_to_num(0.0).cumsum(1)
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
