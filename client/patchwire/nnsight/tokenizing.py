"""The server's tokenizer with the methods that scripts call on Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from patchwire.errors import InputError, here
from patchwire.inputs import ModelTokenizer, Rows
from patchwire.nnsight.structures import Output


class Encoding(Output):
    """`input_ids` and `attention_mask` of texts."""

    def to(self, *_: Any, **__: Any) -> Encoding:
        """This; a prompt goes to the server from here."""
        return self


class Tokenizer(ModelTokenizer):
    """`tokenizer("text", return_tensors="pt")`, `encode`, `decode`, `batch_decode`, `tokenize`.

    `eos_token`, `pad_token` and their ids are those of the model's configuration. What texts are padded with does not
    matter to a trace, which never sees it.
    """

    def __init__(self, json: str, ask: Callable[[Sequence[str]], Rows], config: Mapping[str, Any]) -> None:
        super().__init__(json, ask)
        self.eos_token_id: int | None = config.get("eos_token_id")
        self.bos_token_id: int | None = config.get("bos_token_id")
        self.pad_token_id: int | None = config.get("pad_token_id")
        self.padding_side = "left"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "pad_token":  # `tokenizer.pad_token = tokenizer.eos_token`
            name, value = "pad_token_id", None if value is None else self.encode(value)[0]
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        kind = name.removesuffix("_token")
        if kind in ("eos", "bos", "pad") and kind != name:
            index = getattr(self, f"{name}_id")
            return None if index is None else self.decode(index)
        raise AttributeError(
            f"The tokenizer has no `{name}` here: `tokenizer(texts)`, `encode`, `decode`, `batch_decode` and "
            "`tokenize` are, and `transformers.AutoTokenizer` has the rest."
        )

    def __call__(  # type: ignore[override]
        self,
        text: str | Sequence[str],
        *,
        return_tensors: str | None = None,
        padding: bool | str = False,
        **options: Any,
    ) -> Encoding:
        """The token ids and the attention mask of a text or several, as lists or as tensors `[batch, seq]`.

        Raises:
            InputError: texts of different lengths become a tensor without padding, or an option is not known.
        """
        if unknown := {name for name, value in options.items() if value and name not in ("add_special_tokens",)}:
            raise InputError(
                f"The tokenizer takes no {', '.join(sorted(unknown))} here.",
                hint="Use `transformers.AutoTokenizer`, and give the trace the ids.",
                lines=here(),
            )
        rows = self.batch([text] if isinstance(text, str) else list(text))
        longest = max(map(len, rows))
        if padding:
            filler = self.pad_token_id or 0
            padded = [[filler] * (longest - len(row)) + list(row) for row in rows]
            masks = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        else:
            padded, masks = [list(row) for row in rows], [[1] * len(row) for row in rows]
        if return_tensors is None:
            single = isinstance(text, str)
            return Encoding(input_ids=padded[0] if single else padded, attention_mask=masks[0] if single else masks)
        if not padding and len({len(row) for row in rows}) > 1:
            raise InputError("Texts of different lengths are no tensor.", hint="Write `padding=True`.", lines=here())
        return Encoding(input_ids=torch.tensor(padded), attention_mask=torch.tensor(masks))

    def batch_decode(self, rows: Any, skip_special_tokens: bool = False) -> list[str]:
        """The text of each row of token ids; one text for a list of single ids."""
        if not isinstance(rows, Tensor) and all(
            isinstance(each, int) or torch.as_tensor(each).ndim == 0 for each in rows
        ):
            rows = [[int(each) for each in rows]]
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def decode(self, ids: int | Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        ids = torch.as_tensor(ids).reshape(-1).tolist()
        return self._offline().decode(ids, skip_special_tokens=skip_special_tokens)

    def tokenize(self, text: str) -> list[str]:
        """The text of each token."""
        return self.tokens(text)

    def __len__(self) -> int:
        return self._offline().get_vocab_size()
