"""Mediation: the numbers of plain hooks, and what is built to add does it where it was built to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import patchwire
from patchwire import methods
from patchwire.errors import InputError

QUESTION, OTHER = [3, 14, 15, 9, 26], [3, 33, 15, 44, 26]
RESULTS = 7, 21
NAMES = ["gpt2", "llama", "mamba"]
PLACES = ["mlp", "mixer"]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def components(model: Any, at: str) -> list[Any]:
    base = model.base_model
    layers = list(base.h if hasattr(base, "h") else base.layers)
    if at == "embed":
        return [base.drop if hasattr(base, "drop") else model.get_input_embeddings()]
    names = {"mlp": ("mlp",), "mixer": ("self_attn", "attn", "mixer")}[at]
    return [next(getattr(layer, each) for each in names if hasattr(layer, each)) for layer in layers]


def run(model: Any, ids: list[int], module: Any = None, change: Any = None) -> Tensor:
    """The probabilities of both results, with a component changed."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        first = change((output[0] if isinstance(output, tuple) else output).clone())
        return (first, *output[1:]) if isinstance(output, tuple) else first

    handle = module.register_forward_hook(hook) if module is not None else None
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    if handle is not None:
        handle.remove()
    return logits.softmax(-1)[list(RESULTS)].double()


@pytest.mark.parametrize("at", ["mixer", "mlp", "embed"])
def test_effects_are_those_of_plain_hooks(
    served: Mapping[str, patchwire.Model], references: Mapping[str, PreTrainedModel], name: str, at: str
) -> None:
    if (name, at) == ("mamba", "mlp"):
        pytest.skip("a Mamba has no MLPs")
    reference = references[name]
    found = methods.mediation(served[name], QUESTION, OTHER, *RESULTS, at=at)
    p = run(reference, QUESTION)
    expected = []
    for module in components(reference, at):
        states: list[Tensor] = []
        run(reference, OTHER, module, lambda value, states=states: states.append(value) or value)
        for token in range(len(QUESTION)):

            def patch(value: Tensor, token: int = token, state: Tensor = states[0]) -> Tensor:
                value[:, token] = state[:, token]
                return value

            after = run(reference, QUESTION, module, patch)
            fewer, more = (p[0] - after[0]) / after[0], (after[1] - p[1]) / p[1]
            expected.append(float(fewer + more) / 2)
    torch.testing.assert_close(found.values.flatten(), torch.tensor(expected), rtol=1e-3, atol=1e-6)
    assert found.numbers["result"] == pytest.approx(float(p[0]), rel=1e-4)
    assert found.numbers["other_result_after_other"] == pytest.approx(float(run(reference, OTHER)[1]), rel=1e-4)
    assert found.axes[1].marked == (1, 3), "the tokens that differ"


def test_importance_is_the_share_of_the_logarithms(served: Mapping[str, patchwire.Model]) -> None:
    model = served["gpt2"]
    pairs = [(QUESTION, OTHER), (OTHER, QUESTION)]
    effects = {
        at: methods.stacked([methods.mediation(model, *pair, *RESULTS, at=at) for pair in pairs]) for at in PLACES
    }
    logs = {at: torch.log(each.values.mean(0) + 1) for at, each in effects.items()}
    whole = sum(float(each.sum()) for each in logs.values())
    share = methods.relative_importance(effects, "mlp", layers=[-1], tokens=[-1, 0])
    assert share == pytest.approx(float(logs["mlp"][-1, [-1, 0]].sum()) / whole, rel=1e-4)
    assert methods.relative_importance(effects, "mlp") + methods.relative_importance(effects, "mixer") == pytest.approx(
        1
    )
    with pytest.raises(InputError, match="no “ssm”"):
        methods.relative_importance(effects, "ssm")
    with pytest.raises(InputError, match="between 0 and"):
        methods.relative_importance(effects, "mlp", tokens=[5])


# --- a model that adds ------------------------------------------------------------------------------------------------

MODULUS = 23
EQUALS = MODULUS


def adder(seed: int = 0) -> GPT2LMHeadModel:
    """A GPT-2 trained on `a b =`, whose first layer only moves tokens, and whose second only has an MLP that matters.

    The MLP of the first layer and the attention of the second are zero, and stay so.
    """
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=MODULUS + 1, n_positions=16, n_embd=64, n_layer=2, n_head=2, n_inner=512, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    frozen = [*model.transformer.h[0].mlp.c_proj.parameters(), *model.transformer.h[1].attn.c_proj.parameters()]
    for parameter in frozen:
        parameter.data.zero_()
        parameter.requires_grad_(False)
    questions = torch.tensor([[a, b, EQUALS] for a in range(MODULUS) for b in range(MODULUS)])
    results = (questions[:, 0] + questions[:, 1]) % MODULUS
    optimizer = torch.optim.AdamW(
        [each for each in model.parameters() if each.requires_grad], lr=2e-3, weight_decay=0.0
    )
    for _ in range(2000):
        loss = torch.nn.functional.cross_entropy(model(questions).logits[:, -1], results)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    assert loss.item() < 0.05
    return model.eval().requires_grad_(False)


@pytest.mark.slow
def test_what_adds_is_found_where_it_was_built() -> None:
    model = patchwire.local(adder(), progress=False)
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = torch.randint(MODULUS, (4, 12), generator=generator).tolist()
    different = [([w, x, EQUALS], [y, z, EQUALS]) for w, x, y, z in zip(a, b, c, d, strict=True)
                 if (w + x - y - z) % MODULUS]  # fmt: skip
    same = [([w, x, EQUALS], [y, (w + x - y) % MODULUS, EQUALS]) for w, x, y in zip(a, b, c, strict=True) if w != y]
    found, importance = {}, {}
    for kind, pairs in (("different", different), ("same", same)):
        effects = {
            at: methods.stacked([methods.mediation(model, *pair, at=at) for pair in pairs]) for at in (*PLACES, "embed")
        }
        found[kind] = effects["mlp"].mean("prompt").values
        importance[kind] = methods.relative_importance(effects, "mlp", tokens=[-1])
        print(f"{kind} results: {importance[kind]:.3f} of all effects are those of the MLP at the last token")
    mlp = found["different"]
    assert float(mlp[1, -1]) >= 10 * float(mlp[:, :-1].abs().max()), "no MLP at an operand matters"
    assert float(mlp[1, -1]) >= 5 * float(found["same"][1, -1].abs()), "it has the result, and not the operands"
    assert importance["different"] >= 5 * importance["same"]
