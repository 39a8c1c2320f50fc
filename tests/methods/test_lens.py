"""Lenses: other places than the residual stream, the answer's way up, and translators that are trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

import patchwire
from patchwire import methods
from patchwire.errors import InputError, PatchwireError, ShapeError
from patchwire_worker.zoo import corpus

PROMPT, ANSWER = [3, 14, 15, 9, 26], 7
TEXTS = [[3, 14, 15], [9, 26, 5, 35, 8], [9, 7, 9, 3], [2, 38, 4, 6, 26, 4]]
NAMES = ["gpt2", "llama", "mamba"]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def parts(model: Any) -> tuple[list[Any], nn.Module]:
    base = model.base_model
    layers = list(base.h if hasattr(base, "h") else base.layers)
    return layers, next(getattr(base, each) for each in ("ln_f", "norm", "norm_f") if hasattr(base, each))


def seen(model: Any, ids: Any, modules: list[nn.Module]) -> tuple[list[Tensor], Tensor]:
    """What modules give, and the logits."""
    found: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found[module] = (output[0] if isinstance(output, tuple) else output).clone()

    handles = [each.register_forward_hook(keep) for each in modules]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return [found[each] for each in modules], logits


def divergence(final: Tensor, lens: Tensor) -> Tensor:
    return functional.kl_div(lens.log_softmax(-1), final.log_softmax(-1), log_target=True, reduction="none").sum(-1)


@torch.no_grad()
def test_the_answer_and_the_divergence_are_those_of_plain_hooks(
    served: Mapping[str, patchwire.Model], references: Mapping[str, PreTrainedModel], name: str
) -> None:
    reference = references[name]
    layers, norm = parts(reference)
    found = methods.logit_lens(served[name], PROMPT, answer=ANSWER)
    states, logits = seen(reference, PROMPT, layers)
    assert found.answer is not None
    assert found.rank is not None
    lenses = [reference.lm_head(norm(state))[0] for state in states[:-1]]
    for row, lens in enumerate([*lenses, logits], start=1):
        torch.testing.assert_close(found.answer.values[row], lens.softmax(-1)[:, ANSWER], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.divergence.values[row], divergence(logits, lens), rtol=1e-3, atol=1e-6)
        ranks = (lens > lens[:, ANSWER, None]).sum(-1).float()
        assert torch.equal(found.rank.values[row], ranks)
    assert float(found.divergence.values[-1].abs().max()) < 1e-6, "the last row is the model"
    torch.testing.assert_close(found.likeliest.values, found.probabilities[:, :, 0])
    assert found.answer.plot() is not None


@torch.no_grad()
@pytest.mark.parametrize("place", ["mixer", "mlp"])
def test_what_a_module_adds_is_read_in_the_same_way(
    served: Mapping[str, patchwire.Model], references: Mapping[str, PreTrainedModel], name: str, place: str
) -> None:
    if (name, place) == ("mamba", "mlp"):
        pytest.skip("a Mamba has no MLPs")
    reference = references[name]
    layers, norm = parts(reference)
    names = {"mlp": ("mlp",), "mixer": ("self_attn", "attn", "mixer")}[place]
    modules = [next(getattr(layer, each) for each in names if hasattr(layer, each)) for layer in layers]
    found = methods.logit_lens(served[name], PROMPT, at=place, top=4)
    assert found.layers == tuple(map(str, range(len(layers))))
    for row, state in enumerate(seen(reference, PROMPT, modules)[0]):
        expected = reference.lm_head(norm(state))[0].softmax(-1).topk(4)
        torch.testing.assert_close(found.probabilities[row], expected.values, rtol=1e-4, atol=1e-6)
        assert torch.equal(found.ids[row], expected.indices)


def test_what_is_not_as_wide_is_refused(served: Mapping[str, patchwire.Model]) -> None:
    with pytest.raises(ShapeError):
        methods.logit_lens(served["gpt2"], PROMPT, at="mlp.neurons")


@pytest.mark.parametrize(("epochs", "decay", "seed"), [(1, False, None), (2, True, 5)], ids=["plain", "as theirs"])
def test_translators_learn_by_the_gradient_of_the_divergence(
    served: Mapping[str, patchwire.Model],
    references: Mapping[str, PreTrainedModel],
    name: str,
    epochs: int,
    decay: bool,
    seed: int | None,
) -> None:
    """Two steps of Adam in each epoch, on the server and with autograd."""
    reference = references[name]
    layers, norm = parts(reference)
    width = reference.get_input_embeddings().weight.shape[1]
    options = {"epochs": epochs, "decay": decay, "seed": seed}
    found = methods.tuned_lens(served[name], TEXTS, batch_size=2, lr=0.01, **options)  # type: ignore[arg-type]
    assert found.losses is not None

    maps = [torch.zeros(width, width, requires_grad=True) for _ in layers]
    biases = [torch.zeros(width, requires_grad=True) for _ in layers]
    optimizer = torch.optim.Adam([*maps, *biases], lr=0.01)
    steps = 2 * epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps if decay else 1.0)
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    orders = [torch.randperm(len(TEXTS), generator=generator) for _ in range(epochs)]
    texts = TEXTS if seed is None else [TEXTS[index] for order in orders for index in order.tolist()]
    assert seed is None or len({tuple(order.tolist()) for order in orders} | {tuple(range(len(TEXTS)))}) == 3
    for step in range(steps):
        far: list[list[Tensor]] = [[] for _ in layers]
        for ids in texts[2 * step : 2 * step + 2]:
            states, logits = seen(reference, ids, [layers[0], *layers[:-1]])
            with torch.no_grad():
                before: list[Tensor] = []
                handle = layers[0].register_forward_pre_hook(
                    lambda m, args, before=before: before.append(args[0].clone())
                )
                reference(torch.tensor([ids]), use_cache=False)
                handle.remove()
            states[0] = before[0]
            for row, state in enumerate(states):
                lens = reference.lm_head(norm(state + state @ maps[row].T + biases[row]))[0]
                far[row].append(divergence(logits, lens))
        losses = torch.stack([torch.cat(each).mean() for each in far])
        torch.testing.assert_close(found.losses.values[step], losses.detach(), rtol=1e-3, atol=1e-6)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        schedule.step()
    # Adam divides by the size of a gradient: where that is next to nothing, rounding decides its sign.
    torch.testing.assert_close(found.biases, torch.stack(biases).detach(), rtol=1e-2, atol=1e-3)


def test_a_lens_is_written_to_a_file_and_is_of_one_model(served: Mapping[str, patchwire.Model], tmp_path: Path) -> None:
    model = served["gpt2"]
    lens = methods.tuned_lens(model, TEXTS, lr=0.05)
    again = methods.TunedLens.load(lens.save(tmp_path / "lens.safetensors"))
    one, other = lens(model, PROMPT, answer=ANSWER), again(model, PROMPT, answer=ANSWER)
    assert torch.equal(one.probabilities, other.probabilities)
    assert again.origin == lens.origin
    plain = methods.logit_lens(model, PROMPT)
    torch.testing.assert_close(one.probabilities[-1], plain.probabilities[-1])
    assert not torch.allclose(one.probabilities[1], plain.probabilities[1])
    with pytest.raises(InputError, match="and not of llama"):
        lens(served["llama"], PROMPT)
    (tmp_path / "other").write_bytes(b"\x00" * 64)
    with pytest.raises(PatchwireError, match="no tuned lens"):
        methods.TunedLens.load(tmp_path / "other")
    with pytest.raises(InputError, match="list of texts"):
        methods.tuned_lens(model, "one text")


@pytest.mark.parametrize("zoo", ["facts-gpt2", "facts-mamba"])
def test_on_text_that_it_was_not_trained_on_it_is_nearer_to_the_model(zoo: str) -> None:
    model: Any = patchwire.local(f"zoo:{zoo}", progress=False)
    texts = [fact.prompt().text for fact in corpus.facts()]
    lens = methods.tuned_lens(model, texts[:400], batch_size=16, epochs=4, lr=3e-3)
    both = {"tuned": lens, "logit": methods.logit_lens}
    far = {
        kind: torch.stack([read(model, text).divergence.values.mean(1) for text in texts[-24:]]).mean(0)
        for kind, read in both.items()
    }
    print(zoo, {kind: [round(value, 3) for value in each.tolist()] for kind, each in far.items()})
    assert (far["tuned"] <= far["logit"] + 1e-6).all()
    assert (far["tuned"][:-1] < 0.8 * far["logit"][:-1]).all()
