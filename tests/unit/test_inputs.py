"""Prompts: every form becomes rows of token ids, and what is none is refused with what would be one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from patchwire.errors import InputError
from patchwire.inputs import ModelTokenizer, to_invoke

CHAT = [{"role": "user", "content": "hello"}]


def rows(given, vocabulary=50, max_positions=8):
    invoke = to_invoke(
        given,
        texts_to_ids=lambda texts: [[len(word) for word in text.split()] for text in texts],
        messages_to_ids=lambda messages: [[len(messages), 7]],
        vocabulary=vocabulary,
        max_positions=max_positions,
    )
    return [list(row) for row in invoke.rows]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a bb ccc", [[1, 2, 3]]),
        (["a bb", "ccc"], [[1, 2], [3]]),
        (("a bb", "ccc"), [[1, 2], [3]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ((1, 2, 3), [[1, 2, 3]]),
        (range(3), [[0, 1, 2]]),
        ([np.int64(1), 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([torch.tensor([1, 2]), torch.tensor([3])], [[1, 2], [3]]),
        (torch.tensor([1, 2]), [[1, 2]]),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.tensor([1], dtype=torch.uint8), [[1]]),
        (np.array([[1, 2]], dtype=np.int32), [[1, 2]]),
        (CHAT, [[1, 7]]),
        ({"input_ids": [1, 2]}, [[1, 2]]),
        (
            {"input_ids": torch.tensor([[0, 1], [2, 3]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])},
            [[1], [2, 3]],
        ),
        (
            {"input_ids": [[1, 0], [2, 3]], "attention_mask": [[1, 0], [1, 1]], "token_type_ids": [[0, 0]]},
            [[1], [2, 3]],
        ),
        ({"input_ids": [[1, 2]], "attention_mask": None}, [[1, 2]]),
    ],
    ids=repr,
)
def test_a_prompt_becomes_rows(given, expected):
    assert rows(given) == expected


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "no tokens"),
        ([], "no prompt"),
        (["a", ""], "Prompt 1 has no tokens"),
        ([[1], []], "no prompt"),
        (3, "This int is not a prompt"),
        (1.5, "This float is not a prompt"),
        ([1.5, 2.0], "This list is not a prompt"),
        ([True, False], "This list is not a prompt"),
        ([1, "a"], "This list is not a prompt"),
        (..., "This ellipsis is not a prompt"),
        (b"bytes", "has the token id 98"),
        (torch.tensor([1.0]), r"not \[1\] torch.float32"),
        (torch.tensor([True]), "torch.bool"),
        (torch.tensor(1), r"not \[\] torch.int64"),
        (torch.zeros(1, 1, 1, dtype=torch.long), r"\[1, 1, 1\]"),
        (torch.zeros(2, 0, dtype=torch.long), "no tokens"),
        ({"ids": [1]}, "mapping with 'ids' is not a prompt"),
        ({"input_ids": [1], "labels": [1]}, "'labels'"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "in the middle of a row"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "no tokens"),
        ([{"role": "user"}], "is not a prompt"),
        ([1, -1], "token id -1; ids go from 0 to 49"),
        ([1, 50], "token id 50; ids go from 0 to 49"),
        ([[1], [99]], "Prompt 1 has the token id 99"),
        (list(range(9)), "has 9 tokens; the model takes 8"),
    ],
    ids=repr,
)
def test_what_is_no_prompt_is_refused(given, says):
    with pytest.raises(InputError, match=says):
        rows(given)


def test_the_message_names_the_line_that_gave_the_prompt():
    with pytest.raises(InputError) as caught:
        to_invoke([99], texts_to_ids=list, messages_to_ids=list, vocabulary=50, max_positions=8)

    assert "to_invoke([99]" in caught.value.lines[0].code
    assert caught.value.lines[0].file == __file__


def test_a_model_that_takes_any_length_takes_any_length():
    assert len(rows([1] * 1000, max_positions=0)[0]) == 1000


class TestTokenizer:
    @pytest.fixture
    def offline(self) -> ModelTokenizer:
        tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2, "sat": 3}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.enable_padding(length=20)
        tokenizer.enable_truncation(max_length=2)
        return ModelTokenizer(tokenizer.to_str(), ask=lambda texts: pytest.fail("the server was asked"))

    def test_encodes_and_decodes_without_asking(self, offline):
        assert offline.encode("the cat") == offline("the cat") == [1, 2]
        assert offline.decode([1, 2]) == "the cat"
        assert offline.decode(torch.tensor([[3]])) == "sat"
        assert offline.decode(2) == "cat"

    def test_tells_tokens_one_by_one(self, offline):
        assert offline.tokens("the cat") == offline.tokens([1, 2]) == ["the", " cat"]

    def test_neither_pads_nor_cuts(self, offline):
        assert offline.batch(["the cat sat", "cat"]) == [[1, 2, 3], [2]]

    def test_asks_the_server_for_what_it_cannot_do(self):
        tokenizer = ModelTokenizer("", ask=lambda texts: [[len(text)] for text in texts])

        assert tokenizer.encode("abc") == [3]
        with pytest.raises(InputError, match="could not send"):
            tokenizer.decode([3])
