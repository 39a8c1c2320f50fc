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

    Its sum over heads and the output's bias, if there is one, are `mixer.output` (Elhage et al. 2021, "A Mathematical
    Framework for Transformer Circuits").
    """
    attn = model.module(mixer)
    found: Value = torch.einsum("bshd,hdm->bshm", attn.z, attn.W_O)  # type: ignore[assignment]
    return found


FORMULAS: Mapping[str, Callable[[Model, str], Value]] = {"head_out": head_out}
"""By the name that the catalogue gives them; each takes the model and the canonical name of the part that it is of."""
