"""Value vectors and sub-updates: products of the Hugging Face model's own weights and of what plain hooks see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

import patchwire
import tiny
from patchwire import methods
from patchwire.methods import vocabulary
from patchwire_worker.zoo import corpus
from serving import Server

PROMPT = [3, 14, 15, 9, 26, 5]
LAYER = 1
ANSWER = 7
DATA = [tiny.prompt(2 + index % 9, seed=index) for index in range(40)]


@pytest.fixture(params=["gpt2", "llama", "gpt_neox", "mamba", "mamba2"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(served: Mapping[str, patchwire.Model], name: str) -> patchwire.Model:
    return served[name]


@pytest.fixture
def reference(references: Mapping[str, PreTrainedModel], name: str) -> PreTrainedModel:
    return references[name]


@pytest.fixture(params=[vocabulary.BLOCK, 200], ids=["one-block", "blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block, or in many whose size does not divide the whole."""
    monkeypatch.setattr(vocabulary, "BLOCK", request.param)


def projections(model: PreTrainedModel) -> list[nn.Module]:
    """The output projection of each layer."""
    base = model.base_model
    names = ("mlp.c_proj", "mlp.down_proj", "mlp.dense_4h_to_h", "mixer.out_proj")
    found = []
    for layer in base.h if hasattr(base, "h") else base.layers:
        modules = dict(layer.named_modules())
        found += [modules[each] for each in names if each in modules]
    return found


def values(module: nn.Module) -> Tensor:
    """The value vectors, `[neurons, width]`."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight if type(module).__name__ == "Conv1D" else weight.T


def test_tokens_that_are_no_text_together_are_read_each_for_itself(tmp_path: Path) -> None:
    vocabulary = ["▁cat", "▁dog", "s", "▁sat"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="s"))
    tokenizer.decoder = decoders.Metaspace()  # the first word of a text has no space
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=len(vocabulary))).save_pretrained(tmp_path)
    model = patchwire.local(str(tmp_path), progress=False)

    found = methods.value_projections(model, 0, top=len(vocabulary))
    words = {token: word for token, (word, _) in zip(found.tokens.ids[0].tolist(), found.tokens.at(0), strict=True)}
    assert [words[token] for token in range(len(vocabulary))] == [" cat", " dog", "s", " sat"]


def unembedding(model: PreTrainedModel) -> Tensor:
    found: Tensor = model.get_output_embeddings().weight  # type: ignore[assignment]
    return found.T


def seen(model: PreTrainedModel, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    """What goes into each output projection, and what comes out, at the last token."""
    found: list[tuple[Tensor, Tensor]] = []
    handles = [
        each.register_forward_hook(lambda module, args, output: found.append((args[0][0, -1], output[0, -1])))
        for each in projections(model)
    ]
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.usefixtures("blocks")
class TestValueProjections:
    def test_are_those_of_the_weights(self, model: patchwire.Model, reference: PreTrainedModel) -> None:
        found = methods.value_projections(model, LAYER, top=4).tokens

        expected = values(projections(reference)[LAYER]) @ unembedding(reference)
        torch.testing.assert_close(found.scores.values, expected.topk(4)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(expected.gather(1, found.ids), found.scores.values, rtol=1e-4, atol=1e-5)
        assert found.at(3)[0] == (f"#{int(found.ids[3, 0])}", pytest.approx(float(found.scores.values[3, 0])))

    def test_compare_with_what_comes_after_the_triggers(
        self, model: patchwire.Model, reference: PreTrainedModel
    ) -> None:
        triggers = methods.triggers(model, LAYER, DATA, top=1, neurons=range(5, 38))
        found = methods.value_projections(model, LAYER, triggers=triggers)

        logits = (values(projections(reference)[LAYER]) @ unembedding(reference))[5:38]
        after = triggers.following[:, 0]
        there = after >= 0
        assert 0 < int(there.sum()) < len(there)
        expected = (logits > logits.gather(1, after.clamp(min=0)[:, None])).sum(1).float()
        assert found.rank is not None
        assert found.agreement is not None
        assert found.rank.values.isnan().tolist() == (~there).tolist()
        assert found.rank.values[there].tolist() == expected[there].tolist()
        assert found.agreement.values[there].tolist() == (expected[there] == 0).float().tolist()
        pairs = [float(a == b) for a in logits.argmax(1)[there] for b in after[there]]
        assert found.agreement.numbers["chance"] == pytest.approx(sum(pairs) / len(pairs))


def test_the_model_does_not_run_for_its_weights(model: patchwire.Model) -> None:
    found = methods.value_projections(model, LAYER, top=2).tokens

    assert found.scores.stats.passes == 0
    assert found.scores.stats.result_bytes < 40 * found.ids.shape[0] + 64


def test_triggers_of_other_neurons_are_refused(model: patchwire.Model) -> None:
    triggers = methods.triggers(model, LAYER, DATA, top=1, neurons=[1, 2])
    for layer, neurons in ((0, None), (LAYER, [1, 3])):
        with pytest.raises(patchwire.InputError, match="The triggers are of neurons"):
            methods.value_projections(model, layer, neurons=neurons, triggers=triggers)
    with pytest.raises(patchwire.InputError, match="There are 61 tokens"):
        methods.value_projections(model, LAYER, top=62)


def test_sub_updates_are_what_each_neuron_adds(model: patchwire.Model, reference: PreTrainedModel) -> None:
    found = methods.sub_updates(model, PROMPT, answer=ANSWER, top=6, tokens=3)

    assert found.answer is not None
    for layer, (module, (coefficients, _)) in enumerate(
        zip(projections(reference), seen(reference, PROMPT), strict=True)
    ):
        vectors = values(module)
        importance = coefficients.abs() * vectors.norm(dim=1)
        best, neurons = importance.topk(6)
        torch.testing.assert_close(found.importance.values[layer], best, rtol=1e-4, atol=1e-5)
        assert found.neurons[layer].tolist() == neurons.tolist()
        torch.testing.assert_close(found.coefficients.values[layer], coefficients[neurons], rtol=1e-4, atol=1e-5)
        logits = (coefficients[neurons][:, None] * vectors[neurons]) @ unembedding(reference)
        torch.testing.assert_close(found.tokens.scores.values[layer], logits.topk(3)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            logits.gather(1, found.tokens.ids[layer]), found.tokens.scores.values[layer], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(found.answer.values[layer], logits[:, ANSWER], rtol=1e-4, atol=1e-5)


def test_all_sub_updates_and_the_bias_are_the_output(model: patchwire.Model, reference: PreTrainedModel) -> None:
    width = len(values(projections(reference)[LAYER]))
    found = methods.sub_updates(model, PROMPT, layers=[LAYER], top=width)

    module = projections(reference)[LAYER]
    vectors = values(module)[found.neurons[0]]
    total = found.coefficients.values[0] @ vectors
    if getattr(module, "bias", None) is not None:
        total = total + module.bias
    torch.testing.assert_close(total, seen(reference, PROMPT)[LAYER][1], rtol=1e-5, atol=1e-5)
    assert float(found.gap.values.max()) <= 1e-5


def test_sub_updates_are_of_one_token_of_one_run(model: patchwire.Model, name: str) -> None:
    first = methods.sub_updates(model, PROMPT, 2)
    alone = methods.sub_updates(model, PROMPT[:3])

    torch.testing.assert_close(first.importance.values, alone.importance.values, rtol=1e-4, atol=1e-5)
    assert alone.importance.stats.passes == 1
    assert alone.answer is None
    with pytest.raises(patchwire.InputError, match="has 6 tokens, and none at 6"):
        methods.sub_updates(model, PROMPT, 6)
    with pytest.raises(patchwire.InputError, match="neurons: `top` is from 1 to this"):
        methods.sub_updates(model, PROMPT, top=1000)
    with pytest.raises(patchwire.SiteError):
        methods.sub_updates(model, PROMPT, kind="mlp" if "mamba" in name else "ssm")


def test_a_factor_of_the_coefficients_is_no_sub_update(served: Mapping[str, patchwire.Model]) -> None:
    with pytest.raises(patchwire.InputError, match="no sum over “scan”"):
        methods.sub_updates(served["mamba"], PROMPT, kind="scan")


@pytest.fixture(scope="module")
def zoo() -> Iterator[dict[str, patchwire.Model]]:
    specs = {name: f"zoo:{name}" for name in ("facts-gpt2", "facts-mamba")}
    with Server(specs) as server, patchwire.connect(server.address, progress=False) as client:
        yield {name: client.model(name) for name in specs}


@pytest.mark.parametrize(("name", "least"), [("facts-gpt2", 0.05), ("facts-mamba", 0.25)])
def test_in_the_last_layer_values_say_how_triggers_go_on(
    zoo: dict[str, patchwire.Model], name: str, least: float
) -> None:
    texts = [f"{fact.prompt(template).text} {fact.attribute}" for fact in corpus.facts() for template in range(3)]
    triggers = methods.triggers(zoo[name], -1, texts, top=1, batch_size=64)
    agreement = methods.value_projections(zoo[name], -1, triggers=triggers).agreement

    assert agreement is not None
    assert agreement.numbers["agreement"] >= max(least, 5 * agreement.numbers["chance"])


@pytest.mark.parametrize("name", ["facts-gpt2", "facts-mamba"])
def test_the_last_layer_raises_the_answer_by_a_few_sub_updates(zoo: dict[str, patchwire.Model], name: str) -> None:
    model, raised = zoo[name], []
    for fact in corpus.facts()[::99]:
        prompt = fact.prompt()
        found = methods.sub_updates(model, prompt.text, answer=f" {prompt.answer}", top=10).answer
        assert found is not None
        raised.append(found.values.sum(1))
    early, last = torch.stack(raised).mean(0)[1], torch.stack(raised).mean(0)[-1]
    assert float(last) > max(0.2, 5 * float(abs(early)))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, patchwire.Model]]:
    """A model that multiplies what its MLPs return, and one with a mixture of experts."""
    root = tmp_path_factory.mktemp("others")
    specs = {name: tiny.save(name, root / name) for name in ("falcon_h1", "mixtral")}
    with Server(specs) as server, patchwire.connect(server.address, progress=False) as client:
        yield {name: client.model(name) for name in specs}


def test_sub_updates_that_do_not_add_up_are_said_to(others: dict[str, patchwire.Model]) -> None:
    with pytest.warns(patchwire.errors.PatchwireWarning, match="is not the sum of its sub-updates alone"):
        found = methods.sub_updates(others["falcon_h1"], PROMPT)

    assert float(found.gap.values.max()) > 1e-2
    assert float(methods.sub_updates(others["falcon_h1"], PROMPT, kind="ssm").gap.values.max()) <= 1e-5


def test_a_mixture_of_experts_has_no_neurons_of_its_own(others: dict[str, patchwire.Model]) -> None:
    model = others["mixtral"]
    for call in (
        lambda: methods.sub_updates(model, PROMPT),
        lambda: methods.value_projections(model, 0),
        lambda: methods.triggers(model, 0, [PROMPT]),
    ):
        with pytest.raises(patchwire.SiteError, match="is not in mixtral"):
            call()
