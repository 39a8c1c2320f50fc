"""Architectures that are known, configured as few checkpoints are: the same names, against plain PyTorch."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import patchwire
import tiny
from integration.refusals import refused

PROMPT = tiny.prompt(7)
IDS = torch.tensor([PROMPT])
PATIENCE = 60
_GROUPED: dict[str, Any] = tiny._GROUPED


def built(config: transformers.PretrainedConfig) -> PreTrainedModel:
    return tiny._built(config, torch.float32, 0)


def local(module: nn.Module) -> patchwire.Model:
    return patchwire.local(module, progress=False)


def post_norm_opt() -> PreTrainedModel:
    return built(
        transformers.OPTConfig(
            **tiny._ATTENTION, ffn_dim=40, word_embed_proj_dim=16, do_layer_norm_before=False, init_std=0.3
        )
    )


def post_norm_bloom() -> PreTrainedModel:
    return built(
        transformers.BloomConfig(**tiny._ATTENTION, n_layer=3, n_head=4, apply_residual_connection_post_layernorm=True)
    )


def biased_mamba2() -> PreTrainedModel:
    return built(
        transformers.Mamba2Config(**tiny._SSM, num_heads=6, head_dim=8, n_groups=1, chunk_size=4, use_bias=True)
    )


def clipped_olmo() -> PreTrainedModel:
    return built(transformers.OlmoConfig(**_GROUPED, clip_qkv=0.5))


def gpt_oss() -> PreTrainedModel:
    config = transformers.GptOssConfig(
        **_GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4
    )
    return built(config)


def granite_moe() -> PreTrainedModel:
    return built(
        transformers.GraniteMoeConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2, residual_multiplier=0.5)
    )


def bitnet() -> PreTrainedModel:
    return built(transformers.BitNetConfig(**_GROUPED))


def qwen3_next() -> PreTrainedModel:
    config = transformers.Qwen3NextConfig(
        **_GROUPED | {"num_hidden_layers": 4, "head_dim": 8},
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=6,
        linear_value_head_dim=6,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=20,
    )
    return built(config)


def deepseek_v3() -> PreTrainedModel:
    config = transformers.DeepseekV3Config(
        **tiny._ATTENTION,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=12,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=8,
    )
    return built(config)


@pytest.mark.parametrize(
    "build",
    [
        post_norm_opt, post_norm_bloom, biased_mamba2, clipped_olmo, gpt_oss, granite_moe, bitnet, qwen3_next,
        deepseek_v3,
    ],
)  # fmt: skip
def test_every_claim_holds(build: Any) -> None:
    found = patchwire.verify(local(build()))

    assert found.passed, str(found)


def test_an_opt_with_norms_after_has_none_before_and_a_stream_that_is_normalized() -> None:
    module = post_norm_opt()
    model = local(module)
    layer = module.model.decoder.layers[1]
    seen: dict[str, Tensor] = {}
    hooks = [
        each.register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(name, output.clone()))
        for name, each in (
            ("mixer", layer.self_attn.out_proj),
            ("middle", layer.self_attn_layer_norm),
            ("mlp", layer.fc2),
        )
    ]
    module(IDS)
    for each in hooks:
        each.remove()

    with model.trace(PROMPT):
        mixer, mlp = model.layers[1].mixer.update.save(), model.layers[1].mlp.update.save()
        middle = model.layers[1].resid_mid.save()

    torch.testing.assert_close(mixer.value, seen["mixer"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(middle.value, seen["middle"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mlp.value.reshape(seen["mlp"].shape), seen["mlp"], rtol=1e-5, atol=1e-5)
    for name in ("mixer_norm", "mlp_norm"):
        assert f"layers.1.{name}" not in model.catalogue.names


def test_biases_of_a_mamba2_have_names() -> None:
    module = biased_mamba2()
    model, bias = local(module), module.backbone.layers[1].mixer.in_proj.bias

    with model.trace(PROMPT):
        ssm = model.layers[1].ssm
        found = [ssm.b_gate.save(), ssm.b_in.save(), ssm.b_out.save()]

    assert torch.equal(torch.cat([found[0].value, found[1].value]), bias[:96])
    assert torch.equal(found[2].value, module.backbone.layers[1].mixer.out_proj.bias)


class TestAttentionThatMayGoNowhere:
    """GPT-OSS has a number for each head beside the scores, and a query's pattern sums to less than 1."""

    def test_has_scores_of_keys_alone(self) -> None:
        model = local(gpt_oss())

        with model.trace(PROMPT):
            attn = model.layers[1].attn
            q, k, scores = attn.q_rot.save(), attn.k_rot.save(), attn.scores.save()

        keys = k.value.repeat_interleave(2, 2)
        products = torch.einsum("bqhd,bkhd->bhqk", q.value, keys) * 8**-0.5
        visible = torch.ones(7, 7, dtype=torch.bool).tril()
        assert scores.shape == (1, 4, 7, 7)
        torch.testing.assert_close(scores.value[..., visible], products[..., visible], rtol=1e-4, atol=1e-4)

    def test_is_cut_at_the_last_key(self) -> None:
        model = local(gpt_oss())

        with model.trace() as trace:
            with trace.invoke(PROMPT):
                before = model.layers[1].attn.pattern.save()
            with trace.invoke(PROMPT):
                patchwire.knockout(model.layers[1].mixer, -1, -1)
                after = model.layers[1].attn.pattern.save()

        assert before.value[:, :, -1, -1].min() > 0
        assert after.value[:, :, -1, -1].max() == 0


def test_the_programs_own_use_of_a_model_is_not_disturbed_by_a_pass() -> None:
    """A forward pass on another thread, which has made its mask, goes on while a pass computes step by step."""
    module = tiny.build("llama")
    expected = module(IDS).logits
    model = local(module)
    with model.trace(PROMPT):  # what is inside of attention is learnt now, and not in passes of its own below
        model.layers[0].attn.scores.save()
    begun, inside, done = threading.Event(), threading.Event(), threading.Event()
    found: list[Tensor] = []

    def own() -> None:
        found.append(module(IDS).logits)
        done.set()

    thread = threading.Thread(target=own)

    def wait(*_: Any) -> None:
        if threading.current_thread() is thread:
            begun.set()
            assert inside.wait(PATIENCE)
        else:
            inside.set()
            assert done.wait(PATIENCE)

    hook = module.model.layers[0].register_forward_pre_hook(wait)
    thread.start()
    assert begun.wait(PATIENCE)
    with model.trace(PROMPT):
        scores = model.layers[0].attn.scores.save()
    thread.join(PATIENCE)
    hook.remove()

    assert scores.shape == (1, 4, 7, 7)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [bitnet, qwen3_next])
def test_what_is_normalized_or_gated_after_attention_is_not_taken_for_its_heads(build: Any) -> None:
    model = local(build())

    assert "layers.3.attn.pattern" in model.catalogue.names or "layers.1.attn.pattern" in model.catalogue.names
    assert not [name for name in model.catalogue.names if name.endswith((".attn.z", ".attn.head_out"))]


class TestAnSSMsPattern:
    @pytest.mark.parametrize("name", ["mamba", "mamba2"])
    def test_of_a_shorter_row_is_that_of_the_row_alone(self, name: str, served: dict[str, patchwire.Model]) -> None:
        model, short = served[name], tiny.prompt(4)

        with model.trace([short, PROMPT]):
            together = model.layers[1].ssm.pattern.save()
        with model.trace(short):
            alone = model.layers[1].ssm.pattern.save()

        torch.testing.assert_close(together.value[:1, :, 3:, 3:], alone.value, rtol=1e-4, atol=1e-5)
        assert together.value[0, :, 3:, :3].isnan().all()

    def test_is_not_there_in_later_steps(self, served: dict[str, patchwire.Model]) -> None:
        model = served["mamba"]

        with (
            refused(patchwire.OperationError, "in the state alone", hint="trace"),
            model.generate(PROMPT, max_new_tokens=3) as gen,
        ):
            for _ in gen.iter[1:2]:
                model.layers[1].ssm.pattern.save()  # this line
