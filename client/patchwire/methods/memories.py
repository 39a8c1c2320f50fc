"""Feed-forward layers as key-value memories: what all memories of each layer do over a data set, in four shares.

Geva, Schuster, Berant and Levy (2021), "Transformer Feed-Forward Layers Are Key-Value Memories", sections 4 and 5. A
memory is a neuron: its key says when it is on, and its value, times the unembedding, which token comes next then. An
output is a sum of many of them, and often says what none of them says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from patchwire.errors import InputError, here
from patchwire.methods.measured import LAYER
from patchwire.methods.neurons import layer_of, neurons_of
from patchwire.methods.result import Axis, Origin, Result
from patchwire.methods.triggering import SECONDS, forget, new_prefixes, parts
from patchwire.methods.values import chance
from patchwire.methods.vocabulary import block_size
from patchwire.model import Model
from patchwire.results import Stats
from patchwire.session import Session

SHARES = ("agreement", "chance", "active", "differs")


def key_value_memories(
    model: Model,
    examples: Iterable[Any],
    *,
    layers: Sequence[int] | None = None,
    kind: str | None = None,
    batch_size: int = 16,
) -> Result:
    """What the memories of each layer do over a data set (Geva et al. 2021, sections 4.2 and 5.1).

    The model runs once over the data, for all layers. What a vector predicts is the first token of its product with the
    unembedding, with no norm in between. Two numbers for each neuron come back. Ctrl-C ends it after its batch.

    Args:
        model: Any model with the neurons and an unembedding: those of MLPs, or the channels of SSMs.
        examples: Texts, or lists of token ids: any iterable.
        layers: Which layers; all if left out.
        kind: "mlp" or "ssm"; "mlp" if left out, or "ssm" of a layer without an MLP.
        batch_size: How many texts a pass has.

    Returns:
        `[share, layer]` float32, from 0 to 1; `numbers["tokens"]` is how many tokens there were.

        - "agreement": of the neurons, how many predict by their value `v_i` the token that follows where their
          coefficient is largest. Those that are never active are left out, and those for which a text ends there; a
          prefix that several texts begin with counts once, as in the first of them.
        - "chance": the same if the values were those of any other neurons of the layer.
        - "active": how many neurons have a coefficient above 0, the mean over tokens.
        - "differs": at how many tokens the layer's output predicts what no memory does. A memory's prediction at a
          token is that of `m_i v_i`; the output is `Σ m_i v_i + b`.

    Raises:
        InputError: there are no examples or no such layer, or the neurons add nothing themselves.
        SiteError: a layer does not have them.

    Example:
        >>> shares = methods.key_value_memories(model, texts)
        >>> dict(zip(methods.SHARES, shares.at(layer=-1).values.tolist()))
    """
    if batch_size < 1:
        raise InputError("There is at least one text in a batch.", lines=here())
    places = []
    for each in range(model.num_layers) if layers is None else layers:
        index, module = layer_of(model, each)
        name, site = neurons_of(module, kind)
        if site.output is None:
            raise InputError(
                f"What a layer adds is no sum over “{name}”.",
                hint='Write `kind="ssm"`: the product of scan and gate.',
                lines=here(),
            )
        places.append((index, site, site.values(module).shape[0]))
    if not places:
        raise InputError("There are no layers.", lines=here())

    predictions: list[Any] = []
    state: list[Any] = [torch.tensor(0)]
    for *_, width in places:
        state += [torch.zeros(width), torch.full((width,), -1), torch.zeros(2, dtype=torch.long)]
    costs: list[Stats] = []
    met: dict[tuple[int, int], int] = {}
    count = 0
    for part in parts(model, examples, batch_size):
        count += len(part)
        # Texts of about one length share a batch: less is padded.
        order = sorted(range(len(part)), key=lambda index: len(part[index]))
        new = new_prefixes(part, met)[torch.tensor(order)]
        before = state
        with model.session() as session:
            if not predictions:
                with model.trace([[0]]):  # weights are read in a trace; nothing runs for them
                    values = [site.values(model.layers[index]) for index, site, _ in places]
                    unembedding = model.W_U
                predictions = [_predictions(session, each, unembedding).keep(seconds=SECONDS) for each in values]
            batches: Any = session.over([part[index] for index in order], batch_size=batch_size)
            with batches:
                tokens, *carried = [batches.carry(each) for each in state]
                with model.trace(batches.prompt) as trace:
                    mask: Any = trace.mask()
                    ids: Any = trace.token_ids()
                    following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], 1)
                    row = batches.index * batch_size + mask[:, -1].long().cumsum(0) - 1
                    position = (mask.long().cumsum(1) - 1).clamp(min=0)
                    counted = mask & torch.index_select(new, 0, row).gather(1, position)
                    batches.update(tokens, tokens + mask.sum())
                    for at, (index, site, _) in enumerate(places):
                        module = model.layers[index]
                        assert site.output is not None
                        seen = site.coefficients(module).float()
                        said = (site.output(module) @ model.W_U).argmax(-1)
                        mine = carried[3 * at : 3 * at + 3]
                        after = _next(mine, seen, said, predictions[at], mask, counted, following)
                        for each, then in zip(mine, after, strict=True):
                            batches.update(each, then)
            state = [batches.result(each).keep(seconds=SECONDS) for each in (tokens, *carried)]
        assert session.stats is not None
        costs.append(session.stats)
        forget(before)
        if batches.iterations < batches.count:  # Ctrl-C: what has been found is the result
            break
    if not count:
        raise InputError("There are no examples.", hint="Give texts, or lists of token ids.", lines=here())
    with model.trace([[0]]):
        all_tokens = state[0].save()
        saved = [
            (state[3 * at + 2].save(), state[3 * at + 3].save(), predictions[at][0].save()) for at in range(len(places))
        ]
    forget([*state, *predictions])

    total = int(all_tokens.value)
    columns = []
    for (_, _, width), (after, sums, first) in zip(places, saved, strict=True):
        there = after.value >= 0
        agree = (first.value == after.value)[there].float().mean()  # NaN of none
        active, differs = (sums.value / torch.tensor([total * width, total])).tolist()
        columns.append([float(agree), chance(first.value[there], after.value[there]), active, differs])
    return Result(
        values=torch.tensor(columns).T.contiguous(),
        axes=(Axis("share", SHARES), Axis(LAYER, tuple(str(index) for index, *_ in places))),
        unit="share",
        origin=Origin.of("key_value_memories", model, examples=count, layers=layers, kind=kind),
        numbers={"tokens": float(total)},
        stats=Stats.sum(costs),
    )


def _predictions(session: Session, values: Any, unembedding: Any) -> Any:
    """What each value vector predicts, and what its negative does, `[2, neurons]`."""
    count = values.shape[0]
    size = block_size(count, unembedding.shape[1])
    loop: Any = session.repeat(-(-count // size))
    with loop:
        found = loop.carry(torch.zeros(2, count, dtype=torch.long))
        index = (loop.index * size + torch.arange(size)).clamp(max=count - 1)
        logits = values[index].float() @ unembedding.float()
        loop.update(found, found.index_copy(1, index, torch.stack([logits.argmax(1), logits.argmin(1)])))
    return loop.result(found)


def _next(
    carried: Sequence[Any], seen: Any, said: Any, predictions: Any, mask: Any, counted: Any, following: Any
) -> list[Any]:
    """What has been found in a layer after another batch: the largest coefficient of each neuron, or 0, the token that
    follows there, and how often neurons were active and the output said what none says.

    Args:
        carried: The same before it.
        seen: The coefficients of the batch, `[rows, tokens, neurons]`.
        said: What the output predicts, `[rows, tokens]`.
        predictions: What the values and their negatives predict, `[2, neurons]`.
        mask: Which positions are tokens, `[rows, tokens]`.
        counted: Which of these end a prefix that has not been met, `[rows, tokens]`.
        following: The token after each, `[rows, tokens]`; -1 at the end of a text.
    """
    best, after, sums = carried
    largest, place = torch.where(counted[..., None], seen, -torch.inf).flatten(0, 1).max(0)
    is_new = largest > best
    positive, negative = said[..., None] == predictions[0], said[..., None] == predictions[1]
    alike = (positive & (seen > 0)) | (negative & (seen < 0))
    active = (mask[..., None] & (seen > 0)).sum()
    return [
        torch.where(is_new, largest, best),
        torch.where(is_new, following.flatten()[place], after),
        sums + torch.stack([active, (mask & ~alike.any(-1)).sum()]),
    ]
