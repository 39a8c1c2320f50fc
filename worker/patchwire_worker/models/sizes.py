"""Sizes: how many heads, channels and states the parts of a model have, as its configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "d_model": ("hidden_size", "n_embd", "d_model"),
    "head": ("num_attention_heads", "n_head", "num_heads"),
    "kv_head": ("num_key_value_heads", "num_kv_heads"),
    "d_head": ("head_dim", "attention_head_dim"),
    "d_mlp": (),
    "expert": ("num_local_experts", "num_experts", "n_routed_experts"),
    "choice": ("num_experts_per_tok",),
    "d_inner": ("intermediate_size", "mamba_d_ssm", "d_inner"),
    "d_state": ("state_size", "ssm_state_size", "mamba_d_state"),
    "dt_rank": ("time_step_rank", "mamba_dt_rank"),
    "group": ("n_groups", "mamba_n_groups", "mamba_ngroups"),
    "ssm_head": ("num_heads", "n_mamba_heads", "mamba_n_heads"),
    "d_ssm_head": ("head_dim", "mamba_head_dim", "mamba_d_head", "mamba_headdim"),
}
"""What configurations call each size."""
_OWN: Mapping[str, tuple[str, ...]] = {
    "head": ("num_heads", "num_attention_heads", "n_head"),
    "kv_head": ("num_key_value_heads", "num_kv_heads"),
    # DeepSeek's configuration calls the rotated part of a head `head_dim`.
    "d_head": ("qk_head_dim", "head_dim", "head_size"),
    "d_mlp": ("intermediate_size",),
    "d_inner": ("intermediate_size", "lru_width"),
    "d_state": ("ssm_state_size",),
    "dt_rank": ("time_step_rank",),
    "group": ("n_groups",),
    "ssm_head": ("num_heads",),
    "d_ssm_head": ("head_dim",),
}
"""What modules call their own, which counts before the configuration's."""


def sizes_of(config: Any, module: nn.Module) -> dict[str, int]:
    """The sizes of a part of a model, those that are known."""
    found = {"qkv": 3, "half": 2}
    for name, spellings in _SPELLINGS.items():
        for owner, words in ((module, _OWN.get(name, ())), (config, spellings)):
            values = [getattr(owner, word, None) for word in words]
            whole = [value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0]
            if whole:
                found[name] = whole[0]
                break
    if "head" in found:
        if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
            found["kv_head"] = 1
        found.setdefault("kv_head", found["head"])
        if "d_head" not in found and "d_model" in found:
            found["d_head"] = found["d_model"] // found["head"]
        found |= {"q": found["head"] * found["d_head"], "k": found["kv_head"] * found["d_head"]}
        found |= {"v": found["k"], "q_per_kv": found["head"] // found["kv_head"]}
    if "d_inner" in found:
        found |= {"x": found["d_inner"], "gate": found["d_inner"]}
        if "group" in found and "d_state" in found:
            found |= {"B": found["group"] * found["d_state"], "C": found["group"] * found["d_state"]}
        if "ssm_head" in found:
            found["dt"] = found["ssm_head"]
    return found
