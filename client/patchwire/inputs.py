"""What a trace is given: text, texts, token ids or chat messages, turned into rows of token ids.

The tokens that are counted on the laptop are the tokens that run: text becomes ids once, here, with the tokenizer that
the server sent (or by asking the server, for chat templates and for tokenizers that cannot be sent).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from patchwire.errors import InputError, here, warn
from patchwire.graph import Invoke

Rows = list[list[int]]
_REMEMBERED_TEXTS = 256

_FORMS = "Give a text, a list of texts, token ids, or messages with a role and a content."


def to_invoke(
    given: Any,
    *,
    texts_to_ids: Callable[[Sequence[str]], Rows],
    messages_to_ids: Callable[[Sequence[Mapping[str, str]]], Rows],
    vocabulary: int,
    max_positions: int,
) -> Invoke:
    """The rows of an input.

    Args:
        given: A text, a list of texts, a list of token ids or of such lists, a tensor of token ids `[seq]` or
            `[batch, seq]`, chat messages (dicts with "role" and "content"), or a mapping with "input_ids" and
            perhaps "attention_mask" `[batch, seq]`, whose masked tokens are left out.
        texts_to_ids: Tokenizes texts.
        messages_to_ids: Tokenizes a conversation.
        vocabulary: Ids must be below it; 0 if that is not known.
        max_positions: No row may be longer; 0 if there is no such limit.

    Raises:
        InputError: it is none of these, or the model cannot take it.
    """
    rows = _rows(given, texts_to_ids, messages_to_ids)
    if not rows:
        raise InputError("There is no prompt.", hint=_FORMS, lines=here())
    for index, row in enumerate(rows):
        which = "The prompt" if len(rows) == 1 else f"Prompt {index}"
        if not row:
            raise InputError(f"{which} has no tokens.", hint=_FORMS, lines=here())
        if max_positions and len(row) > max_positions:
            raise InputError(
                f"{which} has {len(row)} tokens; the model takes {max_positions}.",
                hint="Shorten it, or split it.",
                lines=here(),
            )
        if min(row) < 0 or (vocabulary and max(row) >= vocabulary):
            wrong = next(each for each in row if each < 0 or each >= vocabulary)
            raise InputError(
                f"{which} has the token id {wrong}; ids go from 0 to {vocabulary - 1}.",
                hint="Token ids are those of this model's own tokenizer.",
                lines=here(),
            )
    return Invoke(tuple(tuple(row) for row in rows))


def _rows(
    given: Any,
    texts_to_ids: Callable[[Sequence[str]], Rows],
    messages_to_ids: Callable[[Sequence[Mapping[str, str]]], Rows],
) -> Rows:
    if isinstance(given, str):
        return texts_to_ids([given])
    if isinstance(given, Mapping):
        return _masked(given)
    if isinstance(given, (Tensor, np.ndarray)):
        return _matrix(given)
    if isinstance(given, Sequence) and given:
        if all(isinstance(each, str) for each in given):
            return texts_to_ids(given)
        if all(isinstance(each, Mapping) and {"role", "content"} <= each.keys() for each in given):
            return messages_to_ids(given)
        if all(_is_id(each) for each in given):
            return [[int(each) for each in given]]
        if all(isinstance(each, (Sequence, Tensor, np.ndarray)) and not isinstance(each, str) for each in given):
            return [row for each in given for row in _rows(each, texts_to_ids, messages_to_ids)]
    if hasattr(given, "keys") and "input_ids" in given:  # a tokenizer's batch
        return _masked(given)
    raise InputError(
        f"This {type(given).__name__} is not a prompt." if given else "There is no prompt.",
        hint=_FORMS,
        lines=here(),
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _matrix(given: Tensor | np.ndarray[Any, Any]) -> Rows:
    ids = torch.as_tensor(given)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool or ids.ndim not in (1, 2):
        raise InputError(
            f"Token ids are integers of shape [seq] or [batch, seq], not {list(ids.shape)} {ids.dtype}.",
            hint=_FORMS,
            lines=here(),
        )
    rows: Rows = (ids if ids.ndim == 2 else ids[None]).tolist()
    return rows


def _masked(given: Mapping[str, Any]) -> Rows:
    unknown = set(given) - {"input_ids", "attention_mask", "token_type_ids"}
    if unknown or "input_ids" not in given:
        raise InputError(
            f"A mapping with {', '.join(sorted(map(repr, given)))} is not a prompt.",
            hint='It has "input_ids", and "attention_mask" if some tokens are padding.',
            lines=here(),
        )
    ids = torch.as_tensor(given["input_ids"])
    ids = ids[None] if ids.ndim == 1 else ids
    rows = _matrix(ids)
    if given.get("attention_mask") is None:
        return rows
    mask = torch.as_tensor(given["attention_mask"]).bool().reshape(ids.shape)
    kept = [
        [each for each, seen in zip(row, seens, strict=True) if seen] for row, seens in zip(rows, mask, strict=True)
    ]
    for seens in mask:
        where = seens.nonzero().flatten().tolist()
        if where and where[-1] - where[0] + 1 != len(where):
            raise InputError(
                "The attention mask hides tokens in the middle of a row; only padding can be left out.",
                hint="Leave these tokens out of the prompt.",
                lines=here(),
            )
    return kept


class ModelTokenizer:
    """A model's tokenizer: works offline with what the server sent, and asks the server otherwise.

    `encode`, `decode` and `tokens` are enough to find positions.
    """

    def __init__(self, text: str, ask: Callable[[Sequence[str]], Rows]) -> None:
        self._backend: Tokenizer | None = Tokenizer.from_str(text) if text else None
        if self._backend is not None:
            self._backend.no_padding()
            self._backend.no_truncation()
        self._ask = ask
        self._warned: set[str] = set()
        self._unknown = None if self._backend is None else _unknown(self._backend, text)
        self._ids: Callable[[str], tuple[int, ...]] = lru_cache(_REMEMBERED_TEXTS)(self._ids_of)

    @property
    def backend(self) -> Tokenizer | None:
        """The `tokenizers.Tokenizer`, if the server could send one."""
        self._ids = self._ids_of  # whoever has it may change it, and then a text has other ids than those remembered
        return self._backend

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, special tokens as the model's tokenizer adds them."""
        return self.batch([text])[0]

    def batch(self, texts: Sequence[str]) -> Rows:
        """The token ids of several texts."""
        if self._backend is None:
            return self._ask(texts)
        if len(texts) == 1:  # a sweep is of one text, many times
            return [list(self._ids(texts[0]))]
        return [each.ids for each in self._backend.encode_batch(list(texts))]

    def prompts(self, texts: Sequence[str]) -> Rows:
        """The token ids of several texts that a model is to read.

        Warns:
            PatchwireWarning: it has no tokens for some words; once for each text.
        """
        rows = self.batch(texts)
        if self._unknown is None:
            return rows
        for text, row in zip(texts, rows, strict=True):
            if self._unknown not in row or text in self._warned:
                continue
            self._warned.add(text)
            if unknown := self.unknown(text):
                words = ", ".join(f"“{word}”" for word in dict.fromkeys(unknown))
                warn(f"The model's tokenizer does not know {words}: all such words are one token to it.")
        return rows

    def unknown(self, text: str) -> list[str]:
        """The parts of a text that the tokenizer does not know, each of which it makes the same token of."""
        if self._unknown is None or self._backend is None:
            return []
        found = self._backend.encode(text)
        words = (text[slice(*at)] for each, at in zip(found.ids, found.offsets, strict=True) if each == self._unknown)
        # The token may stand there as what it is, or be what every text begins with.
        return [word for word in words if word not in ("", self._backend.id_to_token(self._unknown))]

    def _ids_of(self, text: str) -> tuple[int, ...]:
        assert self._backend is not None
        return tuple(self._backend.encode(text).ids)

    def _offline(self) -> Tokenizer:
        if self._backend is None:
            raise InputError("The server could not send this model's tokenizer; only encoding works, by asking it.")
        return self._backend

    def decode(self, ids: int | Sequence[int] | Tensor) -> str:
        """The text of token ids, special tokens included."""
        ids = torch.as_tensor(ids).reshape(-1).tolist()
        return self._offline().decode(ids, skip_special_tokens=False)

    def tokens(self, text: str | Sequence[int]) -> list[str]:
        """The text of each token: what it adds to the text before it, spaces included."""
        ids = self.encode(text) if isinstance(text, str) else list(text)
        pieces, before = [], ""
        for end in range(1, len(ids) + 1):
            whole = self.decode(ids[:end])
            # A token may complete a character that the one before it began.
            pieces.append(whole[len(before) :] if whole.startswith(before) else self.decode(ids[end - 1]))
            before = whole
        return pieces

    def __call__(self, text: str) -> list[int]:
        return self.encode(text)


def _unknown(backend: Tokenizer, text: str) -> int | None:
    """The token of all words that a tokenizer does not know; None if it knows all."""
    if type(backend.model).__name__ == "Unigram":
        found: int | None = json.loads(text)["model"].get("unk_id")
        return found
    token = getattr(backend.model, "unk_token", None)
    return None if token is None else backend.token_to_id(token)
