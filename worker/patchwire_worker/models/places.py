"""Places: where the values inside the parts of an architecture are, as tables.

`FORMS` is the vocabulary: every canonical value and parameter, with its dimensions, the same for all architectures. The
tables below it say where each is in the modules of one way of writing a model; a family (families.py) puts several
together. An address is relative to the module that the part is; "^" starts at the layer instead. After a ":" comes an
operation in that module's forward, and after each "/" one in the function that it calls, as texts.py finds them; "[*]"
means all times that it runs, once for each token. How the tensor there is laid out is said as in layouts.py. To add an
architecture, say what differs from those that there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from patchwire_worker.models import layouts


@dataclass(frozen=True)
class Place:
    """Where a value is."""

    at: str
    """Its address, relative to the part's module; of a parameter, the parameter's path."""
    layout: str
    """How the tensor there is laid out."""
    in_steps: str = ""
    """The address in the steps of a generation after the first, if it is another."""
    layout_in_steps: str = ""
    """The layout there."""
    form: str = ""
    """Its dimensions, if they are others than in most architectures."""
    when: str = ""
    """What the configuration has to say for it to be there: "alibi", "!alibi multi_query"."""

    def suits(self, config: Any) -> bool:
        """Whether the configuration says so."""
        return all(bool(getattr(config, each.lstrip("!"), False)) != each.startswith("!") for each in self.when.split())


Places = Mapping[str, Place | tuple[Place, ...]]
"""Where values are, by what they are of and their name; of several places, the first that a model has."""


@dataclass(frozen=True)
class Formula:
    """A value that is computed from others."""

    name: str
    """What the client computes it with."""
    needs: tuple[str, ...]
    """The values and parameters of the same part that it is computed from; "^" before those of the layer."""
    form: str
    """Its dimensions; "{A_log}" is the first dimension of that parameter."""


FORMS: Mapping[str, str] = {
    "model.W_E": "vocab d_model",
    "model.W_U": "d_model vocab",
    "layer.resid_mid": "batch seq d_model",
    "mixer.update": "batch seq d_model",
    "mixer.output": "batch seq d_model",
    "attn.update": "batch seq d_model",
    "ssm.update": "batch seq d_model",
    "mlp.update": "batch seq d_model",
    "attn.q": "batch seq head d_head",
    "attn.k": "batch seq kv_head d_head",
    "attn.v": "batch seq kv_head d_head",
    "attn.q_rot": "batch seq head d_head",
    "attn.k_rot": "batch key kv_head d_head",
    "attn.scores": "batch head query key",
    "attn.pattern": "batch head query key",
    "attn.z": "batch seq head d_head",
    "attn.W_Q": "head d_model d_head",
    "attn.W_K": "kv_head d_model d_head",
    "attn.W_V": "kv_head d_model d_head",
    "attn.W_O": "head d_head d_model",
    "attn.b_Q": "head d_head",
    "attn.b_K": "kv_head d_head",
    "attn.b_V": "kv_head d_head",
    "attn.b_O": "d_model",
    "mlp.pre": "batch seq d_mlp",
    "mlp.gate": "batch seq d_mlp",
    "mlp.up": "batch seq d_mlp",
    "mlp.neurons": "batch seq d_mlp",
    "mlp.W_in": "d_model d_mlp",
    "mlp.W_gate": "d_model d_mlp",
    "mlp.W_out": "d_mlp d_model",
    "mlp.b_in": "d_mlp",
    "mlp.b_gate": "d_mlp",
    "mlp.b_out": "d_model",
    "mlp.input": "batch seq d_model",
    "mlp.output": "batch seq d_model",
    "mlp.router": "batch seq expert",
    "mlp.chosen_experts": "batch seq choice",
    "ssm.x_in": "batch seq d_inner",
    "ssm.conv": "batch seq d_inner",
    "ssm.u": "batch seq d_inner",
    "ssm.gate": "batch seq d_inner",
    "ssm.gate_act": "batch seq d_inner",
    "ssm.delta": "batch seq d_inner",
    "ssm.B": "batch seq d_state",
    "ssm.C": "batch seq d_state",
    "ssm.scan": "batch seq d_inner",
    "ssm.state": "batch seq d_inner d_state",
    "ssm.A_log": "d_inner d_state",
    "ssm.D": "d_inner",
    "ssm.W_in": "d_model d_inner",
    "ssm.W_gate": "d_model d_inner",
    "ssm.W_out": "d_inner d_model",
    "ssm.b_in": "d_inner",
    "ssm.b_gate": "d_inner",
    "ssm.b_out": "d_model",
}
"""The dimensions of every canonical value, by what it is of and its name."""

FORMULAS: Mapping[str, Formula] = {
    "attn.head_out": Formula("head_out", ("z", "W_O"), "batch seq head d_model"),
    "mixer.update": Formula("mixer_update", ("^resid_mid",), "batch seq d_model"),
    "mlp.update": Formula("mlp_update", ("^resid_mid",), "batch seq d_model"),
    "ssm.pattern": Formula("ssm_pattern", ("delta", "B", "C", "A_log"), "batch {A_log} query key"),
}
"""What is computed, where no tensor of the model holds it, and how."""

INTERFACE: Mapping[str, Place] = {
    "attn.q_rot": Place(':attention_interface()/input["args"][1]', "batch head seq d_head"),
    "attn.k_rot": Place(':attention_interface()/input["args"][2]', "batch kv_head key d_head"),
    "attn.scores": Place(':attention_interface()/softmax()/input["args"][0]', "batch head query key"),
    "attn.pattern": Place(":attention_interface()/dropout()/output", "batch head query key"),
}
"""Attention through transformers' interface: one call gets queries, keys and values, as the product uses them."""


def inside(module: str, function: str) -> dict[str, Place]:
    """Attention in a function of the module's own, which is given queries, keys and values as the product uses them."""
    at = f"{module}:{function}()"
    return {
        "attn.q_rot": Place(f'{at}/input["args"][0]', "batch head seq d_head"),
        "attn.k_rot": Place(f'{at}/input["args"][1]', "batch kv_head key d_head"),
        "attn.scores": Place(f'{at}/softmax()/input["args"][0]', "batch head query key"),
        "attn.pattern": Place(f"{at}/attn_dropout()/output", "batch head query key"),
    }


BLOOM: Mapping[str, Place] = {
    "attn.q_rot": Place(":_reshape()/output[0]", "batch head seq d_head"),
    "attn.k_rot": Place(
        ":_reshape()/output[1]", "batch kv_head key d_head", ":update()/output[0]", "batch kv_head key d_head"
    ),
    "attn.scores": Place(':softmax()/input["args"][0]', "batch head query key"),
    "attn.pattern": Place(":attention_dropout()/output", "batch head query key"),
}
"""Attention in the module's forward, with a bias for each distance in place of rotations (Press et al. 2022)."""

FALCON: Places = {
    # The queries that share a key are apart from those that share the next, until this.
    "attn.q": Place(":_split_heads()/output[0]", "batch seq head d_head"),
    "attn.q_rot": (
        Place(":apply_rotary_pos_emb()/output[0]", "batch head seq d_head", when="!alibi"),
        Place(":query_layer=/output", "batch head seq d_head"),
    ),
    "attn.k_rot": (
        # The product has a copy of the key for each query that shares it.
        Place(
            ":apply_rotary_pos_emb()/output[1]", "batch head key d_head", ":update()/output[0]",
            "batch head key d_head", "batch key head d_head", when="new_decoder_architecture !alibi",
        ),
        Place(
            ":apply_rotary_pos_emb()/output[1]", "batch kv_head key d_head", ":update()/output[0]",
            "batch kv_head key d_head", when="!alibi",
        ),
        Place(
            ":key_layer=/output", "batch head key d_head", ":update()/output[0]", "batch head key d_head",
            "batch key head d_head", when="new_decoder_architecture",
        ),
        Place(":key_layer=/output", "batch kv_head key d_head", ":update()/output[0]", "batch kv_head key d_head"),
    ),
    "attn.scores": (
        Place(':softmax()[0]/input["args"][0]', "batch head query key", when="!alibi"),
        Place(':softmax()[1]/input["args"][0]', "batch head query key"),
    ),
    "attn.pattern": (
        Place(":softmax()[0]/output", "batch head query key", when="!alibi"),
        Place(":attention_dropout()/output", "batch head query key"),
    ),
}  # fmt: skip
"""Attention in the module's forward, by a kernel or step by step as the configuration says."""


def projections(
    q: str, k: str, v: str, o: str, split: str = "(head d_head), (kv_head d_head), (kv_head d_head)"
) -> dict[str, Place]:
    """Attention whose queries, keys and values are outputs of linear modules; they may be the same module's."""
    found = {}
    for name, module, layout in zip("qkv", (q, k, v), split.split(", "), strict=True):
        found[f"attn.{name}"] = Place(f"{module}.output", f"batch seq {layout}")
        found[f"attn.W_{name.upper()}"] = Place(f"{module}.weight", f"{layout} d_model")
        found[f"attn.b_{name.upper()}"] = Place(f"{module}.bias", layout)
    return found | {
        "attn.z": Place(f"{o}.input", "batch seq (head d_head)"),
        "attn.W_O": Place(f"{o}.weight", "d_model (head d_head)"),
        "attn.b_O": Place(f"{o}.bias", "d_model"),
    }


def mlp(up: str, down: str) -> dict[str, Place]:
    """Two linear modules with an activation between them."""
    return {
        "mlp.pre": Place(f"{up}.output", "batch seq d_mlp"),
        "mlp.neurons": Place(f"{down}.input", "batch seq d_mlp"),
        "mlp.W_in": Place(f"{up}.weight", "d_mlp d_model"),
        "mlp.W_out": Place(f"{down}.weight", "d_model d_mlp"),
        "mlp.b_in": Place(f"{up}.bias", "d_mlp"),
        "mlp.b_out": Place(f"{down}.bias", "d_model"),
    }


def gated_mlp(gate: str, up: str, down: str) -> dict[str, Place]:
    """A gate, whose activation multiplies another projection."""
    return mlp(gate, down) | {
        "mlp.gate": Place(f"{gate}.output", "batch seq d_mlp"),
        "mlp.up": Place(f"{up}.output", "batch seq d_mlp"),
        "mlp.W_in": Place(f"{up}.weight", "d_mlp d_model"),
        "mlp.W_gate": Place(f"{gate}.weight", "d_mlp d_model"),
        "mlp.b_in": Place(f"{up}.bias", "d_mlp"),
        "mlp.b_gate": Place(f"{gate}.bias", "d_mlp"),
    }


def fused_mlp(gate_up: str, down: str) -> dict[str, Place]:
    """A gate and what it multiplies as halves of one projection."""
    gate, up = "(half=0 d_mlp)", "(half=1 d_mlp)"
    return mlp(gate_up, down) | {
        "mlp.pre": Place(f"{gate_up}.output", f"batch seq {gate}"),
        "mlp.gate": Place(f"{gate_up}.output", f"batch seq {gate}"),
        "mlp.up": Place(f"{gate_up}.output", f"batch seq {up}"),
        "mlp.W_in": Place(f"{gate_up}.weight", f"{up} d_model"),
        "mlp.W_gate": Place(f"{gate_up}.weight", f"{gate} d_model"),
        "mlp.b_in": Place(f"{gate_up}.bias", up),
    }


def whole_mlp(up: str, down: str) -> dict[str, Place]:
    """What an MLP takes and returns that is not a module of its own."""
    return {
        "mlp.input": Place(f"{up}.input", "batch seq d_model"),
        "mlp.output": Place(f"{down}.output", "batch seq d_model"),
    }


def either(first: Mapping[str, Place], second: Mapping[str, Place]) -> dict[str, Place | tuple[Place, ...]]:
    """The places of one way of writing a model, or else those of another, one by one."""
    return {
        name: (first[name], second[name]) if name in first and name in second else first.get(name) or second[name]
        for name in {**first, **second}
    }


def only(places: Mapping[str, Place], when: str) -> dict[str, Place]:
    """The same places, if the configuration says so."""
    return {name: replace(place, when=when) for name, place in places.items()}


def in_one_row(places: Mapping[str, Place]) -> dict[str, Place]:
    """The same values, where the tokens of all rows are in one."""
    return {
        name: replace(place, layout=place.layout.replace("batch seq", "(batch seq)")) for name, place in places.items()
    }


EXPERTS: Places = {
    "mlp.router": (
        Place("gate:router_logits=/output", "(batch seq) expert"),
        Place("gate.output", "(batch seq) expert"),
    ),
    "mlp.chosen_experts": Place("gate.output[2]", "(batch seq) choice"),
}
"""A mixture of experts: the router scores all of them for each token, and the best few are chosen."""


def transposed(places: Mapping[str, Place]) -> dict[str, Place]:
    """The same, where weights are stored the other way round, as in GPT-2's Conv1D."""
    swapped = {
        name: Place(place.at, " ".join(reversed(layouts.tokens(place.layout))))
        for name, place in places.items()
        if ".W_" in name
    }
    return {**places, **swapped}


def residual(mixer: str = "output[0]", mlp: str = "output", middle: str = "") -> dict[str, Place]:
    """What is added to the residual stream, and what it is in between: what a norm, or the MLP, by its name, is given.

    Where both are added at once, as in GPT-NeoX if its configuration says so, there is no such value and no name.
    """
    found = {}
    for name, place in (("mixer.update", mixer), ("mlp.update", mlp)):
        if place:
            found[name] = Place(place, "batch seq d_model")
    if middle:
        found["layer.resid_mid"] = Place(f":@{middle}/output", "batch seq d_model")
    return found


MAMBA: Mapping[str, Place] = {
    "ssm.x_in": Place("in_proj.output", "batch seq x!|gate(d_inner)"),
    "ssm.gate": Place("in_proj.output", "batch seq x|gate!(d_inner)"),
    "ssm.conv": Place(
        ":causal_conv1d_fn()/out=[0]/output", "batch d_inner seq",
        ":causal_conv1d_update()/out=[1]/output", "batch d_inner seq",
    ),
    "ssm.u": Place(":hidden_states_B_C=/output", "batch seq d_inner"),
    "ssm.B": Place("x_proj.output", "batch seq dt_rank|d_state!|d_state"),
    "ssm.C": Place("x_proj.output", "batch seq dt_rank|d_state|d_state!"),
    "ssm.delta": Place(
        ":mamba_selective_scan()/dt=/output", "batch d_inner seq",
        ":mamba_selective_state_update()/dt=/output", "batch d_inner",
    ),
    "ssm.state": Place(
        ":mamba_selective_scan()/ssm_state=[*]/output", "batch d_inner d_state",
        ":mamba_selective_state_update()/ssm_state=/output", "batch d_inner d_state",
    ),
    "ssm.scan": Place(
        ":mamba_selective_scan()/scan_output=[-2]/output", "batch d_inner seq",
        ":mamba_selective_state_update()/out=[-2]/output", "batch d_inner",
    ),
    "ssm.gate_act": Place(
        ":mamba_selective_scan()/silu()/output", "batch d_inner seq",
        ":mamba_selective_state_update()/silu()/output", "batch d_inner",
    ),
    "ssm.A_log": Place("A_log", "d_inner d_state"),
    "ssm.D": Place("D", "d_inner"),
    "ssm.W_in": Place("in_proj.weight", "x!|gate(d_inner) d_model"),
    "ssm.W_gate": Place("in_proj.weight", "x|gate!(d_inner) d_model"),
    "ssm.W_out": Place("out_proj.weight", "d_model d_inner"),
    "ssm.b_in": Place("in_proj.bias", "x!|gate(d_inner)"),
    "ssm.b_gate": Place("in_proj.bias", "x|gate!(d_inner)"),
    "ssm.b_out": Place("out_proj.bias", "d_model"),
}  # fmt: skip
"""Mamba: one state for each channel (Gu and Dao 2023)."""

FALCON_MAMBA: Mapping[str, Place] = {
    **MAMBA,
    "ssm.B": Place("b_layernorm.output", "batch seq d_state"),
    "ssm.C": Place("c_layernorm.output", "batch seq d_state"),
}
"""Mamba with norms of what the scan is selected by, as in Falcon-Mamba and Jamba."""

_MAMBA2_IN = "gate|x|B|C|dt"
_MAMBA2_CONV = "x|B|C"


def _one(parts: str, name: str, dims: str) -> str:
    """The layout of one of several parts."""
    return "|".join(f"{each}!" if each == name else each for each in parts.split("|")) + f"({dims})"


MAMBA2: Mapping[str, Place] = {
    "ssm.x_in": Place("in_proj.output", f"batch seq {_one(_MAMBA2_IN, 'x', 'd_inner')}"),
    "ssm.gate": Place("in_proj.output", f"batch seq {_one(_MAMBA2_IN, 'gate', 'd_inner')}"),
    "ssm.conv": Place(
        ":causal_conv1d_fn()/out=[0]/output", f"batch {_one(_MAMBA2_CONV, 'x', 'd_inner')} seq",
        ":causal_conv1d_update()/out=[1]/output", f"batch {_one(_MAMBA2_CONV, 'x', 'd_inner')} seq",
    ),
    "ssm.u": Place(":hidden_states_B_C=/output", f"batch seq {_one(_MAMBA2_CONV, 'x', 'd_inner')}"),
    "ssm.B": Place(
        ":hidden_states_B_C=/output", f"batch seq {_one(_MAMBA2_CONV, 'B', 'group d_state')}",
        form="batch seq group d_state",
    ),
    "ssm.C": Place(
        ":hidden_states_B_C=/output", f"batch seq {_one(_MAMBA2_CONV, 'C', 'group d_state')}",
        form="batch seq group d_state",
    ),
    "ssm.delta": Place(
        ":mamba2_chunk_scan()/dt=/output", "batch seq ssm_head",
        ":mamba2_selective_state_update()/delta=/output", "batch ssm_head", form="batch seq ssm_head",
    ),
    "ssm.state": Place(
        ":mamba2_chunk_scan()/state=[*]/output", "batch ssm_head d_ssm_head d_state",
        ":mamba2_selective_state_update()/new_state=/output", "batch ssm_head d_ssm_head d_state",
        form="batch seq ssm_head d_ssm_head d_state",
    ),
    "ssm.scan": Place(
        "norm.input", "batch seq d_inner",
        ":mamba2_selective_state_update()/scan=/output", "batch d_inner",
    ),
    "ssm.gate_act": Place("norm:silu()/output", "batch seq d_inner"),
    "ssm.A_log": Place("A_log", "ssm_head", form="ssm_head"),
    "ssm.D": Place("D", "ssm_head", form="ssm_head"),
    "ssm.W_in": Place("in_proj.weight", f"{_one(_MAMBA2_IN, 'x', 'd_inner')} d_model"),
    "ssm.W_gate": Place("in_proj.weight", f"{_one(_MAMBA2_IN, 'gate', 'd_inner')} d_model"),
    "ssm.W_out": Place("out_proj.weight", "d_model d_inner"),
    "ssm.b_in": Place("in_proj.bias", _one(_MAMBA2_IN, "x", "d_inner")),
    "ssm.b_gate": Place("in_proj.bias", _one(_MAMBA2_IN, "gate", "d_inner")),
    "ssm.b_out": Place("out_proj.bias", "d_model"),
}  # fmt: skip
"""Mamba-2: one state for each channel of each head, which share their decay (Dao and Gu 2024)."""

FALCON_H1: Places = {
    **MAMBA2,
    # The multipliers come after the projection.
    "ssm.x_in": Place(":projected_states=/output", f"batch seq {_one(_MAMBA2_IN, 'x', 'd_inner')}"),
    "ssm.gate": Place(":projected_states=/output", f"batch seq {_one(_MAMBA2_IN, 'gate', 'd_inner')}"),
    "ssm.scan": (
        MAMBA2["ssm.scan"],
        Place(
            ":scan_output=[-2]/output", "batch seq d_inner",
            ":mamba2_selective_state_update()/scan=/output", "batch d_inner",
        ),
    ),
    "ssm.gate_act": (
        MAMBA2["ssm.gate_act"],
        Place(
            ":silu()/output", "batch seq d_inner",
            ":mamba2_selective_state_update()/gate_act=/output", "batch d_inner",
        ),
    ),
    "attn.update": Place("^:attention_hidden_states=/output", "batch seq d_model"),
    "ssm.update": Place("^:mamba_hidden_states=/output", "batch seq d_model"),
    "mixer.update": Place("^:hidden_states=[1]/output", "batch seq d_model"),
    "mixer.output": Place("^:hidden_states=[1]/output", "batch seq d_model"),
}  # fmt: skip
"""Mamba-2 beside attention, both multiplied and added, with or without a norm after the scan."""

RG_LRU: Mapping[str, Place] = {
    "ssm.x_in": Place("linear_x.output", "batch seq d_inner"),
    # There is no activation after the convolution.
    "ssm.conv": Place("rg_lru.input", "batch seq d_inner"),
    "ssm.u": Place("rg_lru.input", "batch seq d_inner"),
    "ssm.gate": Place("linear_y.output", "batch seq d_inner"),
    "ssm.gate_act": Place("act_fn.output", "batch seq d_inner"),
    "ssm.state": Place(
        "rg_lru:_rnn_scan()/state=[*]/output", "batch d_inner",
        "rg_lru:_rnn_scan()/state=[*]/output", "batch d_inner", form="batch seq d_inner",
    ),
    "ssm.scan": Place("rg_lru.output", "batch seq d_inner"),
    "ssm.W_in": Place("linear_x.weight", "d_inner d_model"),
    "ssm.W_gate": Place("linear_y.weight", "d_inner d_model"),
    "ssm.W_out": Place("linear_out.weight", "d_model d_inner"),
    "ssm.b_in": Place("linear_x.bias", "d_inner"),
    "ssm.b_gate": Place("linear_y.bias", "d_inner"),
    "ssm.b_out": Place("linear_out.bias", "d_model"),
}  # fmt: skip
"""A recurrence of one number for each channel, whose decay is a gate of the input's (De et al. 2024, "Griffin")."""

ZAMBA2: Places = {
    # The attention of a shared block, which sees the embeddings too: twice as wide as the residual stream.
    **projections("q_proj", "k_proj", "v_proj", "o_proj"),
    **INTERFACE,
    **{
        f"attn.{name}": (
            Place(f":{word}_states=[1]/output", f"batch seq ({heads} d_head)", when="use_shared_attention_adapter"),
            Place(f"{name}_proj.output", f"batch seq ({heads} d_head)"),
        )
        for name, word, heads in (("q", "query", "head"), ("k", "key", "kv_head"), ("v", "value", "kv_head"))
    },
    **{
        f"attn.W_{name.upper()}": Place(
            f"{name}_proj.weight", f"({heads} d_head) d_attn", form=f"{heads} d_attn d_head",
            when="!use_shared_attention_adapter",
        )
        for name, heads in (("q", "head"), ("k", "kv_head"), ("v", "kv_head"))
    },
    **MAMBA2,
    # Each use of the shared block has something of its own added to what it projects.
    "mlp.pre": Place(":gate_up_state=[1]/output", "batch seq (half=0 d_mlp)"),
    "mlp.gate": Place(":gate_up_state=[1]/output", "batch seq (half=0 d_mlp)"),
    "mlp.up": Place(":gate_up_state=[1]/output", "batch seq (half=1 d_mlp)"),
    "mlp.neurons": Place("down_proj.input", "batch seq d_mlp"),
    "mlp.W_out": Place("down_proj.weight", "d_model d_mlp"),
    "mlp.b_out": Place("down_proj.bias", "d_model"),
}  # fmt: skip
"""Mamba-2 in every layer, and before it in some a block of attention and MLP that several layers share; what that
computes is not added to the residual stream, but to what Mamba-2 is given."""

ROUTER: Mapping[str, Place] = {
    "mlp.router": Place("router:router_logits=/output", "(batch seq) expert"),
    "mlp.chosen_experts": Place("router.output[2]", "(batch seq) choice"),
}
"""A mixture of experts whose router is called so."""
