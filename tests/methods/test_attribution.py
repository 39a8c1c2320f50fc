"""Attribution: what autograd gives on the Hugging Face model, and how near that is to the effect of patching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import patchwire
from patchwire import methods

CLEAN = [3, 14, 15, 9, 26, 5]
CORRUPT = [3, 33, 44, 9, 26, 5]
ANSWER, FOIL = 7, 12
METRIC = methods.LogitDifference(ANSWER, FOIL)
STEPS = 4
TRANSFORMERS = ["gpt2", "llama"]
EVERY = [*TRANSFORMERS, "mamba"]
SITES: dict[str, tuple[tuple[str, ...], bool]] = {
    "resid": (("",), False),
    "mixer": (("attn", "self_attn", "mixer"), False),
    "attn.z": (("attn.c_proj", "self_attn.o_proj"), True),
    "mlp.neurons": (("mlp.c_proj", "mlp.down_proj"), True),
}
"""The module that each site is the output, or the input, of."""


class Reference:
    """Gradients of the Hugging Face model, by hooks and autograd."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        base = model.base_model
        self.layers: list[nn.Module] = list(base.h if hasattr(base, "h") else base.layers)

    def at(self, layer: int, at: str) -> tuple[nn.Module, bool]:
        paths, is_input = SITES[at]
        for path in paths:
            try:
                return self.layers[layer].get_submodule(path), is_input
            except AttributeError:
                continue
        raise AssertionError(at)

    def seen(self, embedded: Tensor, at: str) -> tuple[list[Tensor], Tensor]:
        """The values at a site in every layer, and the last token's logits, with their graph."""
        found: list[Tensor] = []
        handles = []
        for layer in range(len(self.layers)):
            module, is_input = self.at(layer, at)

            def before(module: nn.Module, args: Any) -> Any:
                found.append(args[0] if args[0].requires_grad else args[0].requires_grad_())
                return (found[-1], *args[1:])

            def after(module: nn.Module, args: Any, out: Any) -> None:
                found.append(out[0] if isinstance(out, tuple) else out)

            handles.append(
                module.register_forward_pre_hook(before) if is_input else module.register_forward_hook(after)
            )
        logits: Tensor = self.model(inputs_embeds=embedded, use_cache=False).logits[:, -1]
        for handle in handles:
            handle.remove()
        return found, logits

    def embedded(self, ids: list[int]) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(torch.tensor([ids])).detach()
        return embedded

    def products(self, base: list[int], source: list[int], at: str, metric: Any, steps: int) -> list[Tensor]:
        """`(x_source - x_base) ∂m/∂x` in every layer, with the mean of the gradients at inputs between both."""
        first, last = self.embedded(base), self.embedded(source)
        states, _ = self.seen(last.requires_grad_(), at)
        mine, _ = self.seen(first.clone().requires_grad_(), at)
        total = [torch.zeros_like(each) for each in states]
        for step in range(steps):
            between = (first + step / steps * (last - first)).detach().requires_grad_()
            sites, logits = self.seen(between, at)
            for index, each in enumerate(torch.autograd.grad(metric(logits), sites)):
                total[index] += each / steps
        return [((one - other) * gradient).detach() for one, other, gradient in zip(states, mine, total, strict=True)]


def difference(logits: Tensor) -> Tensor:
    return logits[0, ANSWER] - logits[0, FOIL]


def log_probability(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)[0, ANSWER]


@pytest.fixture(params=EVERY)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(served: Mapping[str, patchwire.Model], name: str) -> patchwire.Model:
    return served[name]


@pytest.fixture
def reference(references: Mapping[str, PreTrainedModel], name: str) -> Reference:
    return Reference(references[name])


transformers = pytest.mark.parametrize("name", TRANSFORMERS, indirect=True)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("at", ["resid", "mixer"])
def test_layers_and_tokens_are_what_autograd_gives(
    model: patchwire.Model, reference: Reference, at: str, direction: Any
) -> None:
    base, source = (CORRUPT, CLEAN) if direction == "denoising" else (CLEAN, CORRUPT)
    metric = methods.LogProbability(ANSWER)
    found = methods.attribution_patching(model, CLEAN, CORRUPT, metric, at=at, direction=direction)
    averaged = methods.integrated_gradients(model, CLEAN, CORRUPT, metric, at=at, direction=direction, steps=STEPS)

    for result, steps in ((found, 1), (averaged, STEPS)):
        products = reference.products(base, source, at, log_probability, steps)
        expected = torch.stack([each[0].sum(-1) for each in products]).double()
        torch.testing.assert_close(result.effect().values, expected, rtol=1e-3, atol=1e-5)
        assert result.stats.passes == 2
    exact = methods.activation_patching(model, CLEAN, CORRUPT, metric, at=at, direction=direction)
    assert found.numbers == pytest.approx(exact.numbers, rel=1e-5)
    assert found.axes == exact.axes


@transformers
def test_heads_and_neurons_are_sums_over_their_part_of_the_site(model: patchwire.Model, reference: Reference) -> None:
    heads = methods.integrated_gradients(
        model, CLEAN, CORRUPT, METRIC, at="attn.z", over=("head", "layer"), steps=STEPS
    )
    steps = [5, [0, 1, 2, 9], [39, 7]]
    neurons = methods.attribution_patching(
        model, CLEAN, CORRUPT, METRIC, at="mlp.neurons", over={"neuron": steps, "layer": [2, 0], "token": [5]}
    )
    blocks = methods.attribution_patching(
        model, CLEAN, CORRUPT, METRIC, at="mlp.neurons", over={"layer": None, "neuron": methods.Blocks(15)}
    )

    of_heads = reference.products(CORRUPT, CLEAN, "attn.z", difference, STEPS)
    expected = torch.stack([each.unflatten(-1, (4, 6)).sum((0, 1, 3)) for each in of_heads], 1).double()
    torch.testing.assert_close(heads.effect().values, expected, rtol=1e-3, atol=1e-5)
    of_neurons = reference.products(CORRUPT, CLEAN, "mlp.neurons", difference, 1)
    for row, step in enumerate(steps):
        for column, layer in enumerate((2, 0)):
            expected = of_neurons[layer][0, 5, step].sum().double()
            torch.testing.assert_close(neurons.effect().values[row, column, 0], expected, rtol=1e-3, atol=1e-5)
    expected = torch.stack([torch.stack([p.sum() for p in each[0].split(15, -1)]) for each in of_neurons]).double()
    torch.testing.assert_close(blocks.effect().values, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "at", "over"),
    [
        ("gpt2", "attn.pattern", ("layer", "head", "token")),
        ("llama", "attn.k", ("layer", "head")),
        ("mamba", "scan", {"layer": None, "channel": methods.Blocks(16)}),
        ("mamba", "gate", ("layer", "token")),
    ],
    indirect=["name"],
)
def test_small_patches_have_the_effect_that_is_estimated(model: patchwire.Model, at: str, over: Any) -> None:
    """At every site there is: the estimate is the derivative of what patching towards the source does."""
    estimated = methods.attribution_patching(model, CLEAN, CORRUPT, METRIC, at=at, over=over).effect().values
    share = 1e-2
    read = methods.PLACES.get(at) or (lambda layer: getattr(layer.mixer, at.partition(".")[2]))
    effects = []
    with model.trace() as trace:
        with trace.invoke(CLEAN):
            clean = [read(layer) for layer in model.layers]
        for layer in range(model.num_layers):
            for sign in (1, -1):
                with trace.invoke(CORRUPT):
                    site = read(model.layers[layer])
                    site[:] = site + sign * share * (clean[layer] - site)
                    effects.append(METRIC(model.logits[:, -1], None).save())
    ends = torch.stack([each.value for each in effects]).view(model.num_layers, 2)
    expected = ((ends[:, 0] - ends[:, 1]) / (2 * share)).double()
    torch.testing.assert_close(estimated.flatten(1).sum(1), expected, rtol=1e-2, atol=2e-2)


def test_one_step_of_integrated_gradients_is_attribution_patching(model: patchwire.Model) -> None:
    one = methods.attribution_patching(model, CLEAN, CORRUPT, METRIC)
    other = methods.integrated_gradients(model, CLEAN, CORRUPT, METRIC, steps=1)

    assert torch.equal(one.values, other.values)


@transformers
@pytest.mark.parametrize(
    ("at", "over"), [("resid", ("layer", "token")), ("attn.z", ("layer", "head")), ("mlp", ("layer", "token"))]
)
def test_estimates_are_exact_on_a_linear_model(model: patchwire.Model, at: str, over: Any) -> None:
    linear = linearised(model)
    exact = methods.activation_patching(linear, CLEAN, CORRUPT, METRIC, at=at, over=over)

    assert float(exact.effect().values.abs().max()) > 0.1
    for estimate in (methods.attribution_patching, methods.integrated_gradients):
        found = methods.agreement(estimate(linear, CLEAN, CORRUPT, METRIC, at=at, over=over), exact)
        assert found.error < 1e-4
        assert found.pearson == pytest.approx(1, abs=1e-6)
        assert found.sign_of_large == 1


def linearised(model: patchwire.Model) -> patchwire.Model:
    """The model without norms, with the same attention to every token, and with matrices in the place of its MLPs."""
    weight = torch.randn(24, 24, generator=torch.Generator().manual_seed(0)) / 24**0.5
    with model.edit() as edited:
        for layer in model.layers:
            layer.mixer_norm.skip(layer.mixer_norm.input)
            layer.attn.q[:] = 0
            layer.mlp_norm.skip(layer.mlp_norm.input)
            layer.mlp.skip(layer.mlp.input @ weight)
        model.norm.skip(model.norm.input)
    return edited


def test_agreement_counts_signs_and_large_effects(model: patchwire.Model) -> None:
    exact = methods.activation_patching(model, CLEAN, CORRUPT, METRIC)
    estimated = methods.attribution_patching(model, CLEAN, CORRUPT, METRIC)
    found = methods.agreement(estimated, exact, threshold=0.2)

    one, other = estimated.effect().values.flatten(), exact.effect().values.double().flatten()
    nothing = 1e-5 * other.abs().max()
    one, other = (torch.where(each.abs() > nothing, each, 0) for each in (one, other))
    large = other.abs() > 0.2 * other.abs().max()
    assert found.pearson == pytest.approx(float(torch.corrcoef(torch.stack([one, other]))[0, 1]))
    assert found.sign == pytest.approx(float((one.sign() == other.sign()).double().mean()))
    assert found.sign_of_large == pytest.approx(float((one.sign() == other.sign())[large].double().mean()))
    assert (found.cells, found.large) == (len(one), int(large.sum()))
    assert found.table().row_count == 4
    perfect = methods.agreement(exact, exact)
    assert (perfect.pearson, perfect.sign, perfect.sign_of_large, perfect.error) == (pytest.approx(1), 1, 1, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"over": ("token",)}, "one layer at a time"),
        ({"over": {"layer": [[0, 1]]}}, "one layer at a time"),
        ({"steps": 0}, "at least one step"),
        ({"metric": methods.Rank(ANSWER)}, "gradient"),
    ],
)
def test_what_has_no_estimate_is_refused(served: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(patchwire.PatchwireError) as caught:
        methods.integrated_gradients(served["gpt2"], CLEAN, CORRUPT, **({"metric": METRIC} | arguments))
    assert message in str(caught.value)
    assert caught.value.lines


def test_results_over_other_cells_do_not_agree_or_disagree(served: Any) -> None:
    one = methods.attribution_patching(served["gpt2"], CLEAN, CORRUPT, METRIC)
    other = methods.attribution_patching(served["gpt2"], CLEAN, CORRUPT, METRIC, over={"layer": [0], "token": None})
    with pytest.raises(patchwire.InputError, match="not the same axes"):
        methods.agreement(one, other)


def test_the_same_prompt_may_be_given_in_other_forms(served: Any) -> None:
    one = methods.attribution_patching(served["gpt2"], torch.tensor([CLEAN]), CORRUPT, METRIC)
    other = methods.activation_patching(served["gpt2"], CLEAN, CORRUPT, METRIC)
    assert methods.agreement(one, other).cells == one.values.numel()


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"metric": methods.Probability(ANSWER)}, "metrics"),
        ({"direction": "noising"}, "directions"),
        ({"at": "mlp"}, "sites"),
        ({"clean": CORRUPT, "corrupt": CLEAN}, "clean prompts"),
        ({"model": "llama"}, "models"),
    ],
)
def test_results_of_other_experiments_do_not_agree_or_disagree(served: Any, more: dict[str, Any], what: str) -> None:
    usual = {"model": "gpt2", "clean": CLEAN, "corrupt": CORRUPT, "metric": METRIC, "over": {"layer": [0, 1]}}
    one, other = (
        function(served[given["model"]], **{name: each for name, each in given.items() if name != "model"})
        for function, given in (
            (methods.attribution_patching, usual),
            (methods.activation_patching, usual | more),
        )
    )
    with pytest.raises(patchwire.InputError, match=f"different {what}"):
        methods.agreement(one, other)
