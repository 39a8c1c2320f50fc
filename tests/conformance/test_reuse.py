"""The first tokens of a prompt are not computed again for invokes that change and look at later ones only.

What each invoke gets is compared with plain hooks on the model in a run of its own; how much was computed, with a hook
that counts the tokens that each layer gets.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import patchwire
import tiny
from conformance.hooks import assert_same, changed_logits, record
from patchwire.sites import OUTPUT

LENGTH = 31
A, B = tiny.prompt(LENGTH), tiny.prompt(LENGTH, seed=1)
DEFAULT = (*tiny.CORE, "falcon_mamba", "falcon_h1", "gemma2")
NOT_REUSED = ("bloom", "recurrent_gemma", "recurrent_gemma_wide", "granitemoehybrid", "bamba", "odd")
WINDOWS = ("mistral", "gemma2", "gemma3_text")
"""Models with sliding windows that are shorter than the prompt: they do not remember all of it."""
STATES = ("mamba", "jamba", "bamba", "falcon_h1", "nemotron", "zamba")
"""What models with states have in their names: of a state a pass shows only the last."""
FAMILIES = [
    pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.slow])
    for name in tiny.CONFIGS
    if name not in NOT_REUSED
]


class Counted:
    """A model, its proxy, and how many tokens its layers got."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.reference: Any = tiny.build(name).requires_grad_(False)
        served: Any = tiny.build(name).requires_grad_(False)
        # With the reference's products, so that nothing but what is reused can differ.
        self.model = patchwire.local(served, matmul="pytorch", progress=False)
        self.tokens = self.passes = 0
        served.register_forward_pre_hook(self._count_pass)
        for path in self.model.catalogue.layers:
            served.get_submodule(path).register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.tokens += hidden.shape[0] * hidden.shape[1]

    def _count_pass(self, *_: Any) -> None:
        self.passes += 1

    def place(self, index: int) -> Any:
        """Where a layer's output is, for plain hooks."""
        path = self.model.catalogue.layers[index]
        return path, OUTPUT, self.model.catalogue.modules[path].side(OUTPUT)[0].path

    def sweep(self, positions: Any, *, exact: bool = False) -> tuple[dict[tuple[int, int], Any], Any]:
        """Every layer's state at some positions of A patched into B: the last token's logits."""
        model, found = self.model, {}
        self.tokens = self.passes = 0
        with model.session(exact=exact) as session:
            with model.trace(A):
                clean = [layer.output for layer in model.layers]
            with model.trace() as trace:
                for index, layer in enumerate(model.layers):
                    for position in positions:
                        with trace.invoke(B):
                            layer.output[:, position] = clean[index][:, position]
                            found[index, position] = model.logits[:, -1].save()
        return found, session.stats


@pytest.fixture(scope="module", params=FAMILIES)
def counted(request: pytest.FixtureRequest) -> Counted:
    return Counted(request.param)


def test_a_sweep_over_positions_has_the_numbers_of_runs_of_their_own(counted: Counted) -> None:
    positions = range(LENGTH)
    found, stats = counted.sweep(positions)
    with_forks_alone = sum(2 + len(positions) * layer for layer in range(counted.model.num_layers)) * LENGTH
    if counted.name in WINDOWS:
        assert (stats.passes, counted.tokens) == (1, with_forks_alone)
    else:
        assert 1 < stats.passes <= 8, "the prompt is divided, but not into as many parts as it has tokens"
        assert counted.tokens < 0.85 * with_forks_alone
    if not any(each in counted.name for each in STATES):
        assert counted.passes == stats.passes, "what later passes go on from is noted in the first"

    seen = record(counted.reference, A)
    for (index, position), logits in found.items():

        def patched(value: torch.Tensor, index: int = index, position: int = position) -> torch.Tensor:
            value[:, position] = seen[counted.place(index)][:, position]
            return value

        expected = changed_logits(counted.reference, B, {counted.place(index): patched})
        assert_same(logits.value, expected[:, -1], (index, position))


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_single_token_may_be_all_that_is_remembered(counted: Counted, first: int) -> None:
    model, values = counted.model, dict[bool, list[Any]]()
    for exact in (True, False):
        with model.trace(exact=exact) as trace:
            for layer in model.layers:
                for _ in range(1 if exact else 30):
                    with trace.invoke(B):
                        layer.output[:, first:] *= 0.5
                        found = model.logits[:, -1].save()
                values.setdefault(exact, []).append(found)
    # That one enlarges a difference in the last bit on its way through the layers.
    tolerance = 5e-5 if counted.name == "zamba2_adapted" else 1e-5
    for shared, alone in zip(values[False], values[True], strict=True):
        assert_same(shared.value, alone.value, tolerance=tolerance)


@pytest.fixture(scope="module")
def llama() -> Counted:
    return Counted("llama")


def erase_from(model: Any, invokes: Any, first: int, look: Any) -> list[Any]:
    """Many invokes that set what a layer does from some token on to zero, and what they look at."""
    found = []
    for layer in model.layers:
        for _ in range(12):
            with invokes.invoke(B):
                layer.output[:, first:] = 0
                found.append(look(model))
    return found


@pytest.mark.parametrize(
    ("look", "reused"),
    [
        (lambda model: model.logits[:, 25:].save(), True),
        (lambda model: model.logits[0, -3:, :5].save(), True),
        (lambda model: model.norm.output[:, -1].norm().save(), True),
        (lambda model: model.logits.save(), False),
        (lambda model: model.logits[:, 3].save(), False),
        (lambda model: model.norm.output.norm(dim=-1)[:, -1].save(), False),
        (lambda model: model.norm.output[torch.tensor([0]), torch.tensor([-1])].save(), False),
    ],
    ids=["some", "last", "norm", "all", "early", "of all", "by tensors"],
)
def test_only_where_nobody_looks_at_the_first_tokens(llama: Counted, look: Any, reused: bool) -> None:
    values = {}
    for exact in (True, False):
        llama.tokens = 0
        with llama.model.trace(exact=exact) as trace:
            values[exact] = erase_from(llama.model, trace, 25, look)
    assert (llama.tokens < 12 * LENGTH) is reused
    for shared, alone in zip(values[False], values[True], strict=True):
        assert_same(shared.value, alone.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, old: layer.__setattr__("output", old * 2),
        lambda layer, old: layer.output.__setitem__((slice(None), slice(None)), 0),
        lambda layer, old: layer.output.__setitem__((Ellipsis, 0), 0),
        lambda layer, old: layer.output.__setitem__((old > 0), 0),
    ],
    ids=["everything", "a slice of all", "a channel", "a mask"],
)
def test_only_where_nobody_changes_the_first_tokens(llama: Counted, change: Any) -> None:
    values: dict[bool, list[Any]] = {}
    for exact in (False, True):
        with llama.model.trace(exact=exact) as trace:
            for layer in llama.model.layers:
                for _ in range(12):
                    with trace.invoke(B):
                        change(layer, layer.output)
                        values.setdefault(exact, []).append(llama.model.logits[:, -1].save())
        assert trace.stats.passes == (1 if not exact else 12 * llama.model.num_layers)
    for shared, alone in zip(values[False], values[True], strict=True):
        assert_same(shared.value, alone.value)


def test_values_inside_heads_and_of_mlps_go_on_too(llama: Counted) -> None:
    model, values = llama.model, dict[bool, list[Any]]()
    for exact in (False, True):
        with model.trace(exact=exact) as trace:
            for layer in model.layers:
                for position in range(20, LENGTH):
                    with trace.invoke(B):
                        layer.mlp.output[:, position] += 1
                        layer.attn.output[:, position] = 0
                        values.setdefault(exact, []).append(model.logits[:, -1].save())
        assert exact or trace.stats.passes > 1
    for shared, alone in zip(values[False], values[True], strict=True):
        assert_same(shared.value, alone.value)


def test_an_invoke_that_others_need_is_computed_before_them(llama: Counted) -> None:
    model, values = llama.model, dict[bool, list[Any]]()
    for exact in (False, True):
        with model.trace(exact=exact) as trace:
            with trace.invoke(B):
                late = model.layers[0].output[:, -1]
                model.layers[0].output[:, -1] = 0
                values[exact] = [model.logits[:, -1].save()]
            for layer in list(model.layers)[1:]:
                for position in range(15, LENGTH):
                    with trace.invoke(B):
                        layer.output[:, position] = late
                        values[exact].append(model.logits[:, -1].save())
    for shared, alone in zip(values[False], values[True], strict=True):
        assert_same(shared.value, alone.value)


@pytest.mark.parametrize("name", NOT_REUSED)
def test_where_a_model_remembers_in_another_way_all_is_computed(name: str) -> None:
    counted = Counted(name)
    found, _ = counted.sweep((10, 20, 30))
    alone, _ = counted.sweep((10, 20, 30), exact=True)
    for key, logits in found.items():
        assert_same(logits.value, alone[key].value, key)


def test_a_whole_state_of_another_trace_changes_the_first_tokens(llama: Counted) -> None:
    model, values = llama.model, dict[bool, list[Any]]()
    for exact in (False, True):
        with model.session(exact=exact):
            with model.trace(A):
                clean = [layer.output for layer in model.layers]
            for layer, state in zip(model.layers, clean, strict=True):
                for _ in range(12):
                    with model.trace(B):
                        layer.output = state
                        values.setdefault(exact, []).append(model.logits[:, -1].save())
    for shared, alone in zip(values[False], values[True], strict=True):
        assert_same(shared.value, alone.value)


def test_what_a_pass_with_other_weights_remembers_is_no_others(llama: Counted) -> None:
    model, values = llama.model, dict[bool, list[Any]]()
    with model.edit() as edited:
        model.layers[0].mlp.down_proj.weight = -model.layers[0].mlp.down_proj.weight
    for exact in (False, True):
        with model.session() as session:
            with edited.trace(B):
                edited.logits[:, -1].save()
            with model.trace(exact=exact) as trace:
                values[exact] = erase_from(model, trace, 25, lambda model: model.logits[:, -1].save())
        assert exact or session.stats.passes == 2
    for shared, alone in zip(values[False], values[True], strict=True):
        assert_same(shared.value, alone.value)


def test_rows_that_are_named_by_a_list_are_no_positions(llama: Counted) -> None:
    model, values = llama.model, dict[bool, list[Any]]()
    for exact in (False, True):
        with model.trace(exact=exact) as trace:
            for layer in model.layers:
                for _ in range(12):
                    with trace.invoke(B):
                        layer.output[[0, -1]] = 0.1
                        values.setdefault(exact, []).append(model.logits[:, -1].save())
    for shared, alone in zip(values[False], values[True], strict=True):
        assert_same(shared.value, alone.value)


def test_a_value_that_a_later_pass_needs_is_whole(llama: Counted) -> None:
    model, values = llama.model, dict[bool, list[Any]]()
    for exact in (False, True):
        with model.session(exact=exact):
            with model.trace(exact=exact) as trace:
                for layer in list(model.layers) * 12:
                    with trace.invoke(B):
                        layer.output[:, 20] = 0
                        state = model.layers[2].output
                        values.setdefault(exact, []).append(model.logits[:, -1].save())
            with model.trace(A, exact=True):
                model.layers[2].output = state
                values[exact].append(model.logits.save())
    for shared, alone in zip(values[False], values[True], strict=True):
        assert_same(shared.value, alone.value)


def test_a_value_may_be_edited_very_often(llama: Counted) -> None:
    with llama.model.session() as session:
        found = []
        for _ in range(2):
            with llama.model.trace(B):
                state = llama.model.layers[1].output
                for _ in range(1200):
                    state[:, -1] += 0.001
                found.append(llama.model.logits[:, -1].save())
    assert session.stats.passes == 1

    def changed(value: torch.Tensor) -> torch.Tensor:
        value[:, -1] += 1.2
        return value

    expected = changed_logits(llama.reference, B, {llama.place(1): changed})[:, -1]
    for logits in found:
        assert_same(logits.value, expected, tolerance=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_where_positions_depend_on_the_length_all_is_computed(kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        halves = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        rope |= {**halves, "original_max_position_embeddings": 20}
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
    sizes |= {"vocab_size": tiny.VOCABULARY, "max_position_embeddings": 20 if kind == "dynamic" else 60}
    config = LlamaConfig(rope_parameters=rope, **sizes)
    model = patchwire.local(LlamaForCausalLM(config).eval(), progress=False)
    values: dict[bool, list[Any]] = {}
    for exact in (True, False):
        with model.trace(exact=exact) as trace:
            for layer in model.layers:
                for position in range(16, LENGTH):
                    with trace.invoke(tiny.prompt(LENGTH, seed=2)):
                        layer.output[:, position] = 0
                        values.setdefault(exact, []).append(model.logits[:, -1].save())
    for shared, alone in zip(values[False], values[True], strict=True):
        assert_same(shared.value, alone.value)
