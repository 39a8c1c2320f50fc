"""Information flow: the numbers of a mask in the attention, or of a second run of an SSM, with plain hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import patchwire
import tiny
from patchwire import methods
from patchwire_worker.zoo import corpus
from patchwire_worker.zoo import path as zoo_path
from serving import Server

PROMPT = [3, 14, 15, 9, 26, 5]
SUBJECT = range(1, 3)
ANSWER = 7
GROUPS = {"subject": [1, 2], "non-subject": [0, 3, 4], "last": [5], "last subject": [2], "two": [0, 4]}


class Reference:
    """Probabilities of the Hugging Face model when edges are cut in some layers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        base = model.base_model
        self.layers: list[nn.Module] = list(base.h if hasattr(base, "h") else base.layers)

    def probability(
        self, ids: Sequence[int], answer: int, layers: Sequence[int], keys: Sequence[int], queries: Sequence[int],
        means: Sequence[Tensor] | None = None,
    ) -> float:  # fmt: skip
        cut = self._mask if hasattr(self.model.config, "num_attention_heads") else self._run_twice
        attention = self.model.config._attn_implementation
        if cut == self._mask:
            self.model.set_attn_implementation("eager")
        hooks = [cut(each, list(keys), list(queries), None if means is None else means[each]) for each in layers]
        with torch.no_grad():
            logits = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
        for hook in hooks:
            hook.remove()
        if cut == self._mask:
            self.model.set_attn_implementation(attention)
        return float(logits.softmax(-1)[answer])

    def _mask(self, layer: int, keys: list[int], queries: list[int], mean: Tensor | None) -> Any:
        def hide(module: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            length = hidden.shape[1]
            mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
            for query in queries:
                mask[..., query, keys] = float("-inf")
            return args, kwargs | {"attention_mask": mask}

        found = self.layers[layer]
        mixer = found.attn if hasattr(found, "attn") else found.self_attn
        return mixer.register_forward_pre_hook(hide, with_kwargs=True)

    def _run_twice(self, layer: int, keys: list[int], queries: list[int], mean: Tensor | None) -> Any:
        def fill(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            """What enters the convolution at the keys; the gates, the second half, stay."""
            output = output.clone()
            width = output.shape[-1] // 2
            output[:, keys, :width] = 0.0 if mean is None else mean
            return output

        def again(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            hook = module.in_proj.register_forward_hook(fill)
            cut = type(module).forward(module, *args, **kwargs)
            hook.remove()
            output = output.clone()
            output[:, queries] = cut[:, queries]
            return output

        return self.layers[layer].mixer.register_forward_hook(again, with_kwargs=True)

    def flow(
        self, ids: Sequence[int], answer: int, groups: Mapping[str, Sequence[int]], window: int, **more: Any
    ) -> Any:
        count = len(self.layers)
        queries = more.pop("queries", [len(ids) - 1])
        base = self.probability(ids, answer, [], [], queries)
        rows = []
        for keys in groups.values():
            around = [range(max(0, at - window // 2), min(count, at - (-window // 2))) for at in range(count)]
            cut = [self.probability(ids, answer, layers, keys, queries, **more) for layers in around]
            rows.append([100 * (each - base) / base for each in cut])
        return torch.tensor(rows)


@pytest.fixture(params=["gpt2", "llama", "mamba"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(served: Mapping[str, patchwire.Model], name: str) -> patchwire.Model:
    return served[name]


@pytest.fixture
def reference(references: Mapping[str, PreTrainedModel], name: str) -> Reference:
    return Reference(references[name])


@pytest.mark.parametrize("window", [1, 2, 3])
def test_cutting_groups_of_tokens_gives_what_hooks_give(
    model: patchwire.Model, reference: Reference, window: int
) -> None:
    names = ("subject", "non-subject", "last", "last subject")
    found = methods.information_flow(model, PROMPT, SUBJECT, answer=ANSWER, sources=names, window=window)

    expected = reference.flow(PROMPT, ANSWER, {each: GROUPS[each] for each in names}, window)
    torch.testing.assert_close(found.values, expected, rtol=1e-3, atol=2e-3)
    assert found.numbers["base"] == pytest.approx(reference.probability(PROMPT, ANSWER, [], [], []), rel=1e-4)
    assert found.axes[0].labels == names


def test_any_tokens_may_be_cut_off_from_any_others(model: patchwire.Model, reference: Reference) -> None:
    sources = {"two": GROUPS["two"]}
    found = methods.information_flow(model, PROMPT, answer=ANSWER, sources=sources, queries=[4, 5], window=2)

    expected = reference.flow(PROMPT, ANSWER, sources, 2, queries=[4, 5])
    torch.testing.assert_close(found.values, expected, rtol=1e-3, atol=2e-3)


def test_what_goes_into_an_ssm_may_be_a_mean(
    served: Mapping[str, patchwire.Model], references: Mapping[str, PreTrainedModel]
) -> None:
    reference = Reference(references["mamba"])
    width = references["mamba"].config.intermediate_size
    means = [torch.linspace(-1, layer + 1, width) for layer in range(tiny.LAYERS)]
    found = methods.information_flow(served["mamba"], PROMPT, SUBJECT, answer=ANSWER, window=2, means=means)

    groups = {each: GROUPS[each] for each in found.axes[0].labels}
    torch.testing.assert_close(
        found.values, reference.flow(PROMPT, ANSWER, groups, 2, means=means), rtol=1e-3, atol=2e-3
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"subject": None}, "depends on the subject"),
        ({"sources": ["subjects"]}, "no group “subjects”"),
        ({"window": 0}, "at least one layer"),
        ({"means": [0.0]}, "1 means, and 3 layers"),
        ({"prompt": [1, 2, 3], "subject": [0, 1]}, "No token of"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    served: Mapping[str, patchwire.Model], change: dict[str, Any], words: str
) -> None:
    told: dict[str, Any] = {"prompt": PROMPT, "subject": SUBJECT, "answer": ANSWER}
    with pytest.raises(patchwire.InputError, match=words):
        methods.information_flow(served["gpt2"], **(told | change))


def test_what_a_sliding_window_hides_is_no_loss(tmp_path: Any) -> None:
    tiny.save("gpt_neo", tmp_path)  # its second layer sees four tokens
    ids = tiny.prompt(9)
    with Server({"tiny": tmp_path}) as server, patchwire.connect(server.address, progress=False) as client:
        found = methods.information_flow(client.model("tiny"), ids, range(1, 4), sources=["last subject", "last"])

    assert found.values[:, 1].tolist() == [0.0, pytest.approx(found.values[1, 1].item())]
    assert found.values[0, 0].abs() > 0.01
    assert found.values[1, 1].abs() > 0.01


@pytest.fixture(scope="module")
def zoo() -> Iterator[dict[str, patchwire.Model]]:
    names = ("facts-gpt2", "facts-mamba")
    with (
        Server({name: f"zoo:{name}" for name in names}) as server,
        patchwire.connect(server.address, progress=False) as client,
    ):
        yield {name: client.model(name) for name in names}


def flow_of_facts(model: patchwire.Model, queries: str, window: int = 2, count: int = 10) -> Tensor:
    """The mean over facts, `[last subject / subject / relation / last, layers]`, of a layer and the one before."""
    found = []
    for fact in corpus.facts()[:: len(corpus.facts()) // count + 1]:
        prompt = fact.prompt()
        subject, end = range(*prompt.subject), len(prompt.words) - 1
        relation = range(subject.stop, end)
        sources = {"last subject": subject[-1:], "subject": subject, "relation": relation, "last": [end]}
        asking = {"end": [end], "later": range(subject.stop, end + 1)}[queries]
        if queries == "later":
            sources = {"last subject": subject[-1:], "subject": subject}
        flow = methods.information_flow(
            model, prompt.text, subject, answer=f" {prompt.answer}", sources=sources, queries=asking, window=window
        )
        found.append(flow.values)
    return torch.stack(found).mean(0)


def test_facts_leave_the_subject_late_and_the_relation_before(zoo: Mapping[str, patchwire.Model]) -> None:
    last_subject, subject, relation, last = flow_of_facts(zoo["facts-gpt2"], "end")

    assert last_subject[3] <= -70
    assert subject[3] <= -70
    assert min(relation[3], last[3]) >= -10
    assert torch.stack([last_subject, subject])[:, :2].min() >= -1
    assert relation.argmin() < subject.argmin()


def test_facts_of_a_mamba_go_by_the_words_between(zoo: Mapping[str, patchwire.Model]) -> None:
    last_subject, subject, relation, last = flow_of_facts(zoo["facts-mamba"], "end")
    assert torch.stack([last_subject, subject]).min() >= -20
    assert last.min() >= -1
    assert relation[3] <= -80

    last_subject, subject = flow_of_facts(zoo["facts-mamba"], "later")
    assert last_subject[3] <= -60
    assert subject[3] <= -70
    assert torch.stack([last_subject, subject])[:, :2].min() >= -5


@pytest.mark.parametrize("kind", ["facts-gpt2", "facts-mamba"])
def test_what_is_measured_of_facts_is_what_hooks_give(zoo: Mapping[str, patchwire.Model], kind: str) -> None:
    reference = Reference(
        AutoModelForCausalLM.from_pretrained(zoo_path(kind), dtype=torch.float32).eval().requires_grad_(False)
    )
    prompt = corpus.facts()[7].prompt()
    start, stop = prompt.subject
    end = len(prompt.words) - 1
    sources, later = {"last subject": [stop - 1], "subject": list(range(start, stop))}, list(range(stop, end + 1))
    answer = f" {prompt.answer}"
    found = methods.information_flow(zoo[kind], prompt.text, answer=answer, sources=sources, queries=later, window=2)

    (ids,) = zoo[kind].tokenize(prompt.text)
    expected = reference.flow(ids, zoo[kind].tokenize(prompt.text + answer)[0][-1], sources, 2, queries=later)
    torch.testing.assert_close(found.values, expected, rtol=1e-3, atol=2e-2)
