"""What the parts of each architecture are called: the data behind the canonical names.

One row for a family of Hugging Face's `model_type`s; every path is that of a module. A model type without a row is
looked at instead (detecting.py), and what was found is reported. To add an architecture, add a row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from patchwire_worker.models.places import (
    BLOOM,
    EXPERTS,
    FALCON,
    FALCON_H1,
    FALCON_MAMBA,
    INTERFACE,
    MAMBA,
    MAMBA2,
    RG_LRU,
    ROUTER,
    ZAMBA2,
    Place,
    Places,
    either,
    fused_mlp,
    gated_mlp,
    in_one_row,
    inside,
    mlp,
    only,
    projections,
    residual,
    transposed,
    whole_mlp,
)

ATTENTION = "attention"
SSM = "ssm"
MLP = "mlp"
MOE = "moe"
LAYER = "(layer)"
"""In the place of an MLP's name: its parts are the layer's own."""


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
    """Inside a layer: what mixes tokens, and whether it is `ATTENTION` or `SSM`; of several in one layer, the first is
    the mixer. "mixer?in_proj" is only there if it has a part `in_proj`."""
    mlps: Mapping[str, str]
    """Inside a layer: what works on each token, and whether it is `MLP` or `MOE`; a layer may have none. `LAYER` if it
    is no module of its own; "mixer?up_proj" is only there if it has a part `up_proj`."""
    norms: Mapping[str, str]
    """Inside a layer: the norms before the mixer ("mixer_norm") and before the MLP ("mlp_norm"); "a|b" is the first
    that there is, and "a?word" only there if the configuration says so."""
    parts: Places
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
    parts: Places = MappingProxyType({}),
) -> Family:
    return Family(
        f"{body}.{embed}",
        f"{body}.{layers}",
        f"{body}.{norm}",
        head,
        {name: SSM if re.split("[.?]", name)[-1] in _SSM_NAMES else ATTENTION for name in mixers.split()},
        {name: MOE if name in _MOE_NAMES else MLP for name in mlps.split()},
        dict(zip(("mixer_norm", "mlp_norm"), norms.split(), strict=False)),
        {
            "model.W_E": Place(f"{body}.{embed}.weight", "vocab d_model"),
            "model.W_U": Place(f"{head}.weight", "vocab d_model"),
            **parts,
        },
    )


_SSM_NAMES = frozenset({"mamba", "mixer", "ssm", "rec", "temporal_block", "linear_attn", "in_proj", "rg_lru"})
_MOE_NAMES = frozenset({"moe", "block_sparse_moe", "experts"})

_FUSED = "(qkv=0 head d_head), (qkv=1 kv_head d_head), (qkv=2 kv_head d_head)"
_INTERLEAVED = "(head qkv=0 d_head), (kv_head qkv=1 d_head), (kv_head qkv=2 d_head)"
_SIDE_BY_SIDE = "q!|k|v(head d_head), q|k!|v(kv_head d_head), q|k|v!(kv_head d_head)"
_SHARED_KEYS = "(kv_head q_per_kv+2<q_per_kv d_head), (kv_head q_per_kv+2=-2 d_head), (kv_head q_per_kv+2=-1 d_head)"

_NORMS = "input_layernorm post_attention_layernorm"
_SEPARATE = projections("q_proj", "k_proj", "v_proj", "o_proj") | dict(INTERFACE)
_GATED = gated_mlp("gate_proj", "up_proj", "down_proj")
_NEOX_MLP = mlp("dense_h_to_4h", "dense_4h_to_h")
_BEFORE_MLP = residual(middle="post_attention_layernorm")


def _like_llama(parts: Places, norms: str = _NORMS, mlps: str = "mlp", mixers: str = "self_attn") -> Family:
    return _family("model", "embed_tokens", "layers", "norm", "lm_head", mixers, mlps, norms, parts)


def _like_gpt2(parts: Places, norms: str = "ln_1 ln_2") -> Family:
    return _family("transformer", "wte", "h", "ln_f", "lm_head", "attn", norms=norms, parts=parts)


_LLAMA = _like_llama(_SEPARATE | _GATED | _BEFORE_MLP)
_SPARSE = _like_llama({**_SEPARATE, **_GATED, **EXPERTS, **_BEFORE_MLP}, mlps="mlp block_sparse_moe")
_GEMMA2 = _like_llama(
    _SEPARATE
    | _GATED
    | residual("^post_attention_layernorm.output", "^post_feedforward_layernorm.output", "pre_feedforward_layernorm"),
    "input_layernorm pre_feedforward_layernorm",
)
_ADDED: Places = {"mixer.update": (Place("output[0]", "batch seq d_model"), Place("output", "batch seq d_model"))}


def _like_mamba(parts: Places) -> Family:
    return _family("backbone", "embeddings", "layers", "norm_f", "lm_head", "mixer", "", "norm", {**parts, **_ADDED})


def _hybrid(parts: Places, middle: str, **where: str) -> Family:
    """Layers of attention and of an SSM."""
    row = {
        "body": "model", "embed": "embed_tokens", "layers": "layers", "norm": "final_layernorm", "head": "lm_head",
        "mixers": "self_attn mamba", "mlps": "feed_forward", "norms": f"input_layernorm {middle}", **where,
    }  # fmt: skip
    return _family(**row, parts={**_SEPARATE, **_GATED, **residual("", middle=middle), **_ADDED, **parts})


FAMILIES: Mapping[str, Family] = {
    "gpt2": _like_gpt2(
        transposed(projections("c_attn", "c_attn", "c_attn", "c_proj", _FUSED) | mlp("c_fc", "c_proj"))
        # Scores in higher precision, as an option says, are computed by a function of its own, if step by step.
        | either(only(INTERFACE, "!reorder_and_upcast_attn"), inside("", "_upcast_and_reordered_attn"))
        | residual(middle="ln_2")
    ),
    "gpt_neo": _like_gpt2(
        projections("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj")
        | inside("attention", "_attn")
        | mlp("c_fc", "c_proj")
        | residual(middle="ln_2")
    ),
    "gptj": _like_gpt2(
        projections("q_proj", "k_proj", "v_proj", "out_proj")
        | inside("", "_attn")
        | mlp("fc_in", "fc_out")
        | residual(),
        "ln_1 ln_1",
    ),
    "gpt_bigcode": _like_gpt2(
        # With one key for all queries, the three are side by side; else those of each head are together.
        either(
            projections("c_attn", "c_attn", "c_attn", "c_proj", _INTERLEAVED),
            projections("c_attn", "c_attn", "c_attn", "c_proj", _SIDE_BY_SIDE),
        )
        | dict(INTERFACE)
        | mlp("c_fc", "c_proj")
        | residual(middle="ln_2")
    ),
    "gpt_neox": _family(
        "gpt_neox", "embed_in", "layers", "final_layer_norm", "lm_head", "attention", norms=_NORMS,
        parts=projections("query_key_value", "query_key_value", "query_key_value", "dense", _INTERLEAVED)
        | dict(INTERFACE) | _NEOX_MLP | _BEFORE_MLP,
    ),
    "opt": _family(
        "model.decoder", "embed_tokens", "layers", "final_layer_norm", "lm_head", "self_attn", LAYER,
        "self_attn_layer_norm?do_layer_norm_before final_layer_norm?do_layer_norm_before",
        {
            **projections("q_proj", "k_proj", "v_proj", "out_proj"), **INTERFACE,
            **in_one_row(mlp("fc1", "fc2") | whole_mlp("fc1", "fc2") | residual("", "fc2.output")), **residual(mlp=""),
            # The smallest but one normalizes the stream itself, after each addition; and its embeddings are narrower.
            "layer.resid_mid": (
                Place(":@final_layer_norm/output", "(batch seq) d_model", when="do_layer_norm_before"),
                Place("self_attn_layer_norm.output", "batch seq d_model"),
            ),
            "model.W_E": (
                Place("model.decoder.embed_tokens.weight", "vocab d_model"),
                Place("model.decoder.embed_tokens.weight", "vocab d_embed", form="vocab d_embed"),
            ),
            "model.W_U": (
                Place("lm_head.weight", "vocab d_model"),
                Place("lm_head.weight", "vocab d_embed", form="d_embed vocab"),
            ),
        },
    ),
    "bloom": _family(
        "transformer", "word_embeddings", "h", "ln_f", "lm_head", "self_attention", norms=_NORMS,
        parts=projections("query_key_value", "query_key_value", "query_key_value", "dense", _INTERLEAVED)
        | dict(BLOOM) | _NEOX_MLP
        # What these modules return has the residual stream in it already.
        | residual("dense.output", "dense_4h_to_h.output")
        | {"layer.resid_mid": Place("self_attention.output[0]", "batch seq d_model")},
    ),
    "falcon": _family(
        "transformer", "word_embeddings", "h", "ln_f", "lm_head", "self_attention",
        norms="ln_attn|input_layernorm ln_mlp|post_attention_layernorm|input_layernorm",
        parts=projections("query_key_value", "query_key_value", "query_key_value", "dense", _SHARED_KEYS)
        | dict(FALCON) | _NEOX_MLP | _BEFORE_MLP,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "smollm3": _LLAMA,
    # What is added to the stream is multiplied before: no tensor holds it, so it is computed.
    "granite": _like_llama(_SEPARATE | _GATED | residual("", "", "post_attention_layernorm")),
    "phi3": _like_llama(
        projections("qkv_proj", "qkv_proj", "qkv_proj", "o_proj", _SIDE_BY_SIDE)
        | dict(INTERFACE)
        | fused_mlp("gate_up_proj", "down_proj")
        | _BEFORE_MLP
    ),
    "olmo": _LLAMA,
    "olmo2": _like_llama(
        _SEPARATE
        | _GATED
        | residual("^post_attention_layernorm.output", "^post_feedforward_layernorm.output", "mlp"),
        "",
    ),
    "stablelm": _like_llama(
        _SEPARATE | _GATED | _BEFORE_MLP, "input_layernorm post_attention_layernorm|input_layernorm"
    ),
    "cohere": _like_llama(_SEPARATE | _GATED | residual(), "input_layernorm input_layernorm"),
    "starcoder2": _like_llama(_SEPARATE | mlp("c_fc", "c_proj") | _BEFORE_MLP),
    "mixtral": _SPARSE,
    "qwen2_moe": _SPARSE,
    "qwen3_moe": _SPARSE,
    "mamba": _like_mamba(MAMBA),
    "mamba2": _like_mamba(MAMBA2),
    "falcon_mamba": _like_mamba(FALCON_MAMBA),
    "jamba": _hybrid({**FALCON_MAMBA, **ROUTER}, "pre_ff_layernorm"),
    "bamba": _hybrid(MAMBA2, "pre_ff_layernorm"),
    # The activation is of the multiplied gate.
    "falcon_h1": _hybrid(
        {**FALCON_H1, **dict.fromkeys(("mlp.pre", "mlp.gate"), Place("act_fn.input", "batch seq d_mlp"))},
        "pre_ff_layernorm", mixers="mamba self_attn",
    ),
    "recurrent_gemma": _hybrid(
        RG_LRU, "channel_pre_norm", norm="final_norm", mixers="temporal_block?q_proj temporal_block?rg_lru",
        mlps="mlp_block", norms="temporal_pre_norm channel_pre_norm",
    ),
    # What is added to the stream is multiplied before, and the experts have company: both are computed.
    "granitemoehybrid": _like_llama(
        {
            **_SEPARATE, **MAMBA2, **ROUTER, **fused_mlp("input_linear", "output_linear"),
            **residual("", "", "post_attention_layernorm"),
        },
        mixers="self_attn mamba", mlps="block_sparse_moe shared_mlp",
    ),
    "nemotron_h": _family(
        "model", "embeddings", "layers", "norm_f", "lm_head", "mixer?q_proj mixer?in_proj",
        "mixer?up_proj mixer?experts", "norm norm",
        {**_SEPARATE, **MAMBA2, **mlp("up_proj", "down_proj"), **EXPERTS, **residual(""), **_ADDED},
    ),
    "zamba2": _family(
        "model", "embed_tokens", "layers", "final_layernorm", "lm_head",
        "mamba mamba_decoder.mamba shared_transformer.self_attn", "shared_transformer.feed_forward",
        "mamba_decoder.input_layernorm|input_layernorm shared_transformer.pre_ff_layernorm",
        {**ZAMBA2, "mixer.update": Place("output", "batch seq d_model")},
    ),
}  # fmt: skip
"""By the `model_type` of the configuration."""
