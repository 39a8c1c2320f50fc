"""Words that a tokenizer does not know: all of them are one token to the model, and whoever asks is told."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

import patchwire
from patchwire import methods
from serving import Server

PROMPT, SUBJECT = "Ada Barlow lives in the city of", "Ada Barlow"


@pytest.fixture(scope="module")
def model() -> Iterator[patchwire.Model]:
    with (
        Server({"facts-gpt2": "zoo:facts-gpt2"}) as server,
        patchwire.connect(server.address, progress=False) as client,
    ):
        yield client.model("facts-gpt2")


def ask_twice(model: patchwire.Model) -> None:
    for _ in range(2):
        with model.trace("The Eiffel Tower Tower is in"):
            model.logits.save()


def test_a_prompt_with_such_words_is_warned_of_once_at_its_line(model: patchwire.Model) -> None:
    with pytest.warns(patchwire.PatchwireWarning, match="does not know “Eiffel”, “Tower”") as caught:
        ask_twice(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(patchwire.PatchwireWarning, match="“Zanzibar”"):
        methods.logit_lens(model, ["Ada lives in Zanzibar"])


def test_a_prompt_without_is_not(model: patchwire.Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.tokenize(PROMPT) == [model.tokenizer.encode(PROMPT)]
        assert model.tokenizer.tokens("The Eiffel")[1] == " <unk>"  # only looked at


def test_an_answer_of_such_a_word_is_refused(model: patchwire.Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ask in (
            lambda: methods.causal_trace(model, PROMPT, SUBJECT, answer=" Zanzibar"),
            lambda: methods.logit_lens(model, PROMPT, answer=" Zanzibar"),
            lambda: methods.edit_scores(model, " Zanzibar", " Lisbon", efficacy=[PROMPT], paraphrase=[PROMPT],
                                        neighbourhood=[PROMPT]),
        ):  # fmt: skip
            with pytest.raises(patchwire.InputError, match="does not know “Zanzibar”"):
                ask()


def test_results_are_shown_without_what_is_large(model: patchwire.Model) -> None:
    moment = methods.second_moment(model, 1, [PROMPT] * 40)
    edit = methods.rank_one_edit(model, PROMPT, SUBJECT, " Oslo", moment, steps=2)
    for shown in (
        methods.logit_lens(model, PROMPT),
        methods.patchscope(model, PROMPT, PROMPT),
        methods.triggers(model, 1, [PROMPT]),
        edit,
    ):
        assert type(shown).__name__ in repr(shown)
        assert "GPT2LMHeadModel" not in repr(shown)
        assert len(repr(shown)) < 1000
    assert "3 prompts × 2 measures" in repr(
        methods.edit_scores(edit.model, " Oslo", " Lisbon", efficacy=[PROMPT], paraphrase=[PROMPT],
                            neighbourhood=[PROMPT])
    )  # fmt: skip
