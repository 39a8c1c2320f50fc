"""What passes cost: learnt from two short runs, compared with formulas, and with what other runs compute and hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny
from patchwire_worker.interleaving import Stopping
from patchwire_worker.models.costs import Costs
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.models.loading import Loaded

SIZES = ((1, 1), (3, 23), (2, 60))
DENSE = ("gpt2", "llama", "gpt_neox", "opt", "mistral", "gemma2", "mamba", "mamba2", "falcon_mamba", "bamba", "odd")


def hosted(name: str, module: PreTrainedModel | None = None) -> HostedModel:
    return HostedModel(Loaded(name, module or tiny.build(name), None))


@pytest.fixture(scope="module")
def models() -> Callable[[str], HostedModel]:
    known: dict[str, HostedModel] = {}

    def get(name: str) -> HostedModel:
        if name not in known:
            known[name] = hosted(name)
        return known[name]

    return get


def counted(model: HostedModel, rows: int, seq: int) -> int:
    """The operations that PyTorch counts in a run, of attention that is computed by products of matrices."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.interleaver.run(
            lambda: model.module(input_ids=torch.ones(rows, seq, dtype=torch.long)), {}, Stopping(), stepwise=True
        )
    return counter.get_total_flops()


def held(run: Callable[[], object]) -> int:
    """The most bytes that a run has from PyTorch's allocator at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, torch.no_grad():
        run()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for each in sorted((each for each in events if each.name() == "[memory]"), key=lambda each: each.start_ns()):
        now += each.nbytes()
        most = max(most, now)
    return most


def llama(rows: int, seq: int, past: int) -> dict[str, int]:
    """The model of `tiny`: width 24, 4 heads of 6, 2 of keys and values, 40 neurons, 61 tokens."""
    tokens = rows * seq
    projections = 2 * tokens * 24 * (24 + 12 + 12 + 24)
    attention = 2 * 2 * rows * 4 * 6 * seq * (seq + past)
    return {"layer": projections + attention + 3 * 2 * tokens * 24 * 40, "head": 2 * tokens * 24 * 61}


def gpt2(rows: int, seq: int, past: int) -> dict[str, int]:
    """The model of `tiny`: width 24, 4 heads of 6, 96 neurons, 61 tokens."""
    tokens = rows * seq
    projections, attention = 2 * tokens * 24 * 4 * 24, 2 * 2 * rows * 24 * seq * (seq + past)
    return {"layer": projections + attention + 2 * 2 * tokens * 24 * 96, "head": 2 * tokens * 24 * 61}


def mamba(rows: int, seq: int, past: int) -> dict[str, int]:
    """The model of `tiny`: width 24, 48 inner channels, 8 states, a time step of rank 6, convolutions of 4 tokens."""
    tokens = rows * seq
    projections = 2 * tokens * (24 * 96 + 48 * (6 + 8 + 8) + 6 * 48 + 48 * 24)
    convolution = 2 * rows * (seq + 3) * 48 * 4  # padded on both sides: the last three are cut off
    return {"layer": projections + convolution + 2 * tokens * 48 * 8, "head": 2 * tokens * 24 * 61}


@pytest.mark.parametrize("formula", [llama, gpt2, mamba])
@pytest.mark.parametrize(("rows", "seq"), SIZES)
def test_operations_are_those_of_the_formula(models, formula, rows, seq):
    costs, expected = models(formula.__name__).costs, formula(rows, seq, 0)

    for layer in range(tiny.LAYERS):
        assert costs.flops(rows, seq, since=layer, until=layer + 1) == pytest.approx(expected["layer"])
    assert costs.flops(rows, seq, since=tiny.LAYERS) == pytest.approx(expected["head"])
    # Rotations are products too, and before the layers: a little.
    whole = tiny.LAYERS * expected["layer"] + expected["head"]
    assert whole <= costs.flops(rows, seq) * (1 + 1e-9) <= whole * 1.01


@pytest.mark.parametrize("formula", [llama, gpt2])
def test_what_is_in_a_cache_is_attended_to_and_not_computed(models, formula):
    costs = models(formula.__name__).costs
    expected = formula(2, 3, 40)["layer"]
    assert costs.flops(2, 3, past=40, since=1, until=2) == pytest.approx(expected)


def test_logits_are_computed_of_the_positions_that_are_asked_for(models):
    costs = models("llama").costs
    everywhere, once = costs.flops(3, 23), costs.flops(3, 23, positions=3)
    assert everywhere - once == pytest.approx(2 * 3 * 22 * 24 * 61)
    assert costs.logits(6) == 6 * 61 * 4


def test_logits_are_computed_of_the_entries_of_the_vocabulary_that_are_asked_for(models):
    costs = models("llama").costs
    whole, few = costs.flops(3, 23, positions=6), costs.flops(3, 23, positions=6, columns=5)
    assert whole - few == pytest.approx(2 * 3 * 2 * 24 * 56)
    assert costs.logits(6, 5) == 6 * 5 * 4
    assert [costs.few_columns(each) for each in (None, (), range(15), range(16))] == [None, None, 15, None]


def test_a_pass_that_makes_logits_of_a_few_entries_holds_few():
    module = AutoModelForCausalLM.from_config(tiny.CONFIGS["gpt2_untied"](), attn_implementation="eager")
    model, ids = hosted("wide", module), torch.ones(4, 50, dtype=torch.long)
    most = held(lambda: model.run(ids, [], Stopping(), columns=range(3)))
    assert model.costs.bytes(4, 50, columns=3) == pytest.approx(most, rel=0.05)


@pytest.mark.parametrize("name", [*DENSE, "mixtral", "qwen2_moe", "jamba"])
@pytest.mark.parametrize(("rows", "seq"), SIZES[1:])
def test_operations_are_those_that_a_run_has(models, name, rows, seq):
    model = models(name)
    if name in ("mixtral", "qwen2_moe", "jamba"):  # PyTorch does not count what experts compute: it is at least this
        assert model.costs.flops(rows, seq) > counted(model, rows, seq)
    else:
        assert model.costs.flops(rows, seq) == pytest.approx(counted(model, rows, seq), rel=0.01)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize(("rows", "seq"), SIZES[1:])
def test_bytes_are_those_that_a_run_holds(models, name, stepwise, rows, seq):
    model, ids = models(name), torch.ones(rows, seq, dtype=torch.long)

    def call() -> object:
        return model.module(input_ids=ids, **({} if name == "odd" else {"use_cache": False}))

    most = held(lambda: model.interleaver.run(call, {}, Stopping(), stepwise=stepwise))
    assert model.costs.bytes(rows, seq, stepwise=stepwise) == pytest.approx(most, rel=0.15)


def test_a_pass_that_makes_few_logits_holds_few(models):
    model, ids = models("gpt2_untied"), torch.ones(4, 50, dtype=torch.long)
    most = held(lambda: model.module(input_ids=ids, use_cache=False, logits_to_keep=1))
    assert model.costs.bytes(4, 50, positions=4) == pytest.approx(most, rel=0.05)


@pytest.mark.parametrize(
    ("name", "row", "token"),
    [("llama", 0, 3 * 2 * 12), ("gpt2", 0, 3 * 2 * 24), ("mamba", 3 * 48 * (4 + 8), 0), ("gemma2", 0, 3 * 2 * 16)],
)
def test_a_cache_has_keys_and_values_of_tokens_and_states_of_rows(models, name, row, token):
    assert models(name).costs.cache(3, 50) == pytest.approx(3 * 4 * (row + 50 * token), rel=0.01)


def test_scores_are_held_only_where_attention_is_computed_step_by_step(models):
    costs = models("llama").costs
    scores = 4 * 500 * 500 * 4
    assert costs.bytes(1, 500, stepwise=True) > 2 * scores > costs.bytes(1, 500)


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("seq", [3, 9, 150])
def test_chunks_of_an_ssm_are_counted_whole(chunk, seq):
    config = tiny.CONFIGS["mamba2"]()
    config.chunk_size = chunk
    model = hosted("mamba2", AutoModelForCausalLM.from_config(config).eval())
    ids = torch.ones(2, seq, dtype=torch.long)

    most = held(lambda: model.run(ids, [], Stopping()))

    assert model.costs.learnt == ("fakes" if chunk == 64 else "run")
    assert model.costs.flops(2, seq) == pytest.approx(counted(model, 2, seq), rel=0.02)
    assert model.costs.bytes(2, seq) == pytest.approx(most, rel=0.02 if seq > chunk else 0.15)


@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
def test_every_family_costs_more_the_more_there_is(models, name):
    costs: Costs = models(name).costs

    assert costs.learnt == "run"
    assert costs.num_layers == models(name).catalogue.num_layers
    for cost in (costs.flops, costs.bytes, lambda *size: costs.bytes(*size, stepwise=True)):
        found = [cost(*size) for size in ((1, 1), (1, 8), (2, 8), (2, 40), (9, 400))]
        assert 0 < found[0] < found[1] < found[2] < found[3] < found[4] < float("inf")


def test_parts_add_up(models):
    costs = models("gpt2").costs
    parts = [(None, 0), *((layer, layer + 1) for layer in range(3)), (3, None)]

    assert sum(costs.flops(2, 9, since=since, until=until) for since, until in parts) == costs.flops(2, 9)
    assert max(costs.bytes(2, 9, since=since, until=until) for since, until in parts) == costs.bytes(2, 9)


class Unwatched(nn.Embedding):
    """Cannot be watched: a table that looks at who runs it, as kernels of other libraries do."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch._C._len_torch_dispatch_stack():
            raise RuntimeError("not with a mode")
        return super().forward(input)


def test_of_a_model_that_cannot_be_watched_the_parameters_tell():
    module = tiny.build("llama")
    table = module.get_input_embeddings().weight
    module.set_input_embeddings(Unwatched(*table.shape, _weight=table))
    costs, watched = hosted("llama", module).costs, hosted("llama").costs

    assert (costs.learnt, watched.learnt) == ("parameters", "run")
    assert costs.flops(1, 9) == pytest.approx(watched.flops(1, 9), rel=0.2)
    assert 0 < costs.bytes(1, 9) < costs.bytes(2, 9)
