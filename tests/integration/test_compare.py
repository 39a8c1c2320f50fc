"""`patchwire.compare`: one experiment on two models of a real server, its numbers those of hooks on the models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

import patchwire
from integration.refusals import refused
from patchwire.methods import Measured, activation_patching, logit_lens
from serving import Server

CLEAN, CORRUPT, ANSWER = "the red cat sat", "the big cat sat", " dog"
TOLERANCE = 1e-5


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of words, with a token before each text."""
    vocabulary = ["<s>", " cat", " dog", " sat", " red", " big", "the", " ran"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer that cuts "the" and " cat" in pieces and knows the other words."""
    vocabulary = ["t", "h", "e", "Ġ", "c", "a", "th", "Ġc", "s", "d", "o", "g", "r", "b", "i"]
    merges = [("t", "h"), ("Ġ", "c"), ("a", "t"), ("Ġ", "s"), ("Ġs", "at"), ("Ġ", "d"), ("o", "g"), ("Ġd", "og")]
    merges += [("Ġ", "r"), ("Ġr", "e"), ("Ġre", "d"), ("Ġ", "b"), ("Ġb", "i"), ("Ġbi", "g")]
    known = dict.fromkeys([*vocabulary, *("".join(pair) for pair in merges)])
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(known)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    """Two models of different architectures, depths and tokenizers."""
    torch.manual_seed(0)
    first = GPT2Config(n_layer=2, n_embd=24, n_head=2, n_positions=32, vocab_size=40, initializer_range=0.5)
    second = MambaConfig(num_hidden_layers=3, hidden_size=24, state_size=4, vocab_size=40, initializer_range=0.5)
    return {"small": GPT2LMHeadModel(first).eval(), "deep": MambaForCausalLM(second).eval()}


@pytest.fixture(scope="module")
def compared(references: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("compared")
    for (name, module), tokenizer in zip(references.items(), (words(), letters()), strict=True):
        module.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    with Server({name: root / name for name in references}) as server:
        yield server


@pytest.fixture(scope="module")
def pair(compared: Server) -> Iterator[tuple[patchwire.Model, patchwire.Model]]:
    with patchwire.connect(compared.address, progress=False) as client:
        yield client.model("small"), client.model("deep")


def patched(module: Any, layer: Any, clean: list[int], corrupt: list[int], position: int, answer: int) -> float:
    """The same experiment with hooks on the Hugging Face model."""
    states: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).clone())

    def put(_: Any, __: Any, output: Any) -> None:
        (output[0] if isinstance(output, tuple) else output)[:, position] = states[0][:, position]

    with torch.no_grad():
        for hook, prompt in ((keep, clean), (put, corrupt)):
            handle = layer.register_forward_hook(hook)
            logits = module(torch.tensor([prompt]), use_cache=False).logits
            handle.remove()
    return float(logits[0, -1].softmax(-1)[answer])


def experiment(model: patchwire.Model) -> Any:
    return activation_patching(model, CLEAN, CORRUPT, answer=ANSWER)


@pytest.fixture(scope="module")
def found(pair: Any) -> patchwire.Comparison:
    return patchwire.compare(*pair, experiment)


def test_a_cell_of_each_model_is_what_hooks_give(
    found: patchwire.Comparison, pair: Any, references: dict[str, Any]
) -> None:
    column = found.tokens.index(" red")
    for model, values, row, layers, answer in (
        (pair[0], found.first, 0, references["small"].transformer.h, 2),
        (pair[1], found.second, 2, references["deep"].backbone.layers, 20),
    ):
        clean, corrupt = model.tokenizer(CLEAN), model.tokenizer(CORRUPT)
        position = model.tokenizer.tokens(CLEAN).index(" red")
        expected = patched(references[model.name], layers[row], clean, corrupt, position, answer)
        assert float(values[row, column]) == pytest.approx(expected, abs=TOLERANCE)


def test_layers_are_aligned_by_relative_depth(found: patchwire.Comparison) -> None:
    torch.testing.assert_close(found.depth, torch.tensor([1 / 6, 3 / 6, 5 / 6]))
    shallow, deep = (result.values for result in found.results)

    assert (len(shallow), len(deep)) == (2, 3)
    column, (one, other) = found.tokens.index(" sat"), (-1, -1)
    torch.testing.assert_close(found.first[:, column], shallow[[0, 0, 1], one])
    torch.testing.assert_close(found.second[:, column], deep[:, other])


def test_tokens_of_the_same_characters_share_a_column(found: patchwire.Comparison) -> None:
    assert found.tokens == ("<s>", "th", "e", " red", " c", "at", " sat")
    words, letters = (result.values for result in found.results)

    torch.testing.assert_close(found.first[2], words[1][[0, 1, 1, 2, 3, 3, 4]])
    torch.testing.assert_close(found.second[2, 1:], letters[2])
    assert found.second[:, 0].isnan().all(), "it has no token before the text"


def test_token_ids_are_aligned_by_position(pair: Any) -> None:
    found = patchwire.compare(*pair, lambda model: activation_patching(model, [6, 4, 1], [6, 5, 1], answer=3))

    assert found.tokens == ("#6", "#4", "#1")
    torch.testing.assert_close(found.first[0], found.results[0].values[0])
    torch.testing.assert_close(found.second, found.results[1].values)


def test_a_logit_lens_is_compared_from_the_embeddings_on(pair: Any) -> None:
    found = patchwire.compare(*pair, lambda model: logit_lens(model, CLEAN, top=1))

    torch.testing.assert_close(found.depth, torch.tensor([0.0, 1 / 6, 3 / 6, 5 / 6]))
    torch.testing.assert_close(found.first[0, -1], found.results[0].best[0, -1])
    torch.testing.assert_close(found.second[:, -1], found.results[1].best[:, -1])


def test_an_experiment_of_ones_own_measures_by_layer_or_by_token(pair: Any) -> None:
    def norms(model: patchwire.Model) -> Measured:
        with model.trace(CLEAN):
            values = torch.stack([layer.output[0, -1].norm() for layer in model.layers]).save()
        return Measured(values.value, ("layer",), unit="norm")

    def surprise(model: patchwire.Model) -> Measured:
        with model.trace(CLEAN):
            values = (-model.logits[0].log_softmax(-1)).amin(-1).save()
        return Measured(values.value, ("token",), CLEAN)

    by_layer, by_token = patchwire.compare(*pair, norms), patchwire.compare(*pair, surprise)

    assert by_layer.first.shape == by_layer.second.shape == (3,)
    assert by_layer.tokens == ()
    assert by_token.first.shape == by_token.second.shape == (7,)
    assert by_token.depth.shape == (0,)
    assert by_layer.plot().axes
    assert by_token.plot().axes
    assert "norm" in repr(by_layer)


def test_what_an_experiment_returns_has_to_say_what_it_measured(pair: Any) -> None:
    with refused(patchwire.InputError, "returned a Tensor", hint="Measured", line=False):
        patchwire.compare(*pair, lambda model: torch.zeros(3))
    with refused(patchwire.InputError, "measured 2 tokens", line=False):
        patchwire.compare(*pair, lambda model: Measured(torch.zeros(2), ("token",), CLEAN))
    with refused(patchwire.InputError, "by layer in the one model, and by token", line=False):
        patchwire.compare(
            *pair, lambda model: Measured(torch.zeros(3), ("layer" if model is pair[0] else "token",), CLEAN)
        )
    with refused(patchwire.InputError, "another prompt in each", line=False):
        patchwire.compare(
            *pair, lambda model: Measured(torch.zeros(6), ("token",), CLEAN if model is pair[0] else CORRUPT)
        )


def test_an_answer_has_to_go_on_the_clean_prompt(pair: Any) -> None:
    with refused(patchwire.InputError, "is not how", hint="space", line=False):
        activation_patching(pair[1], "t", "c", answer="h")
    with refused(patchwire.InputError, "not with a text", hint="id", line=False):
        activation_patching(pair[1], [1], [2], answer=" dog")


def test_without_an_answer_it_is_what_the_model_says(pair: Any, references: dict[str, Any]) -> None:
    found = activation_patching(pair[0], CLEAN, CORRUPT)

    with torch.no_grad():
        logits = references["small"](torch.tensor([pair[0].tokenizer(CLEAN)])).logits[0, -1]
    assert float(found.values[-1, -1]) == pytest.approx(float(logits.softmax(-1).max()), abs=TOLERANCE)


def test_the_figure_has_both_panels_with_one_scale(found: patchwire.Comparison) -> None:
    figure = found.plot(title="Patching")
    panels = [axes for axes in figure.axes if axes.images]

    assert [axes.get_title(loc="left") for axes in panels] == ["small", "deep"]
    assert panels[0].images[0].get_clim() == panels[1].images[0].get_clim()
    assert repr(found).splitlines()[0].split()[:3] == ["depth", "model", "<s>"]
