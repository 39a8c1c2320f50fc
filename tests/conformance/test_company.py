"""Company never shows: what shares a pass, a process or a memory with a request does not change its numbers."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import patchwire
import tiny


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedModel:
    return tiny.build("gpt2")


@pytest.fixture(scope="module")
def embedded(gpt2: PreTrainedModel) -> patchwire.Model:
    return patchwire.local(gpt2, name="gpt2", progress=False)


SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def long_rope() -> PreTrainedModel:
    """A model whose rotary embeddings depend on the longest row of the call."""
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 16,
        "factor": 4.0,
        "long_factor": [4.0] * 4,
        "short_factor": [1.0] * 4,
    }
    config = transformers.Phi3Config(
        **SIZES, max_position_embeddings=64, original_max_position_embeddings=16, rope_parameters=rope
    )
    return transformers.Phi3ForCausalLM(config).eval()


def dynamic_rope() -> PreTrainedModel:
    """A model whose rotary embeddings remember the longest row so far."""
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, max_position_embeddings=16, rope_parameters=rope)
    ).eval()


def logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits.clone()


def test_rows_of_different_lengths_share_no_pass_where_positions_depend_on_the_longest():
    plain = long_rope()
    short, long = list(range(1, 11)), list(range(1, 31))
    expected = [logits(plain, short), logits(plain, long)]
    model = patchwire.local(plain, name="rope", progress=False)

    with model.trace() as trace:
        with trace.invoke(short):
            first = model.logits.save()
        with trace.invoke(long):
            second = model.logits.save()

    assert trace.stats is not None
    assert trace.stats.passes == 2
    assert torch.allclose(first.value, expected[0], atol=1e-5)
    assert torch.allclose(second.value, expected[1], atol=1e-5)


def test_values_that_mix_rows_are_not_read_in_company():
    plain = tiny.build("gpt2")
    plain.transformer.ln_f = _Norm(plain.transformer.ln_f)
    model = patchwire.local(plain, name="mixing", progress=False)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    alone = []
    for prompt in prompts:
        with model.trace(prompt):
            alone.append(model.transformer.ln_f.mean.output.save())

    together = []
    with model.trace() as trace:
        for prompt in prompts:
            with trace.invoke(prompt):
                together.append(model.transformer.ln_f.mean.output.save())

    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.value, other.value)


class _Mean(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.mean()


class _Norm(nn.Module):
    """A norm with a probe beside it that averages over everything in the pass."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.mean = _Mean()

    def forward(self, hidden: Tensor) -> Tensor:
        self.mean(hidden)
        return self.norm(hidden)


def test_what_one_request_makes_a_module_remember_does_not_reach_the_next():
    plain = dynamic_rope()
    prompt = list(range(1, 17))
    expected = logits(plain, prompt)
    model = patchwire.local(plain, name="rope", progress=False)

    with model.trace(prompt):
        positions = torch.arange(500)[None]
        model.model.rotary_emb(model.layers[0].output, positions)[0].save()
    with model.trace(prompt):
        after = model.logits.save()

    assert torch.allclose(after.value, expected, atol=1e-5)


def test_own_forward_passes_of_an_embedded_model_are_left_alone(gpt2: PreTrainedModel, embedded: patchwire.Model):
    ids = [1, 2, 3, 4]
    expected = logits(gpt2, ids)
    wrong: list[Tensor] = []
    done = threading.Event()

    def own_passes() -> None:
        while not done.is_set():
            found = logits(gpt2, ids)
            if not torch.equal(found, expected):
                wrong.append(found)

    thread = threading.Thread(target=own_passes)
    thread.start()
    for _ in range(40):
        with embedded.trace(ids):
            embedded.layers[0].output[:] = 0
            changed = embedded.logits.save()
        assert not torch.equal(changed.value, expected)
    done.set()
    thread.join()

    assert not wrong


def test_a_site_that_rows_share_is_refused_for_rows_of_different_lengths(embedded: patchwire.Model):
    with (
        pytest.raises(patchwire.SiteError, match="different lengths"),
        embedded.trace([[1, 2, 3], [1, 2, 3, 4, 5]]),
    ):
        embedded.transformer.wpe.output[:, -1] = 0


class TestLocalTensors:
    """A local tensor counts as it is when it is used, however it is changed afterwards."""

    def test_changed_through_numpy(self, embedded: patchwire.Model):
        array = np.zeros(24, dtype=np.float32)
        tensor = torch.from_numpy(array)

        with embedded.trace([1, 2, 3]):
            hidden = embedded.layers[1].output
            before = (hidden * tensor).save()
            array[:] = 1
            after = (hidden * tensor).save()
            plain = hidden.clone().save()

        assert before.value.abs().max() == 0
        assert torch.equal(after.value, plain.value)

    def test_changed_through_data(self, embedded: patchwire.Model):
        tensor = torch.zeros(24)

        with embedded.trace([1, 2, 3]):
            hidden = embedded.layers[1].output
            before = (hidden * tensor).save()
            tensor.data.fill_(1)
            after = (hidden * tensor).save()

        assert before.value.abs().max() == 0
        assert after.value.abs().max() > 0


class TestEditsThatCannotFollow:
    """Where a graph cannot do what PyTorch's shared memory would, it refuses and does not guess."""

    def test_an_edit_of_a_view_that_einsum_took(self, embedded: patchwire.Model):
        with embedded.trace([1, 2, 3]):
            turned = torch.einsum("bsd->dsb", embedded.layers[1].output)
            with pytest.raises(patchwire.GraphError, match="share memory"):
                turned[:] = 0

    def test_an_edit_after_a_conversion_that_may_have_copied(self, embedded: patchwire.Model):
        with embedded.trace([1, 2, 3]):
            hidden = embedded.layers[1].output
            positive = hidden[hidden > 0]
            positive.double().save()
            with pytest.raises(patchwire.GraphError, match="share memory"):
                positive += 1

    def test_a_refused_edit_leaves_nothing_behind(self, gpt2: PreTrainedModel, embedded: patchwire.Model):
        with embedded.trace([1, 2, 3], exact=True):
            hidden = embedded.layers[0].output
            before = hidden.clone().save()
            with pytest.raises(patchwire.OrderError):
                hidden += embedded.layers[2].output
            after = hidden.save()
            result = embedded.logits.save()

        assert torch.equal(after.value, before.value)
        assert torch.equal(result.value, logits(gpt2, [1, 2, 3]))


def test_a_module_that_holds_the_layers_is_not_applied(embedded: patchwire.Model):
    with pytest.raises(patchwire.OperationError, match="holds the layers"), embedded.trace([1, 2, 3]):
        embedded.transformer(embedded.layers[0].output)


def test_a_model_whose_first_result_is_not_the_logits_is_served():
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True)
    torch.manual_seed(0)
    plain = transformers.MixtralForCausalLM(config).eval()
    expected = logits(plain, [1, 2, 3])
    model = patchwire.local(plain, name="mixtral", progress=False)

    with model.trace([1, 2, 3]):
        found = model.logits.save()

    assert torch.allclose(found.value, expected, atol=1e-5)
