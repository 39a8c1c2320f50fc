"""Small random Hugging Face models: the real code of each architecture, with weights that fit into a test.

`build("llama")` always gives the same numbers. The weights are larger than a fresh model's, so that every part of the
model matters: a change anywhere is visible in the logits, and no module is so weak that a mistake in it would hide in
the rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

import odd

VOCABULARY = 61
WIDTH = 24
LAYERS = 3

CORE = ("gpt2", "llama", "gpt_neox", "mamba", "mamba2")
"""The architectures that every test of conformance covers."""
SERVED = (*CORE, "odd")
"""What the server of `conftest.py` has: also a model that does what real ones do rarely (see odd.py)."""

_ATTENTION: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = _ATTENTION | {"num_key_value_heads": 2}
_SSM: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "state_size": 8,
    "conv_kernel": 4,
    "expand": 2,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 3,
    "mamba_d_head": 16,
    "mamba_n_groups": 3,
    "mamba_d_state": 5,
    "mamba_d_conv": 3,
    "mamba_expand": 2,
    "mamba_chunk_size": 4,
}
_MULTIPLIERS: dict[str, Any] = {
    "embedding_multiplier": 1.5,
    "lm_head_multiplier": 0.5,
    "mlp_multipliers": [0.7, 1.3],
    "key_multiplier": 0.6,
    "attention_out_multiplier": 0.8,
    "attention_in_multiplier": 1.2,
    "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.75,
}
_ZAMBA2: dict[str, Any] = _GROUPED | {
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "num_mem_blocks": 1,
    "adapter_rank": 3,
    "n_mamba_heads": 6,
    "mamba_ngroups": 3,
    "time_step_min": 1e-7,
    "mamba_d_state": 5,
    "mamba_d_conv": 3,
    "chunk_size": 4,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}


def _with(name: str, base: dict[str, Any], **changes: Any) -> Callable[[], PretrainedConfig]:
    return lambda: getattr(transformers, name)(**(base | changes))


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": _with("GPT2Config", _GPT2),
    "llama": _with("LlamaConfig", _GROUPED, tie_word_embeddings=False),
    "gpt_neox": _with("GPTNeoXConfig", _ATTENTION, tie_word_embeddings=False, use_parallel_residual=True),
    "mamba": _with("MambaConfig", _SSM, tie_word_embeddings=True, time_step_rank=6),
    "mamba2": _with("Mamba2Config", _SSM, num_heads=6, head_dim=8, n_groups=2, chunk_size=4, tie_word_embeddings=False),
    # The same architectures, built another way.
    "gpt2_untied": _with("GPT2Config", _GPT2, tie_word_embeddings=False, activation_function="relu"),
    "llama_tied": _with("LlamaConfig", _ATTENTION, tie_word_embeddings=True, attention_bias=True, head_dim=10),
    "gpt_neox_sequential": _with("GPTNeoXConfig", _ATTENTION, use_parallel_residual=False, rotary_pct=1.0),
    "mamba_untied": _with("MambaConfig", _SSM, tie_word_embeddings=False, use_bias=True),
    # Others.
    "opt": _with(
        "OPTConfig", _ATTENTION, ffn_dim=40, word_embed_proj_dim=WIDTH, do_layer_norm_before=True, init_std=0.3
    ),
    "bloom": _with("BloomConfig", _ATTENTION, n_layer=LAYERS, n_head=4),
    "gptj": _with("GPTJConfig", _GPT2, rotary_dim=4),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "falcon": _with("FalconConfig", _ATTENTION, multi_query=True, alibi=False),
    "mistral": _with("MistralConfig", _GROUPED, sliding_window=4),
    "qwen2": _with("Qwen2Config", _GROUPED),
    "qwen3": _with("Qwen3Config", _GROUPED, head_dim=8),
    "gemma2": _with("Gemma2Config", _GROUPED, head_dim=8, sliding_window=4),
    "gemma3_text": _with("Gemma3TextConfig", _GROUPED, head_dim=8, sliding_window=4),
    "phi3": _with("Phi3Config", _GROUPED),
    "olmo2": _with("Olmo2Config", _GROUPED),
    "falcon_mamba": _with("FalconMambaConfig", _SSM),
    "mixtral": _with("MixtralConfig", _GROUPED | _EXPERTS, num_local_experts=4),
    "qwen2_moe": _with(
        "Qwen2MoeConfig", _GROUPED | _EXPERTS, num_experts=4, shared_expert_intermediate_size=20, decoder_sparse_step=1
    ),
    "jamba": _with(
        "JambaConfig",
        _GROUPED,
        num_hidden_layers=4,
        attn_layer_period=4,
        attn_layer_offset=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=8,
        mamba_dt_rank=6,
    ),
    "bamba": _with("BambaConfig", _GROUPED | _MAMBA2, attn_layer_indices=[1]),
    "falcon_h1": _with("FalconH1Config", _GROUPED | _MAMBA2, mamba_d_ssm=30, mamba_d_head=10, **_MULTIPLIERS),
    "falcon_h1_norm": _with(
        "FalconH1Config", _GROUPED | _MAMBA2, mamba_d_ssm=30, mamba_d_head=10, mamba_rms_norm=True, **_MULTIPLIERS
    ),
    "falcon_h1_norm_after": _with(
        "FalconH1Config",
        _GROUPED | _MAMBA2,
        mamba_d_ssm=30,
        mamba_d_head=10,
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
    ),
    "granitemoehybrid": _with(
        "GraniteMoeHybridConfig",
        _GROUPED | _MAMBA2,
        layer_types=["mamba", "attention", "mamba"],
        shared_intermediate_size=20,
        num_local_experts=4,
        num_experts_per_tok=2,
        residual_multiplier=0.5,
        embedding_multiplier=2.0,
        logits_scaling=0.5,
        attention_multiplier=0.2,
    ),
    "nemotron_h": _with(
        "NemotronHConfig",
        _GROUPED,
        head_dim=6,
        layers_block_type=["mamba", "attention", "mlp", "moe", "mamba"],
        num_hidden_layers=5,
        ssm_state_size=5,
        mamba_num_heads=6,
        mamba_head_dim=8,
        n_groups=3,
        conv_kernel=3,
        chunk_size=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        moe_shared_expert_intermediate_size=16,
        mlp_bias=True,
        time_step_min=1e-7,
    ),
    "zamba2": _with("Zamba2Config", _ZAMBA2),
    "zamba2_adapted": _with(
        "Zamba2Config", _ZAMBA2, num_key_value_heads=4, use_shared_attention_adapter=True, use_mem_rope=True
    ),
    "recurrent_gemma": _with(
        "RecurrentGemmaConfig",
        _ATTENTION,
        num_key_value_heads=1,
        attention_window_size=4,
        block_types=("recurrent", "attention"),
        conv1d_width=3,
        w_init_variance_scale=2.0,
    ),
    "recurrent_gemma_wide": _with(
        "RecurrentGemmaConfig",
        _GROUPED,
        head_dim=8,
        lru_width=32,
        attention_window_size=64,
        block_types=("recurrent", "attention"),
        conv1d_width=4,
        w_init_variance_scale=2.0,
    ),
    # With sizes that are all different.
    "mamba_odd": _with("MambaConfig", _SSM, state_size=5, conv_kernel=3, time_step_rank=7),
    "mamba2_odd": _with(
        "Mamba2Config", _SSM, state_size=5, conv_kernel=3, num_heads=6, head_dim=8, n_groups=3, chunk_size=4
    ),
    "falcon_mamba_odd": _with("FalconMambaConfig", _SSM, state_size=5, conv_kernel=3, time_step_rank=7),
    # Not a real architecture: see odd.py.
    "odd": odd.OddConfig,
}

# The same again, with lengths that all differ: no dimension can be taken for another. In the first group heads are as
# wide as the configuration says, in the second hidden_size = heads x head size.
_APART: dict[str, Any] = _ATTENTION | {
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 44,
    "tie_word_embeddings": False,
}
_TOGETHER: dict[str, Any] = _ATTENTION | {
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "hidden_size": 30,
    "intermediate_size": 44,
    "ffn_dim": 44,
    "tie_word_embeddings": False,
}
_SHARED: dict[str, Any] = _TOGETHER | {"num_attention_heads": 6, "hidden_size": 36, "num_key_value_heads": 2}
_SLIDING: dict[str, Any] = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
_ROUTED: dict[str, Any] = _EXPERTS | {"num_experts": 5, "decoder_sparse_step": 1}

UNEVEN: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _with("LlamaConfig", _APART, num_attention_heads=3, num_key_value_heads=1, head_dim=10),
    "llama_biased": _with("LlamaConfig", _APART, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": _with("MistralConfig", _APART, sliding_window=4),
    "qwen2": _with("Qwen2Config", _SHARED | _SLIDING, use_sliding_window=True),
    "qwen3": _with("Qwen3Config", _APART),
    "gemma": _with("GemmaConfig", _APART),
    "gemma2": _with("Gemma2Config", _APART | _SLIDING, attn_logit_softcapping=5.0, query_pre_attn_scalar=20),
    "gemma3_text": _with("Gemma3TextConfig", _APART | _SLIDING, query_pre_attn_scalar=20),
    "smollm3": _with("SmolLM3Config", _SHARED, no_rope_layers=[1, 0]),
    "granite": _with("GraniteConfig", _SHARED, residual_multiplier=0.3, attention_multiplier=0.2, logits_scaling=2.0),
    "phi3": _with("Phi3Config", _SHARED, sliding_window=4),
    "olmo": _with("OlmoConfig", _SHARED, clip_qkv=0.7),
    "olmo2": _with("Olmo2Config", _SHARED),
    "stablelm": _with("StableLmConfig", _SHARED, use_qkv_bias=True, partial_rotary_factor=0.34),
    "stablelm_parallel": _with(
        "StableLmConfig", _SHARED, use_parallel_residual=True, qk_layernorm=True, partial_rotary_factor=0.34
    ),
    "cohere": _with("CohereConfig", _SHARED, use_qk_norm=True, logit_scale=0.4),
    "starcoder2": _with("Starcoder2Config", _SHARED, sliding_window=None),
    "gpt2": _with("GPT2Config", _GPT2, n_embd=30, n_layer=2, n_head=3, n_inner=44),
    "gpt2_upcast": _with("GPT2Config", _GPT2, n_embd=30, n_layer=2, n_head=3, reorder_and_upcast_attn=True),
    "gpt_neo": _with(
        "GPTNeoConfig",
        {key: value for key, value in _TOGETHER.items() if key not in ("num_hidden_layers", "num_attention_heads")},
        num_layers=2, num_heads=3, attention_types=[[["global", "local"], 1]], window_size=4,
    ),
    "gptj": _with("GPTJConfig", _GPT2, n_embd=30, n_layer=2, n_head=3, n_inner=44, rotary_dim=4),
    "gpt_bigcode": _with("GPTBigCodeConfig", _GPT2, n_embd=30, n_layer=2, n_head=3, n_inner=44, multi_query=True),
    "gpt_bigcode_heads": _with("GPTBigCodeConfig", _GPT2, n_embd=30, n_layer=2, n_head=3, multi_query=False),
    "gpt_neox": _with("GPTNeoXConfig", _TOGETHER, use_parallel_residual=True),
    "gpt_neox_sequential": _with("GPTNeoXConfig", _TOGETHER, use_parallel_residual=False),
    "opt": _with("OPTConfig", _TOGETHER, word_embed_proj_dim=30, init_std=0.3),
    "bloom": _with("BloomConfig", _TOGETHER, n_layer=2, n_head=3),
    "falcon": _with("FalconConfig", _TOGETHER, multi_query=True, alibi=False, bias=True),
    "falcon_grouped": _with("FalconConfig", _SHARED, new_decoder_architecture=True, num_kv_heads=2, alibi=False),
    "falcon_alibi": _with("FalconConfig", _TOGETHER, multi_query=False, alibi=True, parallel_attn=False),
    "mixtral": _with("MixtralConfig", _APART | _EXPERTS, num_local_experts=5),
    "qwen2_moe": _with("Qwen2MoeConfig", _SHARED | _ROUTED, shared_expert_intermediate_size=20),
    "qwen3_moe": _with("Qwen3MoeConfig", _APART | _ROUTED, mlp_only_layers=[0], norm_topk_prob=True),
}  # fmt: skip
"""Every family with attention; not one of the names here is served to other tests."""


def uneven(name: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a name in `UNEVEN`, ready to run."""
    return _built(UNEVEN[name](), dtype, 0)


def build(
    name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int | None = None
) -> PreTrainedModel:
    """The model of a name in `CONFIGS`, ready to run.

    Args:
        name: Which.
        dtype: The element type of its weights.
        seed: Another one gives other weights.
        layers: How many layers it has, if not as many as the configuration says.
    """
    config = CONFIGS[name]()
    if layers is not None:
        config.num_hidden_layers = layers
    return _built(config, dtype, seed)


def _built(config: PretrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start as ones and biases as zeros: as good as absent
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).requires_grad_(False)


def save(name: str, directory: str | Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write the model that `build` gives as a checkpoint, without a tokenizer; the directory."""
    build(name, dtype=dtype, seed=seed).save_pretrained(directory)
    return Path(directory)


def prompt(length: int, *, seed: int = 0) -> list[int]:
    """Token ids, the same for the same length and seed."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    ids: list[int] = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
    return ids
