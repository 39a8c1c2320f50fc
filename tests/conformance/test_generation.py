"""Generation is Hugging Face's, with sites at every step: its tokens, and what its modules see while it makes them.

The reference for writes is Hugging Face's own `generate` under hooks that count the forward calls; for reads it is also
a run over all tokens at once, without a cache.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import patchwire
import tiny
from conformance import places
from conformance.hooks import Place, assert_same, hooked, record, tensors_in, with_change
from integration import messages
from integration.refusals import refused
from patchwire.errors import GraphError, InputError, OrderError, SiteError
from patchwire.sites import Axis
from patchwire.status import error_from_call
from patchwire.v1 import graph_pb2, service_pb2
from serving import Server

IDS = tiny.prompt(6)
NEW = 5
Step = tuple[int, Place]


@pytest.fixture(params=tiny.CORE)
def name(request: pytest.FixtureRequest) -> str:
    """An architecture."""
    return str(request.param)


def generate(
    module: Any,
    rows: Sequence[Sequence[int]],
    changes: dict[Step, Callable[[Tensor], Tensor]] | None = None,
    *,
    new: int = NEW,
    seen: dict[Step, Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """What Hugging Face generates, with changes at places in some of its forward calls.

    Args:
        module: The model.
        rows: Prompts of one length.
        changes: What becomes of the tensor at a place in a call.
        new: How many tokens.
        seen: Every tensor at every place in every call is put here, as it is when it has been changed.
        options: More for `generate`.
    """
    call = -1

    def visit(path: str, side: str, value: Any) -> Any:
        nonlocal call
        call += (path, side) == ("", "input")
        for (step, place), change in (changes or {}).items():
            if (step, *place[:2]) == (call, path, side):
                value = with_change(value, side, place[2], change)
        if seen is not None:
            for steps, tensor in tensors_in(value, side):
                seen.setdefault((call, (path, side, steps)), tensor.clone())
        return value

    options = {"do_sample": False, "min_new_tokens": new, "pad_token_id": 0} | options
    ids = torch.tensor([list(row) for row in rows])
    with hooked(module, visit):
        return module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)


def layer(name: str, index: int = 1) -> Place:
    return (places.PARTS[name]["layer"].format(index), "output", ())


def mixer(name: str, index: int = 1) -> Place:
    outputs_a_tuple = name in ("gpt2", "llama", "gpt_neox")
    return (places.PARTS[name]["mixer"].format(index), "output", (0,) if outputs_a_tuple else ())


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 6, 20])
def test_greedy_tokens_are_hugging_faces(name: str, length: int, served: Any, references: Any) -> None:
    model, reference, ids = served[name], references[name], tiny.prompt(length, seed=3)

    with model.generate(ids, max_new_tokens=12, min_new_tokens=12) as gen:
        tokens = gen.output.save()

    assert torch.equal(tokens.value, generate(reference, [ids], new=12))
    assert gen.stats.passes == 12


def test_several_rows_and_several_invokes_have_their_own_tokens(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    groups = [[tiny.prompt(6), tiny.prompt(6, seed=1)], [tiny.prompt(9)], [tiny.prompt(2)]]
    found = []

    with model.generate(max_new_tokens=NEW, min_new_tokens=NEW) as gen:
        for group in groups:
            with gen.invoke(group):
                found.append(gen.output.save())

    for group, tokens in zip(groups, found, strict=True):
        assert torch.equal(tokens.value, torch.cat([generate(reference, [row]) for row in group]))
    assert gen.stats.passes == NEW * len(groups)


def test_a_repetition_penalty_is_hugging_faces(name: str, served: Any, references: Any) -> None:
    with served[name].generate(IDS, max_new_tokens=10, min_new_tokens=10, repetition_penalty=3.0) as gen:
        tokens = gen.output.save()
    plain = generate(references[name], [IDS], new=10)
    expected = generate(references[name], [IDS], new=10, repetition_penalty=3.0)
    assert torch.equal(tokens.value, expected)
    assert not torch.equal(expected, plain)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.5},
        {"temperature": 0.4, "top_k": 5},
        {"top_p": 0.7},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.5},
        {"top_k": 10**6},
    ],
)
def test_sampling_one_row_is_hugging_faces_with_the_seed(name: str, options: Any, served: Any, references: Any) -> None:
    for seed in (0, 7):
        with served[name].generate(
            IDS, max_new_tokens=10, min_new_tokens=10, do_sample=True, seed=seed, **options
        ) as gen:
            tokens = gen.output.save()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = generate(references[name], [IDS], new=10, **({"top_k": 0, "do_sample": True} | options))
        assert torch.equal(tokens.value, expected)


def test_sampling_does_not_depend_on_company(name: str, served: Any) -> None:
    model, rows = served[name], [tiny.prompt(6, seed=index) for index in range(3)]

    def sample(*groups: Any, seed: int) -> list[Tensor]:
        with model.generate(max_new_tokens=8, min_new_tokens=8, do_sample=True, temperature=2.0, seed=seed) as gen:
            found = []
            for group in groups:
                with gen.invoke(group):
                    found.append(gen.output.save())
        return [each.value for each in found]

    (together,) = sample(rows, seed=20)
    alone = [sample([row], seed=20 + index)[0] for index, row in enumerate(rows)]
    assert torch.equal(together, torch.cat(alone))
    invokes = sample([rows[1]], [rows[0]], seed=20)
    assert torch.equal(invokes[1], alone[0])


def test_a_row_that_has_ended_is_filled_up(name: str, served: Any, references: Any) -> None:
    """The reference and the server are made to like the token that ends (0) in the second step of one row."""
    model, reference = served[name], references[name]
    rows = [tiny.prompt(6), tiny.prompt(6, seed=1)]

    with model.generate(rows, max_new_tokens=NEW) as gen:
        for _ in gen.iter[1]:
            model.logits[0, -1, 0] = 1e4
        tokens = gen.output.save()

    def end(logits: Tensor) -> Tensor:
        logits[0, -1, 0] = 1e4
        return logits

    expected = generate(reference, rows, {(1, ("", "output", ("logits",))): end}, min_new_tokens=0)
    assert torch.equal(tokens.value, expected)
    assert tokens.value[0, 7:].eq(0).all()


# --- reads ----------------------------------------------------------------------------------------


def test_every_read_at_every_step_is_that_of_a_run_without_a_cache(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    seen: dict[Step, Tensor] = {}
    tokens = generate(reference, [IDS], seen=seen)
    alone = record(reference, tokens[0].tolist())
    prompt = record(reference, IDS)
    reads = {
        (step, place)
        for step, place in seen
        if place in prompt and place[0] != "" and seen[0, place].shape == prompt[place].shape and prompt[place].ndim > 2
    }
    # Logits that nobody asked for are not computed for all of the prompt.
    reads |= {
        (step, place) for step in range(NEW) for place in [("lm_head", "output", ()), ("", "output", ("logits",))]
    }
    decoded = {place for step, place in reads if step and seen[step, place].shape[1] == 1}
    assert len(decoded) > 20
    found: dict[Step, Any] = {}

    with model.generate(IDS, max_new_tokens=NEW, min_new_tokens=NEW) as gen:
        for step in gen.all():
            for each, place in reads:
                known = {(leaf.module, leaf.side, leaf.path) for leaf in model.catalogue.modules[place[0]].leaves}
                if each == step and (not step or place in decoded) and place in known:
                    found[step, place] = places.read(model, place).save()

    assert len(found) > NEW * 20
    for (step, place), value in found.items():
        if step == 0:
            assert_same(value.value, prompt[place], (step, place))
            continue
        assert_same(value.value, seen[step, place], (step, place))
        at = len(IDS) + step - 1
        assert_same(value.value, alone[place][:, at : at + 1], (step, place))


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Models that show their attention weights, masks and biases: with every token these get another key."""
    root = tmp_path_factory.mktemp("growing")
    specs = {name: str(tiny.save(name, root / name)) for name in ("bloom", "gptj")}
    with Server(specs) as server, patchwire.connect(server.address, progress=False) as client:
        yield {
            name: (client.model(name), AutoModelForCausalLM.from_pretrained(path).eval())
            for name, path in specs.items()
        }


@pytest.mark.parametrize("name", ["bloom", "gptj"])
def test_sites_that_grow_with_all_tokens_are_shown_as_they_are(name: str, growing: Any) -> None:
    model, reference = growing[name]
    sites = [
        place
        for place in places.every_place(model)
        if sum(dim.axis is Axis.SEQ for dim in places.leaf_of(model, place).shape) > 1
    ]
    assert len(sites) > 5
    seen: dict[Step, Tensor] = {}
    generate(reference, [IDS], seen=seen)

    with model.generate(IDS, max_new_tokens=NEW, min_new_tokens=NEW) as gen:
        found = {(step, site): places.read(model, site).save() for step in gen.all() for site in sites}

    for (step, site), value in found.items():
        if (step, site) in seen:  # a mask that is not needed is left out
            assert_same(value.value, seen[step, site], (step, site))
    weights = [each for (step, site), each in found.items() if step == 2 and site[1] == "output"]
    assert {tuple(each.shape) for each in weights} == {(1, 4, 1, len(IDS) + 2)}


@pytest.mark.parametrize("name", ["bloom", "gptj"])
def test_attention_is_knocked_out_in_a_step(name: str, growing: Any) -> None:
    model, reference = growing[name]
    site = next(place for place in places.every_place(model) if place[0].endswith("dropout") and place[1] == "output"
                and len(places.leaf_of(model, place).shape) == 4)  # fmt: skip

    with model.generate(IDS, max_new_tokens=NEW, min_new_tokens=NEW) as gen:
        for _ in gen.iter[1:]:
            places.read(model, site)[..., 2:-1] = 0
        tokens = gen.output.save()
        for _ in gen.iter[NEW - 1]:
            logits = model.logits.save()

    def cut(value: Tensor) -> Tensor:
        value[..., 2:-1] = 0
        return value

    seen: dict[Step, Tensor] = {}
    expected = generate(reference, [IDS], {(step, site): cut for step in range(1, NEW)}, seen=seen)
    assert torch.equal(tokens.value, expected)
    assert_same(logits.value, seen[NEW - 1, ("", "output", ("logits",))])


# --- writes ----------------------------------------------------------------------------------------


def halved(value: Tensor) -> Tensor:
    return value * -0.5


def shifted(value: Tensor) -> Tensor:
    value[:, -1] += 1.0
    return value


@pytest.mark.parametrize("steps", [[0], [2], [1, 3], list(range(NEW))])
@pytest.mark.parametrize("change", [halved, shifted])
def test_writes_at_some_steps_are_those_of_hooks_that_count_calls(
    name: str, steps: list[int], change: Any, served: Any, references: Any
) -> None:
    model, reference, site = served[name], references[name], layer(name)

    with model.generate(IDS, max_new_tokens=NEW, min_new_tokens=NEW) as gen:
        logits = []
        for step in gen.all():
            if step in steps:
                hidden = model.layers[1].output
                new = change(hidden)
                if new is not hidden:
                    model.layers[1].output = new
            logits.append(model.logits[:, -1].save())
        tokens = gen.output.save()

    seen: dict[Step, Tensor] = {}
    expected = generate(reference, [IDS], {(step, site): change for step in steps}, seen=seen)
    assert torch.equal(tokens.value, expected)
    for step, value in enumerate(logits):
        assert_same(value.value, seen[step, ("", "output", ("logits",))][:, -1], step)


def test_writes_deep_in_the_cache_are_felt_by_later_steps(name: str, served: Any, references: Any) -> None:
    """What a mixer takes at step 0 and 1 stays in its cache or state."""
    model, reference = served[name], references[name]
    path = places.PARTS[name]["mixer"].format(0)
    seen: dict[Step, Tensor] = {}
    generate(reference, [IDS], seen=seen)
    site = next(place for _, place in seen if place[:2] == (path, "input") and seen[0, place].shape[-1] == tiny.WIDTH)

    with model.generate(IDS, max_new_tokens=NEW, min_new_tokens=NEW) as gen:
        for _ in gen.iter[:2]:
            places.write(model, site, places.read(model, site) * 2 + 1)
        for _ in gen.iter[NEW - 1]:
            logits = model.logits.save()
        tokens = gen.output.save()

    found: dict[Step, Tensor] = {}
    changes = {(step, site): lambda value: value * 2 + 1 for step in (0, 1)}
    expected = generate(reference, [IDS], changes, seen=found)
    assert torch.equal(tokens.value, expected)
    assert_same(logits.value, found[NEW - 1, ("", "output", ("logits",))])


def test_values_are_carried_from_one_step_to_later_ones(name: str, served: Any, references: Any) -> None:
    model, reference, site = served[name], references[name], layer(name)

    with model.generate(IDS, max_new_tokens=NEW, min_new_tokens=NEW) as gen:
        total = model.layers[1].output[:, -1]
        for step in gen.iter[1:NEW]:
            hidden = model.layers[1].output
            total = total + hidden[:, -1]
            if step > 2:
                hidden[:, -1] = total / step
        tokens, last = gen.output.save(), total.save()

    kept: list[Tensor] = []

    def change(step: int) -> Callable[[Tensor], Tensor]:
        def carry(value: Tensor) -> Tensor:
            kept.append((kept[-1] if kept else 0) + value[:, -1].clone())
            if step > 2:
                value[:, -1] = kept[-1] / step
            return value

        return carry

    expected = generate(reference, [IDS], {(step, site): change(step) for step in range(NEW)})
    assert torch.equal(tokens.value, expected)
    assert_same(last.value, kept[-1])


def test_values_of_one_invoke_are_written_into_another(name: str, served: Any, references: Any) -> None:
    model, reference, site = served[name], references[name], layer(name)
    clean, corrupt = IDS, tiny.prompt(9)

    with model.generate(max_new_tokens=NEW, min_new_tokens=NEW) as gen:
        with gen.invoke(clean):
            source = model.layers[1].output[:, -1]
        with gen.invoke(corrupt):
            for _ in gen.iter[2]:
                model.layers[1].output[:, -1] = source
            tokens = gen.output.save()

    given = record(reference, clean)[site][:, -1:]
    assert torch.equal(tokens.value, generate(reference, [corrupt], {(2, site): lambda _: given.clone()}))


# --- steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (2, [2]),
        (slice(1, 4), [1, 2, 3]),
        (slice(None, None, 2), [0, 2, 4]),
        (slice(1, None), [1, 2, 3, 4]),
        (slice(None), [0, 1, 2, 3, 4]),
        ([3, 1], [3, 1]),
        (slice(None, -1), [0, 1, 2, 3]),
        (slice(-2, None), [3, 4]),
        (slice(1, -2), [1, 2]),
        (slice(-3, 5), [2, 3, 4]),
    ],
)
def test_steps_are_chosen_as_items_of_a_list(which: Any, expected: list[int], served: Any, references: Any) -> None:
    model = served["gpt2"]
    seen: dict[Step, Tensor] = {}
    generate(references["gpt2"], [IDS], seen=seen)

    with model.generate(IDS, max_new_tokens=NEW, min_new_tokens=NEW) as gen:
        found = {step: model.layers[0].output.save() for step in gen.iter[which]}

    assert list(found) == expected
    for step, value in found.items():
        assert_same(value.value, seen[step, layer("gpt2", 0)])


@pytest.mark.parametrize("which", [NEW, -1, slice(2, NEW + 1), [0, 9]])
def test_steps_that_there_are_not_are_refused(which: Any, served: Any) -> None:
    with refused(GraphError, "no step", hint="0 to 4"), served["gpt2"].generate(IDS, max_new_tokens=NEW) as gen:
        gen.iter[which]  # this line


def test_a_write_with_a_value_of_a_later_step_is_refused(served: Any) -> None:
    model = served["gpt2"]
    with refused(OrderError, "at step 3"), model.generate(IDS, max_new_tokens=NEW) as gen:
        for _ in gen.iter[3]:
            later = model.layers[0].output[:, -1]  # and this line
        for _ in gen.iter[1]:
            model.layers[2].output[:, -1] = later  # this line


def test_an_invoke_in_a_step_is_refused(served: Any) -> None:
    model = served["gpt2"]
    with refused(GraphError, "all steps", hint="loop"), model.generate(max_new_tokens=2) as gen:
        for _ in gen.all():
            with gen.invoke(IDS):  # this line
                model.logits.save()


def test_steps_outside_of_a_block_or_in_each_other_are_refused(served: Any) -> None:
    model = served["gpt2"]
    gen = model.generate(IDS, max_new_tokens=2)
    with pytest.raises(GraphError, match="only while the model runs"):
        gen.iter[0]
    with refused(GraphError, "one after the other", hint="directly"), gen:
        for _ in gen.all():
            gen.all()  # this line


def test_after_a_loop_that_was_left_sites_are_those_of_step_0_again(served: Any, references: Any) -> None:
    model = served["gpt2"]
    with model.generate(IDS, max_new_tokens=NEW) as gen:
        for step in gen.all():
            if step == 2:
                break
        hidden = model.layers[1].output.save()
    assert_same(hidden.value, record(references["gpt2"], IDS)[layer("gpt2")])


# --- how it ends --------------------------------------------------------------------------------------


def ending(model: patchwire.Model, gen: Any, at: int) -> None:
    """Make the token of a step the one that ends the text."""
    for _ in gen.iter[at]:
        model.logits[:, -1, 0] = 1e4


def test_values_of_steps_that_are_not_reached_say_so(name: str, served: Any) -> None:
    model = served[name]

    with model.generate(IDS, max_new_tokens=8) as gen:
        ending(model, gen, 2)
        found = [model.layers[1].output[:, -1].save() for _ in gen.all()]
        late = (found[1] + found[5]).save()
        tokens = gen.output.save()

    assert tokens.shape == (1, len(IDS) + 3)
    assert gen.stats.passes == 3
    assert all(value.value.isfinite().all() for value in found[:3])
    for value in (*found[3:], late):
        with pytest.raises(GraphError, match="ended before this value's step") as caught:
            value.value  # noqa: B018
        assert "gen.output" in caught.value.hint


def test_a_step_that_was_named_has_to_be_reached(served: Any) -> None:
    model = served["gpt2"]
    with refused(SiteError, r"layers\[1\]\.output at step 5.*3 steps", hint="all"):  # noqa: SIM117
        with model.generate(IDS, max_new_tokens=8) as gen:
            ending(model, gen, 2)
            for _ in gen.iter[4:6]:
                pass
            for _ in gen.iter[5]:
                model.layers[1].output.save()  # this line
            gen.output.save()


def test_min_new_tokens_keeps_it_from_ending(served: Any) -> None:
    model = served["llama"]
    with model.generate(IDS, max_new_tokens=8, min_new_tokens=6) as gen:
        ending(model, gen, 2)
        tokens = gen.output.save()
    assert tokens.shape[1] >= len(IDS) + 6


@pytest.mark.parametrize("last", [0, 2])
def test_it_ends_at_the_last_step_that_is_needed(name: str, last: int, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    with model.generate(IDS, max_new_tokens=8, min_new_tokens=8) as gen:
        for _ in gen.iter[last]:
            hidden = model.layers[0].output.save()
        for _ in gen.all():
            model.layers[2].output[:] = 0.0  # nobody looks at what becomes of it in the last step
    assert gen.stats.passes == last + 1
    seen: dict[Step, Tensor] = {}
    changes = {(step, layer(name, 2)): torch.zeros_like for step in range(8)}
    generate(reference, [IDS], changes, new=8, seen=seen)
    assert_same(hidden.value, seen[last, layer(name, 0)])


# --- streaming ------------------------------------------------------------------------------------------


def test_tokens_come_as_they_are_made(name: str, served: Any) -> None:
    rows, told = [tiny.prompt(5), tiny.prompt(5, seed=1)], []
    with served[name].generate(rows, max_new_tokens=NEW, min_new_tokens=NEW, stream=told.append) as gen:
        tokens = gen.output.save()
    assert told == tokens.value[:, 5:].T.tolist()


def test_tokens_are_told_before_the_end(served: Any) -> None:
    """Whoever is told may end it."""

    class Enough(Exception):
        pass

    def tell(ids: list[int]) -> None:
        raise Enough

    model = served["mamba"]
    with pytest.raises(Enough), model.generate(IDS, max_new_tokens=2000, min_new_tokens=2000, stream=tell) as gen:
        gen.output.save()
    with model.trace(IDS):
        logits = model.logits.save()
    assert logits.value.isfinite().all()


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": 2, "min_new_tokens": 3},
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"seed": -1},
        {"seed": None},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
    ],
)
def test_options_that_mean_nothing_are_refused_at_their_line(options: Any, served: Any) -> None:
    wrong = list(options)[-1]
    with refused(InputError, wrong, hint=wrong):
        served["gpt2"].generate(IDS, **options)  # this line


def test_prompts_of_different_lengths_belong_into_invokes(served: Any) -> None:
    with (
        pytest.raises(InputError, match="same length"),
        served["gpt2"].generate([IDS, IDS[1:]], max_new_tokens=2) as gen,
    ):
        gen.output.save()


def test_more_tokens_than_there_are_positions_are_refused(served: Any) -> None:
    with pytest.raises(InputError, match="64"), served["gpt2"].generate(IDS, max_new_tokens=59) as gen:
        gen.output.save()
    with served["gpt2"].generate(IDS, max_new_tokens=58, min_new_tokens=58) as gen:
        tokens = gen.output.save()
    assert tokens.shape == (1, 64)


@pytest.fixture
def stub(server: Server) -> Iterator[Any]:
    """The bare methods of the server."""
    channel, stub = messages.stub(server.address)
    with channel:
        yield stub


def hostile(model: str = "gpt2", step: int = 0, rows: Any = ((1, 2, 3),), **options: Any) -> graph_pb2.Graph:
    """A generation whose message is written by hand, of which a layer's output and the tokens are asked for."""
    graph = messages.graph(
        model,
        messages.read("layers.1.output"),
        messages.save(0),
        graph_pb2.Node(generated=graph_pb2.Generated(trace=0, invoke=0)),
        messages.save(2),
        rows=rows,
    )
    graph.nodes[0].read.site.step = step
    graph.traces[0].generation.CopyFrom(
        graph_pb2.Generation(**({"max_new_tokens": 3, "temperature": 1, "top_p": 1, "repetition_penalty": 1} | options))
    )
    return graph


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 3},
        {"step": 2**32 - 1},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2**32 - 1},
        {"temperature": math.nan},
        {"temperature": -1.0},
        {"temperature": 0.0},
        {"top_p": math.nan},
        {"top_p": -0.1},
        {"repetition_penalty": math.nan},
        {"repetition_penalty": -2.0},
        {"min_new_tokens": 4},
        {"seed": -1},
        {"seed": 2**63 - 1},
        {"rows": ((1, 2), (3,))},
        {"rows": ((1,) * 62,)},
    ],
)
def test_hostile_messages_are_refused_and_the_server_goes_on(changes: Any, stub: Any) -> None:
    request = service_pb2.RunRequest(graph=hostile(**changes))
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Run(request))
    error = error_from_call(caught.value, "here")
    assert isinstance(error, patchwire.PatchwireError)
    assert caught.value.code() is not grpc.StatusCode.INTERNAL
    assert [
        each for each in messages.events(stub.Run(service_pb2.RunRequest(graph=hostile()))) if each.HasField("done")
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 2**32 - 1, "do_sample": True},
        {"temperature": 1e-300, "do_sample": True},
        {"temperature": 1e300},
        {"repetition_penalty": 1e-300},
    ],
)
def test_extreme_numbers_do_not_fail_inside_the_server(changes: Any, stub: Any) -> None:
    call = stub.Run(service_pb2.RunRequest(graph=hostile(**changes)))
    with contextlib.suppress(grpc.RpcError):
        list(call)
    assert call.code() in (grpc.StatusCode.OK, grpc.StatusCode.ABORTED)  # or an ExecutionError


@pytest.mark.parametrize(
    "body",
    [
        "generated of a forward pass",
        "generated of no invoke",
        "grad of nothing",
        "grad of itself",
        "grad of a gradient",
    ],
)
def test_hostile_nodes_are_refused(body: str, stub: Any) -> None:
    read = messages.read("layers.1.output")
    tokens = [graph_pb2.Node(generated=graph_pb2.Generated(invoke=invoke)) for invoke in (0, 7)]
    bad = {
        "generated of a forward pass": [read, tokens[0], messages.save(1)],
        "generated of no invoke": [read, tokens[1], messages.save(1)],
        "grad of nothing": [read, graph_pb2.Node(grad=graph_pb2.Grad(loss=0)), messages.save(0)],
        "grad of itself": [read, graph_pb2.Node(grad=graph_pb2.Grad(loss=1, values=[1])), messages.save(0)],
        "grad of a gradient": [
            read,
            messages.call("torch.sum", ("node", 0)),
            graph_pb2.Node(grad=graph_pb2.Grad(loss=1, values=[0])),
            graph_pb2.Node(grad=graph_pb2.Grad(loss=2, values=[0])),
            messages.call("operator.getitem", ("node", 3), 0),
            messages.save(4),
        ],
    }[body]  # fmt: skip
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Run(service_pb2.RunRequest(graph=messages.graph("gpt2", *bad))))
    assert caught.value.code() is not grpc.StatusCode.INTERNAL
