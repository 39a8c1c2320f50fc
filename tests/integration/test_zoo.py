"""The zoo: each model answers as its card says, and experiments on it come out as they must."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

import patchwire
from integration.refusals import refused
from patchwire_worker import zoo
from patchwire_worker.zoo import corpus
from patchwire_worker.zoo.training import facts, induction, modular, recall, superposition
from serving import Server

PAIR = ("facts-gpt2", "facts-mamba")
RECALL = ("recall-gpt", "recall-gpt@seed-1", "recall-mamba", "recall-mamba@seed-1")
SERVED = (
    *PAIR, *RECALL, "induction-2l", "modular-addition", "modular-addition@500", "modular-addition@3000",
    "modular-addition@5000", "superposition", "superposition@dense", "superposition@20-features",
)  # fmt: skip
EVERY = [name for entry in zoo.ENTRIES for name in entry.names]


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, patchwire.Model]]:
    """Every model of the zoo, on one server."""
    specs = {name.replace("@", "-"): f"zoo:{name}" for name in SERVED}
    with Server(specs) as server, patchwire.connect(server.address, progress=False) as client:
        yield {name: client.model(name.replace("@", "-")) for name in SERVED}


def accuracy(model: patchwire.Model, prompts: Sequence[corpus.Prompt]) -> float:
    """The share of prompts after which the right word is the likeliest."""
    with model.trace([prompt.text for prompt in prompts]):
        said = model.logits[:, -1].argmax(-1).save()
    answers = [model.tokenizer.encode(prompt.answer)[0] for prompt in prompts]
    return (said.value == torch.tensor(answers)).double().mean().item()


class TestTheCatalogue:
    def test_names_every_folder_and_no_other(self):
        here = Path(zoo.__file__).parent
        folders = {file.parent.relative_to(here) for file in here.rglob("config.json")}
        assert folders == {Path(*name.split("@")) for name in EVERY} == {Path(*name.split("@")) for name in SERVED}

    def test_has_a_card_and_weights_for_every_model(self):
        for name in EVERY:
            assert zoo.card(name).startswith(f"# zoo:{name.partition('@')[0]}\n")
            with safe_open(zoo.path(name) / "model.safetensors", "pt") as weights:
                assert weights.keys()

    def test_is_small(self):
        sizes = {name: (zoo.path(name) / "model.safetensors").stat().st_size for name in EVERY}
        assert max(sizes.values()) < 3_000_000
        assert sum(sizes.values()) < 12_000_000

    @pytest.mark.parametrize(
        ("wrong", "hint"),
        [("facts-gpt", "`zoo:facts-gpt2`"), ("modular-addition@1", "`zoo:modular-addition@500`"), ("../zoo", "`zoo:")],
    )
    def test_refuses_what_it_does_not_have_and_names_the_nearest(self, wrong, hint):
        with refused(patchwire.ModelNotFoundError, f"There is no `zoo:{wrong}`", hint=hint, line=False):
            patchwire.local(f"zoo:{wrong}")

    def test_loads_into_this_program_by_its_name(self):
        model = patchwire.local("zoo:modular-addition@500", progress=False)
        assert model.name == "modular-addition-500"


class TestFacts:
    @pytest.mark.parametrize("name", PAIR)
    def test_are_recalled_in_every_template(self, models, name):
        for template in range(3):
            assert accuracy(models[name], [fact.prompt(template) for fact in corpus.facts()]) >= 0.95

    @pytest.mark.parametrize("name", PAIR)
    def test_are_not_all_that_is_known(self, models, name):
        assert accuracy(models[name], corpus.ioi(100)) >= 0.9
        assert accuracy(models[name], corpus.successors()) >= 0.98
        assert accuracy(models[name], corpus.induction(100)) >= 0.9

    @pytest.mark.parametrize("name", PAIR)
    @pytest.mark.parametrize("template", [0, 1])
    def test_are_stored_early_at_the_subject_and_late_at_the_end(self, models, name, template):
        effect = traced(models[name], template)

        assert min(effect["subject"][:2]) >= 0.45
        assert effect["subject"][1] >= 0.7
        assert abs(effect["subject"][-1]) <= 0.1
        assert max(map(abs, effect["relation"][:2])) <= 0.1
        assert max(map(abs, effect["end"][:2])) <= 0.1
        assert effect["end"][-1] >= 0.99

    @pytest.mark.parametrize("name", PAIR)
    def test_leave_the_subject_in_the_later_layers(self, models, name):
        assert without_flow(models[name], [0, 1]) >= 0.9
        assert without_flow(models[name], [2, 3]) <= 0.3

    def test_have_a_counterpart_that_shares_no_name_and_no_answer(self):
        for fact in corpus.facts():
            other = corpus.counterpart(fact)
            assert other.relation is fact.relation
            assert other.attribute != fact.attribute
            assert not set(other.subject.split()) & set(fact.subject.split())

    def test_cannot_be_told_from_one_name_alone(self):
        by_name: dict[tuple[str, str], set[str]] = {}
        for fact in corpus.facts():
            for name in fact.subject.split():
                by_name.setdefault((name, fact.relation.name), set()).add(fact.attribute)
        assert min(map(len, by_name.values())) >= 3

    def test_name_their_subject_by_its_tokens(self, models):
        prompt = corpus.facts()[0].prompt(2)
        tokens = models["facts-gpt2"].tokenizer.encode(prompt.text)
        start, stop = prompt.subject
        assert models["facts-gpt2"].tokenizer.decode(tokens[start:stop]) == corpus.facts()[0].subject


class TestRecall:
    @pytest.mark.parametrize("name", RECALL)
    def test_is_of_every_fact_in_every_template(self, models, name):
        for template in range(3):
            assert accuracy(models[name], [fact.prompt(template) for fact in corpus.facts()]) == 1

    @pytest.mark.parametrize("name", RECALL)
    def test_sees_two_tokens_before_the_last_layer(self, models, name):
        texts = ["Ada Barlow lives in the city of", "Hugo Barlow lives in the city of"]
        with models[name].trace(texts):
            states = [layer.output.save() for layer in models[name].layers]
        same = torch.stack([(each.value[0] == each.value[1]).all(-1) for each in states])
        assert same.tolist() == [[False] * 2 + [True] * 5] * 2 + [[False] * 7]

    @pytest.mark.parametrize("name", RECALL[:2])
    def test_has_no_attention_in_the_middle_and_no_mlp_around_it(self, models, name):
        model = models[name]
        with model.trace(corpus.facts()[0].prompt().text):
            mlps = [layer.mlp.output.any().save() for layer in model.layers]
            mixers = [layer.mixer.output.any().save() for layer in model.layers]
        assert [each.item() for each in mlps] == [False, True, False]
        assert [each.item() for each in mixers] == [True, False, True]

    @pytest.mark.parametrize("name", RECALL[2:])
    def test_of_a_mamba_has_no_state_that_lasts_before_the_last_layer(self, models, name):
        model = models[name]
        with model.trace(corpus.facts()[0].prompt().text):
            decays = [
                (layer.ssm.delta[..., None] * -layer.ssm.A_log.exp()).exp().max().save() for layer in model.layers
            ]
        assert [each.item() > 0 for each in decays] == [False, False, True]


def some_facts(count: int) -> Sequence[corpus.Fact]:
    """About so many facts. The step is odd, so that each of the four relations, which take turns, is among them."""
    return corpus.facts()[:: len(corpus.facts()) // count | 1]


def traced(model: patchwire.Model, template: int, count: int = 12) -> dict[str, list[float]]:
    """What share of the right answer's probability comes back when one state is restored, after each layer.

    The subject is replaced by another; then the residual stream of the right prompt is written at the subject's last
    token, at the middle one of the relation, or at the end. Of the sums over facts.
    """
    gained: dict[str, list[patchwire.Value]] = {}
    lost = []
    with model.session():
        for fact in some_facts(count):
            right, wrong = fact.prompt(template), corpus.counterpart(fact).prompt(template)
            answer = model.tokenizer.encode(right.answer)[0]
            last, end = right.subject[1] - 1, len(right.words) - 1
            with model.trace() as trace:
                with trace.invoke(right.text):
                    states = [layer.output[0] for layer in model.layers]
                    most = model.logits[0, -1].softmax(-1)[answer]
                with trace.invoke(wrong.text):
                    least = model.logits[0, -1].softmax(-1)[answer]
                lost.append((most - least).save())
                for place, position in (("subject", last), ("relation", (last + end + 1) // 2), ("end", end)):
                    for layer, state in zip(model.layers, states, strict=True):
                        with trace.invoke(wrong.text):
                            layer.output[0, position] = state[position]
                            restored = model.logits[0, -1].softmax(-1)[answer]
                        gained.setdefault(place, []).append((restored - least).save())
    whole = sum(each.item() for each in lost)
    return {
        place: (torch.stack([each.value for each in found]).view(-1, model.num_layers).sum(0) / whole).tolist()
        for place, found in gained.items()
    }


def without_flow(model: patchwire.Model, layers: Sequence[int], count: int = 20) -> float:
    """The mean probability of the answer when the words after a subject do not see it in some layers."""
    found = []
    with model.session():
        for fact in some_facts(count):
            prompt = fact.prompt()
            with model.trace(prompt.text):
                for layer in layers:
                    later = range(prompt.subject[1], len(prompt.words))
                    patchwire.knockout(model.layers[layer].mixer, keys=range(*prompt.subject), queries=later)
                found.append(model.logits[0, -1].softmax(-1)[model.tokenizer.encode(prompt.answer)[0]].save())
    return sum(each.item() for each in found) / len(found)


@pytest.fixture(scope="module")
def repeats() -> Tensor:
    """25 random words that come four times, after the beginning: `[6, 101]`."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(64, generator=generator)[:25] + 1 for _ in range(6)]
    return torch.stack([torch.cat([torch.zeros(1, dtype=torch.long), *[row] * 4]) for row in rows])


class TestInduction:
    def test_tokens_that_came_before_are_known(self, models, repeats):
        assert loss_on_repeats(models["induction-2l"], repeats) < 0.2

    def test_heads_of_the_second_layer_match_prefixes(self, models, repeats):
        model = models["induction-2l"]
        with model.trace(repeats):
            patterns = [layer.attn.pattern.save() for layer in model.layers]
        first, second = (prefix_matching(each.value, period=25) for each in patterns)

        assert second.max() >= 0.5
        assert first.max() <= 0.15

    @pytest.mark.parametrize("layer", [0, 1])
    def test_nothing_is_known_without_either_layer(self, models, repeats, layer):
        assert loss_on_repeats(models["induction-2l"], repeats, without=layer) >= math.log(64)

    def test_its_mlps_add_nothing(self, models, repeats):
        model = models["induction-2l"]
        with model.trace(repeats):
            added = [layer.mlp.output.abs().max().save() for layer in model.layers]
        assert [each.item() for each in added] == [0, 0]


def loss_on_repeats(model: patchwire.Model, ids: Tensor, without: int | None = None) -> float:
    with model.trace(ids):
        if without is not None:
            model.layers[without].mixer.output[:] = 0
        logits = model.logits.save()
    return F.cross_entropy(logits.value[:, 26:-1].flatten(0, 1), ids[:, 27:].flatten()).item()


def prefix_matching(pattern: Tensor, period: int) -> Tensor:
    """For each head, the mean attention to the tokens that followed the present one before."""
    query, key = torch.meshgrid(*[torch.arange(pattern.shape[-1])] * 2, indexing="ij")
    after = (key > 1) & (key <= query) & ((query - key + 1) % period == 0)
    return (pattern * after).sum(-1)[..., period + 1 :].mean((0, 2))


class TestModularAddition:
    def answers(self, model: patchwire.Model) -> Tensor:
        with model.trace(modular.pairs()):
            said = model.logits[:, -1].argmax(-1).save()
        return said.value == modular.answers()

    def test_is_right_in_the_end(self, models):
        assert self.answers(models["modular-addition"]).double().mean() > 0.99

    def test_is_memorised_before_it_is_understood(self, models):
        seen, right = modular.trained_on(), self.answers(models["modular-addition@500"])
        assert right[seen].double().mean() > 0.99
        assert right[~seen].double().mean() < 0.6

    def test_takes_text(self, models):
        model = models["modular-addition"]
        with model.trace("17 50 ="):
            said = model.logits[0, -1].argmax().save()
        assert model.tokenizer.decode(said.value) == str(67 % modular.PRIME)

    def test_its_norms_do_next_to_nothing(self, models):
        model = models["modular-addition"]
        with model.trace(modular.pairs()[:100]):
            before, after = model.norm.input.save(), model.norm.output.save()
        plain = before.value - before.value.mean(-1, keepdim=True)
        torch.testing.assert_close(after.value, plain, rtol=1e-3, atol=1e-4)

    def test_its_embedding_has_few_frequencies_in_the_end_and_many_before(self, models):
        def share_of_five(name: str) -> float:
            with models[name].trace("1 2 ="):
                weight = models[name].embed.weight.save()
            power = torch.fft.rfft(weight.value[: modular.PRIME].double(), dim=0)[1:].abs().pow(2).sum(1)
            return float(power.sort(descending=True).values[:5].sum() / power.sum())

        assert share_of_five("modular-addition") >= 0.8
        assert share_of_five("modular-addition@500") <= 0.4


class TestSuperposition:
    def weight(self, model: patchwire.Model) -> Tensor:
        with model.trace([[0]]):
            weight = model.layers[0].weight.save()
        return weight.value

    def test_makes_a_pentagon_of_sparse_features(self, models):
        weight = self.weight(models["superposition"])
        assert (superposition.dimensionality(weight) - 0.4).abs().max() < 0.02
        angles = torch.atan2(weight[1], weight[0]).rad2deg().sort().values
        gaps = torch.cat([angles.diff(), angles[:1] + 360 - angles[-1:]])
        assert (gaps - 72).abs().max() < 2

    def test_keeps_two_of_five_dense_features(self, models):
        shares = superposition.dimensionality(self.weight(models["superposition@dense"])).sort().values
        torch.testing.assert_close(shares, torch.tensor([0.0, 0, 0, 1, 1]), rtol=0, atol=0.05)

    def test_makes_pairs_of_ten_of_twenty_features(self, models):
        shares = superposition.dimensionality(self.weight(models["superposition@20-features"])).sort().values
        torch.testing.assert_close(shares, torch.tensor([0.0] * 10 + [0.5] * 10), rtol=0, atol=0.05)

    def test_takes_features_and_gives_their_reconstruction(self, models):
        model = models["superposition"]
        x = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
        with model.trace({"inputs_embeds": x}):
            hidden, reconstruction = model.layers[0].output.save(), model.logits.save()
            weight, bias = model.layers[0].weight.save(), model.lm_head.bias.save()

        torch.testing.assert_close(hidden.value, x @ weight.value.T)
        torch.testing.assert_close(reconstruction.value, torch.relu(x @ weight.value.T @ weight.value + bias.value))

    def test_takes_a_feature_alone_as_a_token(self, models):
        model = models["superposition"]
        with model.trace([[0, 1, 2, 3, 4]]):
            embedded, reconstruction = model.embed.output.save(), model.logits.save()

        assert torch.equal(embedded.value[0], torch.eye(5))
        assert torch.equal(reconstruction.value[0].argmax(-1), torch.arange(5))

    def test_takes_the_same_tokens_twice_in_one_trace(self, models):
        model = models["superposition"]
        with model.trace() as trace:
            with trace.invoke([[0, 1, 2]]):
                plain = model.logits.save()
            with trace.invoke([[0, 1, 2]]):
                model.layers[0].output[:, 1] = 0
                patched, bias = model.logits.save(), model.lm_head.bias.save()

        assert torch.equal(patched.value[:, [0, 2]], plain.value[:, [0, 2]])
        torch.testing.assert_close(patched.value[0, 1], torch.relu(bias.value))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "options"),
    [
        (facts, ["--architecture", "gpt2"]),
        (facts, ["--architecture", "mamba"]),
        (recall, ["--architecture", "gpt"]),
        (recall, ["--architecture", "mamba"]),
        (induction, []),
        (modular, ["--checkpoints", "2"]),
        (superposition, []),
    ],
)
def test_a_model_can_be_trained_again(tmp_path, module, options):
    told = subprocess.run(
        [sys.executable, "-m", module.__name__, "--out", str(tmp_path), "--steps", "3", *options],
        capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr

    assert "# zoo:" in (tmp_path / "CARD.md").read_text()
    model = patchwire.local(str(tmp_path), progress=False)
    with model.trace([[0, 1, 2]]):
        logits = model.logits.save()
    assert logits.value.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "mamba"])
def test_training_computes_what_hugging_face_does(architecture):
    torch.manual_seed(0)
    model = facts.build(architecture).eval()
    ids = torch.randint(0, len(corpus.vocabulary()), (3, 12))
    torch.testing.assert_close(facts.forward(model, ids, torch.tensor([False] * 3)), model(input_ids=ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt", "mamba"])
def test_training_to_recall_computes_what_hugging_face_does(architecture):
    torch.manual_seed(0)
    model = recall.build(architecture).eval()
    ids, end = torch.randint(0, len(corpus.vocabulary()), (3, 12)), torch.full((3,), 11)
    torch.testing.assert_close(recall.forward(model, ids, end, end), model(input_ids=ids).logits)
