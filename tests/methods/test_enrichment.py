"""Enrichment: the tokens that states promote, and what is left without a block of sublayers, with plain hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

import patchwire
import tiny
from patchwire import methods
from patchwire_worker.zoo import corpus
from patchwire_worker.zoo import path as zoo_path
from serving import Server

PROMPT = [3, 14, 15, 9, 26, 5]
SUBJECT = range(1, 3)
ATTRIBUTES = list(range(0, tiny.VOCABULARY, 4))
TOP = 12


class Reference:
    """States of the Hugging Face model, with parts of some layers knocked out."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        base = model.base_model
        self.layers: list[nn.Module] = list(base.h if hasattr(base, "h") else base.layers)

    def rate(self, layer: int, position: int, blocked: Sequence[int] = (), knockout: str = "mlp") -> float:
        states: list[Tensor] = []

        def see(module: nn.Module, args: Any, output: Any) -> None:
            states.append((output[0] if isinstance(output, tuple) else output)[0, position])

        hooks = [getattr(self, f"_{knockout}")(self.layers[each]) for each in blocked]
        hooks.append(self.layers[layer].register_forward_hook(see))
        if knockout == "uniform":
            self.model.set_attn_implementation("eager")
        with torch.no_grad():
            self.model(torch.tensor([PROMPT]), use_cache=False)
        if knockout == "uniform":
            self.model.set_attn_implementation("sdpa")
        for hook in hooks:
            hook.remove()
        best = (self.model.get_output_embeddings().weight @ states[0]).argsort(descending=True)[:TOP]
        return sum(each in ATTRIBUTES for each in best.tolist()) / TOP

    def _mlp(self, layer: nn.Module) -> Any:
        return layer.mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))

    def _neurons(self, layer: nn.Module) -> Any:
        down = layer.mlp.c_proj if hasattr(layer.mlp, "c_proj") else layer.mlp.down_proj
        return down.register_forward_pre_hook(lambda module, args: (torch.zeros_like(args[0]),))

    def _mixer(self, layer: nn.Module) -> Any:
        def nothing(module: nn.Module, args: Any, output: Any) -> Any:
            return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

        return self._mixer_of(layer).register_forward_hook(nothing)

    def _uniform(self, layer: nn.Module) -> Any:
        """A mask after which all that may be seen has the same score."""

        def hide(module: nn.Module, args: Any, kwargs: Any) -> Any:
            length = (args[0] if args else kwargs["hidden_states"]).shape[1]
            mask = torch.full((1, 1, length, length), float("-inf")).triu(1)
            mask += torch.full((length, length), torch.finfo(torch.float32).min).tril()
            return args, kwargs | {"attention_mask": mask}

        return self._mixer_of(layer).register_forward_pre_hook(hide, with_kwargs=True)

    def _mixer_of(self, layer: nn.Module) -> nn.Module:
        return next(getattr(layer, name) for name in ("attn", "self_attn", "mixer") if hasattr(layer, name))


@pytest.fixture(params=["gpt2", "llama", "mamba"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(served: Mapping[str, patchwire.Model], name: str) -> patchwire.Model:
    return served[name]


@pytest.fixture
def reference(references: Mapping[str, PreTrainedModel], name: str) -> Reference:
    return Reference(references[name])


@pytest.mark.parametrize("position", [None, -1])
def test_the_rate_is_that_of_the_states_with_hooks(
    model: patchwire.Model, reference: Reference, position: int | None
) -> None:
    found = methods.attributes_rate(model, PROMPT, SUBJECT, ATTRIBUTES, position=position, top=TOP)

    read = 2 if position is None else len(PROMPT) - 1
    expected = [reference.rate(layer, read) for layer in range(tiny.LAYERS)]
    assert found.values.tolist() == pytest.approx(expected)
    assert len(set(expected)) > 1


def test_a_token_before_every_text_is_no_attribute(tmp_path: Path) -> None:
    vocabulary = ["<s>", " cat", " dog", " sat", " red"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=len(vocabulary))).save_pretrained(tmp_path)
    model = patchwire.local(str(tmp_path), progress=False)

    found = methods.attributes_rate(model, " dog sat", " dog", " red cat")
    assert found.values.tolist() == pytest.approx([2 / len(vocabulary)]), "of all tokens, two are in the text"


@pytest.mark.parametrize("knockout", ["mlp", "neurons", "mixer", "uniform"])
@pytest.mark.parametrize(("block", "layer"), [(1, -1), (2, -1), (2, 1)])
def test_the_rate_without_a_block_is_that_with_hooks(
    model: patchwire.Model, reference: Reference, name: str, knockout: str, block: int, layer: int
) -> None:
    if name == "mamba" and knockout != "mixer":
        pytest.skip("a Mamba has no MLPs and no patterns")
    found = methods.sublayer_knockout(
        model, PROMPT, SUBJECT, ATTRIBUTES, knockouts=[knockout], block=block, layer=layer, top=TOP
    )

    end = layer % tiny.LAYERS
    blocks = [range(first, min(first + block, end + 1)) for first in range(end + 1)]
    expected = [reference.rate(end, 2, each, knockout) for each in blocks]
    assert found.values[0].tolist() == pytest.approx(expected)
    assert found.numbers["base"] == pytest.approx(reference.rate(end, 2))


def test_a_mamba_has_no_patterns_that_could_be_uniform(served: Mapping[str, patchwire.Model]) -> None:
    with pytest.raises(patchwire.PatchwireError, match="computed"):
        methods.sublayer_knockout(served["mamba"], PROMPT, SUBJECT, ATTRIBUTES, knockouts=["uniform"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"subject": [9]}, "none at 9"),
        ({"attributes": []}, "no attributes"),
        ({"position": 6}, "none at 6"),
        ({"top": 0}, "cannot be counted"),
        ({"knockouts": ["attn"]}, "no knockout “attn”"),
        ({"layer": 3}, "up to layer 3"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    served: Mapping[str, patchwire.Model], change: dict[str, Any], words: str
) -> None:
    told: dict[str, Any] = {"prompt": PROMPT, "subject": SUBJECT, "attributes": ATTRIBUTES}
    with pytest.raises(patchwire.InputError, match=words):
        methods.sublayer_knockout(served["gpt2"], **(told | change))


@pytest.fixture(scope="module")
def zoo() -> Iterator[dict[str, patchwire.Model]]:
    names = ("facts-gpt2", "facts-mamba")
    with (
        Server({name: f"zoo:{name}" for name in names}) as server,
        patchwire.connect(server.address, progress=False) as client,
    ):
        yield {name: client.model(name) for name in names}


ABOUT_PEOPLE = " ".join(attribute for relation in corpus.RELATIONS for attribute in relation.attributes)


def test_stop_words_and_short_words_do_not_count(zoo: Mapping[str, patchwire.Model]) -> None:
    reference = AutoModelForCausalLM.from_pretrained(zoo_path("facts-gpt2"), dtype=torch.float32)
    words, prompt = list(corpus.vocabulary()), corpus.facts()[3].prompt()
    about = "the City of Lisbon in a house is where friends have Ada 's home , not one B C D baker lawyer Latin"
    with torch.no_grad():
        states = reference(torch.tensor([corpus.encode(prompt.words)]), output_hidden_states=True).hidden_states
        scores = reference.lm_head.weight @ states[2][0, prompt.subject[1] - 1]
    promoted = [words[each] for each in scores.argsort(descending=True)[:100]]
    counted = [each for each in promoted if len(each) > 2 and each.lower() not in methods.STOPWORDS][:40]
    expected = sum(each in about.split() for each in counted) / 40

    found = methods.attributes_rate(zoo["facts-gpt2"], prompt.text, range(*prompt.subject), about, top=40, among=100)
    assert found.values[1] == pytest.approx(expected)
    assert expected > 0
    assert len(set(promoted[:40]) - set(counted)) > 0


@pytest.mark.parametrize("name", ["facts-gpt2", "facts-mamba"])
def test_early_mixers_enrich_a_subject_with_attributes(zoo: Mapping[str, patchwire.Model], name: str) -> None:
    rates, without = [], []
    for fact in corpus.facts()[::79]:
        told = (zoo[name], fact.prompt().text, fact.subject, ABOUT_PEOPLE)
        rates.append(methods.attributes_rate(*told, top=16).values)
        found = methods.sublayer_knockout(*told, top=16, knockouts=["mixer"], block=2, layer=1)
        without.append(found.values[0, 0])
        assert found.numbers["base"] == pytest.approx(float(rates[-1][1]))

    after = torch.stack(rates).mean(0)
    assert after[1] > after[0]
    assert after[1] > after[3]
    assert torch.stack(without).mean() <= 0.3 * after[1]
