"""Architectures as their configurations rarely build them: names and verification follow what the model computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import patchwire
import tiny

PROMPT = torch.tensor([tiny.prompt(7), tiny.prompt(7, seed=1)])
_ENDS: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_OPT: dict[str, Any] = _ENDS | {
    "hidden_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "ffn_dim": 44,
    "word_embed_proj_dim": 14,
    "max_position_embeddings": 64,
    "init_std": 0.3,
}
_SSM: dict[str, Any] = _ENDS | {"num_hidden_layers": 2, "initializer_range": 0.3}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "norms of the stream": lambda: transformers.OPTConfig(**_OPT, do_layer_norm_before=False),
    "narrow embeddings": lambda: transformers.OPTConfig(**_OPT, do_layer_norm_before=True),
    "a stream of norms": lambda: transformers.BloomConfig(
        **_ENDS, hidden_size=30, n_layer=2, n_head=5, initializer_range=0.3,
        apply_residual_connection_post_layernorm=True,
    ),
    "biases": lambda: transformers.Mamba2Config(
        **_SSM, hidden_size=24, expand=3, num_heads=9, head_dim=8, n_groups=3, state_size=3, conv_kernel=2,
        chunk_size=3, use_bias=True, tie_word_embeddings=True,
    ),
    "another activation": lambda: transformers.MambaConfig(
        **_SSM, hidden_size=10, state_size=1, conv_kernel=5, expand=1, time_step_rank=3, hidden_act="gelu"
    ),
}  # fmt: skip


class Built:
    """A model, here and served."""

    def __init__(self, name: str) -> None:
        self.here = self._built(name)
        self.model = patchwire.local(self._built(name), progress=False)

    def _built(self, name: str) -> nn.Module:
        return tiny._built(CONFIGS[name](), torch.float32, 0)

    def hooked(self, path: str) -> Tensor:
        """What a module here returns."""
        seen: list[Tensor] = []
        handle = self.here.get_submodule(path).register_forward_hook(lambda _, __, output: seen.append(output.clone()))
        self.here(PROMPT)
        handle.remove()
        return seen[0]


class Cases(dict[str, Built]):
    """Each is built when a test first asks."""

    def __missing__(self, name: str) -> Built:
        self[name] = Built(name)
        return self[name]


@pytest.fixture(scope="module")
def cases() -> Cases:
    return Cases()


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_verification_passes(name: str, cases: Cases) -> None:
    found = patchwire.verify(cases[name].model)

    assert found.passed, found


def test_where_the_stream_is_normalized_the_value_in_between_is_the_normalized_one(
    cases: Cases,
) -> None:
    case = cases["norms of the stream"]
    layer = case.model.layers[1]

    with case.model.trace(PROMPT):
        middle, read = layer.resid_mid.save(), layer.mlp.input.save()
    with case.model.trace(PROMPT):
        layer.resid_mid[:, 3] = 0
        changed = case.model.logits.save()

    norm = case.here.get_submodule("model.decoder.layers.1.self_attn_layer_norm")
    expected = case.hooked("model.decoder.layers.1.self_attn_layer_norm")
    handle = norm.register_forward_hook(lambda _, __, output: output.index_fill(1, torch.tensor([3]), 0.0))
    logits = case.here(PROMPT).logits
    handle.remove()
    same(middle.value, expected)
    same(read.value, expected)
    same(changed.value, logits)
    assert "mixer_norm" not in dir(layer), "no norm is before attention"
    assert "mlp_norm" not in dir(layer)


@pytest.mark.parametrize("name", ["norms of the stream", "narrow embeddings"])
def test_embeddings_narrower_than_the_model_have_names(name: str, cases: Cases) -> None:
    case = cases[name]

    with case.model.trace(PROMPT):
        table, back = case.model.W_E.save(), case.model.W_U.save()

    same(table.value, case.here.get_input_embeddings().weight)
    same(back.value, case.here.get_output_embeddings().weight.T)
    assert table.value.shape == (tiny.VOCABULARY, 14)
    assert not [each for each in case.model.catalogue.missing if each.endswith(".mlp")]


def test_the_biases_of_mamba_2s_projections_have_names(cases: Cases) -> None:
    case = cases["biases"]
    ssm = case.model.layers[1].ssm

    with case.model.trace(PROMPT):
        x, gate = ssm.x_in.save(), ssm.gate.save()
        computed = {
            name: (ssm.input @ getattr(ssm, f"W_{name}") + getattr(ssm, f"b_{name}")).save() for name in ("in", "gate")
        }
        output = ssm.b_out.save()

    mixer = case.here.get_submodule("backbone.layers.1.mixer")
    projected = case.hooked("backbone.layers.1.mixer.in_proj")
    same(gate.value, projected[..., :72])
    same(x.value, projected[..., 72:144])
    same(computed["gate"].value, gate.value)
    same(computed["in"].value, x.value)
    same(output.value, mixer.out_proj.bias)


def test_what_the_scan_is_given_has_gone_through_the_configured_activation(cases: Cases) -> None:
    case = cases["another activation"]

    with case.model.trace(PROMPT):
        conv, u = case.model.layers[1].ssm.conv.save(), case.model.layers[1].ssm.u.save()

    given = case.hooked("backbone.layers.1.mixer.in_proj")[..., :10]
    conv1d: Any = case.here.get_submodule("backbone.layers.1.mixer.conv1d")
    same(conv.value, conv1d(given.mT)[..., : PROMPT.shape[1]].mT)
    same(u.value, F.gelu(conv.value))


def test_scores_that_half_precision_rounds_are_no_failure() -> None:
    found = patchwire.verify(patchwire.local(tiny.uneven("granite", dtype=torch.bfloat16), progress=False))

    assert found.passed, found
