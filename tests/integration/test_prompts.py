"""Every kind of prompt, given to a server: the tokens that are counted here are the tokens that run there."""

from __future__ import annotations

import pytest
import torch

import patchwire

WORDS = ["the", "cat", "sat", "on", "the", "mat"]
TEXT = " ".join(WORDS)
IDS = [1, 3, 5, 7, 1, 8]


def logits_of(model: patchwire.Model, prompt) -> torch.Tensor:
    with model.trace(prompt):
        logits = model.logits.save()
    return logits.value


class TestAModelWithATokenizer:
    @pytest.mark.parametrize(
        "prompt",
        [
            TEXT,
            [TEXT],
            IDS,
            tuple(IDS),
            [IDS],
            torch.tensor(IDS),
            torch.tensor([IDS]),
            torch.tensor([IDS]).numpy(),
            {"input_ids": torch.tensor([IDS])},
            {"input_ids": torch.tensor([[0, 0, *IDS]]), "attention_mask": torch.tensor([[0, 0] + [1] * 6])},
            {"input_ids": torch.tensor([[*IDS, 0]]), "attention_mask": torch.tensor([[1] * 6 + [0]])},
        ],
        ids=lambda each: f"{type(each).__name__}",
    )
    def test_gives_the_same_for_every_spelling_of_one_prompt(self, chatty, prompt):
        assert torch.equal(logits_of(chatty, prompt), logits_of(chatty, IDS))

    def test_takes_several_texts_that_end_together(self, chatty):
        with chatty.trace([TEXT, "the dog"]) as trace:
            logits = chatty.logits.save()

        assert trace.tokens == [IDS, [1, 4]]
        assert trace.mask().tolist() == [[True] * 6, [False] * 4 + [True] * 2]
        torch.testing.assert_close(logits[1, -2:], logits_of(chatty, "the dog")[0])
        assert logits[1, :4].isnan().all()

    def test_takes_a_conversation_through_its_chat_template(self, chatty):
        conversation = [{"role": "system", "content": "fast"}, {"role": "user", "content": "hello world"}]

        with chatty.trace(conversation) as trace:
            chatty.logits[:, -1].save()

        words = ["system", ":", "fast", "user", ":", "hello", "world", "assistant", ":"]
        assert [chatty.tokenizer.decode(each).split() for each in trace.tokens] == [words]

    def test_tells_its_tokens_on_the_laptop(self, chatty):
        assert chatty.tokenizer.backend is not None
        assert chatty.tokenize(TEXT) == [IDS]
        assert [each.strip() for each in chatty.tokenizer.tokens(TEXT)] == WORDS
        assert "".join(chatty.tokenizer.tokens(TEXT)) == TEXT
        assert chatty.tokenizer.decode(IDS) == TEXT

    def test_is_asked_for_tokens_with_the_same_result(self, chatty):
        assert chatty.connection.tokenize("chatty", texts=[TEXT, "cat"]) == [IDS, [3]]

    @pytest.mark.parametrize("prompt", ["", "   ", [TEXT, ""], []])
    def test_refuses_a_prompt_without_tokens(self, chatty, prompt):
        with pytest.raises(patchwire.InputError, match=r"no tokens|no prompt"):
            logits_of(chatty, prompt)


class TestAModelWithoutATokenizer:
    def test_takes_token_ids(self, served):
        assert logits_of(served["gpt2"], [1, 2, 3]).shape == (1, 3, 61)

    @pytest.mark.parametrize("prompt", ["a text", ["several", "texts"]])
    def test_refuses_text_and_says_what_to_give(self, served, prompt):
        with pytest.raises(patchwire.InputError, match="gpt2 has no tokenizer") as caught:
            logits_of(served["gpt2"], prompt)
        assert "token ids" in caught.value.hint

    def test_refuses_a_conversation(self, served):
        with pytest.raises(patchwire.InputError, match="no chat template"):
            logits_of(served["gpt2"], [{"role": "user", "content": "hello"}])


class TestServerSide:
    """What the server says to a client that does not check."""

    def test_a_text_for_a_model_without_a_tokenizer_is_refused(self, client):
        with pytest.raises(patchwire.InputError, match="has no tokenizer"):
            client.connection.tokenize("gpt2", texts=["text"])

    def test_a_conversation_that_the_template_refuses_is_refused(self, strict_client):
        with pytest.raises(patchwire.InputError, match=r"refuses|no chat template"):
            strict_client.connection.tokenize("chatty", messages=[])
