"""Verification: does a model do what its canonical names say? Every claim is checked on the model itself.

`CHECKS` is a table of equations between canonical values, such as `softmax(scores) = pattern`. Beside them, every value
that can be written is written: what was read, which must leave the logits as they are, and something else, which must
not; and every value is read in a batch with a row of another length, and alone. All of it is a handful of blocks over
the public tracing language; the differences are computed on the server, and only numbers come back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchwire import tabular
from patchwire.canonical import EVERY
from patchwire.errors import (
    ExecutionError,
    GraphError,
    InputError,
    LimitError,
    OperationError,
    OrderError,
    PatchwireError,
    ShapeError,
    SiteError,
    here,
)
from patchwire.listing import generic, layer_of, spans
from patchwire.model import Model
from patchwire.results import Stats
from patchwire.sites import Catalogue, Name
from patchwire.tensors import dtype_from_proto

Pair = tuple[Any, Any]
"""A value, and what it must be equal to."""

TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-5,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
}
"""How far two values may be apart, relative to the largest element, by the dtype of the weights. Models compute softmax
and scans in float32, whatever the dtype is."""
_OTHERWISE = 4e-2
_TOKENS = 9
_EQUATIONS_AT_ONCE = 256
_WRITES_AT_ONCE = 48
_TOKENS_AT_ONCE = 4096
_OF_TOKENS = ("seq", "query", "key")
"""What the dimensions of tokens are called."""
_FINDINGS = (ExecutionError, GraphError, LimitError, OperationError, OrderError, ShapeError, SiteError)
"""Errors that say that a value is not what its name says; others say that nothing can be said."""


@dataclass(frozen=True)
class Run:
    """What the checks of a run share."""

    model: Model
    prompt: list[int]
    """Its token ids."""

    def activation(self, value: Any) -> Any:
        """The activation function of the model's MLPs, as its configuration names it."""
        return _ACTIVATIONS[_activation_name(self.model)](value)

    def scale(self, key: str, index: int | None = None) -> float:
        """What the model multiplies a value by (Falcon-H1), by the key of its configuration; 1 if it does not."""
        found = self.model.config.get(key)
        if isinstance(found, list) and index is not None:
            found = found[index]
        return 1.0 if found is None else float(found)


@dataclass(frozen=True)
class Check:
    """An equation between values of a layer, or of the model."""

    name: str
    """The equation, in words."""
    needs: str
    """The canonical names, and parameters, that all have to exist, relative to the layer or the model."""
    sides: Callable[[Any, Run], Pair]
    """Takes the layer or the model, in a block; returns the value and what it must be."""
    also: str = ""
    """Names that take part if they exist."""
    unless: str = ""
    """Names of which none may exist."""
    only: Callable[[Model], bool] = lambda model: True
    """Whether the model is one that it is about."""

    def sites(self, model: Model, owner: str) -> tuple[str, ...]:
        """The canonical names that it is about, of a layer or of the model; none if it does not apply there."""

        def there(names: str) -> list[str]:
            full = [f"{owner}.{each}".lstrip(".") for each in names.split()]
            return [each for each in full if exists(model.catalogue, each)]

        found = there(self.needs)
        if len(found) < len(self.needs.split()) or there(self.unless) or not self.only(model):
            return ()
        return tuple(found + there(self.also))


# --- what the equations are made of -----------------------------------------------------------------------------------

_TANH = "tanh"
_ACTIVATIONS: Mapping[str, Callable[[Any], Any]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda value: F.gelu(value, approximate=_TANH),
    "gelu_fast": lambda value: F.gelu(value, approximate=_TANH),
    "gelu_pytorch_tanh": lambda value: F.gelu(value, approximate=_TANH),
    "relu": F.relu,
}
"""By what configurations call them."""
_ACTIVATION_KEYS = ("hidden_activation", "hidden_act", "activation_function")

_SHARED = "shared_transformer"
"""What is added to the input of a layer's mixer, and to nothing else, where there is one (Zamba2)."""
_RG_LRU = "ssm.rg_lru"
"""A recurrence of one number for each channel, which is its own output."""

_SILU = ("zamba2",)
"""Model types whose configured activation is that of their MLPs, and not of their SSMs."""

_BEFORE_HEAD = "model.decoder.project_out"
"""What is between the last norm and `lm_head` where embeddings are narrower than the model (OPT)."""

_ALIBI = ("bloom", "mpt")
"""Model types that add something for the distance of two tokens to their scores, and do not say so otherwise."""

_LOGITS: Mapping[str, Callable[[Any, float], Any]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,
    "logits_soft_cap": lambda logits, cap: torch.tanh(logits / cap) * cap,
    "logits_scaling": lambda logits, scale: logits / scale,
    "logit_scale": lambda logits, scale: logits * scale,
    "lm_head_multiplier": lambda logits, scale: logits * scale,
}
"""What some models do to their logits after `lm_head`, by the key of their configuration."""


def _activation_name(model: Model) -> str:
    return next((str(model.config[key]) for key in _ACTIVATION_KEYS if model.config.get(key)), "")


def _knows_activation(model: Model) -> bool:
    return _activation_name(model) in _ACTIVATIONS


def _ssm_activation_name(model: Model) -> str:
    """The activation after an SSM's convolution."""
    if model.config.get("model_type") in _SILU:
        return "silu"
    return str(model.config.get("mamba_hidden_act") or _activation_name(model))


def _logits(model: Any, run: Run) -> Any:
    last = model.norm(model.layers[-1].output)
    if _BEFORE_HEAD in run.model.catalogue.modules:
        last = run.model.module(_BEFORE_HEAD)(last)
    logits = model.lm_head(last.to(model.lm_head.input.dtype))
    for key, change in _LOGITS.items():
        if run.model.config.get(key):
            logits = change(logits, run.model.config[key])
    return logits


def _grouped(value: Any, heads: int) -> Any:
    """Keys or values `[batch, seq, kv_head, d_head]`, repeated for the heads that share them."""
    return value.repeat_interleave(heads // value.shape[2], 2)


def _linear(part: Any, x: Any, name: str) -> Any:
    """`x @ W + b`, with the weight and, if it has one, the bias of that name."""
    weight = getattr(part, f"W_{name}")
    return x.to(weight.dtype) @ weight + getattr(part, f"b_{name}", 0)


def _fed(ssm: Any, run: Run, name: str, index: int) -> Any:
    """What an SSM's input is projected to, and multiplied by, if the model does so."""
    x = ssm.input * run.scale("ssm_in_multiplier")
    return _linear(ssm, x, name) * run.scale("ssm_multipliers", index)


def _heads(attn: Any, name: str) -> Any:
    """The same by heads, of the attention's input: `[batch, seq, head, d_head]`."""
    return torch.einsum("bsm,hmd->bshd", attn.input, getattr(attn, f"W_{name}")) + getattr(attn, f"b_{name}", 0)


def _alike(found: Any, expected: Any) -> Pair:
    """Two values of the same elements: some models flatten rows and tokens into one dimension in between."""
    return found.reshape(expected.shape), expected


def _adds_inside(model: Model) -> bool:
    """Whether mixers and MLPs return the residual stream with their update added, as BLOOM's do."""
    update, mixer = model.catalogue.named("layers.0.mixer.update"), model.catalogue.named("layers.0.mixer")
    if update is None or mixer is None or update.part is None:
        return False
    inside = update.part.address.removeprefix(f"{mixer.module}.")
    return inside != update.part.address and not inside.startswith("output")


def _returns_updates(model: Model) -> bool:
    return not _adds_inside(model)


def _adds_to_norms(model: Model) -> bool:
    """Whether updates are added to what the norms return (BLOOM, if its configuration says so)."""
    return bool(model.config.get("apply_residual_connection_post_layernorm")) and _adds_inside(model)


def _norms_before(model: Model) -> bool:
    """Whether updates are added to the residual stream as it is, and no norm is applied to the sum."""
    return not _normalizes_afterwards(model) and not _adds_to_norms(model)


def _is_known(model: Model) -> bool:
    """Whether that there is no `resid_mid` means that there is none; else it was not found, perhaps."""
    return model.catalogue.found_by == "table"


def _has_no_alibi(model: Model) -> bool:
    """Whether scores are products of queries and keys alone, and nothing for their distance is added."""
    return not model.config.get("alibi") and model.config.get("model_type") not in _ALIBI


def _normalizes_afterwards(model: Model) -> bool:
    """Whether the residual stream itself is normalized after each addition, as in OPT-350M."""
    return model.config.get("do_layer_norm_before") is False


def _chosen(mlp: Any) -> Pair:
    """The experts of each token, and those that the router likes best, both in order of their numbers."""
    chosen = mlp.chosen_experts
    return chosen.sort(-1)[0], mlp.router.topk(chosen.shape[-1])[1].sort(-1)[0]


def _attended(attn: Any, run: Run) -> Any:
    """What the pattern makes of the values, which some models clip before (OLMo)."""
    clip = run.model.config.get("clip_qkv")
    v = attn.v.clamp(-clip, clip) if clip else attn.v
    return torch.einsum("bhqk,bkhd->bqhd", attn.pattern, _grouped(v, attn.pattern.shape[1]))


def _with_sinks(attn: Any) -> Any:
    """The softmax over the scores and one number more for each head, without what goes to that."""
    scores = attn.scores.float()
    sinks = attn.sinks.float()[None, :, None, None].expand(scores.shape[0], -1, scores.shape[2], -1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


def _unmasked(scores: Any) -> Any:
    """Scores, with 0 in the place of what is masked."""
    scores = scores.float()
    return scores.masked_fill(scores < -1e4, 0.0)


def _products(attn: Any, run: Run) -> Pair:
    """The scores, and queries times keys as large as they are: scales differ between architectures."""
    scores = attn.scores.float()
    masked = scores < -1e4
    cap = run.model.config.get("attn_logit_softcapping")
    if cap:
        scores = torch.atanh(scores / cap) * cap
    scores = scores.masked_fill(masked, 0.0)
    products = torch.einsum("bqhd,bkhd->bhqk", attn.q_rot, _grouped(attn.k_rot, scores.shape[1])).float()
    products = products.masked_fill(masked, 0.0)
    return scores, products * ((products * scores).sum() / (products * products).sum())


def _convolved(ssm: Any) -> Any:
    """The causal convolution of `x_in`, each channel by itself."""
    x, weight = ssm.x_in, ssm.conv1d.weight
    channels, length = x.shape[-1], weight.shape[-1]
    padded = torch.cat([torch.zeros_like(x)[:, :1].expand(-1, length - 1, -1), x], 1)
    total = sum(padded[:, tap : tap + x.shape[1]] * weight[:channels, 0, tap] for tap in range(length))
    bias = getattr(ssm.conv1d, "bias", None)
    return total if bias is None else total + bias[:channels]


def _shares_states(ssm: Any) -> bool:
    """Whether the channels of a head share their decay, as in Mamba-2; else each has its own, as in Mamba."""
    return bool(ssm.delta.shape[-1] != ssm.u.shape[-1])


def _by_head(value: Any, heads: int) -> Any:
    """`[batch, seq, group, d_state]` to `[batch, seq, head, 1, d_state]`."""
    return value.float().repeat_interleave(heads // value.shape[2], 2)[:, :, :, None]


def _recurrence(ssm: Any, run: Run) -> Pair:
    """The states, and `exp(delta A) state + delta B u` of the token before (Gu and Dao 2023)."""
    state, delta, u = ssm.state.float(), ssm.delta.float(), ssm.u.float()
    decay = -ssm.A_log.float().exp()
    before = torch.cat([torch.zeros_like(state[:, :1]), state[:, :-1]], 1)
    if _shares_states(ssm):
        heads, size = state.shape[2:4]
        moved = (delta[..., None] * u.unflatten(-1, (heads, size)))[..., None] * _by_head(ssm.B, heads)
        return state, (delta * decay).exp()[..., None, None] * before + moved
    return state, (delta[..., None] * decay).exp() * before + (delta * u)[..., None] * ssm.B.float()[:, :, None]


def _scanned(ssm: Any, run: Run) -> Pair:
    """The scan, and `C state + D u`."""
    state, u, skip = ssm.state.float(), ssm.u.float(), ssm.D.float()
    if _shares_states(ssm):
        heads, size = state.shape[2:4]
        out = (state * _by_head(ssm.C, heads)).sum(-1) + skip.reshape(heads, -1) * u.unflatten(-1, (heads, size))
        return ssm.scan, out.flatten(2)
    return ssm.scan, (state * ssm.C.float()[:, :, None]).sum(-1) + skip * u


def _mixed(ssm: Any) -> Pair:
    """The scan, and what its effective attention makes of `u`, and `D u`."""
    pattern, u, skip = ssm.pattern.float(), ssm.u.float(), ssm.D.float()
    heads = u.unflatten(-1, (pattern.shape[1], -1))
    out = torch.einsum("bhqk,bkhp->bqhp", pattern, heads) + skip.reshape(pattern.shape[1], -1) * heads
    return ssm.scan, out.flatten(2)


# --- the equations ----------------------------------------------------------------------------------------------------

CHECKS: Sequence[Check] = (
    Check("mixer_norm.input = input", "mixer_norm.input input", lambda at, _: _alike(at.mixer_norm.input, at.input),
          unless=_SHARED),
    Check("mixer_norm.output = mixer.input", "mixer_norm.output mixer.input",
          lambda at, _: _alike(at.mixer_norm.output, at.mixer.input)),
    Check("input + mixer.update = resid_mid", "input mixer.update resid_mid",
          lambda at, _: (at.resid_mid, at.input + at.mixer.update), only=_norms_before),
    Check("mixer_norm.output + mixer.update = resid_mid", "mixer_norm.output mixer.update resid_mid",
          lambda at, _: (at.resid_mid, at.mixer_norm.output + at.mixer.update), only=_adds_to_norms),
    Check("norm(input + mixer.update) = resid_mid", "input mixer.update resid_mid self_attn_layer_norm",
          lambda at, _: (at.resid_mid, at.self_attn_layer_norm(at.input + at.mixer.update)),
          only=_normalizes_afterwards),
    Check("mlp_norm.input = resid_mid", "mlp_norm.input resid_mid",
          lambda at, _: _alike(at.mlp_norm.input, at.resid_mid)),
    Check("mlp_norm.input = input, or it is resid_mid", "mlp_norm.input input",
          lambda at, _: _alike(at.mlp_norm.input, at.input), unless=f"resid_mid {_SHARED}", only=_is_known),
    Check("mlp_norm.output = mlp.input", "mlp_norm.output mlp.input",
          lambda at, _: _alike(at.mlp_norm.output, at.mlp.input)),
    Check("resid_mid + mlp.update = output", "resid_mid mlp.update output",
          lambda at, _: (at.output, at.resid_mid + at.mlp.update), only=_norms_before),
    Check("mlp_norm.output + mlp.update = output", "mlp_norm.output mlp.update output",
          lambda at, _: (at.output, at.mlp_norm.output + at.mlp.update), only=_adds_to_norms),
    Check("norm(resid_mid + mlp.update) = output", "resid_mid mlp.update output final_layer_norm",
          lambda at, _: (at.output, at.final_layer_norm(at.resid_mid + at.mlp.update)), only=_normalizes_afterwards),
    Check("input + mixer.update + mlp.update = output", "input mixer.update mlp.update output",
          lambda at, _: (at.output, at.input + at.mixer.update + at.mlp.update), unless="resid_mid",
          only=_norms_before),
    Check("input + mixer.update = output", "input mixer.update output",
          lambda at, _: (at.output, at.input + at.mixer.update), unless="mlp mlp.update"),
    Check("input @ W_Q + b_Q = q", "attn.input attn.W_Q attn.q",
          lambda at, _: (at.attn.q, _heads(at.attn, "Q")), also="attn.b_Q"),
    Check("input @ W_K + b_K = k", "attn.input attn.W_K attn.k",
          lambda at, _: (at.attn.k, _heads(at.attn, "K")), also="attn.b_K"),
    Check("input @ W_V + b_V = v", "attn.input attn.W_V attn.v",
          lambda at, _: (at.attn.v, _heads(at.attn, "V")), also="attn.b_V"),
    Check("q_rot · k_rot ~ scores", "attn.q_rot attn.k_rot attn.scores", lambda at, run: _products(at.attn, run),
          only=_has_no_alibi),
    Check("softmax(scores) = pattern", "attn.scores attn.pattern",
          lambda at, _: (at.attn.pattern, at.attn.scores.float().softmax(-1)), unless="attn.sinks"),
    Check("softmax(scores, sink) = pattern", "attn.scores attn.sinks attn.pattern",
          lambda at, _: (at.attn.pattern, _with_sinks(at.attn))),
    Check("rows of pattern sum to 1", "attn.pattern",
          lambda at, _: (at.attn.pattern.float().sum(-1), torch.ones_like(at.attn.pattern[..., 0])),
          unless="attn.sinks"),
    Check("pattern has nothing from later tokens", "attn.pattern",
          lambda at, _: (at.attn.pattern, at.attn.pattern.tril())),
    Check("pattern @ v = z", "attn.pattern attn.v attn.z", lambda at, run: (at.attn.z, _attended(at.attn, run))),
    Check("sum of head_out + b_O = output", "attn.head_out attn.output attn.W_O attn.z",
          lambda at, _: (at.attn.output, at.attn.head_out.sum(2) + getattr(at.attn, "b_O", 0)),
          also="attn.b_O", only=_returns_updates),
    Check("sum of head_out + b_O = mixer.update", "attn.head_out mixer.update attn.W_O attn.z",
          lambda at, _: (at.mixer.update, at.attn.head_out.sum(2) + getattr(at.attn, "b_O", 0)),
          also="attn.b_O", only=_adds_inside),
    Check("input @ W_in + b_in = pre", "mlp.input mlp.W_in mlp.pre",
          lambda at, _: (at.mlp.pre, _linear(at.mlp, at.mlp.input, "in")), unless="mlp.gate", also="mlp.b_in"),
    Check("input @ W_in + b_in = up", "mlp.input mlp.W_in mlp.up",
          lambda at, _: (at.mlp.up, _linear(at.mlp, at.mlp.input, "in")), also="mlp.b_in"),
    Check("input @ W_gate + b_gate = gate", "mlp.input mlp.W_gate mlp.gate",
          lambda at, run: (at.mlp.gate, _linear(at.mlp, at.mlp.input, "gate") * run.scale("mlp_multipliers", 0)),
          also="mlp.b_gate"),
    Check("gate = pre", "mlp.gate mlp.pre", lambda at, _: (at.mlp.pre, at.mlp.gate)),
    Check("act(pre) = neurons", "mlp.pre mlp.neurons",
          lambda at, run: (at.mlp.neurons, run.activation(at.mlp.pre)), unless="mlp.gate", only=_knows_activation),
    Check("act(gate) * up = neurons", "mlp.gate mlp.up mlp.neurons",
          lambda at, run: (at.mlp.neurons, run.activation(at.mlp.gate) * at.mlp.up), only=_knows_activation),
    Check("neurons @ W_out + b_out = output", "mlp.neurons mlp.W_out mlp.output",
          lambda at, run: (at.mlp.output, _linear(at.mlp, at.mlp.neurons, "out") * run.scale("mlp_multipliers", 1)),
          also="mlp.b_out", only=_returns_updates),
    Check("neurons @ W_out + b_out = mlp.update", "mlp.neurons mlp.W_out mlp.update",
          lambda at, _: (at.mlp.update, _linear(at.mlp, at.mlp.neurons, "out")), also="mlp.b_out", only=_adds_inside),
    Check("largest of router = chosen_experts", "mlp.router mlp.chosen_experts", lambda at, _: _chosen(at.mlp)),
    Check("input @ W_in + b_in = x_in", "ssm.input ssm.W_in ssm.x_in",
          lambda at, run: (at.ssm.x_in, _fed(at.ssm, run, "in", 1)), also="ssm.b_in"),
    Check("input @ W_gate + b_gate = gate", "ssm.input ssm.W_gate ssm.gate",
          lambda at, run: (at.ssm.gate, _fed(at.ssm, run, "gate", 0)), also="ssm.b_gate"),
    Check("convolution of x_in = conv", "ssm.x_in ssm.conv1d.weight ssm.conv",
          lambda at, _: (at.ssm.conv, _convolved(at.ssm))),
    Check("act(conv) = u", "ssm.conv ssm.u",
          lambda at, run: (at.ssm.u, _ACTIVATIONS[_ssm_activation_name(run.model)](at.ssm.conv)),
          unless=_RG_LRU, only=lambda model: _ssm_activation_name(model) in _ACTIVATIONS),
    Check("conv = u", f"ssm.conv ssm.u {_RG_LRU}", lambda at, _: (at.ssm.u, at.ssm.conv)),
    Check("exp(delta A) state + delta B u = next state", "ssm.state ssm.delta ssm.A_log ssm.B ssm.u",
          lambda at, run: _recurrence(at.ssm, run)),
    Check("C state + D u = scan", "ssm.state ssm.C ssm.D ssm.u ssm.scan", lambda at, run: _scanned(at.ssm, run)),
    Check("pattern @ u + D u = scan", "ssm.pattern ssm.u ssm.D ssm.scan", lambda at, _: _mixed(at.ssm)),
    Check("silu(gate) = gate_act", "ssm.gate ssm.gate_act", lambda at, _: (at.ssm.gate_act, F.silu(at.ssm.gate)),
          unless=_RG_LRU),
    Check("act(gate) = gate_act", f"ssm.gate ssm.gate_act {_RG_LRU}",
          lambda at, run: (at.ssm.gate_act, run.activation(at.ssm.gate)), only=_knows_activation),
    Check("state = scan", f"ssm.state ssm.scan {_RG_LRU}", lambda at, _: (at.ssm.scan, at.ssm.state)),
    Check("(scan * gate_act) @ W_out + b_out = output", "ssm.scan ssm.gate_act ssm.W_out ssm.output",
          lambda at, _: (at.ssm.output, _linear(at.ssm, at.ssm.scan * at.ssm.gate_act, "out")),
          unless="ssm.norm.output", also="ssm.b_out"),
    Check("norm(scan, gate) @ W_out + b_out = output", "ssm.scan ssm.gate ssm.norm.output ssm.W_out ssm.output",
          lambda at, _: (at.ssm.output, _linear(at.ssm, at.ssm.norm(at.ssm.scan, at.ssm.gate), "out")),
          also="ssm.b_out"),
)  # fmt: skip
"""The equations between the values of a layer."""

MODEL_CHECKS: Sequence[Check] = (
    Check("W_E[tokens] = embed.output", "W_E embed.output",
          lambda at, run: (at.embed.output[0], at.W_E[torch.tensor(run.prompt)] * getattr(at.embed, "embed_scale", 1))),
    Check("lm_head.input @ W_U = lm_head.output", "lm_head.input W_U lm_head.output",
          lambda at, _: (at.lm_head.output, at.lm_head.input @ at.W_U + getattr(at.lm_head, "bias", 0))),
    Check("lm_head(norm(output of the last layer)) = logits", "norm lm_head logits",
          lambda at, run: (at.logits, _logits(at, run)), only=lambda model: model.num_layers > 0),
)  # fmt: skip
"""The equations between the values of the model's ends."""

WRITTEN_BACK = "written back: the logits stay"
CHANGED = "changed: the logits change"
REFUSED = "computed: cannot be written"
TOGETHER = "in a batch: the same beside a longer row"
FUSED = "fused: the same from the fast attention kernel"
_STEPWISE = re.compile(r"layers\.\d+\.attn\.(scores|pattern)")
"""What exists only where attention is computed step by step."""


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One check, at one layer or of the whole model."""

    check: str
    """What was checked."""
    layer: int | None
    """Where; None if it is about the model, or about all layers at once."""
    sites: tuple[str, ...]
    """The canonical names that it is about."""
    error: float
    """The largest difference; where a write has to change the logits, by how much it does."""
    tolerance: float
    """The error may be as large as this; where a write has to change the logits, the change must be larger."""
    passed: bool
    """Whether it holds."""
    words: str = ""
    """What was found, if it does not hold: where the difference is largest, and the two numbers there."""


@dataclass(frozen=True, eq=False)
class Verification:
    """What the checks of a model found. Printed, it is a table: one line for all layers that a check holds at."""

    model: str
    """The model's name."""
    rows: list[Row]
    """Every check, at every layer."""
    tokens: int
    """How many tokens the prompt had."""
    stats: Stats
    """What it cost: passes, rows, seconds."""

    @property
    def passed(self) -> bool:
        """Whether there was something to check, and all of it holds."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failures(self) -> list[Row]:
        """What does not hold."""
        return [row for row in self.rows if not row.passed]

    def of(self, site: str) -> list[Row]:
        """The checks that a canonical name takes part in."""
        return self._by_site.get(site, [])

    @cached_property
    def _by_site(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            for site in row.sites:
                found.setdefault(site, []).append(row)
        return found

    def table(self) -> tuple[Sequence[str], list[Sequence[str]]]:
        """The heads of the columns, and the lines: what holds at several layers on one, each failure on its own."""
        groups: dict[tuple[str, tuple[str, ...], object], list[Row]] = {}
        for index, row in enumerate(self.rows):
            key = (row.check, tuple(dict.fromkeys(map(generic, row.sites))), None if row.passed else index)
            groups.setdefault(key, []).append(row)
        lines: list[Sequence[str]] = []
        for (check, sites, _), rows in groups.items():
            worst = (min if check == CHANGED else max)(rows, key=lambda row: row.error)
            sign = ">" if check == CHANGED else "≤"
            layers = spans([row.layer for row in rows if row.layer is not None])
            lines.append(
                (
                    "ok" if worst.passed else "FAILED",
                    check,
                    layers,
                    " ".join(each.removeprefix("layers[i].") for each in sites),
                    f"{worst.error:.1e}",
                    f"{sign} {worst.tolerance:.0e}",
                    worst.words,
                )
            )
        return ("", "check", "layers", "sites", "error", "bound", ""), lines

    @property
    def summary(self) -> str:
        """How many checks there were, whether they hold, and what they cost, in one sentence."""
        wrong = len(self.failures)
        result = "nothing to check" if not self.rows else f"{wrong} FAILED" if wrong else "all hold"
        return (
            f"{self.model}: {len(self.rows)} checks, {result}; {self.stats.passes} passes of {self.tokens} tokens and "
            f"less, {self.stats.rows} rows, {self.stats.seconds_running:.1f} s"
        )

    def __repr__(self) -> str:
        head, lines = self.table()
        return "\n".join([*([tabular.text(head, lines)] if lines else []), self.summary])

    def _repr_html_(self) -> str:
        return tabular.html(*self.table()) + tabular.html((self.summary,), ())


def exists(catalogue: Catalogue, name: str) -> bool:
    """Whether a model has a canonical value, a side of a part, a part, or a parameter."""
    if catalogue.named(name) is not None:
        return True
    owner, _, last = name.rpartition(".")
    raw = catalogue.raw(owner)
    if raw is None:
        return False
    module = catalogue.modules[raw]
    if last in ("input", "output"):
        return bool(module.side(last))
    return f"{raw}.{last}" in catalogue.modules or any(each.name == last for each in module.parameters)


# --- how it is done ---------------------------------------------------------------------------------------------------

_Measure = Callable[[Any, Any], list[Any]]
"""Takes a value and what it must be, in a block; returns numbers."""


def _sizes(found: Any, expected: Any) -> list[Any]:
    """The largest difference, and the largest element that is expected: few operations, as there are many checks."""
    if tuple(found.shape) != tuple(expected.shape):
        raise ShapeError(
            f"The value is {list(found.shape)}, and what it must be is {list(expected.shape)}.",
            hint="Compare the dimensions.",
            lines=here(),
        )
    return [(found - expected).abs().max(), expected.abs().max()]


def _numbers(found: Any, expected: Any) -> list[Any]:
    """The same, then where the difference is largest (counted as in one row), and the two numbers there."""
    found, expected = found.flatten(), expected.flatten()
    worst = (found - expected).abs().argmax()
    return [*_sizes(found, expected), worst, found[worst], expected[worst]]


def _saved(pairs: Iterable[Pair], measure: _Measure) -> Any:
    """The numbers of every pair, `[pairs, numbers]` float32, as a value that is saved."""
    numbers = [measure(*pair) for pair in pairs]
    flat = [each if each.dtype is torch.float32 else each.float() for row in numbers for each in row]
    table: Any = torch.stack(flat).reshape(len(numbers), -1)
    return table.save()


@dataclass(frozen=True)
class _Probe:
    """One thing to find out in a run."""

    check: str
    layer: int | None
    sites: tuple[str, ...]
    pair: Callable[[], Pair] | None = None
    """The two sides of an equation, in a block."""
    slack: float = 0.0
    """How much further than others its values may be apart, relative to the largest."""


_Ask = Callable[[Sequence[_Probe], _Measure], tuple[Tensor, Stats | None]]
"""Sends one request for some probes; returns the numbers of each, and what it cost."""


@dataclass
class _Runner:
    """Runs probes, a few requests for many of them, and notes what they find and what they cost."""

    run: Run
    rows: list[Row] = field(default_factory=list)
    costs: list[Stats] = field(default_factory=list)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Of the values that probes compare."""

    @cached_property
    def dtype(self) -> torch.dtype | None:
        """Of the model's weights."""
        dtype = self.run.model.summary.dtype
        return dtype_from_proto(dtype) if dtype else None

    @cached_property
    def tolerance(self) -> float:
        """How far values may be apart, relative to the largest."""
        return _OTHERWISE if self.dtype is None else TOLERANCES.get(self.dtype, _OTHERWISE)

    def answers(
        self, probes: Sequence[_Probe], ask: _Ask, at_once: int, measure: _Measure = _sizes
    ) -> Iterator[tuple[_Probe, list[float] | PatchwireError]]:
        """What each probe finds: its numbers, or the error that it meets.

        Where a request meets an error it is cut in halves, until the probe is found that it is of.
        """
        waiting = [list(probes[start : start + at_once]) for start in range(0, len(probes), at_once)]
        while waiting:
            part = waiting.pop(0)
            try:
                found, stats = ask(part, measure)
            except _FINDINGS as error:
                if len(part) == 1:
                    yield part[0], error
                else:
                    middle = len(part) // 2
                    waiting[:0] = [part[:middle], part[middle:]]
                continue
            if stats is not None:
                self.costs.append(stats)
            yield from zip(part, found.tolist(), strict=True)

    def equal(self, probes: Sequence[_Probe], ask: _Ask, at_once: int = _EQUATIONS_AT_ONCE) -> list[Row]:
        """Whether the two values of each probe are equal; where they are not, more is asked."""
        rows = {id(probe): self._row(probe, found) for probe, found in self.answers(probes, ask, at_once)}
        wrong = [each for each in probes if not rows[id(each)].passed and not rows[id(each)].words]
        rows |= {id(probe): self._row(probe, found) for probe, found in self.answers(wrong, ask, at_once, _numbers)}
        return [rows[id(each)] for each in probes]

    def _row(self, probe: _Probe, numbers: list[float] | PatchwireError) -> Row:
        if isinstance(numbers, PatchwireError):
            words = f"{type(numbers).__name__}: {numbers.message}"
            return Row(probe.check, probe.layer, probe.sites, float("inf"), 0.0, False, words)
        error, scale, *more = numbers
        tolerance, words = (self.tolerance + probe.slack) * scale, ""
        if more:
            worst, value, expected = more
            shape = self.shapes[id(probe)]
            words = f"at {_position(int(worst), shape)} of {list(shape)}: {value:.6g}, not {expected:.6g}"
        return Row(probe.check, probe.layer, probe.sites, error, tolerance, error <= tolerance, words)

    def changed(self, probes: Sequence[_Probe], ask: _Ask, at_once: int, noise: Mapping[str, float]) -> Iterator[Row]:
        """Whether the write of each probe changes the logits, by more than `noise`, by the site."""
        for probe, found in self.answers(probes, ask, at_once):
            if isinstance(found, PatchwireError):
                yield self._row(probe, found)
            else:
                change, bound = found[0], noise[generic(probe.sites[0])]
                words = "" if change > bound else "the logits are as they were"
                yield Row(probe.check, probe.layer, probe.sites, change, bound, change > bound, words)


def _position(index: int, shape: Sequence[int]) -> list[int]:
    found = []
    for length in reversed(shape):
        found.append(index % length)
        index //= length
    return found[::-1]


def verify(model: Model, prompt: Any = None) -> Verification:
    """Check on the model itself that its canonical values are what their names say.

    At every layer that has the names: residual bookkeeping (`input + mixer.update = resid_mid`, …), projections
    (`input @ W_Q + b_Q = q`, …), attention (`softmax(scores) = pattern`, whose rows sum to one and have nothing from
    later tokens, `pattern @ v = z`, the sum of `head_out`), MLPs, the recurrence of an SSM's states; and the embedding
    and unembedding. Then each value that can be written is written back, which must leave the logits, and changed,
    which must change them; what is computed must refuse to be written; and every value must be the same alone, beside
    a longer row, and from the fast attention kernel.

    Two values are equal if no elements are further apart than `TOLERANCES` of the largest, by the dtype of the weights.

    Args:
        model: The model; one without a tokenizer too.
        prompt: One prompt of at least three tokens, as for `model.trace`. If left out, random token ids, the same ones
            every time.

    Returns:
        A `Verification`: `.passed`, `.rows`, `.failures`, `.stats`. A value that cannot even be read is a failed row.

    Raises:
        InputError: the prompt is not one of three tokens or more.

    Example:
        >>> found = patchwire.verify(model)
        >>> assert found.passed, found
    """
    rows = model.tokenize(_random_ids(model) if prompt is None else prompt)
    if len(rows) != 1 or len(rows[0]) < 3:
        raise InputError(
            "A model is verified with one prompt of at least three tokens.", hint="Give a sentence.", lines=here()
        )
    runner = _Runner(Run(model, rows[0]))
    _equations(runner)
    _company(runner)
    _writes(runner)
    _refusals(runner)
    return Verification(model.name, runner.rows, len(rows[0]), Stats.sum(runner.costs))


def _random_ids(model: Model) -> list[int]:
    length = min(_TOKENS, model.config.get("max_position_embeddings") or _TOKENS)
    generator = torch.Generator().manual_seed(0)
    known = model.catalogue.names
    if "embed" in known:
        vocabulary = model.embed.weight.shape[0]
    elif known["logits"].value is not None:
        vocabulary = known["logits"].value.shape[-1].size
    found: list[int] = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
    return found


def _equations(runner: _Runner) -> None:
    run, model = runner.run, runner.run.model
    owners = [(index, f"layers.{index}", CHECKS) for index in range(model.num_layers)]

    def probe(check: Check, layer: int | None, owner: str, sites: tuple[str, ...]) -> _Probe:
        return _Probe(check.name, layer, sites, lambda: check.sides(_part(model, owner), run))

    def ask(part: Sequence[_Probe], measure: _Measure) -> tuple[Tensor, Stats | None]:
        with model.trace(run.prompt) as trace:
            pairs = [each.pair() for each in part if each.pair is not None]
            runner.shapes |= {id(each): tuple(found.shape) for each, (found, _) in zip(part, pairs, strict=True)}
            saved = _saved(pairs, measure)
        return saved.value, trace.stats

    probes = [
        probe(check, layer, owner, sites)
        for layer, owner, checks in [*owners, (None, "", MODEL_CHECKS)]
        for check in checks
        if (sites := check.sites(model, owner))
    ]
    runner.rows += runner.equal(probes, ask)


def _part(model: Model, owner: str) -> Any:
    """A layer or a part of it; some parts have values and are no module, such as OPT's MLPs."""
    part: Any = model
    for word in owner.split(".") if owner else ():
        part = part[int(word)] if word.isdigit() else getattr(part, word)
    return part


def _values(model: Model, *, computed: bool = False) -> list[Name]:
    """The canonical values of a model; those that are computed, or those that are not."""
    names = [each for each in model.catalogue.names.values() if not each.is_module and each.name != "logits"]
    return [each for each in names if bool(each.formula) == computed and not (each.part and each.part.parameter)]


def _sides(model: Model) -> list[str]:
    """What the layers and their parts return."""
    parts = ("", ".mixer", ".mlp")
    names = [f"layers.{index}{part}" for index in range(model.num_layers) for part in parts]
    return [f"{name}.output" for name in names if exists(model.catalogue, f"{name}.output")]


def _read(model: Model, name: str) -> Any:
    owner, _, last = name.rpartition(".")
    return getattr(_part(model, owner), last)


def _company(runner: _Runner) -> None:
    """Every value of a row alone and beside a longer row, and attention's from the fast kernel and step by step."""
    model, long = runner.run.model, runner.run.prompt
    short = long[: max(2, len(long) // 2)]
    named = [each.name for each in (*_values(model), *_values(model, computed=True))]
    names = list(dict.fromkeys([*named, *_sides(model), "logits"]))
    stepwise = [name for name in names if _STEPWISE.fullmatch(name)]

    def comparable(probe: _Probe) -> Any:
        value = _read(model, probe.sites[0])
        _has_its_dims(model, probe.sites[0], value)
        return _unmasked(value) if probe.sites[0].endswith(".scores") else value

    def alone_and_beside(part: Sequence[_Probe]) -> list[Pair]:
        with model.trace(short):
            alone = [comparable(each) for each in part]
        with model.trace() as together:
            with together.invoke(long):
                pass
            with together.invoke(short):
                beside = [comparable(each) for each in part]
        return list(zip(beside, alone, strict=True))

    def fast_and_stepwise(part: Sequence[_Probe]) -> list[Pair]:
        with model.trace(long):
            fast = [comparable(each) for each in part]
        with model.trace(long):
            for each in stepwise:
                _read(model, each).amax().save()
            slow = [comparable(each) for each in part]
        return list(zip(fast, slow, strict=True))

    def compare(
        check: str, names: Iterable[str], pairs: Callable[[Sequence[_Probe]], list[Pair]], slack: float = 0.0
    ) -> None:
        def ask(part: Sequence[_Probe], measure: _Measure) -> tuple[Tensor, Stats | None]:
            with model.session() as session:
                found = pairs(part)
                runner.shapes |= {id(each): tuple(value.shape) for each, (value, _) in zip(part, found, strict=True)}
                saved = _saved(found, measure)
            return saved.value, session.stats

        runner.rows += runner.equal([_Probe(check, layer_of(name), (name,), slack=slack) for name in names], ask)

    compare(TOGETHER, stepwise, alone_and_beside)
    compare(TOGETHER, [name for name in names if name not in stepwise], alone_and_beside)
    if stepwise:
        fused = [name for name in names if name.endswith(".attn.z") or name == "logits"]
        compare(FUSED, fused, fast_and_stepwise, _rounding_of_scores(runner, stepwise))


def _rounding_of_scores(runner: _Runner, stepwise: Sequence[str]) -> float:
    """How far apart patterns are because scores, step by step, are rounded to the dtype of the weights; kernels do not.

    A score of 25 in bfloat16 is up to 1/16 off, and its probability as much of itself.
    """
    model, scores = runner.run.model, [name for name in stepwise if name.endswith(".scores")]
    if runner.dtype not in (torch.float16, torch.bfloat16) or not scores:
        return 0.0
    try:
        with model.trace(runner.run.prompt) as trace:
            largest = torch.stack([_unmasked(_read(model, name)).abs().amax() for name in scores]).amax().save()  # type: ignore[attr-defined]
    except _FINDINGS:  # a failed row says so
        return 0.0
    if trace.stats is not None:
        runner.costs.append(trace.stats)
    return torch.finfo(runner.dtype).eps * float(largest.value)


def _has_its_dims(model: Model, name: str, value: Any) -> None:
    named = model.catalogue.named(name)
    if named is None or not named.dims:
        return
    dims = [each.partition("=")[2] for each in named.dims.split()]
    shape = tuple(value.shape)
    if len(dims) != len(shape) or any(dim and int(dim) != length for dim, length in zip(dims, shape, strict=True)):
        raise ShapeError(
            f"The value is {list(shape)}, and its dimensions are {named.dims}.",
            hint="Compare the table of the model's family.",
            lines=here(),
        )


def _writes(runner: _Runner) -> None:
    """Every value that can be written, written back and changed, each in a row of its own beside an untouched one."""
    model, prompt = runner.run.model, runner.run.prompt
    at_once = max(1, min(_WRITES_AT_ONCE, _TOKENS_AT_ONCE // len(prompt)))
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys([*(each.name for each in _values(model)), *_sides(model)]):
        groups.setdefault(generic(name), []).append(name)

    def ask(part: Sequence[_Probe], measure: _Measure) -> tuple[Tensor, Stats | None]:
        with model.trace() as trace:
            with trace.invoke(prompt):
                clean = model.logits
            logits = []
            for each in part:
                with trace.invoke(prompt):
                    for name in each.sites:
                        _write(model, name, change=each.check == CHANGED)
                    logits.append(model.logits)
            runner.shapes |= {id(each): tuple(clean.shape) for each in part}
            saved = _saved([(each, clean) for each in logits], measure)
        return saved.value, trace.stats

    def back(groups: Iterable[Sequence[str]]) -> list[Row]:
        probes = [
            _Probe(WRITTEN_BACK, layer_of(names[0]) if len(names) == 1 else None, tuple(names)) for names in groups
        ]
        return runner.equal(probes, ask, at_once)

    noise: dict[str, float] = {}
    for row in back(groups.values()):
        noise[generic(row.sites[0])] = row.error if row.passed else 0.0
        several = not row.passed and len(row.sites) > 1
        runner.rows += back([name] for name in row.sites) if several else [row]
    probes = [_Probe(CHANGED, layer_of(name), (name,)) for names in groups.values() for name in names]
    runner.rows += runner.changed(probes, ask, at_once, noise)


def _write(model: Model, name: str, *, change: bool) -> None:
    """Write back what is read, or the same numbers at other tokens."""
    named = model.catalogue.named(name)
    value = _read(model, name)
    if named is not None and named.part is not None and EVERY in named.part.address:  # a value for each token
        for token in [value.shape[1] // 2] if change else range(value.shape[1]):
            value[:, token] = value[:, token].roll(1, 1) if change else value[:, token].clone()
        return
    dims = named.dims.split() if named is not None else []
    tokens = next((index for index, each in enumerate(dims) if each in _OF_TOKENS), 1)
    value[...] = value.roll(1, tokens) if change else value.clone()


def _refusals(runner: _Runner) -> None:
    """What is computed cannot be written."""
    model = runner.run.model
    for named in _values(model, computed=True):
        owner, _, last = named.name.rpartition(".")
        try:
            with model.scan(runner.run.prompt):
                setattr(_part(model, owner), last, torch.zeros(1))
        except SiteError:
            refused = True
        else:
            refused = False
        words = "" if refused else "it was written, though nothing in the model holds it"
        runner.rows.append(Row(REFUSED, layer_of(named.name), (named.name,), float(not refused), 0.0, refused, words))
