"""Rank-one model editing: what a model associates with a subject is changed by one vector times another in one weight.

Meng, Bau, Andonian and Belinkov (2022), "Locating and Editing Factual Associations in GPT" (ROME), section 3.1; on
Mamba: Sharma, Atkinson and Bau (2024), "Locating and Editing Factual Associations in Mamba", section 5.

A projection `v = k W + b` is taken for a memory that answers the key k with the value v. C is the second moment of its
keys, k* the key of a subject, u = C⁻¹ k*, and v* the value with which the model says what it is to say. Then

    Λ = (v* - v) / (k · u),    W += u Λᵀ

answers the subject's key with v*, and changes as little as possible what other keys are answered with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

import patchwire
from patchwire.errors import InputError, here
from patchwire.kept import Kept
from patchwire.methods.prompts import Prompt, continuation, known_id, prompt_of, span
from patchwire.methods.result import Axis, Origin, Result
from patchwire.model import Model, Module
from patchwire.optim import Adam
from patchwire.results import Stats


@dataclass(frozen=True)
class Projection:
    """A linear map of a layer, `value = key @ weight + bias`, whatever the way in which the model stores it."""

    key: Callable[[Module], Any]
    """What goes into it, `[rows, tokens, d_key]`."""
    weight: Callable[[Module], Any]
    """`[d_key, d_value]`: a parameter, or the part of one."""
    value: Callable[[Module], Any]
    """What it gives, `[rows, tokens, d_value]`."""


PROJECTIONS: Mapping[str, Projection] = {
    "mlp": Projection(lambda layer: layer.mlp.neurons, lambda layer: layer.mlp.W_out, lambda layer: layer.mlp.output),
    "ssm_out": Projection(
        lambda layer: layer.ssm.out_proj.input, lambda layer: layer.ssm.W_out, lambda layer: layer.ssm.out_proj.output
    ),
    "ssm_in": Projection(
        lambda layer: layer.ssm.in_proj.input, lambda layer: layer.ssm.W_in, lambda layer: layer.ssm.x_in
    ),
    "ssm_gate": Projection(
        lambda layer: layer.ssm.in_proj.input, lambda layer: layer.ssm.W_gate, lambda layer: layer.ssm.gate
    ),
}
"""By name: what a rank-one edit can change. The last three are an SSM's: W_o, W_a and W_g of Sharma et al. (2024)."""


@dataclass(frozen=True)
class Mention:
    """A prompt with a subject in it."""

    prompt: Any
    """A text, or token ids."""
    subject: str | Sequence[int]
    """Words that stand in it once, or the positions of their tokens."""


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """The second moment of a projection's keys, C = E[k kᵀ]."""

    layer: int
    projection: str
    matrix: Tensor | Kept = field(repr=False)
    """`[d_key, d_key]` float64: here, or kept on the server."""
    count: int
    """Of how many tokens."""
    stats: Stats = field(default_factory=Stats)
    """What the runs cost."""


@dataclass(frozen=True, eq=False)
class RankOneEdit:
    """An edited model, and how the edit was found. The model that it was made from is as it was."""

    model: Model = field(repr=False)
    """The model with the edit. Nobody else's is edited: to revert it, go on with `original`."""
    original: Model = field(repr=False)
    layer: int
    projection: str
    key: Tensor = field(repr=False)
    """k*: the subject's key, the mean over prefixes, `[d_key]` float32."""
    direction: Tensor = field(repr=False)
    """u: C⁻¹ k*, of length 1, `[d_key]` float32."""
    value: Tensor = field(repr=False)
    """v*: what the subject's key is to be answered with, `[d_value]` float32."""
    update: Tensor = field(repr=False)
    """Λ: (v* - v) / (k · u), `[d_value]` float32."""
    losses: Result
    """`[step, part]`: the loss and its parts in each step of the search for v*; "probability" is the target's. After
    it was small enough, all steps are the same."""


def second_moment(
    model: Model,
    layer: int,
    prompts: Sequence[Any],
    *,
    projection: str | None = None,
    batch_size: int = 16,
    keep: float | None = None,
) -> SecondMoment:
    """C = E[k kᵀ] of the keys k of a projection over all tokens of some prompts (Meng et al. 2022, eq. 2 and A.3).

    The sum stays on the server, where it is made, batch by batch.

    Args:
        model: Any model with the projection.
        layer: Which layer's.
        prompts: Texts, or token ids; together they should have many more tokens than a key has numbers.
        projection: One of `patchwire.methods.PROJECTIONS`; "mlp" if left out, or "ssm_out" of a layer without an MLP.
        batch_size: How many prompts a pass has.
        keep: For how many seconds the server keeps the matrix; if left out it comes here.

    Raises:
        InputError: there is no projection of that name.
        SiteError: the model does not have it.

    Example:
        >>> moment = second_moment(model, 17, texts)
    """
    projection, linear = _projection(model, layer, projection)
    width = linear.weight(model.layers[layer]).shape[0]
    with model.session() as session:
        batches: Any = session.over(prompts, batch_size=batch_size)
        with batches:
            total = batches.carry(torch.zeros(width, width, dtype=torch.float64))
            count = batches.carry(torch.tensor(0))
            with model.trace(batches.prompt) as trace:
                keys = linear.key(model.layers[layer])
            mask: Any = trace.mask()
            seen = torch.where(mask[..., None], keys, 0).flatten(0, 1)
            total += (seen.T.float() @ seen.float()).double()
            count += mask.sum()
        tokens = batches.result(count).save()
        mean = batches.result(total) / batches.result(count)
        matrix: Any = mean.save() if keep is None else mean.keep(seconds=keep)
    assert session.stats is not None
    found = matrix.value if keep is None else matrix
    return SecondMoment(layer, projection, found, int(tokens.value), session.stats)


def rank_one_edit(
    model: Model,
    prompt: Any,
    subject: str | Sequence[int],
    target: str | int | Sequence[int],
    moment: SecondMoment,
    *,
    prefixes: Sequence[Any] = (),
    essence: Sequence[Mention] | None = None,
    steps: int = 20,
    lr: float = 0.5,
    kl_factor: float = 0.0625,
    weight_decay: float = 0.5,
    clamp: float = 4.0,
    enough_loss: float = 0.05,
    enough_probability: float = 1.0,
) -> RankOneEdit:
    """Have a model say something else of a subject, by changing one weight by rank one (Meng et al. 2022, section 3.1).

    v* is v + δ, where δ, added to what the projection gives at the subject's last token, makes small

        -log P(target) + kl_factor * KL(with δ ‖ without, after the essence prompts) + weight_decay * ‖δ‖ / ‖v‖²

    All of it is one request: the search is a loop on the server. v and k are those of the prompt without a prefix, so
    that the edited model gives v* there, as in the authors' code; there the divergence is measured at the subject's
    last token, here, as in the paper, at the end of the prompt.

    Args:
        model: The model; it may be edited already, and then has both edits.
        prompt: What is said of the subject, up to what is to be said: a text, or token ids.
        subject: Words that stand in it once, or the positions of their tokens.
        target: How the prompt is to go on: a text, or token ids.
        moment: Of the keys of the projection that is edited: `second_moment`.
        prefixes: What may stand before the prompt, beside nothing: texts, or token ids where the prompt is ids.
        essence: Prompts that the edit should not change; "{subject} is a" if left out and the prompt is a text.
        steps: How often the loss is computed; there is one step of Adam less, as there is none after the last.
        lr: Adam's.
        kl_factor: See above.
        weight_decay: See above.
        clamp: δ is at most so many times as long as v.
        enough_loss: When the loss is smaller than this, δ stays as it is.
        enough_probability: The same when the target's is larger; Sharma et al. (2024) take 0.9, and 3 for `clamp`.

    Raises:
        InputError: the subject is not in a prompt, the target is not how the prompt goes on, or C has no inverse.

    Example:
        >>> moment = second_moment(model, 17, texts)
        >>> edit = rank_one_edit(model, "The Eiffel Tower is in", "The Eiffel Tower", " Rome", moment)
        >>> with edit.model.trace("Beside the Eiffel Tower one can see"):
        ...     logits = model.logits.save()
    """
    if steps < 1:
        raise InputError(f"There is at least one step, not {steps}.", lines=here())
    linear = _projection(model, moment.layer, moment.projection)[1]
    width = linear.weight(model.layers[moment.layer]).shape[1]
    plain = prompt_of(model, prompt)
    positions = span(plain, subject if isinstance(subject, str) else list(subject))
    place = positions[-1] - len(plain)
    before = [[*plain.ids], *(_prefixed(model, plain, prefix, place) for prefix in prefixes)]
    answer = target_ids(model, plain, target)
    rows = [[*row, *answer[:-1]] for row in before]
    kept_same = [_mentioned(model, each) for each in _essence(plain, subject, essence)]
    optimiser, matrix = Adam(lr=lr), cast(Any, moment.matrix)

    def here_in(model: Model) -> Module:
        found: Module = model.layers[moment.layer]
        return found

    with model.session() as session:
        with model.trace() as trace:
            with trace.invoke(before):
                key = linear.key(here_in(model))[:, place].float().mean(0)
            with trace.invoke(plain.rows):
                own = linear.key(here_in(model))[0, place].float()
                value = linear.value(here_in(model))[0, place].float()
            usual = []
            for prompt_of_it, _ in kept_same:
                with trace.invoke(prompt_of_it.rows):
                    usual.append(model.logits[0, -1].float().log_softmax(-1))
        direction = torch.linalg.solve(matrix, key.double())
        direction = (direction / direction.norm()).float()
        length = value.norm()

        loop: Any = session.repeat(steps)
        with loop:
            delta = loop.carry(torch.zeros(width))
            memory = [loop.carry(each) for each in optimiser.start(torch.zeros(width))]
            with model.trace() as trace:
                with trace.invoke(rows):
                    _add(linear.value(here_in(model)), place - len(answer) + 1, delta)
                    said = model.logits[:, -len(answer) :].float().log_softmax(-1)
                changed = []
                for prompt_of_it, at in kept_same:
                    with trace.invoke(prompt_of_it.rows):
                        _add(linear.value(here_in(model)), at, delta)
                        changed.append(model.logits[0, -1].float().log_softmax(-1))
            nll = -torch.stack([said[:, index, token] for index, token in enumerate(answer)], 1)
            kl = sum((now.exp() * (now - was)).sum() for now, was in zip(changed, usual, strict=True))
            kl = kl_factor * kl / max(1, len(usual)) + torch.zeros(())
            decay = weight_decay * delta.norm() / length**2
            loss = nll.mean() + kl + decay
            probability = (-nll).exp().mean()
            losses: Any = torch.stack([loss, nll.mean(), kl, decay, probability])
            losses = losses.save()

            gradient = patchwire.grad(loss, delta)
            new, remembered = optimiser.step(delta, gradient, memory)
            new = new * (clamp * length / new.norm()).clamp(max=1.0)
            done = (loss < enough_loss) | (probability > enough_probability) | (loop.index == steps - 1)
            loop.update(delta, torch.where(done, delta, new))
            for each, then in zip(memory, remembered, strict=True):
                loop.update(each, then)
        found = loop.result(delta)
        update = (found / (own @ direction)).save()
        value, key, direction = (value + found).save(), key.save(), direction.save()
    edited = with_update(model, moment.layer, direction.value, update.value, projection=moment.projection)
    assert session.stats is not None
    return RankOneEdit(
        model=edited,
        original=model,
        layer=moment.layer,
        projection=moment.projection,
        key=key.value,
        direction=direction.value,
        value=value.value,
        update=update.value,
        losses=Result(
            values=losses.value,
            axes=(
                Axis("step", tuple(map(str, range(len(losses.value))))),
                Axis("part", ("loss", "target", "essence", "decay", "probability")),
            ),
            unit="nats",
            origin=Origin.of(
                "rank_one_edit",
                model,
                prompt=prompt,
                subject=list(positions),
                target=answer,
                layer=moment.layer,
                projection=moment.projection,
                tokens=moment.count,
                prefixes=list(prefixes),
                essence=[[*each.ids] for each, _ in kept_same],
                steps=steps,
                lr=lr,
                kl_factor=kl_factor,
                weight_decay=weight_decay,
                clamp=clamp,
                enough_loss=enough_loss,
                enough_probability=enough_probability,
            ),
            stats=session.stats,
        ),
    )


def with_update(model: Model, layer: int, direction: Tensor, update: Tensor, *, projection: str | None = None) -> Model:
    """A model with `W + u Λᵀ` for the weight W `[d_key, d_value]` of a projection; only the two vectors travel.

    Args:
        model: The model; it stays as it is, for everybody.
        layer: Which layer's projection.
        direction: u, `[d_key]`.
        update: Λ, `[d_value]`.
        projection: As for `second_moment`.

    Raises:
        InputError: there is no projection of that name.
        ShapeError: the vectors do not fit the weight.
    """
    _, linear = _projection(model, layer, projection)
    with model.edit() as edited:
        weight = linear.weight(edited.layers[layer])
        weight += torch.outer(direction, update).to(weight.dtype)
    return edited


def sampled_prefixes(
    model: Model,
    start: Any = "The",
    *,
    lengths: Mapping[int, int] | None = None,
    top_k: int = 5,
    seed: int = 0,
    end: str = ". ",
) -> list[str]:
    """Texts by the model itself that may stand before a prompt (Meng et al. 2022, section 3.1, step 1).

    Args:
        model: A model with a tokenizer.
        start: What they begin with.
        lengths: How many texts of how many tokens; ten of 5 and ten of 10 if left out.
        top_k: Tokens are drawn from so many of the likeliest.
        seed: Another one gives others.
        end: What is written behind each.

    Example:
        >>> edit = rank_one_edit(model, prompt, subject, " Rome", moment, prefixes=sampled_prefixes(model))
    """
    first = prompt_of(model, start)
    found = []
    for length, count in (lengths or {5: 10, 10: 10}).items():
        rows = [list(first.ids)] * count
        gen: Any = model.generate(rows, max_new_tokens=length, do_sample=True, top_k=top_k, seed=seed)
        with gen:
            ids = gen.output.save()
        new = [row[len(first) :] for row in ids.value.tolist()]
        found += [(str(start) if isinstance(start, str) else "") + model.tokenizer.decode(row) + end for row in new]
    return found


def target_ids(model: Model, prompt: Prompt, target: str | int | Sequence[int]) -> list[int]:
    """The token ids of how a prompt is to go on.

    Raises:
        InputError: the text does not go on like that, the prompt is token ids, or there are no such tokens.
    """
    if isinstance(target, str) and isinstance(prompt.given, str):
        return continuation(model, prompt, target)
    if isinstance(target, str) or (not isinstance(target, int) and not len(target)):
        raise InputError(
            f"{target!r} is not how token ids go on.", hint="Give a token id, or a list of them.", lines=here()
        )
    return [known_id(model, int(each)) for each in ([target] if isinstance(target, int) else target)]


def _projection(model: Model, layer: int, name: str | None) -> tuple[str, Projection]:
    if not -model.num_layers <= layer < model.num_layers:
        raise InputError(f"The model has layers 0 to {model.num_layers - 1}, and no {layer}.", lines=here())
    name = name or ("mlp" if hasattr(model.layers[layer], "mlp") else "ssm_out")
    if name not in PROJECTIONS:
        raise InputError(f"There is no projection “{name}”; there are {', '.join(PROJECTIONS)}.", lines=here())
    return name, PROJECTIONS[name]


def _add(value: Any, place: int, delta: Any) -> None:
    """Add to what a projection gives at a token of all rows."""
    value[:, place] += delta.to(value.dtype)


def _mentioned(model: Model, mention: Mention) -> tuple[Prompt, int]:
    """A prompt, and the place of its subject's last token, from the end."""
    prompt = prompt_of(model, mention.prompt)
    where = span(prompt, mention.subject if isinstance(mention.subject, str) else list(mention.subject))
    return prompt, where[-1] - len(prompt)


def _essence(prompt: Prompt, subject: Any, given: Sequence[Mention] | None) -> list[Mention]:
    if given is not None:
        return list(given)
    if isinstance(subject, str) and isinstance(prompt.given, str):
        return [Mention(f"{subject} is a", subject)]
    return []


def _prefixed(model: Model, prompt: Prompt, prefix: Any, place: int) -> list[int]:
    """The tokens of a prompt with something before it. From the subject's last token on, counted from the end, both are
    the same; the subject itself may be split otherwise."""
    if not isinstance(prompt.given, str):
        return [*(int(each) for each in prefix), *prompt.ids]
    ids = model.tokenize(f"{prefix}{prompt.given}")[0]
    after = place + 1
    if len(ids) < len(prompt) or (after and tuple(ids[after:]) != prompt.ids[after:]):
        raise InputError(
            f"“{prefix}” before “{prompt.given}” changes its tokens after the subject.",
            hint="End it with a space, or with what separates words.",
            lines=here(),
        )
    return ids
