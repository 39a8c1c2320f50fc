"""Prompts of experiments: their tokens, where in them a subject stands, and the token that an answer begins with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patchwire.errors import InputError, here
from patchwire.model import Model


@dataclass(frozen=True)
class Prompt:
    """One prompt, as a model sees it."""

    given: Any
    """A text, or token ids, as it was given."""
    ids: tuple[int, ...]
    """Its token ids."""
    tokens: tuple[str, ...]
    """Their texts; "#id" where the model has no tokenizer here."""

    @property
    def rows(self) -> list[list[int]]:
        """The prompt as the one row of a trace."""
        return [list(self.ids)]

    def __len__(self) -> int:
        return len(self.ids)


def prompt_of(model: Model, given: Any) -> Prompt:
    """One prompt, as a model sees it: its token ids, their texts, and the `rows` that a trace takes.

    Args:
        model: The model, which knows how to tokenize it.
        given: A text, or token ids.

    Raises:
        InputError: it is several, or the model cannot take it.

    Example:
        >>> given = methods.prompt_of(model, "The Eiffel Tower is in the city of")
        >>> given.tokens[0], len(given), methods.span(given, "The Eiffel Tower")
        >>> with model.trace(given.rows):
        ...     logits = model.logits[:, -1].save()
    """
    rows = model.tokenize(given)
    if len(rows) != 1:
        raise InputError(f"This takes one prompt, not {len(rows)}.", lines=here())
    return Prompt(given, tuple(rows[0]), texts(model, rows[0]))


def texts(model: Model, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token; its id where the model has no tokenizer here."""
    return tuple(f"#{each}" for each in ids) if model.tokenizer.backend is None else tuple(model.tokenizer.tokens(ids))


def words_of(model: Model, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each of some tokens that are no text together, as in the middle of one; its id where the model has no
    tokenizer here."""
    if model.tokenizer.backend is None:
        return texts(model, ids)
    return tuple(model.tokenizer.tokens([each, each])[1] for each in ids)


def span(prompt: Prompt, part: str | range | Sequence[int]) -> range:
    """The tokens of a prompt that a part of it stands in, from the first to the last.

    Args:
        prompt: The prompt.
        part: Words of its text, which must be there once; or positions of tokens, which follow each other.

    Raises:
        InputError: the words are not there, or several times; or there are no such tokens.
    """
    if not isinstance(part, str):
        positions = list(part)
        if not positions or positions != list(range(positions[0], positions[-1] + 1)):
            raise InputError(f"{positions} are no tokens that follow each other.", lines=here())
        if positions[0] < 0 or positions[-1] >= len(prompt):
            raise InputError(f"The prompt has {len(prompt)} tokens, and none at {positions[-1]}.", lines=here())
        return range(positions[0], positions[-1] + 1)
    whole = "".join(prompt.tokens)
    first = whole.find(part)
    if not part or first < 0 or whole.find(part, first + 1) >= 0:
        often = "not" if first < 0 else "several times"
        raise InputError(
            f"“{part}” is {often} in the tokens “{'|'.join(prompt.tokens)}”.",
            hint="Give words that are there once, or the positions of their tokens: `range(1, 4)`.",
            lines=here(),
        )
    ends, at = [], 0
    for token in prompt.tokens:
        at += len(token)
        ends.append(at)
    begin = next(index for index, end in enumerate(ends) if end > first)
    last = next(index for index, end in enumerate(ends) if end >= first + len(part))
    return range(begin, last + 1)


def token_of(model: Model, prompt: Prompt, answer: str | int) -> int:
    """The token id of an answer: itself, or the first token with which the text goes on.

    Args:
        model: The model.
        prompt: What goes on.
        answer: How, " Paris"; or a token id.

    Raises:
        InputError: the text does not go on like that, or the prompt is token ids; or there is no such token.
    """
    if not isinstance(answer, str):
        return known_id(model, int(answer))
    if not isinstance(prompt.given, str):
        raise InputError(
            "Token ids go on with a token id, not with a text.", hint="Give the answer's id.", lines=here()
        )
    return continuation(model, prompt, answer)[0]


def known_id(model: Model, token: int) -> int:
    """A token id that a model has.

    Raises:
        InputError: it has not.
    """
    if token < 0 or (model.vocab_size and token >= model.vocab_size):
        raise InputError(f"There is no token {token}; {model.name} has 0 to {model.vocab_size - 1}.", lines=here())
    return token


def continuation(model: Model, prompt: Prompt, text: str) -> list[int]:
    """The token ids with which a prompt's text goes on.

    Raises:
        InputError: it does not go on like that, or the tokenizer does not know one of its words.
    """
    whole = model.tokenizer.encode(prompt.given + text)
    if len(whole) <= len(prompt) or tuple(whole[: len(prompt)]) != prompt.ids:
        raise InputError(
            f"“{text}” is not how “{prompt.given}” goes on: together they are other tokens.",
            hint="Begin it with a space where a new word begins, or give token ids.",
            lines=here(),
        )
    if unknown := model.tokenizer.unknown(text):
        raise InputError(f"The tokenizer of {model.name} does not know “{unknown[0]}”.", lines=here())
    return whole[len(prompt) :]


def answer_of(model: Model, prompt: Prompt, answer: str | int | None) -> int:
    """The token id of an answer, or of what the model itself says if there is none.

    Raises:
        InputError: the text does not go on like that, or the prompt is token ids.
    """
    if answer is not None:
        return token_of(model, prompt, answer)
    with model.trace(prompt.rows):
        best = model.logits[0, -1].argmax().save()
    return int(best)


GROUPS: Mapping[str, Callable[[int, range], list[int]]] = {
    "subject": lambda length, subject: list(subject),
    "last subject": lambda length, subject: [subject[-1]],
    "non-subject": lambda length, subject: [each for each in range(length - 1) if each not in subject],
    "last": lambda length, subject: [length - 1],
}
"""The tokens of a group, by its name, of a prompt's length and its subject; those that are none of the subject are
without the prompt's last token (Geva et al. 2023)."""


def group(prompt: Prompt, subject: range | None, name: str) -> list[int]:
    """The positions of a group of a prompt's tokens.

    Raises:
        InputError: there is no such group, it has no tokens, or the subject is not known.
    """
    if name not in GROUPS:
        raise InputError(f"There is no group “{name}”; there are {', '.join(GROUPS)}.", lines=here())
    if subject is None and name != "last":
        raise InputError(f"Which tokens are “{name}” depends on the subject.", hint="Say the subject.", lines=here())
    found = GROUPS[name](len(prompt), subject or range(0))
    if not found:
        raise InputError(f"No token of “{prompt.given}” is “{name}”.", lines=here())
    return found
