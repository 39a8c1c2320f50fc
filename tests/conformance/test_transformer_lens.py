"""Canonical values beside TransformerLens 4: what both have is the same number, and the same edit has the same effect.

TransformerLens wraps the same Hugging Face weights, but finds what is in them with tables of its own and computes
rotations, attention and scans with code of its own. `LAYER` says which of its hooks is which canonical value.

It is no dependency of this project; where it is not installed, nothing here runs. `-s` prints the largest differences.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import patchwire
import tiny
from serving import Server

pytest.importorskip("transformer_lens")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ELSEWHERE = ("gpt_bigcode_heads", "falcon_grouped", "falcon_alibi")
"""It refuses GPT-BigCode with a key for each head, cuts groups of Falcon's queries wrongly, and uses eager attention,
which Hugging Face computes otherwise than the kernel in Falcon with ALiBi."""
ATTENTION = [name for name in tiny.UNEVEN if name not in ELSEWHERE]
STATE_SPACE = [
    # Of the SSM of a hybrid layer that has both, and of RecurrentGemma's, it shows nothing inside.
    "mamba", "mamba_untied", "mamba_odd", "mamba2", "mamba2_odd", "falcon_mamba_odd", "jamba", "bamba", "falcon_h1",
    "nemotron_h", "zamba2", "recurrent_gemma",
]  # fmt: skip
SCANNED = [name for name in STATE_SPACE if name not in ("falcon_h1", "recurrent_gemma")]
PROMPT = torch.tensor([tiny.prompt(7), tiny.prompt(7, seed=1)])
AT = 3
TOLERANCE = 2e-5
"""Of the largest element, or of one."""

LAYER: Mapping[str, str] = {
    "input": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "output": "hook_resid_post",
    "mixer.update": "hook_attn_out",
    "attn.output": "attn.hook_out",
    "attn.q": "attn.hook_q",
    "attn.k": "attn.hook_k",
    "attn.v": "attn.hook_v",
    "attn.q_rot": "attn.hook_rot_q",
    "attn.k_rot": "attn.hook_rot_k",
    "attn.scores": "attn.hook_attn_scores",
    "attn.pattern": "attn.hook_pattern",
    "attn.z": "attn.hook_z",
    "attn.head_out": "attn.hook_result",
    "mlp.update": "hook_mlp_out",
    "mlp.output": "mlp.hook_out",
    "mlp.pre": "mlp.hook_pre",
    "mlp.up": "mlp.hook_pre_linear",
    "mlp.neurons": "mlp.hook_post",
    "mlp.router": "mlp.gate.hook_out",
    "mlp.chosen_experts": "mlp.hook_expert_indices",
    "ssm.output": "mixer.hook_out",
    "ssm.x_in": "mixer.in_proj.hook_out",
    "ssm.gate": "mixer.in_proj.hook_out",
    "ssm.conv": "mixer.conv1d.hook_out",
    "ssm.u": "mixer.conv1d.hook_out",
    "ssm.delta": "mixer.dt_proj.hook_out",
    "ssm.scan": "mixer.inner_norm.hook_in",
    "ssm.state": "mixer.hook_ssm_state",
}
"""Which of its hooks is what, relative to a layer."""
WEIGHTS = [f"attn.{kind}_{name}" for kind in "Wb" for name in "QKVO"]
WEIGHTS += [f"mlp.{kind}_{name}" for kind in "Wb" for name in ("in", "gate", "out")]
FACTORS: Mapping[tuple[str, str], float] = {
    # TransformerLens: what a head adds to the residual stream. Here: what it adds to the mixer's output.
    ("granite", "attn.head_out"): 0.3,
    # TransformerLens: the projection. Here: what the activation is of.
    ("falcon_h1", "mlp.pre"): 1 / 0.7,
}
"""By what a value has to be multiplied to be that of TransformerLens, where the two names mean something else."""
ANOTHER: Mapping[tuple[str, str], str] = {
    **{(name, "attn.scores"): "it puts the pattern there" for name in ("gpt_neo", "gptj", "opt", "jamba")},
    **{
        (name, f"mlp.{each}"): "it calls the input and output of the experts so"
        for name in ("mixtral", "qwen2_moe", "qwen3_moe", "jamba")
        for each in ("pre", "neurons")
    },
    ("falcon_h1", "mixer.update"): "of attention alone, without the multiplier",
    ("bloom", "mixer.update"): "with the residual stream in it",
}
"""What has the same name there, and is something else."""
AFTERWARDS = ("gpt_neo", "gptj", "opt")
"""Where it reads the pattern after the attention function has used it: an edit has no effect there."""
EDITED = ("input", "mixer.update", "attn.q", "attn.v", "attn.scores", "attn.pattern", "attn.z", "mlp.neurons")


def _mamba(name: str, value: Tensor, length: int, width: int) -> Tensor:
    """What of a hook of an SSM a canonical value is."""
    if name in ("ssm.conv", "ssm.u"):
        value = value[..., :length].mT[..., :width]
        return F.silu(value) if name == "ssm.u" else value
    if name == "ssm.state" and value.ndim == 4:  # [batch, channel, seq, state]
        return value.transpose(1, 2)
    if name in ("ssm.x_in", "ssm.gate"):  # [x, gate] of Mamba, [gate, x, B, C, delta] of Mamba-2
        first = (name == "ssm.x_in") == (value.shape[-1] == 2 * width)
        return value[..., :width] if first else value[..., width : 2 * width]
    return F.softplus(value) if name == "ssm.delta" else value


@dataclass
class Pair:
    """One model, in both."""

    name: str
    model: patchwire.Model
    directory: Any
    differences: dict[str, float] = field(default_factory=dict)
    """The largest difference of each canonical value, over all layers."""

    @functools.cached_property
    def lens(self) -> Any:
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        model = AutoModelForCausalLM.from_pretrained(self.directory, attn_implementation="eager").eval()
        model.requires_grad_(False).config.use_cache = False
        lens = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
        for layer in range(self.model.num_layers):
            if self.has(layer, "ssm.delta") and hasattr(lens.blocks[layer], "mixer"):
                lens.blocks[layer].mixer.eager_scan = True
        if all(self.has(layer, "attn.W_O") for layer in range(self.model.num_layers)):
            try:
                lens.set_use_attn_result(True)
            except (NotImplementedError, ValueError):  # some of its attention cannot say what heads add
                lens.set_use_attn_result(False)
        return lens

    def has(self, layer: int, name: str) -> bool:
        path = f"layers.{layer}.{name}"
        return self.model.catalogue.named(path) is not None or name in ("input", "output") or self._returned(path)

    def computed(self, layer: int, name: str) -> bool:
        named = self.model.catalogue.named(f"layers.{layer}.{name}")
        return named is not None and bool(named.formula)

    def _returned(self, path: str) -> bool:
        part, _, side = path.rpartition(".")
        return side == "output" and self.model.catalogue.named(part) is not None

    def of(self, layer: int, name: str) -> Any:
        return functools.reduce(getattr, name.split("."), self.model.layers[layer])

    def hook(self, layer: int, name: str) -> str:
        """The hook of a canonical value."""
        return f"blocks.{layer}.{LAYER[name]}"

    def compare(self, name: str, found: Tensor, theirs: Tensor) -> None:
        """Note how far they are apart, and insist that it is not far."""
        found, theirs = found.double() * FACTORS.get((self.name, name), 1), theirs.double()
        assert found.shape == theirs.shape, (name, found.shape, theirs.shape)
        apart = float((found - theirs).abs().max())
        self.differences[name] = max(self.differences.get(name, 0.0), apart)
        assert apart <= TOLERANCE * max(1.0, float(theirs.abs().max())), (name, apart)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pair]]:
    root = tmp_path_factory.mktemp("models")
    for name in ATTENTION:
        tiny.uneven(name).save_pretrained(root / name)
    for name in STATE_SPACE:
        tiny.save(name, root / name)
    names = [*ATTENTION, *STATE_SPACE]
    with (
        Server({name: root / name for name in names}) as server,
        patchwire.connect(server.address, progress=False) as client,
    ):
        pairs = {name: Pair(name, client.model(name), root / name) for name in names}
        yield pairs
    for name, pair in pairs.items():
        print(f"\n{name}:", "  ".join(f"{each} {apart:.1e}" for each, apart in sorted(pair.differences.items())))


@pytest.fixture
def pair(pairs: dict[str, Pair], name: str) -> Pair:
    return pairs[name]


every_family = pytest.mark.parametrize("name", [*ATTENTION, *STATE_SPACE])


@every_family
def test_what_both_have_is_the_same(pair: Pair) -> None:
    logits, cache = pair.lens.run_with_cache(PROMPT)
    named = [(layer, name) for layer in range(pair.model.num_layers) for name in LAYER if pair.has(layer, name)]
    named = [(layer, name) for layer, name in named if (pair.name, name) not in ANOTHER]
    named = [(layer, name) for layer, name in named if pair.hook(layer, name) in cache.cache_dict]

    with pair.model.trace(PROMPT):
        values = {(layer, name): pair.of(layer, name).save() for layer, name in named}
        here = pair.model.logits.save()

    assert {"input", "output"} <= {name for _, name in named}
    pair.compare("logits", here.value, logits)
    for (layer, name), value in values.items():
        found, theirs = value.value, cache[pair.hook(layer, name)]
        found, theirs = (each[0] if isinstance(each, tuple) else each for each in (found, theirs))
        if name.startswith("ssm."):
            theirs = _mamba(name, theirs, found.shape[1], found.shape[-1])
        if name in ("mlp.router", "mlp.chosen_experts"):
            theirs = theirs.reshape(found.shape)
        if name == "attn.scores":
            seen = (found > -1e4) & (theirs > -1e4)
            assert torch.equal(seen, theirs > -1e4)
            found, theirs = found[seen], theirs[seen]
        pair.compare(name, found, theirs)


@every_family
def test_weights_have_the_same_orientation(pair: Pair) -> None:
    names = [
        (layer, name)
        for layer in range(pair.model.num_layers)
        for name in WEIGHTS
        if pair.has(layer, name) and hasattr(pair.lens.blocks[layer], name.partition(".")[0])
    ]

    with pair.model.trace(PROMPT):
        values = {key: pair.of(*key).save() for key in names}
        ends = {name: getattr(pair.model, name).save() for name in ("W_E", "W_U")}

    for name, value in ends.items():
        pair.compare(name, value.value, getattr(pair.lens, name))
    for (layer, name), value in values.items():
        part, _, word = name.partition(".")
        theirs = getattr(getattr(pair.lens.blocks[layer], part), word, None)
        if theirs is not None:
            pair.compare(name, value.value, theirs)


@pytest.mark.parametrize("name", ATTENTION)
def test_an_edit_has_the_same_effect(pair: Pair) -> None:
    layer = 1
    names = [name for name in EDITED if pair.has(layer, name) and (pair.name, name) not in ANOTHER]
    names = [name for name in names if not (name == "attn.pattern" and pair.name in AFTERWARDS)]
    names = [name for name in names if not pair.computed(layer, name)]
    edits: dict[str, Any] = {}

    with pair.model.session():
        for name in names:
            with pair.model.trace(PROMPT):
                pair.of(layer, name)[...] = pair.of(layer, name) * 0.6
                edits[name] = pair.model.logits.save()

    for name, logits in edits.items():
        hooks = [(pair.hook(layer, name), lambda value, hook: value * 0.6)]
        pair.compare(f"edit of {name}", logits.value, pair.lens.run_with_hooks(PROMPT, fwd_hooks=hooks))


@pytest.mark.parametrize("name", SCANNED)
def test_the_hidden_attention_of_an_ssm_is_the_same(pair: Pair) -> None:
    _, cache = pair.lens.run_with_cache(PROMPT)
    layers = [layer for layer in range(pair.model.num_layers) if pair.hook(layer, "ssm.state") in cache.cache_dict]

    with pair.model.trace(PROMPT):
        found = {layer: pair.of(layer, "ssm.pattern").save() for layer in layers}

    assert found
    for layer, value in found.items():
        theirs = pair.lens.blocks[layer].mixer.compute_effective_attention(cache, layer, include_dt_scaling=True)
        pair.compare("ssm.pattern", value.value, theirs)


@pytest.mark.parametrize("name", SCANNED)
def test_what_is_written_to_a_state_goes_on_in_the_same_way(pair: Pair) -> None:
    layer = next(layer for layer in range(pair.model.num_layers) if pair.has(layer, "ssm.state"))
    clean = pair.lens(PROMPT)

    def add(value: Tensor, hook: Any) -> Tensor:
        added = torch.zeros_like(value)
        added.select(2 if value.ndim == 4 else 1, AT).fill_(1.5)  # [batch, channel, seq, state], or [batch, seq, …]
        return value + added

    with pair.model.trace(PROMPT):
        pair.model.layers[layer].ssm.state[:, AT] += 1.5
        logits = pair.model.logits.save()
    hook = pair.hook(layer, "ssm.state").replace("hook_ssm_state", "hook_ssm_write")
    theirs = pair.lens.run_with_hooks(PROMPT, fwd_hooks=[(hook, add)])

    pair.compare("edit of ssm.state", logits.value, theirs)
    assert not torch.allclose(logits.value[:, AT + 1 :], clean[:, AT + 1 :], atol=1e-3)
