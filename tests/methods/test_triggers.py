"""Trigger examples: those that plain hooks find, one text at a time."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import patchwire
import tiny
from patchwire import methods
from patchwire_worker.zoo import corpus
from serving import Server

LAYER = 1
DATA = [tiny.prompt(2 + index % 9, seed=index % 50) for index in range(150)]
"""Some texts come several times."""


@pytest.fixture(params=["gpt2", "llama", "mamba", "mamba2"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(served: Mapping[str, patchwire.Model], name: str) -> patchwire.Model:
    return served[name]


@pytest.fixture
def reference(references: Mapping[str, PreTrainedModel], name: str) -> PreTrainedModel:
    return references[name]


def coefficients(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """What goes into the output projection of the layer, `[tokens, neurons]`."""
    base = model.base_model
    layer = (base.h if hasattr(base, "h") else base.layers)[LAYER]
    names = ("mlp.c_proj", "mlp.down_proj", "mixer.out_proj")
    modules = dict(layer.named_modules())
    [module] = [modules[each] for each in names if each in modules]
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(args[0][0]))
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("distinct", [True, False])
def test_are_those_of_plain_hooks(model: patchwire.Model, reference: PreTrainedModel, distinct: bool) -> None:
    # More than one request has, so that what has been found waits on the server in between.
    found = methods.triggers(model, LAYER, iter(DATA), top=5, distinct=distinct, batch_size=2)

    each = [coefficients(reference, ids) for ids in DATA]
    everything = torch.cat(each)
    met: set[tuple[int, ...]] = set()
    new = []
    for ids in DATA:
        for end in range(1, len(ids) + 1):
            new.append(not distinct or tuple(ids[:end]) not in met)
            met.add(tuple(ids[:end]))
    expected = everything[torch.tensor(new)].topk(5, dim=0)[0].T

    torch.testing.assert_close(found.coefficients.values, expected, rtol=1e-4, atol=1e-5)
    for neuron in range(0, len(expected), 7):
        for rank in range(5):
            example, position = int(found.examples[neuron, rank]), int(found.positions[neuron, rank])
            torch.testing.assert_close(
                found.coefficients.values[neuron, rank], each[example][position, neuron], rtol=1e-4, atol=1e-5
            )
            after = DATA[example][position + 1 : position + 2] or [-1]
            assert found.following[neuron, rank] == after[0]
            assert found.prefix(neuron, rank) == tuple(f"#{token}" for token in DATA[example][: position + 1])
    if distinct:
        prefixes = {found.prefix(0, rank) for rank in range(5)}
        assert len(prefixes) == 5


def test_statistics_are_those_of_all_tokens(model: patchwire.Model, reference: PreTrainedModel) -> None:
    found = methods.triggers(model, LAYER, DATA[:30], top=1, neurons=[3, 1, 20]).statistics

    everything = torch.cat([coefficients(reference, ids) for ids in DATA[:30]])[:, [3, 1, 20]]
    expected = torch.stack([(everything > 0).float().mean(0), everything.mean(0), everything.std(0, correction=0)], 1)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-5)
    assert found.numbers == {
        "active": pytest.approx(float((everything > 0).float().mean())),
        "tokens": sum(map(len, DATA[:30])),
    }
    assert found.axes[0].labels == ("3", "1", "20")


def test_only_the_answer_comes_back(model: patchwire.Model, name: str) -> None:
    found = methods.triggers(model, LAYER, DATA, top=3)

    assert found.coefficients.stats.result_bytes < 64 * found.coefficients.values.numel() + 256


def test_fewer_examples_than_asked_for_leave_gaps(model: patchwire.Model) -> None:
    found = methods.triggers(model, LAYER, [[5, 6], [5]], top=4)

    assert found.coefficients.values.isnan().all(0).tolist() == [False, False, True, True]
    assert set(found.examples[:, 2:].flatten().tolist()) == set(found.positions[:, 2:].flatten().tolist()) == {-1}
    assert sorted(found.positions[0, :2].tolist()) == [0, 1]
    with pytest.raises(patchwire.InputError, match="not so many examples"):
        found.prefix(0, 3)


@pytest.mark.parametrize(("kind", "site"), [("scan", "scan"), ("gate", "gate_act")])
def test_of_an_ssm_can_be_those_of_its_scan_or_its_gate(
    served: Mapping[str, patchwire.Model], kind: str, site: str
) -> None:
    model = served["mamba"]
    found = methods.triggers(model, LAYER, DATA[:9], top=2, kind=kind)

    best = []
    for ids in DATA[:9]:
        with model.trace(ids):
            best.append(getattr(model.layers[LAYER].mixer, site)[0].save())
    expected = torch.cat([each.value for each in best]).amax(0)
    torch.testing.assert_close(found.coefficients.values[:, 0], expected, rtol=1e-4, atol=1e-5)


PROGRAM = """
import os, signal, sys, threading, time, patchwire
from patchwire import methods
from patchwire.methods import triggering

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background have it ignored
triggering._BATCHES = 5_000
model = patchwire.connect(sys.argv[1], progress=False).model("gpt2")

def interrupt():
    while signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # until the request is under way
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

def data():
    yield from [[1, 2, 3]] * 4_999
    threading.Thread(target=interrupt, daemon=True).start()
    yield [1, 2, 3]
    sys.exit("goes on")

found = methods.triggers(model, 1, data(), top=2, batch_size=1)
print("tokens", int(found.statistics.numbers["tokens"]), found.prefix(0))
"""


def test_ctrl_c_keeps_what_has_been_found(server: Server) -> None:
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM, server.address], capture_output=True, text=True, timeout=120, check=False
    )

    word, tokens, *_ = program.stdout.split() or [""]
    assert (word, program.stderr) == ("tokens", "")
    assert 3 <= int(tokens) < 15_000


def refusals(served: Mapping[str, patchwire.Model]) -> list[tuple[type[Exception], str, Any]]:
    gpt2, mamba = served["gpt2"], served["mamba"]
    return [
        (patchwire.SiteError, "mlp", lambda: methods.triggers(mamba, LAYER, DATA, kind="mlp")),
        (patchwire.SiteError, "ssm", lambda: methods.triggers(gpt2, LAYER, DATA, kind="scan")),
        (patchwire.InputError, "There are no neurons", lambda: methods.triggers(gpt2, LAYER, DATA, kind="heads")),
        (patchwire.InputError, "has layers 0 to 2", lambda: methods.triggers(gpt2, 3, DATA)),
        (patchwire.InputError, "that has 0 to 95", lambda: methods.triggers(gpt2, LAYER, DATA, neurons=[96])),
        (patchwire.InputError, "that has 0 to 95", lambda: methods.triggers(gpt2, LAYER, DATA, neurons=[])),
        (patchwire.InputError, "There are no examples", lambda: methods.triggers(gpt2, LAYER, [])),
        (patchwire.InputError, "is no data set", lambda: methods.triggers(gpt2, LAYER, "a text")),
        (patchwire.InputError, "at least one trigger", lambda: methods.triggers(gpt2, LAYER, DATA, top=0)),
    ]


@pytest.mark.parametrize("case", range(9))
def test_are_refused_with_a_reason(served: Mapping[str, patchwire.Model], case: int) -> None:
    kind, words, call = refusals(served)[case]
    with pytest.raises(kind, match=words):
        call()


class TestFacts:
    """Where facts are stored, neurons are about subjects: the texts that trigger one share a first or a family name."""

    texts = tuple(f"{fact.prompt(template).text} {fact.attribute}" for fact in corpus.facts() for template in range(3))

    def shared(self, found: methods.Triggers, *, shuffled: bool = False) -> float:
        """Which share of a neuron's ten triggers have its most frequent name in them, the mean over neurons that are
        ever clearly on; or the same of triggers of different neurons."""
        names = {*corpus.FIRST_NAMES, *corpus.FAMILY_NAMES}
        on = found.coefficients.values[:, 0] > 0.5
        places = torch.stack([found.examples, found.positions], -1)[on]
        if shuffled:
            order = torch.randperm(len(places) * 10, generator=torch.Generator().manual_seed(0))
            places = places.flatten(0, 1)[order].view_as(places)
        total = 0
        for neuron in places.tolist():
            words = Counter(
                word for example, place in neuron for word in names & {*self.texts[example].split()[: place + 1]}
            )
            total += words.most_common(1)[0][1] if words else 0
        return total / (10 * len(places))

    def test_share_a_name(self, facts: patchwire.Model) -> None:
        found = methods.triggers(facts, 1, self.texts, top=10, distinct=False, batch_size=64)

        assert self.shared(found) >= 0.8
        assert self.shared(found, shuffled=True) <= 0.4

    def test_share_a_name_even_where_each_is_another_prefix(self, facts: patchwire.Model) -> None:
        found = methods.triggers(facts, 1, self.texts, top=10, batch_size=64)
        last = methods.triggers(facts, 3, self.texts, top=10, batch_size=64)

        assert self.shared(found) >= max(0.6, self.shared(last) + 0.15)
        assert self.shared(found, shuffled=True) <= 0.4
        assert found.statistics.numbers["active"] <= 0.5
