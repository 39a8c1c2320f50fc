"""The vocabulary of canonical sites, read from the worker's tables.

`python docs/vocabulary.py` writes the tables of `sites.md` between its marks. The test suite checks that they are up to
date, and that every name has its meaning here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from patchwire_worker.models.places import FORMS, FORMULAS

PAGE = Path(__file__).with_name("sites.md")
_BEGIN, _END = "<!-- Written by docs/vocabulary.py. -->", "<!-- Until here. -->"

PARTS: Mapping[str, str] = {
    "model": "The model: `model.…`",
    "layer": "A layer: `model.layers[i].…`",
    "mixer": "What mixes tokens, attention or SSM: `model.layers[i].mixer.…`",
    "attn": "Attention: `model.layers[i].attn.…`, or `.mixer.…`",
    "mlp": "MLP: `model.layers[i].mlp.…`",
    "ssm": "SSM: `model.layers[i].ssm.…`, or `.mixer.…`",
}
"""What names are of."""

MEANINGS: Mapping[str, str] = {
    "model.W_E": "token embeddings",
    "model.W_U": "unembedding",
    "layer.resid_mid": "the residual stream between mixer and MLP; not there where both read the layer's input",
    "mixer.update": "what is really added to the residual stream: after a norm or a multiplier, if there is one",
    "mlp.update": "the same of the MLP",
    "attn.update": "of a layer that has an SSM too: what attention adds",
    "ssm.update": "what the SSM adds",
    "mixer.output": "of a layer with attention and an SSM: what both return, together",
    "mlp.input": "what the MLP is given",
    "mlp.output": "what it returns",
    "mlp.router": "of a mixture of experts: the router's logits, before the softmax",
    "mlp.chosen_experts": "which experts each token goes to",
    "ssm.A_log": "`A = -exp(A_log)`, how fast the state decays",
    "ssm.D": "how much of `u` goes past the state",
    "ssm.pattern": "effective attention: `scan = pattern @ u + D u`; one for each head where there are heads",
    "attn.q": "queries, as the projection returns them: a head's input is patched by writing `x @ W_Q[head]`",
    "attn.k": "keys",
    "attn.v": "values",
    "attn.q_rot": "queries as the product uses them, rotated where positions are",
    "attn.k_rot": "keys as the product uses them",
    "attn.scores": "before the softmax, masked ones included",
    "attn.pattern": "attention probabilities",
    "attn.z": "`pattern @ v`, the input of the output projection",
    "attn.head_out": "what each head adds to the mixer's output",
    "attn.W_Q": "queries from the residual stream",
    "attn.W_K": "keys",
    "attn.W_V": "values",
    "attn.W_O": "output projection",
    "attn.b_Q": "bias of the queries",
    "attn.b_K": "of the keys",
    "attn.b_V": "of the values",
    "attn.b_O": "of the output",
    "mlp.pre": "before the activation",
    "mlp.gate": "of a gated MLP: what goes through the activation; the same as `pre`",
    "mlp.up": "of a gated MLP: what the activation multiplies",
    "mlp.neurons": "after the activation: the input of the output projection",
    "mlp.W_in": "input projection; of a gated MLP, that of `up`",
    "mlp.W_gate": "projection of `gate`",
    "mlp.W_out": "output projection",
    "mlp.b_in": "bias of the input projection",
    "mlp.b_gate": "of `gate`",
    "mlp.b_out": "of the output",
    "ssm.x_in": "before the convolution",
    "ssm.conv": "after the convolution, before its activation",
    "ssm.u": "after the activation: the input of the scan",
    "ssm.gate": "before its activation",
    "ssm.gate_act": "after its activation",
    "ssm.delta": "step sizes, as the scan uses them",
    "ssm.B": "how a token is written into the state",
    "ssm.C": "how the state is read",
    "ssm.scan": "`C state + D u`, before the gate",
    "ssm.state": "the recurrent state after every token; later tokens go on from what is written",
    "ssm.W_in": "projection of `x_in`",
    "ssm.W_gate": "projection of `gate`",
    "ssm.W_out": "output projection",
    "ssm.b_in": "bias of `x_in`",
    "ssm.b_gate": "of `gate`",
    "ssm.b_out": "of the output",
}
"""What each value is, in words."""


def tables() -> str:
    """A table for each part: names, dimensions, what can be done, meanings."""
    computed = {name: formula.form.format(A_log="d_inner") for name, formula in FORMULAS.items()}
    dimensions = {**FORMS, **{name: form for name, form in computed.items() if name not in FORMS}}
    parts = []
    for part, title in PARTS.items():
        rows = [
            f"| `{name.partition('.')[2]}` | {dims} | {_kind(name)} | {MEANINGS[name]} |"
            for name, dims in dimensions.items()
            if name.partition(".")[0] == part
        ]
        parts.append("\n".join([f"**{title}**\n", "| name | dimensions | | |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _kind(name: str) -> str:
    if name in FORMULAS:
        return "" if name in FORMS else "computed"
    return "parameter" if re.match(r"[Wb]_|A_log|D$", name.partition(".")[2]) else ""


def page() -> str:
    """The page, with tables of today."""
    before, _, rest = PAGE.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n\n{tables()}\n\n{_END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
