"""Parameters in words of the vocabulary: what a weight says to which token, without a run of the model.

Dar, Geva, Gupta and Berant (2023), "Analyzing Transformers in Embedding Space", section 3. With E the unembedding
`[d_model, vocabulary]`, which has a token's number for every vector, and E' `[vocabulary, d_model]` a vector for every
token, an attention head says `E' W_V W_O E` (which token it makes of which), and looks where `E' W_Q W_Kᵀ E'ᵀ` says; of
an MLP, keys are `K E'ᵀ` and values `V E`. Norms, biases, positions and activations are left out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from patchwire.errors import InputError, here
from patchwire.methods.neurons import layer_of
from patchwire.methods.prompts import words_of
from patchwire.methods.result import Axis, Origin, Result
from patchwire.methods.vocabulary import TopTokens, check_top, project, project_pairs
from patchwire.model import Model, Module
from patchwire.results import Stats


@dataclass(frozen=True)
class Vectors:
    """Rows of a parameter that are vectors of the residual stream."""

    rows: Callable[[Module], Any]
    """Of a layer, `[vectors, d_model]`."""
    writes: bool
    """Whether they are added to the residual stream, and projected by E, or compared with it, and projected by E'ᵀ."""


@dataclass(frozen=True)
class Interaction:
    """Two factors of a matrix `[d_model, d_model]` that is between tokens."""

    left: Callable[[Module, int], Any]
    """Of a layer and a head, `[d_model, inner]`: reads the residual stream."""
    right: Callable[[Module, int], Any]
    """`[inner, d_model]`."""
    writes: bool
    """Whether what comes out is added to the residual stream, or compared with that of another token."""
    by_head: bool = False
    """Whether each head of a layer has its own."""


def _shared(head: int, heads: int, shared: int) -> int:
    """The key and value head of a head."""
    return head * shared // heads


PARAMETERS: Mapping[str, Vectors | Interaction] = {
    "ov": Interaction(
        lambda layer, head: layer.attn.W_V[_shared(head, layer.attn.W_O.shape[0], layer.attn.W_V.shape[0])],
        lambda layer, head: layer.attn.W_O[head],
        writes=True,
        by_head=True,
    ),
    "qk": Interaction(
        lambda layer, head: layer.attn.W_Q[head],
        lambda layer, head: layer.attn.W_K[_shared(head, layer.attn.W_Q.shape[0], layer.attn.W_K.shape[0])].T,
        writes=False,
        by_head=True,
    ),
    "mlp_in": Vectors(lambda layer: layer.mlp.W_in.T, writes=False),
    "mlp_gate": Vectors(lambda layer: layer.mlp.W_gate.T, writes=False),
    "mlp_out": Vectors(lambda layer: layer.mlp.W_out, writes=True),
    "ssm_in": Vectors(lambda layer: layer.ssm.W_in.T, writes=False),
    "ssm_gate": Vectors(lambda layer: layer.ssm.W_gate.T, writes=False),
    "ssm_x": Vectors(lambda layer: layer.ssm.x_proj.weight @ layer.ssm.W_in.T, writes=False),
    "ssm_out": Vectors(lambda layer: layer.ssm.W_out, writes=True),
    "ssm": Interaction(lambda layer, head: layer.ssm.W_in, lambda layer, head: layer.ssm.W_out, writes=True),
}
"""By name: a head's two circuits; the keys, gates and values of an MLP; those of an SSM's channels, `x_in`, `gate` and
what is added. "ssm_x" are the rows of a Mamba's `x_proj`, of the step size first, then of B and C, as if there were no
convolution and activation before it; "ssm" is what a channel makes of a token if it passes it on."""

Inputs = Literal["embedding", "transposed", "inverse"]


@dataclass(frozen=True, eq=False)
class TopPairs:
    """The pairs of tokens for which a parameter has the largest numbers."""

    scores: Result
    """`[pair]` float32, the largest first."""
    first: Tensor = field(repr=False)
    """`[pair]` int64: the token that is read; of "qk" the one that looks."""
    second: Tensor = field(repr=False)
    """`[pair]` int64: the token that is written; of "qk" the one that is looked at."""


def project_to_vocabulary(
    model: Model,
    layer: int,
    parameter: str | Vectors | Interaction,
    *,
    head: int | None = None,
    top: int = 50,
    inputs: Inputs = "embedding",
) -> TopPairs | TopTokens:
    """Read a parameter as numbers between tokens, or of tokens (Dar et al. 2023, section 3).

    The model does not run. The server goes through the tokens block by block and keeps the `top` largest numbers: no
    matrix of the vocabulary times itself, or times the neurons, is ever there.

    Args:
        model: Any model that has the parameter, an embedding and an unembedding.
        layer: Which layer's.
        parameter: One of `patchwire.methods.PARAMETERS`, or any other: `Vectors` or an `Interaction`.
        head: Which head, of a parameter that each has.
        top: How many pairs, or how many tokens of each vector.
        inputs: What E' is: the token embeddings (the paper's Eᵀ, if they are tied to the unembedding), Eᵀ whether they
            are or not, or the right inverse of E.

    Returns:
        `TopPairs` of an interaction; `TopTokens` `[vector, token]` of vectors.

    Raises:
        InputError: there is no such parameter, layer or head, or not so many tokens.
        SiteError: the model does not have it.

    Example:
        >>> pairs = methods.project_to_vocabulary(model, 5, "ov", head=1)
        >>> pairs.scores.axes[0].labels[:3]
        >>> methods.project_to_vocabulary(model, 5, "mlp_out", top=10).at(17)
    """
    layer, _ = layer_of(model, layer)
    found = _parameter(parameter)
    head = _head(model, layer, found, head)
    if inputs not in ("embedding", "transposed", "inverse"):
        raise InputError(f"E' is “embedding”, “transposed” or “inverse”, not {inputs!r}.", lines=here())
    with model.session() as session:
        with model.trace([[0]]):  # weights are read in a trace; nothing runs for them
            module = model.layers[layer]
            unembedding = model.W_U
            # E' is `tokens @ correct`.
            tokens = model.W_E if inputs == "embedding" else unembedding.T
            full = unembedding.float()
            correct = torch.linalg.pinv(full @ full.T) if inputs == "inverse" else None
            if isinstance(found, Vectors):
                rows = found.rows(module)
                rows = rows if found.writes or correct is None else rows.float() @ correct
            else:
                left, right = found.left(module, head), found.right(module, head)
                if correct is not None:
                    left = correct @ left.float()
                    right = right if found.writes else right.float() @ correct
        columns = unembedding if found.writes else tokens.T
        wanted: Any = (
            project(session, rows, columns, top)
            if isinstance(found, Vectors)
            else project_pairs(session, tokens, left, right, columns, top)
        )
    scores, first, second = wanted.tensors()
    name = parameter if isinstance(parameter, str) else type(parameter).__name__
    origin = Origin.of("project_to_vocabulary", model, layer=layer, parameter=name, head=head, top=top, inputs=inputs)
    stats = session.stats or Stats()
    if isinstance(found, Vectors):
        axes = Axis("vector", tuple(map(str, range(len(scores))))), Axis("token", tuple(map(str, range(top))))
        return TopTokens(Result(scores, axes, "logit", origin, signed=True, stats=stats), first, model)
    words = [words_of(model, each.tolist()) for each in (first, second)]
    labels = tuple(f"{one} → {other}" for one, other in zip(*words, strict=True))
    return TopPairs(Result(scores, (Axis("pair", labels),), "score", origin, signed=True, stats=stats), first, second)


def keep_k(values: Any, k: int) -> Any:
    """The `k` largest numbers along the last dimension, and 0 in the place of the others: a vector that says as few
    tokens, `keep_k(x @ E, k)` (Dar et al. 2023, section 4).

    Args:
        values: A tensor, or in a block a value, `[…, vocabulary]`.
        k: How many.

    Raises:
        InputError: there are not so many.
    """
    check_top(k, values.shape[-1], "numbers")
    largest, places = values.topk(k)
    return torch.zeros_like(values).scatter(-1, places, largest)


def recall_at_k(found: TopTokens | TopPairs, wanted: TopTokens | TopPairs, k: int | None = None) -> Result:
    """How many of the first `k` tokens of one list are among the first `k` of another: R@k, as a share of `k`.

    It is the same in both directions. Of lists of the same vectors in two bases, for example with another E', it says
    how much of the meaning is lost. The intersection over the union is `r / (2 - r)`.

    Args:
        found: Tokens of vectors, or pairs of tokens.
        wanted: The same of as many others; of a model with the same vocabulary.
        k: How many; all that both have, if left out.

    Returns:
        The axes of `found` without the tokens, float32, from 0 to 1.

    Raises:
        InputError: these are not lists of as many vectors, or not so long.

    Example:
        >>> one, other = (methods.project_to_vocabulary(model, 5, "mlp_in", inputs=each, top=100)
        ...               for each in ("embedding", "inverse"))
        >>> methods.recall_at_k(other, one, 10).values.mean()
    """
    first, second = _listed(found), _listed(wanted)
    if first.shape[:-1] != second.shape[:-1]:
        sizes = " and ".join(str(list(each.shape[:-1])) for each in (first, second))
        raise InputError(f"Lists of {sizes} vectors have no pairs.", lines=here())
    length = min(first.shape[-1], second.shape[-1])
    k = length if k is None else k
    check_top(k, length, "tokens in both lists")
    there = (first[..., :k, None] == second[..., None, :k]).any(-2)
    return replace(
        found.scores,
        values=there.float().mean(-1),
        axes=found.scores.axes[:-1],
        unit=f"R@{k}",
        numbers={},
        signed=False,
    )


def _listed(found: TopTokens | TopPairs) -> Tensor:
    """A number for each token or pair of tokens."""
    return found.ids if isinstance(found, TopTokens) else (found.first << 32) + found.second


def _parameter(parameter: str | Vectors | Interaction) -> Vectors | Interaction:
    if not isinstance(parameter, str):
        return parameter
    if parameter not in PARAMETERS:
        raise InputError(f"There is no parameter “{parameter}”; there are {', '.join(PARAMETERS)}.", lines=here())
    return PARAMETERS[parameter]


def _head(model: Model, layer: int, parameter: Vectors | Interaction, head: int | None) -> int:
    """The head whose parameter is meant; 0 of one that is not of heads.

    Raises:
        InputError: there is no such head, or none is said where there are several.
    """
    if isinstance(parameter, Vectors) or not parameter.by_head:
        if head is not None:
            raise InputError("This parameter is not of heads.", hint="Leave `head` out.", lines=here())
        return 0
    count = model.layers[layer].attn.W_O.shape[0]
    if head is None or not 0 <= head < count:
        raise InputError(f"The layer has heads 0 to {count - 1}: `head` is one of them, not {head}.", lines=here())
    return head
