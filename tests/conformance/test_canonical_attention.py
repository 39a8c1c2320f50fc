"""Canonical values of every family with attention: each equals what Hugging Face's modules, taken apart by hand, give.

The models are small, and their lengths all differ, so that no dimension can be taken for another. The values of one
layer are read once, for prompts of two lengths that share a pass; the tests compare them with the model here and with
each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

import patchwire
import tiny
from conformance.attention import Reference
from patchwire import SiteError
from serving import Server

LAYER = 1
PROMPTS = (torch.tensor([tiny.prompt(7), tiny.prompt(7, seed=1)]), torch.tensor([tiny.prompt(4, seed=2)]))
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}
ROUTED = ("mixtral", "qwen2_moe", "qwen3_moe")
WITHOUT_SCORES = ("falcon_alibi",)
"""Hugging Face's code for these computes something else step by step than in one kernel."""
LACKS: dict[str, set[str]] = {
    **{name: {"resid_mid"} for name in ("stablelm_parallel", "cohere", "gptj", "gpt_neox", "falcon", "falcon_grouped")},
    "falcon_alibi": {"attn.scores", "attn.pattern"},
    "olmo2": {"mixer_norm", "mlp_norm"},
    **{name: {"mlp.pre", "mlp.neurons", "mlp.W_out", "mlp.W_in"} for name in ROUTED},
}
"""What there is everywhere but here."""
_OF_ATTENTION = ("q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z", "head_out", "W_Q", "W_K", "W_V", "W_O")
_OF_LAYERS = ("mixer_norm", "mlp_norm", "resid_mid", "mixer.update", "mlp.update")
_OF_MLPS = ("mlp.pre", "mlp.neurons", "mlp.W_in", "mlp.W_out")
EVERYWHERE = {f"attn.{name}" for name in _OF_ATTENTION} | {*_OF_LAYERS, *_OF_MLPS}


@dataclass
class Case:
    """A family: its proxy, and its model here."""

    name: str
    model: patchwire.Model
    directory: Path
    read: list[dict[str, Tensor]] = field(default_factory=list)
    """The values of one layer, for each of the prompts, by canonical name relative to the layer."""

    @cached_property
    def here(self) -> Reference:
        return Reference(self.name, self._load("sdpa" if self.name == "falcon_alibi" else None), LAYER)

    @cached_property
    def eager(self) -> Reference:
        return Reference(self.name, self._load("eager"), LAYER)

    def _load(self, attention: str | None) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(self.directory, attn_implementation=attention)
        return model.eval().requires_grad_(False)

    @property
    def layer(self) -> Any:
        return self.model.layers[LAYER]

    @property
    def names(self) -> list[str]:
        """The canonical values and parameters of the layer."""
        prefix = f"layers.{LAYER}."
        names = self.model.catalogue.names
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix) and not names[name].is_module]

    def has(self, name: str) -> bool:
        return self.model.catalogue.named(f"layers.{LAYER}.{name}") is not None

    def of(self, name: str) -> Any:
        """The proxy of a value of the layer."""
        value = self.layer
        for part in name.split("."):
            value = getattr(value, part)
        return value

    @cached_property
    def values(self) -> list[dict[str, Tensor]]:
        read = []
        with self.model.trace() as trace:
            for ids in PROMPTS:
                with trace.invoke(ids):
                    found = {name: self.of(name).save() for name in self.names}
                    found |= {"input": self.layer.input.save(), "output": self.layer.output.save()}
                    found |= {"x": self.layer.mixer.input.save(), "mlp_out": self.layer.mlp.output.save()}
                    found |= {"W_U": self.model.W_U.save(), "W_E": self.model.W_E.save()}
                    found |= {"logits": self.model.logits.save(), "embed": self.model.embed.output.save()}
                    if self.has("mixer_norm"):
                        found["normed"] = self.layer.mixer_norm(self.layer.input).save()
                    read.append(found)
        return [{name: value.value for name, value in found.items()} for found in read]

    @cached_property
    def expected(self) -> list[dict[str, Tensor]]:
        return [self.here.run(ids) for ids in PROMPTS]

    @property
    def both(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """What was read, and what is to be expected, for each of the prompts."""
        return zip(self.values, self.expected, strict=True)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    root = tmp_path_factory.mktemp("families")
    for name in tiny.UNEVEN:
        tiny.uneven(name).save_pretrained(root / name)
    with (
        Server({name: root / name for name in tiny.UNEVEN}) as server,
        patchwire.connect(server.address, progress=False) as client,
    ):
        yield {name: Case(name, client.model(name), root / name) for name in tiny.UNEVEN}


@pytest.fixture
def case(cases: dict[str, Case], name: str) -> Case:
    return cases[name]


every_family = pytest.mark.parametrize("name", tiny.UNEVEN)


def same(one: Tensor, other: Tensor, what: object = "") -> None:
    torch.testing.assert_close(one, other, **TOLERANCE, msg=lambda message: f"{what}: {message}")


def ramp(size: int) -> Tensor:
    """Numbers that no norm takes away."""
    return torch.linspace(-2.0, 3.0, size)


@every_family
def test_what_attention_has_everywhere_has_a_name(case: Case) -> None:
    known = {each for each in EVERYWHERE if case.has(each)}

    assert EVERYWHERE - known == LACKS.get(case.name, set())


@every_family
def test_queries_keys_and_values_are_the_projections_heads(case: Case) -> None:
    for read, expected in case.both:
        for name in "qkvz":
            assert read[f"attn.{name}"].shape == expected[name].shape
            same(read[f"attn.{name}"], expected[name], name)


@every_family
def test_weights_turn_the_mixers_input_into_queries_keys_and_values(case: Case) -> None:
    for read, expected in case.both:
        same(read["x"], expected["x"])
        if "normed" in read:
            same(read["normed"], read["x"])
        for name in "QKV":
            computed = torch.einsum("bsm,hmd->bshd", read["x"], read[f"attn.W_{name}"])
            computed += read.get(f"attn.b_{name}", torch.zeros(()))
            same(computed, read[f"attn.{name.lower()}"], name)


@every_family
def test_patterns_are_those_that_hugging_face_returns(case: Case) -> None:
    if case.name in WITHOUT_SCORES:
        pytest.skip("this model has no patterns")
    for ids, read in zip(PROMPTS, case.values, strict=True):
        expected = case.eager.model(ids, output_attentions=True).attentions[LAYER]

        same(read["attn.pattern"], expected)
        same(torch.softmax(read["attn.scores"], -1), read["attn.pattern"])
        attended = torch.einsum("bhqk,bkhd->bqhd", read["attn.pattern"], case.here.repeated(read["attn.v"]))
        if case.name != "olmo":  # which clips values first
            same(attended, read["attn.z"])


@every_family
def test_scores_are_the_product_of_rotated_queries_and_keys(case: Case) -> None:
    if case.name in WITHOUT_SCORES:
        pytest.skip("this model has no scores")
    for read in case.values:
        product, scores = case.here.product(read["attn.q_rot"], read["attn.k_rot"]), read["attn.scores"]
        seen = read["attn.pattern"] > 0
        if case.name == "bloom":  # a bias for each key, as in its paper's figure 3, with slopes for three heads
            slopes = torch.tensor([2.0**-4, 2.0**-8, 2.0**-2])
            product = product + slopes[:, None, None] * torch.arange(scores.shape[-1])

        same(scores[seen], product[seen])


@every_family
def test_heads_add_up_to_what_attention_returns(case: Case) -> None:
    for read, expected in case.both:
        bias = read.get("attn.b_O", torch.zeros(()))

        same(read["attn.head_out"].sum(2) + bias, expected["attn_out"])
        if case.name not in ("gemma2", "gemma3_text", "olmo2"):
            same(expected["attn_out"] * case.here.family.times, read["mixer.update"])


@every_family
def test_the_residual_stream_adds_up(case: Case) -> None:
    for read, expected in case.both:
        same(read["input"], expected["input"])
        same(read["output"], expected["output"])
        same(read["mixer.update"], expected["mixer.update"])
        same(read["mlp.update"], expected["mlp.update"])
        if "resid_mid" in read:
            same(read["input"] + read["mixer.update"], read["resid_mid"])
            same(read["resid_mid"] + read["mlp.update"], read["output"])
        else:
            assert case.here.family.parallel
            same(read["input"] + read["mixer.update"] + read["mlp.update"], read["output"])


@every_family
def test_neurons_add_up_to_what_the_mlp_returns(case: Case) -> None:
    if not case.here.has_mlp:
        pytest.skip("its neurons are its experts'")
    for read, expected in case.both:
        same(read["mlp.neurons"], expected["neurons"])
        for name in ("pre", "gate", "up"):
            if name in expected:
                same(read[f"mlp.{name}"], expected[name], name)
        out = torch.einsum("bsn,nm->bsm", read["mlp.neurons"], read["mlp.W_out"])
        same(out + read.get("mlp.b_out", torch.zeros(())), expected["mlp_out"])
        same(read["mlp.pre"], expected.get("gate", expected.get("pre")))


@every_family
def test_the_mlps_weights_turn_its_input_into_what_neurons_come_from(case: Case) -> None:
    if not case.here.has_mlp:
        pytest.skip("its neurons are its experts'")
    with case.model.trace(PROMPTS[0]):
        x = case.layer.mlp.input.save()
        bias = case.layer.mlp.b_in.save() if case.has("mlp.b_in") else None
        weights = {each: case.of(f"mlp.{each}").save() for each in ("W_in", "W_gate") if case.has(f"mlp.{each}")}
    read = case.values[0]

    found = x.value @ weights["W_in"].value + (0 if bias is None else bias.value)
    same(found, read["mlp.up"] if "W_gate" in weights else read["mlp.pre"])
    if "W_gate" in weights and not case.has("mlp.b_in"):
        same(x.value @ weights["W_gate"].value, read["mlp.gate"])


@every_family
def test_reading_leaves_the_logits_as_they_are_and_embeddings_are_rows_of_a_table(case: Case) -> None:
    for ids, (read, expected) in zip(PROMPTS, case.both, strict=True):
        same(read["logits"], expected["logits"])
        width = case.here.model.config.hidden_size
        assert read["W_E"].shape == (tiny.VOCABULARY, width)
        assert read["W_U"].shape == (width, tiny.VOCABULARY)
        scale = width**0.5 if case.name.startswith("gemma") else 1.0
        same(read["W_E"][ids] * scale, read["embed"])
        torch.testing.assert_close(read["W_U"].T, case.here.model.get_output_embeddings().weight, rtol=0, atol=0)


@every_family
def test_writes_do_what_hooks_do(case: Case) -> None:
    ids, size, here = PROMPTS[0], case.here.size, case.here
    logits: dict[str, Any] = {}

    with case.model.session():
        with case.model.trace(ids):
            case.layer.attn.z[:, :, 1] = 0
            logits["z"] = case.model.logits.save()
        with case.model.trace(ids):
            case.layer.attn.q[:, 2:, 0] += ramp(size)
            logits["q"] = case.model.logits.save()
        if here.has_mlp:
            with case.model.trace(ids):
                case.layer.mlp.neurons[..., 5] = 2.0
                logits["neurons"] = case.model.logits.save()
        if case.has("resid_mid"):
            with case.model.trace(ids):
                case.layer.resid_mid[:, 3] += ramp(here.model.config.hidden_size)
                logits["mixer.update"] = case.model.logits.save()

    changes = {
        "z": lambda value: value[..., size : 2 * size].zero_(),
        "q": lambda value: value[:, 2:].add_(ramp(size)),
        "neurons": lambda value: value[..., 5].fill_(2.0),
        "mixer.update": lambda value: value[:, 3].add_(ramp(value.shape[-1])),
    }
    plain = case.expected[0]["logits"]
    for what, value in logits.items():
        with here.changed(what, changes[what]):
            expected = here.model(ids).logits
        same(value.value, expected, what)
        assert not torch.allclose(expected, plain, atol=1e-3), what


@every_family
def test_a_key_whose_scores_are_taken_away_is_not_attended_to(case: Case) -> None:
    if case.name in WITHOUT_SCORES:
        pytest.skip("this model has no scores")
    ids = PROMPTS[0]

    with case.model.trace(ids):
        case.layer.attn.scores[..., 2] = float("-inf")
        pattern = case.layer.attn.pattern.save()
        logits = case.model.logits.save()
    with case.eager.scores_changed(lambda scores: scores[..., 2].fill_(float("-inf"))):
        expected = case.eager.model(ids).logits

    assert (pattern.value[..., 2] == 0).all()
    same(logits.value, expected)
    assert not torch.allclose(expected, case.expected[0]["logits"], atol=1e-3)


@every_family
def test_what_is_computed_cannot_be_written(case: Case) -> None:
    with pytest.raises(SiteError, match="is computed from other values"), case.model.trace(PROMPTS[0]):
        case.layer.attn.head_out = torch.zeros(2, 7, case.here.heads, case.here.model.config.hidden_size)
    with pytest.raises(patchwire.PatchwireError, match="is computed from other values"), case.model.trace(PROMPTS[0]):
        case.layer.attn.head_out[:, 0] = 0


def test_queries_weights_that_are_apart_in_the_model_are_computed(cases: dict[str, Case]) -> None:
    case = cases["falcon_grouped"]

    with pytest.raises(patchwire.PatchwireError, match="is computed from other values"), case.model.trace(PROMPTS[0]):
        case.layer.attn.W_Q[0] = 0
    with case.model.trace(PROMPTS[0]):
        case.layer.attn.W_K[0] = 0
        key = case.layer.attn.k.save()

    assert (key.value[:, :, 0] == 0).all()
    assert (key.value[:, :, 1] != 0).any()


@every_family
def test_steps_of_a_generation_have_them_too(case: Case) -> None:
    ids, found = PROMPTS[1], []
    names = [f"attn.{each}" for each in ("q", "k", "v", "z", "q_rot", "k_rot", "pattern") if case.has(f"attn.{each}")]
    names += [name for name in ("mixer.update", "mlp.update", "mlp.neurons", "mlp.router") if case.has(name)]

    with case.model.generate(ids, max_new_tokens=3, min_new_tokens=3) as generation:
        for _ in generation.iter[0:3]:
            found.append({name: case.of(name).save() for name in names})
        tokens = generation.output.save()
    with case.model.trace(tokens.value[:, :-1]):
        whole = {name: case.of(name).save() for name in names}

    for step in (1, 2):
        position = ids.shape[1] + step - 1
        for name, value in found[step].items():
            if name == "attn.pattern":  # earlier than a window, keys may have been forgotten
                expected = whole[name].value[:, :, position : position + 1, : position + 1]
                same(value.value, expected[..., -value.value.shape[-1] :], (name, step))
            elif name == "attn.k_rot":
                expected = whole[name].value[:, : position + 1]
                same(value.value, expected[:, -value.value.shape[1] :], (name, step))
            else:
                same(value.value, whole[name].value[:, position : position + 1], (name, step))


@pytest.mark.parametrize("length", [5, 11, 20])
def test_a_generation_grows_into_a_sliding_window_and_beyond(length: int) -> None:
    window = 12
    reference = tiny.build("mistral").requires_grad_(False)
    reference.config.sliding_window = window
    model = patchwire.local(reference, progress=False)
    with model.generate(tiny.prompt(length), max_new_tokens=5, min_new_tokens=5) as generation:
        found = [model.layers[1].attn.pattern.save() for _ in generation.iter[0:5]]
        tokens = generation.output.save()
    reference.set_attn_implementation("eager")
    expected = reference(tokens.value[:, :-1], output_attentions=True).attentions[1]

    same(found[0].value, expected[:, :, :length, :length])
    for step, value in enumerate(found[1:], start=length):
        seen = min(step + 1, window)
        same(value.value, expected[:, :, step : step + 1, step + 1 - seen : step + 1])


@pytest.mark.parametrize("name", ROUTED)
def test_the_router_scores_every_expert_and_the_best_are_chosen(case: Case) -> None:
    gate = case.here.layer.get_submodule("mlp.gate")
    for ids, read in zip(PROMPTS, case.values, strict=True):
        seen: list[Tensor] = []
        handle = gate.register_forward_hook(lambda _, args, output, seen=seen: seen.extend((args[0], *output)))
        case.here.model(ids)
        handle.remove()
        x, logits, _, chosen = seen

        same(read["mlp.router"], (x @ gate.weight.T).view(*ids.shape, -1))
        same(read["mlp.router"], logits.view(*ids.shape, -1))
        assert torch.equal(read["mlp.chosen_experts"], chosen.view(*ids.shape, -1))
        assert torch.equal(read["mlp.router"].topk(2).indices, read["mlp.chosen_experts"])


@pytest.mark.parametrize("name", ROUTED)
def test_what_is_written_to_the_router_decides(case: Case) -> None:
    ids, gate = PROMPTS[0], case.here.layer.get_submodule("mlp.gate")

    with case.model.trace(ids):
        case.layer.mlp.router[:, 3:, 4] += 9.0
        chosen = case.layer.mlp.chosen_experts.save()
        logits = case.model.logits.save()

    def routed(_: Any, args: tuple[Tensor], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scores = (args[0] @ gate.weight.T).view(*ids.shape, -1)
        scores[:, 3:, 4] += 9.0
        weights, best = torch.softmax(scores.flatten(0, 1), -1).topk(2)
        if case.name != "qwen2_moe":
            weights = weights / weights.sum(-1, keepdim=True)
        return scores, weights, best

    handle = gate.register_forward_hook(routed)
    expected = case.here.model(ids).logits
    handle.remove()

    assert (chosen.value[:, 3:] == 4).any(-1).all()
    same(logits.value, expected)
    assert not torch.allclose(expected, case.expected[0]["logits"], atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt2_upcast"])
def test_the_kernel_stays_in_use_unless_somebody_looks_inside(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, kernel = patchwire.local(tiny.uneven(name)), list[int](), F.scaled_dot_product_attention
    with model.trace(tiny.prompt(5)):  # learns what is where
        model.layers[LAYER].attn.pattern.save()
        if name != "gpt2_upcast":
            model.layers[LAYER].attn.q_rot.save()

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    with model.trace(tiny.prompt(5)):
        attn = model.layers[LAYER].attn
        attn.q.save()
        attn.z[:, :, 0] = 0
        if name != "gpt2_upcast":
            attn.q_rot.save()
        model.logits.save()
    usual = len(calls)
    with model.trace(tiny.prompt(5)):
        model.layers[LAYER].attn.pattern.save()
        model.logits.save()

    assert usual == model.num_layers
    assert len(calls) == usual
