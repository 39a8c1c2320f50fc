"""`patchwire.verify`: it holds on models as they are, and says what is wrong with one that is subtly different."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import patchwire
import tiny
from integration.refusals import refused
from patchwire import cli
from patchwire.listing import listing, spans
from serving import Server

ATTENTION = ("gpt2", "llama", "gpt_neox")
OTHERS = [
    pytest.param(name, marks=[] if name in ("llama_tied", "mamba_untied") else pytest.mark.slow)
    for name in tiny.CONFIGS
    if name not in tiny.SERVED
]


def local(module: nn.Module, **options: Any) -> patchwire.Model:
    return patchwire.local(module, progress=False, **options)


def checks(found: patchwire.Verification) -> set[str]:
    return {row.check for row in found.rows}


class Verified(dict[str, patchwire.Verification]):
    """What was found, by model; each is verified when a test first asks."""

    def __init__(self, models: dict[str, patchwire.Model]) -> None:
        super().__init__()
        self._models = models

    def __missing__(self, name: str) -> patchwire.Verification:
        self[name] = patchwire.verify(self._models[name])
        return self[name]


@pytest.fixture(scope="module")
def verified(served: dict[str, patchwire.Model]) -> dict[str, patchwire.Verification]:
    return Verified(served)


# --- what holds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.CORE)
def test_a_model_as_it_is_passes(name: str, verified: dict[str, patchwire.Verification]) -> None:
    found = verified[name]

    assert found.passed, found
    assert found.failures == []
    assert {row.layer for row in found.rows if row.layer is not None} == set(range(tiny.LAYERS))
    assert all(row.error <= row.tolerance for row in found.rows if not row.check.startswith("changed"))
    assert found.stats.passes < 12, "checks share passes"


@pytest.mark.parametrize("name", OTHERS)
def test_another_architecture_passes(name: str, tmp_path: Path) -> None:
    with Server({name: tiny.save(name, tmp_path)}) as server, patchwire.connect(server.address) as client:
        found = patchwire.verify(client.model())

    assert found.passed, found


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_checked_from_projections_to_the_residual_stream(
    name: str, verified: dict[str, patchwire.Verification]
) -> None:
    assert {
        "input @ W_Q + b_Q = q",
        "q_rot · k_rot ~ scores",
        "softmax(scores) = pattern",
        "rows of pattern sum to 1",
        "pattern has nothing from later tokens",
        "pattern @ v = z",
        "sum of head_out + b_O = output",
        "neurons @ W_out + b_out = output",
        "lm_head(norm(output of the last layer)) = logits",
    } <= checks(verified[name])


def test_the_residual_stream_is_added_up_as_the_model_does_it(verified: dict[str, patchwire.Verification]) -> None:
    assert {"input + mixer.update = resid_mid", "resid_mid + mlp.update = output"} <= checks(verified["llama"])
    assert "input + mixer.update + mlp.update = output" in checks(verified["gpt_neox"]), "it works in parallel"
    assert "input + mixer.update = output" in checks(verified["mamba"]), "it has no MLP"


def test_an_ssm_is_checked_through_its_states(verified: dict[str, patchwire.Verification]) -> None:
    assert {
        "convolution of x_in = conv",
        "exp(delta A) state + delta B u = next state",
        "C state + D u = scan",
        "silu(gate) = gate_act",
    } <= checks(verified["mamba"])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "mamba"])
def test_every_canonical_value_is_read_written_back_and_changed(
    name: str, served: dict[str, patchwire.Model], verified: dict[str, patchwire.Verification]
) -> None:
    for each in served[name].catalogue.names.values():
        kinds = {row.check.partition(":")[0] for row in verified[name].of(each.name)}
        if each.formula:
            assert {"computed", "in a batch"} <= kinds, each.name
        elif each.part is not None and not each.part.parameter:
            assert {"written back", "changed", "in a batch"} <= kinds, each.name
        elif each.part is not None:
            assert kinds, f"no check covers {each.name}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_other_dtypes_pass_within_their_rounding(name: str, dtype: torch.dtype) -> None:
    found = patchwire.verify(local(tiny.build(name, dtype=dtype)))

    assert found.passed, found


def test_odd_head_counts_and_biases_everywhere_pass() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=30, intermediate_size=44, num_hidden_layers=2, num_attention_heads=5, head_dim=6,
        num_key_value_heads=1, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    module = LlamaForCausalLM(config).eval()
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)

    found = patchwire.verify(local(module))

    assert found.passed, found
    assert "layers.1.mlp.b_gate" in {site for row in found.rows for site in row.sites}


def test_a_prompt_of_ones_own_is_used(served: dict[str, patchwire.Model]) -> None:
    found = patchwire.verify(served["gpt2"], tiny.prompt(5))

    assert found.passed, found
    assert found.tokens == 5


def test_a_prompt_that_is_too_short_is_refused(served: dict[str, patchwire.Model]) -> None:
    with refused(patchwire.InputError, "at least three tokens", hint="a sentence", line=False):
        patchwire.verify(served["gpt2"], [1, 2])


def test_the_table_has_one_line_for_all_layers_of_a_check(verified: dict[str, patchwire.Verification]) -> None:
    shown = repr(verified["llama"])

    assert shown.count("softmax(scores) = pattern") == 1
    assert "0–2" in shown
    assert f"{len(verified['llama'].rows)} checks, all hold" in shown
    assert f"{verified['llama'].stats.passes} passes" in shown
    assert verified["llama"]._repr_html_().count("<table") == 2


# --- what does not ----------------------------------------------------------------------------------------------------


def changed(name: str, change: Callable[[nn.Module], None]) -> patchwire.Verification:
    module = tiny.build(name)
    change(module)
    return patchwire.verify(local(module))


class Shifting(nn.Linear):
    """A linear module that is off by two in one place."""

    def forward(self, input: Tensor) -> Tensor:
        output = nn.functional.linear(input, self.weight, self.bias)
        output[:1, -1, 5] += 2.0
        return output


def test_a_layer_that_scales_its_mlp_is_found_out() -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    class Scaling(LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
            hidden_states, _ = self.self_attn(hidden_states=hidden_states, **options)
            hidden_states = residual + hidden_states
            residual = hidden_states
            hidden_states = self.post_attention_layernorm(hidden_states)
            hidden_states = self.mlp(hidden_states)
            return residual + 1.01 * hidden_states

    def change(module: Any) -> None:
        module.model.layers[1].__class__ = Scaling

    # Its text stands in this file, and so do the functions that it calls.
    found = changed("llama", change)

    assert not found.passed
    assert [(row.check, row.layer) for row in found.failures] == [("resid_mid + mlp.update = output", 1)]
    failure = found.failures[0]
    assert "layers.1.mlp.update" in failure.sites
    assert failure.error > failure.tolerance
    assert "of [1, 9, 24]:" in failure.words
    assert "1 FAILED" in repr(found)


def test_a_failure_tells_where_the_difference_is_largest_and_both_numbers() -> None:
    def change(module: Any) -> None:
        module.lm_head.__class__ = Shifting

    found = changed("gpt2", change)

    (failure,) = [row for row in found.failures if row.check == "lm_head.input @ W_U = lm_head.output"]
    assert failure.words.startswith("at [0, 8, 5] of [1, 9, 61]: ")
    value, expected = (float(each) for each in failure.words.partition(": ")[2].split(", not "))
    assert value - expected == pytest.approx(2.0, abs=1e-4)
    assert failure.error == pytest.approx(2.0, abs=1e-4)


def test_a_mask_that_lets_later_tokens_through_is_found_out() -> None:
    def change(module: Any) -> None:
        module.config._attn_implementation = "eager"
        for layer in module.model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
            )

    found = changed("llama", change)

    assert {(row.check, row.layer) for row in found.failures} == {
        ("pattern has nothing from later tokens", layer) for layer in range(tiny.LAYERS)
    }


def test_a_name_for_another_tensor_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from patchwire_worker.models import families
    from patchwire_worker.models.places import Place

    row = families.FAMILIES["mamba"]
    swapped = dict(row.parts) | {
        "ssm.B": Place("x_proj.output", "batch seq dt_rank|d_state|d_state!"),
        "ssm.C": Place("x_proj.output", "batch seq dt_rank|d_state!|d_state"),
    }
    monkeypatch.setitem(families.FAMILIES, "mamba", replace(row, parts=swapped))  # type: ignore[arg-type]

    found = patchwire.verify(local(tiny.build("mamba")))

    failed = {row.check for row in found.failures}
    assert {"exp(delta A) state + delta B u = next state", "C state + D u = scan"} <= failed
    assert not any(check.startswith(("written", "changed", "input")) for check in failed)


def test_a_value_that_cannot_be_read_is_a_failed_row_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from patchwire_worker.models import families
    from patchwire_worker.models.places import Place

    row = families.FAMILIES["gpt2"]
    broken = dict(row.parts) | {"attn.z": Place(":attn_output=[-1]/output", "batch seq head d_head")}
    monkeypatch.setitem(families.FAMILIES, "gpt2", replace(row, parts=broken))  # type: ignore[arg-type]

    found = patchwire.verify(local(tiny.build("gpt2")))

    assert not found.passed
    failed = {row.check.partition(":")[0]: row.words for row in found.failures if row.sites[0].endswith(".z")}
    assert failed["in a batch"].endswith("The value is [1, 4, 24], and its dimensions are batch seq head=4 d_head=6.")
    failed = {row.check: row.words for row in found.failures}
    assert failed["pattern @ v = z"].startswith("ShapeError: ")
    assert all("attn.z" in " ".join(row.sites) or "head_out" in " ".join(row.sites) for row in found.failures)
    assert any(row.passed and row.check == "softmax(scores) = pattern" for row in found.rows)


# --- the list of sites ------------------------------------------------------------------------------------------------


def test_sites_say_where_each_value_is(served: dict[str, patchwire.Model]) -> None:
    rows = {row.name: row for row in served["gpt2"].sites.rows}

    q = rows["layers[i].attn.q"]
    assert (q.layers, q.dims, q.kind) == ((0, 1, 2), "batch seq head=4 d_head=6", "value")
    assert q.where == "transformer.h[i].attn.c_attn.output"
    assert rows["layers[i].attn.head_out"].kind == "computed"
    assert rows["layers[i].attn.W_Q"].kind == "parameter"
    assert rows["layers[i].mixer"].kind == "module"
    assert served["gpt2"].sites.found_by == "table"


def test_sites_tell_what_the_model_lacks_with_the_reason(served: dict[str, patchwire.Model]) -> None:
    (bias,) = [each for each in served["llama"].sites.missing if each.name == "layers[i].attn.b_Q"]

    assert bias.layers == (0, 1, 2)
    assert bias.reason == "`model.layers[i].self_attn.q_proj.bias` is not there"
    assert "layers.0.attn.b_Q" in served["llama"].catalogue.missing
    assert "no layers[i].attn.b_Q (layers 0–2)" in repr(served["llama"].sites)


def test_sites_of_an_architecture_without_a_table_say_what_was_detected(served: dict[str, patchwire.Model]) -> None:
    found = served["odd"].sites

    assert found.found_by == "detected"
    assert "no table of this architecture" in repr(found)
    assert {row.name for row in found.rows} == {"embed", "layers[i]", "norm", "lm_head", "logits", "W_E", "W_U"}
    assert patchwire.verify(served["odd"]).passed, "what was detected is right"


def test_a_model_without_layers_says_so() -> None:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class FlatConfig(PretrainedConfig):
        model_type = "flat"
        vocab_size = 61

    class Flat(PreTrainedModel):
        config_class = FlatConfig

        def __init__(self, config: FlatConfig) -> None:
            super().__init__(config)
            self.embed = nn.Embedding(61, 8)
            self.head = nn.Linear(8, 61)
            self.post_init()

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

        def forward(self, input_ids: Tensor) -> CausalLMOutput:
            return CausalLMOutput(logits=self.head(self.embed(input_ids)))

    model = local(Flat(FlatConfig()))

    assert model.sites.found_by == "unknown"
    assert [(each.name, each.reason) for each in model.sites.missing] == [("layers", "no list of layers was found")]
    assert patchwire.verify(model).passed, "its logits are the same in a batch"


def test_a_listing_notes_the_checks_of_each_site(
    served: dict[str, patchwire.Model], verified: dict[str, patchwire.Verification]
) -> None:
    rows = {row.name: row for row in listing(served["gpt2"].catalogue, verified["gpt2"]).rows}

    assert rows["layers[i].attn.z"].checks[:2] == ("pattern @ v = z", "sum of head_out + b_O = output")
    assert {"written back", "changed", "in a batch"} <= set(rows["layers[i].attn.z"].checks)
    assert not any(row.failed for row in rows.values())


def test_numbers_are_shown_as_ranges() -> None:
    assert spans([4, 0, 1, 2, 7, 8]) == "0–2, 4, 7–8"
    assert spans([]) == ""


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.out, "width", 300)


@pytest.mark.usefixtures("wide")
def test_the_command_prints_every_check_and_ends_well(server: Server) -> None:
    result = CliRunner().invoke(cli.app, ["verify", "gpt2", "--server", server.address])

    assert result.exit_code == 0, result.output
    assert "softmax(scores) = pattern" in result.output
    assert "all hold" in result.output


@pytest.mark.usefixtures("wide")
def test_the_command_ends_with_one_if_something_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = tiny.build("gpt2")
    module.lm_head.__class__ = Shifting
    monkeypatch.setattr(cli.looking, "opened", lambda *_: local(module))

    result = CliRunner().invoke(cli.app, ["verify", "gpt2"])

    assert result.exit_code == 1
    assert "FAILED" in result.output


@pytest.mark.usefixtures("wide")
def test_the_command_lists_sites_with_and_without_checks(server: Server) -> None:
    plain = CliRunner().invoke(cli.app, ["sites", "llama", "--server", server.address, "--no-verify"])
    checked = CliRunner().invoke(cli.app, ["sites", "llama", "--server", server.address])

    assert plain.exit_code == checked.exit_code == 0
    assert "model.layers[i].self_attn.q_proj.output" in plain.output
    assert "no layers[i].attn.b_Q (layers 0–2)" in plain.output
    assert "verified by" not in plain.output
    assert "verified by" in checked.output
    assert "pattern @ v = z" in checked.output
