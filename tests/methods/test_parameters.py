"""Parameters in words of the vocabulary: products of the model's own weights here, and a planted permutation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import patchwire
import tiny
from patchwire import methods
from patchwire.methods import vocabulary
from serving import Server

LAYER = 1
HEADS, WIDTH = 4, tiny.WIDTH
INPUTS = ["embedding", "transposed", "inverse"]


@pytest.fixture(params=[vocabulary.BLOCK, 200], ids=["one-block", "blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block, or in many whose size does not divide the whole."""
    monkeypatch.setattr(vocabulary, "BLOCK", request.param)


def head_of(weight: Tensor, head: int, heads: int = HEADS) -> Tensor:
    """A head's part of a weight `[d_model, heads * d_head]`."""
    return weight.unflatten(1, (heads, -1))[:, head]


def factors(name: str, model: PreTrainedModel, parameter: str, head: int) -> list[Tensor]:
    """The matrices of which an interaction is the product."""
    base = model.base_model
    layer = (base.h if name == "gpt2" else base.layers)[LAYER]
    if name == "gpt2":
        q, k, v = layer.attn.c_attn.weight.split(WIDTH, 1)
        o = layer.attn.c_proj.weight
        shared, groups = head, HEADS
    elif name == "llama":
        q, k, v = (getattr(layer.self_attn, f"{each}_proj").weight.T for each in "qkv")
        o = layer.self_attn.o_proj.weight.T
        shared, groups = head // 2, HEADS // 2
    else:
        inner = layer.mixer.intermediate_size
        return [layer.mixer.in_proj.weight[:inner].T, layer.mixer.out_proj.weight.T]
    if parameter == "qk":
        return [head_of(q, head), head_of(k, shared, groups).T]
    return [head_of(v, shared, groups), head_of(o.T, head).T]


def vectors(name: str, model: PreTrainedModel, parameter: str) -> Tensor:
    base = model.base_model
    layer = (base.h if name == "gpt2" else base.layers)[LAYER]
    if name == "gpt2":
        return {"mlp_in": layer.mlp.c_fc.weight.T, "mlp_out": layer.mlp.c_proj.weight}[parameter]
    if name == "llama":
        mlp = layer.mlp
        return {
            "mlp_in": mlp.up_proj.weight, "mlp_gate": mlp.gate_proj.weight, "mlp_out": mlp.down_proj.weight.T
        }[parameter]  # fmt: skip
    mixer, inner = layer.mixer, layer.mixer.intermediate_size
    return {
        "ssm_in": mixer.in_proj.weight[:inner],
        "ssm_gate": mixer.in_proj.weight[inner:],
        "ssm_x": mixer.x_proj.weight @ mixer.in_proj.weight[:inner],
        "ssm_out": mixer.out_proj.weight.T,
    }[parameter]


def embeddings(model: PreTrainedModel, inputs: str) -> tuple[Tensor, Tensor]:
    """E' `[vocabulary, d_model]` and E."""
    out = model.get_output_embeddings().weight.T
    tokens = {
        "embedding": lambda: model.get_input_embeddings().weight,
        "transposed": lambda: out.T,
        "inverse": lambda: torch.linalg.pinv(out),
    }
    return tokens[inputs](), out


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(
    ("name", "parameter", "head"),
    [("gpt2", "ov", 2), ("gpt2", "qk", 3), ("llama", "ov", 2), ("llama", "qk", 3), ("mamba", "ssm", None)],
)
def test_pairs_are_the_largest_of_the_whole_matrix(
    served: Mapping[str, patchwire.Model],
    references: Mapping[str, PreTrainedModel],
    name: str,
    parameter: str,
    head: int | None,
    inputs: Any,
) -> None:
    found = methods.project_to_vocabulary(served[name], LAYER, parameter, head=head, top=30, inputs=inputs)

    assert isinstance(found, methods.TopPairs)
    tokens, out = embeddings(references[name], inputs)
    left, right = factors(name, references[name], parameter, head or 0)
    whole = tokens @ left @ right @ (tokens.T if parameter == "qk" else out)
    expected = whole.flatten().topk(30)[0]
    scale = float(whole.abs().max())
    torch.testing.assert_close(found.scores.values, expected, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(whole[found.first, found.second], expected, rtol=1e-4, atol=1e-5 * scale)
    assert len(set(zip(found.first.tolist(), found.second.tolist(), strict=True))) == 30
    assert found.scores.axes[0].labels[0] == f"#{int(found.first[0])} → #{int(found.second[0])}"
    assert found.scores.stats.passes == 0


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("gpt2", "mlp_in"),
        ("gpt2", "mlp_out"),
        *[("llama", f"mlp_{each}") for each in ("in", "gate", "out")],
        *[("mamba", f"ssm_{each}") for each in ("in", "gate", "x", "out")],
    ],
)
def test_vectors_are_projected_row_by_row(
    served: Mapping[str, patchwire.Model],
    references: Mapping[str, PreTrainedModel],
    name: str,
    parameter: str,
    inputs: Any,
) -> None:
    found = methods.project_to_vocabulary(served[name], LAYER, parameter, top=5, inputs=inputs)

    assert isinstance(found, methods.TopTokens)
    tokens, out = embeddings(references[name], inputs)
    whole = vectors(name, references[name], parameter) @ (out if parameter.endswith("out") else tokens.T)
    scale = float(whole.abs().max())
    torch.testing.assert_close(found.scores.values, whole.topk(5)[0], rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(whole.gather(1, found.ids), found.scores.values, rtol=1e-4, atol=1e-5 * scale)


def test_a_parameter_of_ones_own_is_projected_too(
    served: Mapping[str, patchwire.Model], references: Mapping[str, PreTrainedModel]
) -> None:
    weight = methods.Vectors(lambda layer: layer.attn.W_O[1], writes=True)
    found = methods.project_to_vocabulary(served["gpt2"], LAYER, weight, top=3)

    assert isinstance(found, methods.TopTokens)
    reference = references["gpt2"]
    _, right = factors("gpt2", reference, "ov", 1)
    torch.testing.assert_close(
        found.scores.values, (right @ embeddings(reference, "embedding")[1]).topk(3)[0], rtol=1e-4, atol=1e-5
    )


# --- a planted permutation ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[patchwire.Model, Tensor]]:
    """A GPT-2 of one head, whose tokens are unit vectors, and whose OV circuit makes each token another: which."""
    directory: Path = tmp_path_factory.mktemp("planted")
    model = tiny.build("gpt2")
    config = model.config
    config.n_head, config.n_embd, config.n_layer = 1, tiny.VOCABULARY + 3, 2
    model = type(model)(config)
    order = torch.randperm(tiny.VOCABULARY, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        width = config.n_embd
        model.transformer.wte.weight.copy_(torch.eye(tiny.VOCABULARY, width))
        turned = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(6)))[0]
        permutation = torch.zeros(width, width)
        permutation[torch.arange(tiny.VOCABULARY), order] = 1.0 + torch.arange(tiny.VOCABULARY) / 100
        attention = model.transformer.h[LAYER].attn
        attention.c_attn.weight[:, 2 * width :] = turned
        attention.c_proj.weight.copy_(turned.T @ permutation)
    model.save_pretrained(directory)
    with Server({"planted": directory}) as server, patchwire.connect(server.address, progress=False) as client:
        yield client.model("planted"), order


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("inputs", INPUTS)
def test_an_ov_circuit_says_the_permutation_that_was_planted(
    planted: tuple[patchwire.Model, Tensor], inputs: Any
) -> None:
    model, order = planted
    found = methods.project_to_vocabulary(model, LAYER, "ov", head=0, top=tiny.VOCABULARY, inputs=inputs)

    assert isinstance(found, methods.TopPairs)
    # The last token's number is the largest.
    assert found.first.tolist() == list(range(tiny.VOCABULARY))[::-1]
    assert found.second.tolist() == order.flip(0).tolist()


def test_an_edit_is_projected_as_it_stands(planted: tuple[patchwire.Model, Tensor]) -> None:
    model, _ = planted
    with model.edit() as edited:
        edited.layers[LAYER].attn.W_O[:] = 0
    found = methods.project_to_vocabulary(edited, LAYER, "ov", head=0, top=3)

    assert isinstance(found, methods.TopPairs)
    assert found.scores.values.tolist() == [0, 0, 0]


# --- how much two lists have in common ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameter"), [("gpt2", "mlp_in"), ("llama", "mlp_gate"), ("mamba", "ssm_in")])
def test_recall_counts_the_tokens_that_are_in_both_lists(
    served: Mapping[str, patchwire.Model], name: str, parameter: str
) -> None:
    one, other = (
        methods.project_to_vocabulary(served[name], LAYER, parameter, top=9, inputs=inputs)  # type: ignore[arg-type]
        for inputs in ("embedding", "inverse")
    )
    assert isinstance(one, methods.TopTokens)
    assert isinstance(other, methods.TopTokens)
    found = methods.recall_at_k(one, other, 5)

    pairs = zip(one.ids[:, :5].tolist(), other.ids[:, :5].tolist(), strict=True)
    assert found.values.tolist() == pytest.approx([len({*mine} & {*its}) / 5 for mine, its in pairs])
    assert found.unit == "R@5"
    assert found.axes == one.scores.axes[:1]
    assert torch.equal(methods.recall_at_k(other, one, 5).values, found.values)
    assert methods.recall_at_k(one, one).values.tolist() == [1.0] * len(one.ids)


def test_recall_of_pairs_is_of_both_of_their_tokens(served: Mapping[str, patchwire.Model]) -> None:
    one, other = (methods.project_to_vocabulary(served["gpt2"], LAYER, "ov", head=head, top=2000) for head in (0, 1))
    assert isinstance(one, methods.TopPairs)
    assert isinstance(other, methods.TopPairs)

    mine, its = ({*zip(each.first.tolist(), each.second.tolist(), strict=True)} for each in (one, other))
    assert float(methods.recall_at_k(one, other).values) == pytest.approx(len(mine & its) / 2000)


def test_recall_is_of_lists_that_belong_together(served: Mapping[str, patchwire.Model]) -> None:
    tokens = methods.project_to_vocabulary(served["gpt2"], LAYER, "mlp_in", top=3)
    pairs = methods.project_to_vocabulary(served["gpt2"], LAYER, "ov", head=0, top=3)
    with pytest.raises(patchwire.InputError, match="have no pairs"):
        methods.recall_at_k(tokens, pairs)
    with pytest.raises(patchwire.InputError, match="There are 3 tokens in both lists"):
        methods.recall_at_k(tokens, tokens, 4)


def test_what_is_kept_of_a_vector_is_its_largest_numbers(
    served: Mapping[str, patchwire.Model], references: Mapping[str, PreTrainedModel]
) -> None:
    model = served["gpt2"]
    with model.trace([[5, 6, 7]]):
        kept = methods.keep_k(model.layers[LAYER].output[0, -1] @ model.W_U, 4).save()

    hidden = references["gpt2"](torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states[LAYER + 1][0, -1]
    expected = (hidden @ references["gpt2"].get_output_embeddings().weight.T).detach()
    torch.testing.assert_close(kept.value, expected.where(expected >= expected.sort()[0][-4], 0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(methods.keep_k(expected, 4), kept.value, rtol=1e-4, atol=1e-5)
    with pytest.raises(patchwire.InputError, match="There are 61 numbers"):
        methods.keep_k(expected, 62)


# --- how much is there at once --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(checkpoints: dict[str, str]) -> Iterator[patchwire.Model]:
    """A server on which no value may have as many bytes as the vocabulary times itself, or times the neurons."""
    limits = {"value_bytes": 12_000}
    with (
        Server({"gpt2": checkpoints["gpt2"]}, limits=limits) as server,
        patchwire.connect(server.address, progress=False) as client,
    ):
        yield client.model("gpt2")


def test_no_matrix_of_the_vocabulary_is_ever_made(strict: patchwire.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "BLOCK", 1000)
    with pytest.raises(patchwire.LimitError), strict.trace([[0]]):
        (strict.layers[LAYER].mlp.W_out @ strict.W_U).save()
    with pytest.raises(patchwire.LimitError), strict.trace([[0]]):
        (strict.W_E @ strict.W_U).save()

    for parameter, head in (("ov", 1), ("qk", 1), ("mlp_in", None), ("mlp_out", None)):
        for inputs in INPUTS:
            methods.project_to_vocabulary(strict, LAYER, parameter, head=head, top=5, inputs=inputs)  # type: ignore[arg-type]
    methods.value_projections(strict, LAYER, top=5)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameter", "options", "kind", "words"),
    [
        ("mamba", "ov", {"head": 0}, patchwire.SiteError, "attn"),
        ("mamba", "mlp_in", {}, patchwire.SiteError, "mlp"),
        ("gpt2", "ssm", {}, patchwire.SiteError, "ssm"),
        ("gpt2", "mlp_gate", {}, patchwire.SiteError, "W_gate"),
        ("mamba2", "ssm_x", {}, patchwire.SiteError, "x_proj"),
        ("gpt2", "vo", {}, patchwire.InputError, "There is no parameter “vo”"),
        ("gpt2", "ov", {}, patchwire.InputError, "has heads 0 to 3"),
        ("gpt2", "ov", {"head": 4}, patchwire.InputError, "has heads 0 to 3"),
        ("gpt2", "mlp_in", {"head": 1}, patchwire.InputError, "is not of heads"),
        ("gpt2", "mlp_in", {"top": 62}, patchwire.InputError, "There are 61 tokens"),
        ("gpt2", "ov", {"head": 0, "top": 0}, patchwire.InputError, "There are 3721 pairs"),
        ("gpt2", "mlp_in", {"inputs": "none"}, patchwire.InputError, "“embedding”, “transposed” or “inverse”"),
    ],
)
def test_what_is_not_there_is_refused(
    served: Mapping[str, patchwire.Model],
    name: str,
    parameter: str,
    options: dict[str, Any],
    kind: type[Exception],
    words: str,
) -> None:
    with pytest.raises(kind, match=words):
        methods.project_to_vocabulary(served[name], LAYER, parameter, **options)
