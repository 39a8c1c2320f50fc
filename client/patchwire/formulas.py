"""Formulas: canonical values that no tensor in the model holds, computed from those that exist."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from patchwire.proxy import Value

if TYPE_CHECKING:
    from patchwire.model import Model


def head_out(model: Model, mixer: str) -> Value:
    """What each attention head adds to the residual stream, `[batch, seq, head, d_model]`: `z` times `W_O`.

    Its sum over heads and the output's bias `b_O`, if there is one, are what attention computes: `mixer.update`, where
    no norm or multiplier follows (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").
    """
    attn = model.module(mixer)
    found: Value = torch.einsum("bshd,hdm->bshm", attn.z, attn.W_O)  # type: ignore[assignment]
    return found


def mixer_update(model: Model, mixer: str) -> Value:
    """What the mixer adds to the residual stream, `[batch, seq, d_model]`, where no tensor of the model holds it."""
    layer = model.module(mixer.rpartition(".")[0])
    return layer.resid_mid - layer.input  # type: ignore[no-any-return]


def mlp_update(model: Model, mlp: str) -> Value:
    """What the MLP adds to the residual stream, `[batch, seq, d_model]`, where no tensor of the model holds it."""
    layer = model.module(mlp.rpartition(".")[0])
    return layer.output - layer.resid_mid  # type: ignore[no-any-return]


FORMULAS: Mapping[str, Callable[[Model, str], Value]] = {
    "head_out": head_out,
    "mixer_update": mixer_update,
    "mlp_update": mlp_update,
}
"""By the name that the catalogue gives them; each takes the model and the canonical name of the part that it is of."""
