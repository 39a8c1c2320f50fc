"""What the parts of each architecture are called: the data behind the canonical names.

One row for a family of Hugging Face's `model_type`s; every path is that of a module. A model type without a row is
looked at instead (`detected`), and what was found is reported. To add an architecture, add a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import nn

from patchwire_worker.models.places import (
    INTERFACE,
    MAMBA,
    MAMBA2,
    Place,
    gated_mlp,
    mlp,
    projections,
    residual,
    transposed,
)

ATTENTION = "attention"
SSM = "ssm"
MLP = "mlp"
MOE = "moe"


@dataclass(frozen=True)
class Family:
    """Where the parts of an architecture are."""

    embed: str
    """The table of token embeddings."""
    layers: str
    """The list of layers."""
    norm: str
    """The last norm, before the unembedding."""
    lm_head: str
    """The unembedding."""
    mixers: Mapping[str, str]
    """Inside a layer: what mixes tokens, and whether it is `ATTENTION` or `SSM`; each layer has one of them."""
    mlps: Mapping[str, str]
    """Inside a layer: what works on each token, and whether it is `MLP` or `MOE`; a layer may have none."""
    norms: Mapping[str, str]
    """Inside a layer: the norms before the mixer ("mixer_norm") and before the MLP ("mlp_norm")."""
    parts: Mapping[str, Place]
    """Where values and parameters are, by what they are of and their name: "attn.q", "mlp.neurons", "model.W_E"."""


def _family(
    body: str,
    embed: str,
    layers: str,
    norm: str,
    head: str,
    mixers: str,
    mlps: str = "mlp",
    norms: str = "",
    parts: Mapping[str, Place] = MappingProxyType({}),
) -> Family:
    return Family(
        f"{body}.{embed}",
        f"{body}.{layers}",
        f"{body}.{norm}",
        head,
        {name: SSM if name in _SSM_NAMES else ATTENTION for name in mixers.split()},
        {name: MOE if name in _MOE_NAMES else MLP for name in mlps.split()},
        dict(zip(("mixer_norm", "mlp_norm"), norms.split(), strict=False)),
        {
            "model.W_E": Place(f"{body}.{embed}.weight", "vocab d_model"),
            "model.W_U": Place(f"{head}.weight", "vocab d_model"),
            **parts,
        },
    )


_SSM_NAMES = frozenset({"mamba", "mixer", "ssm", "rec", "temporal_block", "linear_attn"})
_MOE_NAMES = frozenset({"moe", "block_sparse_moe", "experts"})

_LLAMA = _family(
    "model", "embed_tokens", "layers", "norm", "lm_head", "self_attn", norms="input_layernorm post_attention_layernorm",
    parts=projections("q_proj", "k_proj", "v_proj", "o_proj") | dict(INTERFACE)
    | gated_mlp("gate_proj", "up_proj", "down_proj") | residual("output[0]", "output", "post_attention_layernorm"),
)  # fmt: skip
_FUSED = "(qkv=0 head d_head), (qkv=1 kv_head d_head), (qkv=2 kv_head d_head)"
_GPT2 = _family(
    "transformer", "wte", "h", "ln_f", "lm_head", "attn", norms="ln_1 ln_2",
    parts=transposed(projections("c_attn", "c_attn", "c_attn", "c_proj", _FUSED) | mlp("c_fc", "c_proj"))
    | dict(INTERFACE) | residual("output[0]", "output", "ln_2"),
)  # fmt: skip
_MAMBA = _family("backbone", "embeddings", "layers", "norm_f", "lm_head", "mixer", "", "norm", MAMBA)
_INTERLEAVED = "(head qkv=0 d_head), (kv_head qkv=1 d_head), (kv_head qkv=2 d_head)"

FAMILIES: Mapping[str, Family] = {
    "gpt2": _GPT2,
    "gpt_neo": _GPT2,
    "gptj": _GPT2,
    "gpt_neox": _family(
        "gpt_neox",
        "embed_in",
        "layers",
        "final_layer_norm",
        "lm_head",
        "attention",
        norms="input_layernorm post_attention_layernorm",
        parts=projections("query_key_value", "query_key_value", "query_key_value", "dense", _INTERLEAVED)
        | dict(INTERFACE)
        | mlp("dense_h_to_4h", "dense_4h_to_h")
        | residual("output[0]", "output"),
    ),
    "opt": _family("model.decoder", "embed_tokens", "layers", "final_layer_norm", "lm_head", "self_attn", ""),
    "bloom": _family("transformer", "word_embeddings", "h", "ln_f", "lm_head", "self_attention"),
    "falcon": _family("transformer", "word_embeddings", "h", "ln_f", "lm_head", "self_attention"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi3": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "mixtral": _family("model", "embed_tokens", "layers", "norm", "lm_head", "self_attn", "mlp block_sparse_moe"),
    "qwen2_moe": _LLAMA,
    "qwen3_moe": _LLAMA,
    "mamba": _MAMBA,
    "mamba2": _family("backbone", "embeddings", "layers", "norm_f", "lm_head", "mixer", "", "norm", MAMBA2),
    "falcon_mamba": _MAMBA,
}
"""By the `model_type` of the configuration."""

_MIXER_HINTS = ("self_attn", "attention", "self_attention", "attn", "mamba", "mixer", "ssm", "temporal_block")
_MLP_HINTS = ("mlp", "feed_forward", "ffn", "moe", "block_sparse_moe")
_NORM_HINTS = ("norm", "ln_f")


def family_of(model: nn.Module, model_type: str) -> tuple[Family | None, str]:
    """The family of a model, and how it was found: "table", "detected" or "unknown".

    A row of the table counts only if its modules exist: a checkpoint may be of the same type and built differently.
    """
    row = FAMILIES.get(model_type)
    if row is not None and _exists(model, row.layers) and _exists(model, row.embed):
        if not _exists(model, row.lm_head):  # its name differs between versions of transformers
            row = replace(row, lm_head=_path_of(model, _call(model, "get_output_embeddings")))
        return row, "table"
    found = detected(model)
    return found, "unknown" if found is None else "detected"


def detected(model: nn.Module) -> Family | None:
    """The family of an architecture that is not in the table, by its structure; None if it has no list of layers."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    lists = {path: module for path, module in lists.items() if len({type(each) for each in module}) <= 3}
    if not lists:
        return None
    layers = max(lists, key=lambda path: sum(parameter.numel() for parameter in lists[path].parameters()))
    body = layers.rpartition(".")[0]
    siblings = dict(model.get_submodule(body).named_children())
    norms = [name for name in siblings if any(hint in name for hint in _NORM_HINTS)]
    inner = [name for layer in lists[layers] for name, _ in layer.named_children()]
    return Family(
        _path_of(model, _call(model, "get_input_embeddings")),
        layers,
        (f"{body}.{norms[-1]}" if body else norms[-1]) if norms else "",
        _path_of(model, _call(model, "get_output_embeddings")),
        {hint: SSM if hint in _SSM_NAMES else ATTENTION for hint in _MIXER_HINTS if hint in inner},
        {hint: MOE if hint in _MOE_NAMES else MLP for hint in _MLP_HINTS if hint in inner},
        {},
        {},
    )


def _exists(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _call(model: nn.Module, method: str) -> nn.Module | None:
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _path_of(model: nn.Module, module: nn.Module | None) -> str:
    return next((path for path, each in model.named_modules() if each is module), "")
