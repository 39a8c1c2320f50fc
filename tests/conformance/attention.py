"""Attention models of Hugging Face's, taken apart by hand: what canonical values have to equal.

Nothing here knows of Patchwire. A `Family` says where the modules of one layer are, and cuts their outputs into heads
with plain indexing, one function for each way of writing it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

Heads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Family:
    """Where the modules of a layer are, relative to it."""

    attn: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Inside attention: three modules, or one."""
    cut: Callable[..., Heads] | None = None
    """Views of the heads in the output of the one module; each `[batch, seq, head, d_head]`."""
    out: str = "o_proj"
    up: str = "mlp.up_proj"
    gate: str = "mlp.gate_proj"
    """Empty if the MLP has none."""
    down: str = "mlp.down_proj"
    added: str = "self_attn"
    """Whose output is added to the residual stream."""
    added_mlp: str = "mlp"
    times: float = 1.0
    """By what that is multiplied."""
    parallel: bool = False
    scale: float | None = None
    """What scores are the products of queries and keys times; None for 1/sqrt(d_head)."""
    cap: float = 0.0
    layers: str = "model.layers"
    body: str = ""
    """Inside attention: what holds its modules."""


def in_a_row(fused: Tensor, heads: int, kv: int, size: int) -> Heads:
    """All queries, all keys, all values."""
    batch, seq, _ = fused.shape
    q, k = heads * size, kv * size
    return (
        fused[..., :q].view(batch, seq, heads, size),
        fused[..., q : q + k].view(batch, seq, kv, size),
        fused[..., q + k :].view(batch, seq, kv, size),
    )


def head_by_head(fused: Tensor, heads: int, kv: int, size: int) -> Heads:
    """Query, key and value of the first head, then those of the second."""
    batch, seq, _ = fused.shape
    each = fused.view(batch, seq, heads, 3 * size)
    return each[..., :size], each[..., size : 2 * size], each[..., 2 * size :]


def group_by_group(fused: Tensor, heads: int, kv: int, size: int) -> Heads:
    """The queries that share a key, the key, the value; then the next. The queries are a copy, if there are groups."""
    batch, seq, _ = fused.shape
    each = fused.view(batch, seq, kv, heads // kv + 2, size)
    return each[:, :, :, :-2].reshape(batch, seq, heads, size), each[:, :, :, -2], each[:, :, :, -1]


_GPT2 = Family("attn", ("c_attn",), in_a_row, "c_proj", "mlp.c_fc", "", "mlp.c_proj", "attn", layers="transformer.h")
_NEOX = Family(
    "attention", ("query_key_value",), head_by_head, "dense", "mlp.dense_h_to_4h", "", "mlp.dense_4h_to_h", "attention",
    layers="gpt_neox.layers",
)  # fmt: skip
_POSTNORM = Family(added="post_attention_layernorm", added_mlp="post_feedforward_layernorm")
_FALCON = replace(
    _NEOX, attn="self_attention", cut=group_by_group, added="self_attention", parallel=True, layers="transformer.h"
)
FAMILIES: dict[str, Family] = {
    "gemma2": replace(_POSTNORM, scale=20**-0.5, cap=5.0),
    "gemma3_text": replace(_POSTNORM, scale=20**-0.5),
    "olmo2": _POSTNORM,
    "granite": Family(times=0.3, scale=0.2),
    "phi3": Family(qkv=("qkv_proj",), cut=in_a_row, up="mlp.gate_up_proj[1]", gate="mlp.gate_up_proj[0]"),
    "stablelm_parallel": Family(parallel=True),
    "cohere": Family(parallel=True),
    "starcoder2": Family(up="mlp.c_fc", gate="", down="mlp.c_proj"),
    "gpt2": _GPT2,
    "gpt2_upcast": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_bigcode_heads": replace(_GPT2, cut=head_by_head),
    "gpt_neo": replace(_GPT2, qkv=Family.qkv, cut=None, out="out_proj", scale=1.0, body="attention"),
    "gptj": replace(_GPT2, qkv=Family.qkv, cut=None, out="out_proj", up="mlp.fc_in", down="mlp.fc_out", parallel=True),
    "gpt_neox": replace(_NEOX, parallel=True),
    "gpt_neox_sequential": _NEOX,
    "opt": Family(
        out="out_proj", up="fc1", gate="", down="fc2", added_mlp="fc2", scale=1.0, layers="model.decoder.layers"
    ),
    "bloom": replace(
        _NEOX,
        attn="self_attention",
        added="self_attention.dense",
        added_mlp="mlp.dense_4h_to_h",
        layers="transformer.h",
    ),
    "falcon": _FALCON,
    "falcon_grouped": _FALCON,
    "falcon_alibi": replace(_FALCON, parallel=False),
}


class Reference:
    """A model, one layer of which is looked at with hooks."""

    def __init__(self, name: str, model: PreTrainedModel, layer: int) -> None:
        self.family = FAMILIES.get(name, Family())
        self.model = model
        self.layer = model.get_submodule(f"{self.family.layers}.{layer}")
        self.index = layer
        config = model.config
        self.heads = int(config.num_attention_heads)
        self.kv = int(getattr(config, "num_key_value_heads", None) or self.heads)
        if name.startswith(("falcon", "gpt_bigcode")):
            grouped = getattr(config, "new_decoder_architecture", False)
            self.kv = config.num_kv_heads if grouped else 1 if config.multi_query else self.heads
        self.size = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)

    @property
    def attn(self) -> nn.Module:
        """The module with the projections."""
        return self.layer.get_submodule(".".join(each for each in (self.family.attn, self.family.body) if each))

    def module(self, path: str) -> nn.Module:
        """A module of the layer."""
        return self.layer.get_submodule(path.partition("[")[0])

    @property
    def has_mlp(self) -> bool:
        """Whether there are neurons that all tokens share."""
        return self._has(self.family.down)

    def _has(self, path: str) -> bool:
        try:
            self.module(path)
        except AttributeError:
            return False
        return True

    def run(self, ids: Tensor) -> dict[str, Tensor]:
        """The values in the layer, by hand."""
        family, found = self.family, dict[str, Tensor]()
        seen: dict[str, Tensor] = {}
        projections = [self.attn.get_submodule(each) for each in family.qkv]
        spots: list[tuple[str, nn.Module]] = [(f"qkv{index}", each) for index, each in enumerate(projections)]
        spots += [("out", self.attn.get_submodule(family.out)), ("added", self.module(family.added))]
        spots += [("layer", self.layer), ("attn", self.layer.get_submodule(family.attn))]
        spots += [("added_mlp", self.module(family.added_mlp))]
        if self.has_mlp:
            spots += [("down", self.module(family.down)), ("up", self.module(family.up))]
            spots += [("gate", self.module(family.gate))] if family.gate else []
        with contextlib.ExitStack() as stack:
            for key, module in spots:
                stack.enter_context(_watched(module, key, seen))
            found["logits"] = self.model(ids, use_cache=False).logits
        batch, seq = ids.shape
        outputs = [seen[f"qkv{index}.output"] for index in range(len(projections))]
        found |= dict(zip("qkv", self.cut(*outputs), strict=True))
        found["x"] = seen["attn.input"]
        found["z"] = seen["out.input"].view(batch, seq, self.heads, self.size)
        found["mixer.update"] = seen["added.output"] * family.times
        found["mlp.update"] = (seen["added_mlp.output"] * family.times).view(batch, seq, -1)
        found["attn_out"] = seen["out.output"]
        found["input"], found["output"] = seen["layer.input"], seen["layer.output"]
        if self.has_mlp:
            found["neurons"] = seen["down.input"].view(batch, seq, -1)
            found["mlp_out"] = seen["down.output"].view(batch, seq, -1)
            up, gate = seen["up.output"].view(batch, seq, -1), seen.get("gate.output")
            if family.gate and gate is not None:
                found["gate"] = gate.chunk(2, -1)[0] if "[" in family.gate else gate
                found["up"] = up.chunk(2, -1)[1] if "[" in family.up else up
            else:
                found["pre"] = up
        return {key: value.detach().clone() for key, value in found.items()}

    def cut(self, *outputs: Tensor) -> Heads:
        """Queries, keys and values of each head: views of the projections' outputs."""
        if self.family.cut is not None:
            return self.family.cut(*outputs, self.heads, self.kv, self.size)
        q, k, v = (each.view(*each.shape[:2], -1, self.size) for each in outputs)
        return q, k, v

    def repeated(self, kv: Tensor) -> Tensor:
        """Keys or values `[batch, seq, kv, size]`, one for each query."""
        return torch.stack([kv[:, :, head * kv.shape[2] // self.heads] for head in range(self.heads)], dim=2)

    def product(self, q_rot: Tensor, k_rot: Tensor) -> Tensor:
        """Scores `[batch, head, query, key]` as the paper has them, before biases and masks."""
        scale = self.family.scale or self.size**-0.5
        keys = self.repeated(k_rot)
        found = torch.stack(
            [q_rot[:, :, head] @ keys[:, :, head].transpose(1, 2) * scale for head in range(self.heads)], dim=1
        )
        return torch.tanh(found / self.family.cap) * self.family.cap if self.family.cap else found

    @contextlib.contextmanager
    def changed(self, what: str, change: Callable[[Tensor], None]) -> Iterator[None]:
        """Have a tensor changed in place: "q" (its first head), "z", "neurons" or "mixer.update"."""
        family = self.family
        if what == "q":
            module = self.attn.get_submodule(family.qkv[0])

            def hook(_: Any, __: Any, output: Tensor) -> Tensor:
                output = output.clone()
                if family.cut is group_by_group:
                    change(output.view(*output.shape[:2], self.kv, -1, self.size)[:, :, 0, 0])
                elif family.cut is not None:
                    change(family.cut(output, self.heads, self.kv, self.size)[0][:, :, 0])
                else:
                    change(output[..., : self.size])
                return output

            handle = module.register_forward_hook(hook)
        elif what == "mixer.update":

            def hook(_: Any, __: Any, output: Any) -> Any:
                first = (output[0] if isinstance(output, tuple) else output) * family.times
                change(first)
                first = first / family.times
                return (first, *output[1:]) if isinstance(output, tuple) else first

            handle = self.module(family.added).register_forward_hook(hook)
        else:
            module = self.attn.get_submodule(family.out) if what == "z" else self.module(family.down)

            def before(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
                value = args[0].clone()
                change(value)
                return (value,)

            handle = module.register_forward_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def scores_changed(self, change: Callable[[Tensor], None]) -> Iterator[None]:
        """Have what the softmax of attention is given changed in place, in this layer; in a model that has one."""
        layer, softmax = self.layer, F.softmax
        within = [False]

        def wrapped(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if within[0] and value.dim() == 4:
                value = value.clone()
                change(value)
            return softmax(value, *args, **kwargs)

        handles = [
            layer.register_forward_pre_hook(lambda *_: within.__setitem__(0, True)),
            layer.register_forward_hook(lambda *_: within.__setitem__(0, False)),
        ]
        F.softmax = wrapped
        try:
            yield
        finally:
            F.softmax = softmax
            for handle in handles:
                handle.remove()


@contextlib.contextmanager
def _watched(module: nn.Module, key: str, seen: dict[str, Tensor]) -> Iterator[None]:
    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        returned = output[0] if isinstance(output, tuple) else output
        # What comes later may change it in place.
        seen[f"{key}.input"], seen[f"{key}.output"] = given.clone(), returned.clone()

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
