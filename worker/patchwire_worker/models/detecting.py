"""Detecting: what can be told of an architecture that no table describes, and no more.

Its parts are found by the names that most architectures use, and count only if their tensors have the shape that the
configuration asks for. What is added to the residual stream is found by its numbers: on a few tokens, the input of some
module of the layer has to be the layer's input and what the mixer, or a norm after it, returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from patchwire.sites import INPUT, OUTPUT
from patchwire_worker.models import texts
from patchwire_worker.models.families import ATTENTION, FAMILIES, MLP, MOE, SSM, Family
from patchwire_worker.models.places import (
    EXPERTS,
    INTERFACE,
    SINKS,
    Place,
    Places,
    fused_mlp,
    gated_mlp,
    mlp,
    projections,
    residual,
    transposed,
)

_MIXERS: Mapping[str, str] = {
    **dict.fromkeys(("self_attn", "attention", "self_attention", "attn"), ATTENTION),
    **dict.fromkeys(("mamba", "mixer", "ssm", "rec", "temporal_block", "linear_attn"), SSM),
}
_MLPS: Mapping[str, str] = {
    **dict.fromkeys(("mlp", "feed_forward", "ffn"), MLP),
    **dict.fromkeys(("moe", "block_sparse_moe"), MOE),
}
_NORMS = ("norm", "ln_f")
_INPUTS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv"))
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_OF_OUTPUT = ("attn.z", "attn.W_O", "attn.b_O")
_FUSED = (("gate_up_proj", "down_proj"),)
_PLAIN = (
    ("up_proj", "down_proj"), ("c_fc", "c_proj"), ("fc1", "fc2"), ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)  # fmt: skip
_CLOSE = {torch.float32: 1e-5, torch.float64: 1e-9}
_ROUGHLY = 2e-2

Values = Callable[[str, str], Sequence[tuple[tuple[int | str, ...], Tensor]]]
"""What a side of a module held: its tensors, by where in the side each is."""


def family_of(model: nn.Module, model_type: str) -> tuple[Family | None, bool]:
    """The family of a model, if it has one, and whether it was detected.

    A row of the table counts only if its modules exist: a checkpoint may be of the same type and built differently.
    """
    row = FAMILIES.get(model_type)
    if row is not None and _exists(model, row.layers) and _exists(model, row.embed):
        if not _exists(model, row.lm_head):  # its name differs between versions of transformers
            head = _path_of(model, _call(model, "get_output_embeddings"))
            row = replace(row, lm_head=head, parts={**row.parts, **_tables("", head)})
        return row, False
    return detected(model), True


def detected(model: nn.Module) -> Family | None:
    """The family of an architecture that is not in the table, by its structure; None if it has no list of layers."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    lists = {path: module for path, module in lists.items() if len({type(each) for each in module}) <= 3}
    if not lists:
        return None
    layers = max(lists, key=lambda path: sum(parameter.numel() for parameter in lists[path].parameters()))
    body = layers.rpartition(".")[0]
    siblings = dict(model.get_submodule(body).named_children())
    norms = [name for name in siblings if any(hint in name for hint in _NORMS)]
    inner = [(name, module) for layer in lists[layers] for name, module in layer.named_children()]
    names = {name for name, _ in inner}
    embed = _path_of(model, _call(model, "get_input_embeddings"))
    head = _path_of(model, _call(model, "get_output_embeddings"))
    parts: dict[str, Place | tuple[Place, ...]] = dict(_tables(embed, head))
    for name, module in inner:
        if _MIXERS.get(name) == ATTENTION:
            parts |= _attention(module)
        elif name in _MLPS:
            parts |= _mlp(module)
    return Family(
        embed,
        layers,
        (f"{body}.{norms[-1]}" if body else norms[-1]) if norms else "",
        head,
        {name: kind for name, kind in _MIXERS.items() if name in names},
        {name: kind for name, kind in _MLPS.items() if name in names},
        {},
        parts,
    )


def _tables(embed: str, head: str) -> dict[str, Place]:
    found = {"model.W_E": Place(f"{embed}.weight", "vocab d_model")} if embed else {}
    return found | ({"model.W_U": Place(f"{head}.weight", "vocab d_model")} if head else {})


def _attention(module: nn.Module) -> Places:
    children = dict(module.named_children())
    inner = dict(SINKS if "sinks" in dict(module.named_parameters(recurse=False)) else INTERFACE)
    outputs = [name for name in _OUTPUTS if name in children]
    for names in _INPUTS:
        if outputs and all(name in children for name in names):
            found = _with_z(module, projections(*names, outputs[0]), outputs[0])
            return _as_stored(found, [children[name] for name in (*names, outputs[0])]) | inner
    if not outputs:
        return inner
    known = _with_z(module, projections("", "", "", outputs[0]), outputs[0])
    found = {name: place for name, place in known.items() if name in _OF_OUTPUT}
    return _as_stored(found, [children[outputs[0]]]) | inner


def _with_z(module: nn.Module, places: dict[str, Place], output: str) -> dict[str, Place]:
    """Places of attention; without the values of heads where the output projection is given something else."""
    return {name: place for name, place in places.items() if name != "attn.z" or texts.goes_straight(module, output)}


def _mlp(module: nn.Module) -> Places:
    children = dict(module.named_children())
    experts = dict(EXPERTS) if "experts" in children and "gate" in children else {}
    ways: tuple[tuple[tuple[tuple[str, ...], ...], Callable[..., dict[str, Place]]], ...]
    ways = ((_GATED, gated_mlp), (_FUSED, fused_mlp), (_PLAIN, mlp))
    for spellings, places in ways:
        for names in spellings:
            if all(name in children for name in names):
                return {**_as_stored(places(*names), [children[name] for name in names]), **experts}
    return experts


def _as_stored(places: Mapping[str, Place], modules: Sequence[nn.Module]) -> dict[str, Place]:
    """Places with weights as these modules have them; without, if that is not known."""
    if all(isinstance(module, nn.Linear) for module in modules):
        return dict(places)
    if all(isinstance(module, Conv1D) for module in modules):
        return transposed(places)
    return {name: place for name, place in places.items() if ".W_" not in name}


def completed(family: Family, model: nn.Module, values: Values) -> Family:
    """A detected family, with what is added to its residual stream, and its norms, as the numbers of a run show them.

    Args:
        family: What was detected.
        model: The model.
        values: What was at each side of each module in that run.
    """
    found: list[tuple[dict[str, Place], dict[str, str]]] = []
    for index, _ in model.get_submodule(family.layers).named_children():
        layer = f"{family.layers}.{index}"
        children = [name for name, _ in model.get_submodule(layer).named_children()]
        mixer = next((name for name in family.mixers if name in children), "")
        inner = next((name for name in family.mlps if name in children), "")
        if mixer and inner:
            found.append(_of_layer(layer, children, mixer, inner, values))
    if not found:
        return family
    # What is true of some layers only is not sure.
    parts = {name: place for name, place in found[0][0].items() if all(each.get(name) == place for each, _ in found)}
    norms = {name: norm for name, norm in found[0][1].items() if all(each.get(name) == norm for _, each in found)}
    return replace(family, parts={**family.parts, **parts}, norms=norms)


def _of_layer(
    layer: str, children: Sequence[str], mixer: str, inner: str, values: Values
) -> tuple[dict[str, Place], dict[str, str]]:
    enters, leaves = _first(values(layer, INPUT)), _first(values(layer, OUTPUT))
    if enters is None or leaves is None:
        return {}, {}
    given = {name: _first(values(f"{layer}.{name}", INPUT)) for name in children}
    returned = {name: _first(values(f"{layer}.{name}", OUTPUT)) for name in children}
    norms: dict[str, str] = {}
    for role, name in (("mixer_norm", mixer), ("mlp_norm", inner)):
        before = [each for each in children if ("norm" in each or "ln" in each) and _is(given[name], returned[each])]
        norms |= {role: before[0]} if len(before) == 1 else {}
    of_mixer = list(_updates(layer, mixer, children, values))
    of_inner = list(_updates(layer, inner, children, values))
    for name in children:
        if name == mixer or _is(given[name], enters):
            continue
        for at, update in of_mixer:
            if _is(given[name], enters + update):
                found = residual("", "", name) | {"mixer.update": Place(at, "batch seq d_model")}
                ends = [place for place, last in of_inner if _is(leaves, enters + update + last)]
                return found | ({"mlp.update": Place(ends[0], "batch seq d_model")} if ends else {}), norms
    for at, update in of_mixer:
        for place, last in of_inner:
            if _is(leaves, enters + update + last):
                return residual(at, place), norms
    return {}, norms


def _updates(layer: str, part: str, children: Sequence[str], values: Values) -> Iterator[tuple[str, Tensor]]:
    """What a part may add: what it returns, or what is made of that by a norm of the layer."""
    outputs = [(way, tensor) for way, tensor in values(f"{layer}.{part}", OUTPUT) if tensor.is_floating_point()]
    for way, tensor in outputs[:1]:
        yield f"output[{way[0]}]" if way else "output", tensor
        for name in children:
            if _is(_first(values(f"{layer}.{name}", INPUT)), tensor):
                after = _first(values(f"{layer}.{name}", OUTPUT))
                if after is not None:
                    yield f"^{name}.output", after


def _first(values: Sequence[tuple[tuple[int | str, ...], Tensor]]) -> Tensor | None:
    return next((tensor for _, tensor in values if tensor.is_floating_point()), None)


def _is(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape:
        return False
    scale = float(other.abs().max())
    return torch.allclose(one, other, rtol=0, atol=scale * _CLOSE.get(one.dtype, _ROUGHLY))


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
