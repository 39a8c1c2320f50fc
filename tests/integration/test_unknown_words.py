"""Words that a tokenizer does not know: all of them are one token to the model, and whoever asks is told."""

from __future__ import annotations

import warnings

import pytest

import patchwire
from patchwire import methods

PROMPT, SUBJECT = "Ada Barlow lives in the city of", "Ada Barlow"


def ask_twice(facts: patchwire.Model) -> None:
    for _ in range(2):
        with facts.trace("The Eiffel Tower Tower is in"):
            facts.logits.save()


def test_a_prompt_with_such_words_is_warned_of_once_at_its_line(facts: patchwire.Model) -> None:
    with pytest.warns(patchwire.PatchwireWarning, match="does not know “Eiffel”, “Tower”") as caught:
        ask_twice(facts)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(patchwire.PatchwireWarning, match="“Zanzibar”"):
        methods.logit_lens(facts, ["Ada lives in Zanzibar"])


def test_a_prompt_without_is_not(facts: patchwire.Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert facts.tokenize(PROMPT) == [facts.tokenizer.encode(PROMPT)]
        assert facts.tokenizer.tokens("The Eiffel")[1] == " <unk>"  # only looked at


def test_an_answer_of_such_a_word_is_refused(facts: patchwire.Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ask in (
            lambda: methods.causal_trace(facts, PROMPT, SUBJECT, answer=" Zanzibar"),
            lambda: methods.logit_lens(facts, PROMPT, answer=" Zanzibar"),
            lambda: methods.edit_scores(facts, " Zanzibar", " Lisbon", efficacy=[PROMPT], paraphrase=[PROMPT],
                                        neighbourhood=[PROMPT]),
        ):  # fmt: skip
            with pytest.raises(patchwire.InputError, match="does not know “Zanzibar”"):
                ask()


def test_results_are_shown_without_what_is_large(facts: patchwire.Model) -> None:
    moment = methods.second_moment(facts, 1, [PROMPT] * 40)
    edit = methods.rank_one_edit(facts, PROMPT, SUBJECT, " Oslo", moment, steps=2)
    for shown in (
        methods.logit_lens(facts, PROMPT),
        methods.patchscope(facts, PROMPT, PROMPT),
        methods.triggers(facts, 1, [PROMPT]),
        edit,
    ):
        assert type(shown).__name__ in repr(shown)
        assert "GPT2LMHeadModel" not in repr(shown)
        assert len(repr(shown)) < 1000
    assert "3 prompts × 2 measures" in repr(
        methods.edit_scores(edit.model, " Oslo", " Lisbon", efficacy=[PROMPT], paraphrase=[PROMPT],
                            neighbourhood=[PROMPT])
    )  # fmt: skip
