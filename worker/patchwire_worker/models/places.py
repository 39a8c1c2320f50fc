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
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Formula:
    """A value that is computed from others."""

    name: str
    """What the client computes it with."""
    needs: tuple[str, ...]
    """The values and parameters of the same part that it is computed from."""
    form: str
    """Its dimensions."""


FORMS: Mapping[str, str] = {
    "model.W_E": "vocab d_model",
    "model.W_U": "d_model vocab",
    "layer.resid_mid": "batch seq d_model",
    "mixer.update": "batch seq d_model",
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
}
"""What is computed, and how."""

INTERFACE: Mapping[str, Place] = {
    "attn.q_rot": Place(':attention_interface()/input["args"][1]', "batch head seq d_head"),
    "attn.k_rot": Place(':attention_interface()/input["args"][2]', "batch kv_head key d_head"),
    "attn.scores": Place(':attention_interface()/softmax()/input["args"][0]', "batch head query key"),
    "attn.pattern": Place(":attention_interface()/dropout()/output", "batch head query key"),
}
"""Attention through transformers' interface: one call gets queries, keys and values, as the product uses them."""


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


def transposed(places: Mapping[str, Place]) -> dict[str, Place]:
    """The same, where weights are stored the other way round, as in GPT-2's Conv1D."""
    swapped = {
        name: Place(place.at, " ".join(reversed(layouts.tokens(place.layout))))
        for name, place in places.items()
        if ".W_" in name
    }
    return {**places, **swapped}


def residual(mixer: str = "output", mlp: str = "output", middle: str = "") -> dict[str, Place]:
    """What is added to the residual stream, and what it is in between: the input of a norm, by the norm's name."""
    found = {
        "mixer.update": Place(mixer, "batch seq d_model"),
        "mlp.update": Place(mlp, "batch seq d_model"),
    }
    if middle:
        found["layer.resid_mid"] = Place(f":@{middle}/output", "batch seq d_model")
    return found


MAMBA: Mapping[str, Place] = {
    "mixer.update": Place("output", "batch seq d_model"),
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
    "ssm.W_in": Place("in_proj.weight", "x!|gate(d_inner) d_model"),
    "ssm.W_gate": Place("in_proj.weight", "x|gate!(d_inner) d_model"),
    "ssm.W_out": Place("out_proj.weight", "d_model d_inner"),
    "ssm.b_in": Place("in_proj.bias", "x!|gate(d_inner)"),
    "ssm.b_gate": Place("in_proj.bias", "x|gate!(d_inner)"),
    "ssm.b_out": Place("out_proj.bias", "d_model"),
}  # fmt: skip
"""Mamba: one state for each channel (Gu and Dao 2023)."""
