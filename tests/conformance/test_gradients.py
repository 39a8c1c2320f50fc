"""A gradient is what PyTorch's autograd gives on the same checkpoint, whatever else is asked for or shares the pass.

The reference puts a tensor of its own at every place in question, in a hook, and asks autograd for its gradient: the
effect of what a write there would change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import patchwire
import tiny
from conformance import places
from conformance.hooks import Place, assert_same, hooked, tensors_in, with_change
from conformance.test_several_prompts import PROMPTS, assert_rows
from integration.refusals import refused
from patchwire.errors import ExecutionError, GraphError, OperationError, OrderError, ShapeError
from patchwire.sites import Axis
from serving import Server

IDS = tiny.prompt(8)
SCALES = torch.linspace(-1, 2, 12)
WEIGHTS = torch.randn(tiny.VOCABULARY, generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=tiny.CORE)
def name(request: pytest.FixtureRequest) -> str:
    """An architecture."""
    return str(request.param)


def loss_of(logits: Any) -> Any:
    """A number that every token's logits matter for."""
    return (logits.log_softmax(-1) * WEIGHTS.to(logits.dtype)).sum()


def last(logits: Any) -> Any:
    """A number of the last token."""
    return (logits[:, -1] * WEIGHTS.to(logits.dtype)).sum()


def tracked(
    module: Any,
    ids: Sequence[int],
    sites: Sequence[Place],
    changes: Mapping[Place, Callable[[Tensor], Tensor]] | None = None,
) -> tuple[dict[Place, Tensor], Tensor]:
    """The tensors at some places, which autograd follows to the logits, and the logits.

    Args:
        module: The Hugging Face model.
        ids: The prompt.
        sites: The places.
        changes: What becomes of the tensor at a place after it was taken.
    """
    found: dict[Place, Tensor] = {}

    def visit(path: str, side: str, value: Any) -> Any:
        for steps, tensor in list(tensors_in(value, side)):
            place = (path, side, steps)
            if place in sites:
                found[place] = tensor.clone() if tensor.requires_grad else tensor.detach().clone().requires_grad_()
                value = with_change(value, side, steps, lambda _, place=place: found[place].clone())
            if place in (changes or {}):
                value = with_change(value, side, steps, changes[place])  # type: ignore[index]
        return value

    options = {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}
    with torch.enable_grad(), hooked(module, visit):
        logits = module(input_ids=torch.tensor([list(ids)]), **options).logits
    return found, logits


def expected_gradients(
    module: Any, ids: Sequence[int], sites: Sequence[Place], loss: Any = loss_of
) -> dict[Place, Any]:
    """The gradient of a loss with respect to each place that it depends on."""
    found, logits = tracked(module, ids, sites)
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(logits), list(found.values()), allow_unused=True)
    return {place: gradient for place, gradient in zip(found, gradients, strict=True) if gradient is not None}


def floats(model: patchwire.Model) -> list[Place]:
    """Every place that holds floating-point numbers, but the logits."""
    every = places.every_place(model)
    return [place for place in every if place[0] and places.leaf_of(model, place).dtype.is_floating_point]


def layer(name: str, index: int = 1, side: str = "output") -> Place:
    return (places.PARTS[name]["layer"].format(index), side, () if side == "output" else ("args", 0))


def embed(name: str) -> Place:
    return (places.PARTS[name]["embed"], "output", ())


# --- with respect to sites -----------------------------------------------------------------


def test_the_gradient_at_every_place_is_autograds(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    expected = expected_gradients(reference, IDS, floats(model))
    assert len(expected) > 40

    with model.trace(IDS):
        values = {place: places.read(model, place) for place in expected}
        gradients = patchwire.grad(loss_of(model.logits), list(values.values()))
        patchwire.save(gradients)
        logits = model.logits.save()

    assert_same(logits.value, tracked(reference, IDS, [])[1], "logits")
    for (place, gradient), found in zip(expected.items(), gradients, strict=True):
        assert_same(found.value, gradient, place)


def test_a_gradient_does_not_depend_on_what_else_is_differentiated(name: str, served: Any, references: Any) -> None:
    """A residual stream is also a norm's input: one tensor at two sites, with two gradients."""
    model, reference = served[name], references[name]
    for place in floats(model)[::5]:
        expected = expected_gradients(reference, IDS, [place])
        if not expected:
            continue
        with model.trace(IDS):
            early = model.embed.output
            value = places.read(model, place)
            alone = patchwire.grad(loss_of(model.logits), value).save()
        with model.trace(IDS):
            early = model.embed.output
            value = places.read(model, place)
            together = patchwire.grad(loss_of(model.logits), [early, value])[1].save()
        assert_same(alone.value, expected[place], place)
        assert_same(together.value, expected[place], place)


def test_backward_and_grad_record_what_grad_does(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    sites = [embed(name), layer(name)]
    expected = expected_gradients(reference, IDS, sites)

    with model.trace(IDS):
        first, second = model.embed.output, model.layers[1].output
        loss_of(model.logits).backward()
        found = [first.grad.save(), second.grad.save()]
        again = first.grad

    assert again is found[0]
    for place, gradient in zip(sites, found, strict=True):
        assert_same(gradient.value, expected[place], place)


def test_several_backward_calls_add_up_and_a_block_under_one_limits_it(name: str, served: Any, references: Any) -> None:
    model, reference, site = served[name], references[name], embed(name)

    with model.trace(IDS):
        hidden = model.embed.output
        one, two = loss_of(model.logits), last(model.logits)
        one.backward()
        first = hidden.grad.save()
        with two.backward():
            second = hidden.grad.save()
        after = hidden.grad.clone().save()
        two.backward()
        both = hidden.grad.save()

    of_one = expected_gradients(reference, IDS, [site])[site]
    of_two = expected_gradients(reference, IDS, [site], last)[site]
    assert_same(first.value, of_one)
    assert_same(second.value, of_two)
    assert_same(after.value, of_one)
    assert_same(both.value, of_one + of_two)


def test_backward_with_a_vector_multiplies_the_jacobian(served: Any, references: Any) -> None:
    model, reference, site = served["llama"], references["llama"], embed("llama")
    vector = torch.randn(1, len(IDS), tiny.VOCABULARY, generator=torch.Generator().manual_seed(2))

    with model.trace(IDS):
        hidden = model.embed.output
        model.logits.backward(vector)
        one = hidden.grad.save()
        two = patchwire.grad(model.logits, hidden, vector).save()
        three = patchwire.grad(model.logits, hidden, model.logits * 0.5).save()

    assert_same(one.value, expected_gradients(reference, IDS, [site], lambda logits: (logits * vector).sum())[site])
    assert torch.equal(one.value, two.value)
    halved = expected_gradients(reference, IDS, [site], lambda logits: (logits * logits.detach() * 0.5).sum())
    assert_same(three.value, halved[site])


def test_a_loss_in_the_middle_of_the_model_ends_the_pass_there(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    found, _ = tracked(reference, IDS, [layer(name, 0), layer(name, 1)])
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(found[layer(name, 1)][:, -1].pow(2).sum(), [found[layer(name, 0)]])

    with model.trace(IDS) as trace:
        hidden = model.layers[0].output
        gradient = patchwire.grad(model.layers[1].output[:, -1].pow(2).sum(), hidden).save()

    assert_same(gradient.value, expected)
    assert trace.stats.modules_skipped > 0


def test_a_gradient_is_that_of_what_stands_in_the_block_and_of_the_model_together(
    name: str, served: Any, references: Any
) -> None:
    model, reference = served[name], references[name]
    found, logits = tracked(reference, IDS, [layer(name)])
    hidden = found[layer(name)]
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(last(logits) + hidden.pow(2).sum() + hidden[:, -1].sum(), [hidden])

    with model.trace(IDS):
        hidden = model.layers[1].output
        loss = last(model.logits) + hidden.pow(2).sum() + hidden[:, -1].sum()
        gradient = patchwire.grad(loss, hidden).save()

    assert_same(gradient.value, expected)


def test_items_of_tuples_have_gradients(served: Any, references: Any) -> None:
    model, reference = served["gpt2"], references["gpt2"]
    site = ("transformer.h.1.attn", "output", (0,))

    with model.trace(IDS):
        attention = model.transformer.h[1].attn.output[0]
        gradient = patchwire.grad(loss_of(model.logits), attention).save()

    assert_same(gradient.value, expected_gradients(reference, IDS, [site])[site])


# --- with respect to other values ---------------------------------------------------------------


def test_an_edited_value_has_the_gradient_of_what_it_has_become(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    site = layer(name)

    with model.trace(IDS):
        original = model.layers[1].output.clone()
        hidden = model.layers[1].output
        hidden[:, 2] = hidden[:, 3] * 2
        hidden *= 1.5
        gradient = patchwire.grad(loss_of(model.logits), hidden).save()
        value = hidden.clone().save()

    assert original is not hidden
    kept: list[Tensor] = []

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[:, 2] = tensor[:, 3] * 2
        kept.append((tensor * 1.5).detach().requires_grad_())
        return kept[0].clone()

    _, logits = tracked(reference, IDS, [], {site: change})
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(loss_of(logits), kept)
    assert_same(value.value, kept[0].detach())
    assert_same(gradient.value, expected)


def test_a_gradient_flows_through_what_is_written(name: str, served: Any, references: Any) -> None:
    """With respect to the embeddings, through an edit of a later layer that uses them, and a tensor of the program."""
    model, reference = served[name], references[name]
    steering = torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(3))

    with model.trace(IDS):
        early = model.embed.output
        model.layers[1].output[:, -2:] += early[:, :2] * steering
        gradients = patchwire.save(patchwire.grad(loss_of(model.logits), (early, steering)))

    vector = steering.clone().requires_grad_()
    found: dict[Place, Tensor] = {}

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[:, -2:] += found[embed(name)][:, :2] * vector
        return tensor

    def take(tensor: Tensor) -> Tensor:
        found[embed(name)] = tensor.detach().clone().requires_grad_()
        return found[embed(name)].clone()

    _, logits = tracked(reference, IDS, [], {embed(name): take, layer(name): change})
    with torch.enable_grad():
        expected = torch.autograd.grad(loss_of(logits), [found[embed(name)], vector])
    assert isinstance(gradients, tuple)
    for gradient, each in zip(gradients, expected, strict=True):
        assert_same(gradient.value, each)


@pytest.mark.parametrize("which", ["lm_head.weight", "norm.weight", "first", "embed.weight"])
def test_parameters_have_gradients_on_every_way_through_the_model(
    name: str, which: str, served: Any, references: Any
) -> None:
    """Also where weights are tied, and where the block uses them itself, under whatever name."""
    model, reference = served[name], references[name]
    parts = places.PARTS[name]
    path = {
        "lm_head.weight": f"{parts['lm_head']}.weight",
        "norm.weight": f"{parts['norm']}.weight",
        "embed.weight": f"{parts['embed']}.weight",
        "first": next(each for each, _ in reference.named_parameters() if parts["layer"].format(0) in each),
    }[which]
    owner, _, attribute = path.rpartition(".")

    with model.trace(IDS):
        logits = model.logits
        plain = patchwire.grad(loss_of(logits), getattr(model.module(owner), attribute)).save()
        used = loss_of(logits) + (getattr(model.module(owner), attribute) ** 2).sum()
        both = patchwire.grad(used, getattr(model.module(owner), attribute)).save()

    parameter = reference.get_parameter(path)
    parameter.requires_grad_()
    try:
        _, logits = tracked(reference, IDS, [])
        with torch.enable_grad():
            (expected,) = torch.autograd.grad(loss_of(logits), [parameter])
    finally:
        parameter.requires_grad_(False)
    assert_same(plain.value, expected, path)
    assert_same(both.value, expected + 2 * parameter, path)


def test_a_module_applied_in_the_block_is_differentiated_too(served: Any, references: Any) -> None:
    model, reference, site = served["gpt2"], references["gpt2"], layer("gpt2")
    found, _ = tracked(reference, IDS, [site])
    with torch.enable_grad():
        lens = reference.lm_head(reference.transformer.ln_f(found[site]))
        (expected,) = torch.autograd.grad(last(lens), [found[site]])

    with model.trace(IDS):
        hidden = model.layers[1].output
        gradient = patchwire.grad(last(model.lm_head(model.norm(hidden))), hidden).save()

    assert_same(gradient.value, expected)


# --- several prompts ---------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(8, 8, 8), (6, 11, 1)])
def test_invokes_that_share_a_pass_have_their_own_gradients(
    name: str, lengths: tuple[int, ...], served: Any, references: Any
) -> None:
    model, reference = served[name], references[name]
    prompts = [tiny.prompt(length, seed=index) for index, length in enumerate(lengths)]
    sites = [embed(name), layer(name), *floats(model)[3::9]]
    expected = [expected_gradients(reference, prompt, sites) for prompt in prompts]
    found = []

    with model.trace() as trace:
        for prompt, known in zip(prompts, expected, strict=True):
            with trace.invoke(prompt):
                values = [places.read(model, place) for place in known]
                found.append(patchwire.save(patchwire.grad(loss_of(model.logits), values)))

    for known, gradients in zip(expected, found, strict=True):
        for (place, gradient), value in zip(known.items(), gradients, strict=True):
            assert_same(value.value, gradient, place)


def test_each_invoke_may_call_backward(name: str, served: Any, references: Any) -> None:
    model, reference, site = served[name], references[name], embed(name)
    found = []

    with model.trace() as trace:
        for prompt in PROMPTS:
            with trace.invoke(prompt):
                hidden = model.embed.output
                loss_of(model.logits).backward()
                found.append(hidden.grad.save())

    for prompt, gradient in zip(PROMPTS, found, strict=True):
        assert_same(gradient.value, expected_gradients(reference, prompt, [site])[site])


def test_rows_of_a_list_have_their_own_gradients_and_padding_has_none(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    expected = [expected_gradients(reference, prompt, [embed(name), layer(name)], last) for prompt in PROMPTS]

    with model.trace(PROMPTS):
        early, late = model.embed.output, model.layers[1].output
        values = patchwire.save(patchwire.grad(last(model.logits), [early, late]))

    for place, value in zip((embed(name), layer(name)), values, strict=True):
        assert_rows(value.value, [each[place] for each in expected], place)


def test_a_gradient_crosses_from_one_invoke_into_another(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    clean, corrupt = PROMPTS[0], PROMPTS[1]

    with model.trace() as trace:
        with trace.invoke(clean):
            source = model.layers[0].output
        with trace.invoke(corrupt):
            model.layers[1].output[:, -1] = source[:, -1]
            gradient = patchwire.grad(last(model.logits), source).save()

    found, _ = tracked(reference, clean, [layer(name, 0)])
    source = found[layer(name, 0)]

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[:, -1] = source[:, -1]
        return tensor

    _, logits = tracked(reference, corrupt, [], {layer(name): change})
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(last(logits), [source])
    assert_same(gradient.value, expected)


def test_invokes_that_cannot_share_a_pass_have_their_own_gradients(served: Any, references: Any) -> None:
    """Cosines of positions are one tensor for all rows: a pass that is shared would give the sum of all."""
    model, reference = served["llama"], references["llama"]
    shared = [
        place
        for place in floats(model)
        if not any(dim.axis in (Axis.BATCH, Axis.BATCH_SEQ) for dim in places.leaf_of(model, place).shape)
    ]
    prompts = [tiny.prompt(7), tiny.prompt(7, seed=1)]
    expected = [expected_gradients(reference, prompt, shared) for prompt in prompts]
    assert expected[0]

    for place in expected[0]:
        with model.trace() as trace:
            values, losses = [], []
            for prompt in prompts:
                with trace.invoke(prompt):
                    values.append(places.read(model, place))
                    losses.append(loss_of(model.logits))
            gradients = patchwire.save(patchwire.grad(losses[0] + losses[1], values))
        for known, gradient in zip(expected, gradients, strict=True):
            assert_same(gradient.value, known[place], place)


# --- sessions -------------------------------------------------------------------------------------


def test_a_gradient_of_one_trace_is_written_into_a_later_one(name: str, served: Any, references: Any) -> None:
    model, reference, site = served[name], references[name], layer(name)
    other = tiny.prompt(8, seed=4)

    with model.session():
        with model.trace(IDS):
            hidden = model.layers[1].output
            gradient = patchwire.grad(last(model.logits), hidden)
        with model.trace(other):
            model.layers[1].output[:] -= 0.1 * gradient
            logits = model.logits.save()

    expected = expected_gradients(reference, IDS, [site], last)[site]
    _, wanted = tracked(reference, other, [], {site: lambda tensor: tensor - 0.1 * expected})
    assert_same(logits.value, wanted.detach())


def test_a_gradient_goes_back_through_several_traces(name: str, served: Any, references: Any) -> None:
    model, reference, site = served[name], references[name], layer(name)
    other = tiny.prompt(8, seed=4)

    with model.session():
        with model.trace(IDS):
            early = model.layers[0].output
            late = model.layers[1].output
        with model.trace(other):
            model.layers[1].output[:] += late
            gradient = patchwire.grad(last(model.logits), early).save()

    found, _ = tracked(reference, IDS, [layer(name, 0), site])
    _, logits = tracked(reference, other, [], {site: lambda tensor: tensor + found[site]})
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(last(logits), [found[layer(name, 0)]])
    assert_same(gradient.value, expected)


def test_each_trace_of_a_session_may_call_backward(served: Any, references: Any) -> None:
    model, reference, site = served["gpt2"], references["gpt2"], embed("gpt2")
    found = []

    with model.session():
        for prompt in PROMPTS:
            with model.trace(prompt):
                hidden = model.embed.output
                last(model.logits).backward()
                found.append(hidden.grad.save())

    for prompt, gradient in zip(PROMPTS, found, strict=True):
        assert_same(gradient.value, expected_gradients(reference, prompt, [site], last)[site])


def test_integrated_gradients_as_a_user_writes_them(name: str, served: Any, references: Any) -> None:
    model, reference, site = served[name], references[name], embed(name)
    alphas = [0.25, 0.5, 0.75, 1.0]

    with model.session() as session:
        with model.trace(IDS):
            embeddings = model.embed.output
        total = 0
        for alpha in alphas:
            with model.trace(IDS):
                scaled = embeddings * alpha
                model.embed.output = scaled
                total = total + patchwire.grad(last(model.logits), scaled)
        with model.trace(IDS):
            attribution = (total / len(alphas) * embeddings).sum(-1).save()

    assert session.stats.passes == len(alphas) + 1
    known = tracked(reference, IDS, [site])[0][site].detach()
    wanted = torch.zeros_like(known)
    for alpha in alphas:
        point = (known * alpha).requires_grad_()
        _, logits = tracked(reference, IDS, [], {site: lambda _, point=point: point.clone()})
        with torch.enable_grad():
            wanted += torch.autograd.grad(last(logits), [point])[0]
    assert_same(attribution.value, (wanted / len(alphas) * known).sum(-1))


# --- nothing stays behind ------------------------------------------------------------------------


def test_nothing_of_a_gradient_stays_behind(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    site = layer(name)
    expected = expected_gradients(reference, IDS, [site])[site]

    def gradient() -> Any:
        with model.trace(IDS):
            hidden = model.layers[1].output
            found = patchwire.grad(loss_of(model.logits), [hidden, model.lm_head.weight])
            return patchwire.save(found)

    first = gradient()
    with model.trace(IDS):
        logits = model.logits.save()
    with refused(ExecutionError, "no gradient"), model.trace(IDS):
        hidden = model.layers[1].output
        patchwire.grad(loss_of(model.logits), hidden[:, -1]).save()  # this line
    second = gradient()

    assert_same(logits.value, tracked(reference, IDS, [])[1])
    assert not logits.value.requires_grad
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.value, two.value)
    assert_same(first[0].value, expected)


def test_memory_of_gradients_is_given_back(server: Server, served: Any) -> None:
    """The way back of each request is some 30 MB; of forty, nothing is left."""
    model = served["llama"]

    def resident() -> int:
        with open(f"/proc/{server.process.pid}/status") as status:
            return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) // 1024

    def request() -> None:
        with model.trace([tiny.prompt(60, seed=index) for index in range(16)]):
            early = model.embed.output
            for _ in range(20):
                model.layers[0].output[:] = (model.layers[0].output.repeat(1, 1, 8) * 1.01).tanh()[..., : tiny.WIDTH]
            patchwire.grad(loss_of(model.logits), early).sum().save()

    for _ in range(5):
        request()
    before = resident()
    for _ in range(35):
        request()
    assert resident() - before < 150


@pytest.fixture(scope="module")
def narrow(checkpoints: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Models whose weights are bfloat16."""
    specs = {name: checkpoints[name] for name in ("gpt2", "mamba")}
    with (
        Server(specs, dtypes=dict.fromkeys(specs, "bfloat16")) as server,
        patchwire.connect(server.address, progress=False) as client,
    ):
        yield {
            name: (client.model(name), AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval())
            for name, path in specs.items()
        }


@pytest.mark.parametrize("name", ["gpt2", "mamba"])
def test_gradients_of_bfloat16_models_have_the_type_of_their_value(name: str, narrow: Any) -> None:
    model, reference = narrow[name]
    reference.requires_grad_(False)
    sites = [embed(name), layer(name)]
    expected = expected_gradients(reference, IDS, sites, lambda logits: loss_of(logits.float()))

    with model.trace(IDS):
        values = [model.embed.output, model.layers[1].output]
        gradients = patchwire.save(patchwire.grad(loss_of(model.logits.float()), values))

    assert torch.bfloat16 in {each.value.dtype for each in gradients}
    for place, gradient in zip(sites, gradients, strict=True):
        assert_same(gradient.value, expected[place], place, tolerance=2e-2)


# --- what is refused ------------------------------------------------------------------------------------


@pytest.fixture
def model(served: Any) -> patchwire.Model:
    """One of the models."""
    return served["gpt2"]  # type: ignore[no-any-return]


def test_a_loss_of_several_elements_is_refused_at_its_line(model: Any) -> None:
    with refused(ShapeError, r"one number.*\[1, 8, 61\]", hint="weights"), model.trace(IDS):
        hidden = model.embed.output
        patchwire.grad(model.logits, hidden)  # this line


def test_backward_of_several_elements_is_refused_at_its_line(model: Any) -> None:
    with refused(ShapeError, r"one number.*\[1, 8, 61\]", hint="gradient"), model.trace(IDS):
        model.logits.backward()  # this line


def test_backward_with_a_vector_of_another_shape_is_refused(model: Any) -> None:
    with pytest.raises(ShapeError, match=r"\[1, 8, 61\]"), model.trace(IDS):
        model.logits.backward(torch.ones(61))


def test_weights_of_another_shape_or_kind_are_refused(model: Any) -> None:
    with pytest.raises(ShapeError, match=r"\[1, 8, 61\]"), model.trace(IDS):
        patchwire.grad(model.logits, model.embed.output, torch.ones(61))
    with pytest.raises(GraphError, match="weights"), model.trace(IDS):
        patchwire.grad(model.logits, model.embed.output, 1.0)


def test_a_value_that_comes_later_than_the_loss_is_refused(model: Any) -> None:
    with refused(OrderError, r"layers\[2\]\.output", line=False), model.trace(IDS):
        loss = model.layers[0].output.sum()
        patchwire.grad(loss, model.layers[2].output)


def test_a_value_that_the_loss_does_not_depend_on_is_refused_at_its_line(model: Any) -> None:
    with refused(ExecutionError, "no gradient"), model.trace(IDS):
        aside = model.layers[0].output * 2
        patchwire.grad(model.logits.sum(), aside).save()  # this line


def test_a_view_of_a_read_is_refused_with_what_to_write(model: Any) -> None:
    with refused(ExecutionError, "no gradient", hint=r"grad\(loss, h\)\[:, -1\]"), model.trace(IDS):
        hidden = model.layers[0].output
        patchwire.grad(model.logits.sum(), hidden[:, -1]).save()  # this line


def test_integers_have_no_gradient(model: Any) -> None:
    with refused(ShapeError, "floating-point.*int64", hint="float"), model.trace(IDS):
        ids = model.embed.input
        patchwire.grad(model.logits.sum(), ids)  # this line


def test_a_gradient_with_respect_to_nothing_is_refused(model: Any) -> None:
    with refused(GraphError, "something"), model.trace(IDS):
        patchwire.grad(model.logits.sum(), [])  # this line


def test_a_gradient_before_any_backward_is_refused(model: Any) -> None:
    with refused(GraphError, "no gradient yet", hint="backward"), model.trace(IDS):
        model.embed.output.grad  # noqa: B018  # this line


def test_a_gradient_in_a_generation_is_refused(model: Any) -> None:
    with refused(OperationError, "generation", hint="trace"), model.generate(IDS, max_new_tokens=2):
        hidden = model.embed.output
        patchwire.grad(model.logits.sum(), hidden)  # this line


def test_a_gradient_across_a_generation_is_refused(model: Any) -> None:
    """Part of it would be missing: what a weight does in the generation."""
    with refused(OperationError, "generation", hint="trace"), model.session():
        with model.generate(IDS, max_new_tokens=2):
            steered = model.layers[1].output
        with model.trace(IDS):
            model.layers[1].output = steered
            patchwire.grad(model.logits.sum(), model.lm_head.weight)  # this line


def test_a_gradient_after_a_generation_is_not(served: Any, references: Any) -> None:
    model, reference, site = served["gpt2"], references["gpt2"], layer("gpt2")
    with model.session():
        with model.generate(IDS, max_new_tokens=2):
            steered = model.layers[0].output
        with model.trace(IDS):
            model.layers[0].output = steered * 2
            hidden = model.layers[1].output
            gradient = patchwire.grad(last(model.logits), hidden).save()
    found, logits = tracked(reference, IDS, [site], {layer("gpt2", 0): lambda tensor: tensor * 2})
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(last(logits), [found[site]])
    assert_same(gradient.value, expected)


def test_a_gradient_where_the_model_works_in_place_is_refused_unless_a_copy_is_written(
    served: Any, references: Any
) -> None:
    """A tensor of its own there would change what the model computes."""
    model, reference = served["odd"], references["odd"]
    with refused(OperationError, r"same\.output.*in place", hint="clone"), model.trace(IDS):
        hidden = model.same.output  # this line
        patchwire.grad(last(model.logits), hidden).save()

    with model.trace(IDS):
        copy = model.same.output.clone()
        model.same.output = copy
        gradient = patchwire.grad((model.other.output * SCALES).sum(), copy).save()
        value = model.other.output.save()

    site, result = ("same", "output", ()), ("other", "output", ())
    found, _ = tracked(reference, IDS, [site, result])
    assert_same(value.value, found[result].detach())
    assert_same(gradient.value, SCALES.expand_as(gradient))


def test_a_gradient_passes_what_the_model_changes_in_place(served: Any, references: Any) -> None:
    model, reference = served["odd"], references["odd"]
    expected = tracked(reference, IDS, [("embed", "output", ())])[0]

    with model.trace(IDS):
        hidden = model.embed.output
        before = model.same.output  # the model adds 1 to it, and to what it was made of
        one = patchwire.grad(before.pow(2).sum(), hidden).save()
        two = patchwire.grad((model.other.output * SCALES).sum(), hidden).save()
        value = before.save()

    assert_same(one.value, 2 * value.value)
    assert_same(two.value, 1.5 * SCALES.expand_as(two))
    assert_same(value.value, expected["embed", "output", ()].detach() + reference.positions.weight[: len(IDS)])


def test_a_model_that_spoils_its_own_gradient_is_said_to(served: Any) -> None:
    model = served["odd"]
    with refused(ExecutionError, "no gradient.*in place", hint="PyTorch"), model.trace(IDS):
        hidden = model.embed.output
        patchwire.grad(last(model.logits), hidden).save()  # this line


class TestNamedParts:
    """The gradient of a value that is part of a tensor in the model is that part of the tensor's gradient."""

    def test_of_queries_patterns_and_neurons(self, served, references):
        model, reference = served["gpt2"], references["gpt2"]
        ids = tiny.prompt(6)
        with model.trace(ids):
            layer = model.layers[1]
            values = [layer.attn.q, layer.attn.z, layer.mlp.neurons]
            grads = [each.save() for each in patchwire.grad(model.logits[0, -1, 7], values)]
            alone = patchwire.grad(model.logits[0, -1, 7], model.layers[1].attn.q).save()
        block = reference.transformer.h[1]
        modules = {"q": block.attn.c_attn, "z": block.attn.c_proj, "neurons": block.mlp.c_proj}
        wanted = {}
        for name, module in modules.items():  # one at a time: each hook cuts off what is before it
            seen: list[torch.Tensor] = []

            def remember(tensor: torch.Tensor, into: list[torch.Tensor] = seen) -> torch.Tensor:
                into.append(tensor.detach().clone().requires_grad_())
                return into[0]

            hook = (
                module.register_forward_hook(lambda *args, to=remember: to(args[2]))
                if name == "q"
                else module.register_forward_pre_hook(lambda _, args, to=remember: (to(args[0]),))
            )
            with torch.enable_grad():
                loss = reference(torch.tensor([ids])).logits[0, -1, 7]
                (wanted[name],) = torch.autograd.grad(loss, seen)
            hook.remove()
        q = wanted["q"].unflatten(-1, (3, 4, 6))[:, :, 0]
        torch.testing.assert_close(grads[0].value, q, rtol=1e-4, atol=1e-6)
        assert torch.equal(alone.value, grads[0].value)
        torch.testing.assert_close(grads[1].value, wanted["z"].unflatten(-1, (4, 6)), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(grads[2].value, wanted["neurons"], rtol=1e-4, atol=1e-6)
