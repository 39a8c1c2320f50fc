"""The catalogue of errors in docs/errors.md."""

from __future__ import annotations

import catalogue


def test_is_up_to_date():
    assert catalogue.PAGE.read_text() == catalogue.page(), "run `python docs/catalogue.py`"


def test_says_of_every_kind_of_error_what_it_means():
    assert all(kind.__doc__ for kind in catalogue.KINDS.values())


def test_knows_the_words_of_an_error_whatever_they_are_about():
    entry = next(each for each in catalogue.entries() if "cannot be assigned: only values and weights" in each.message)

    assert entry.matches("`model.lm_head` cannot be assigned: only values and weights can, not modules.")
    assert not entry.matches("`model.lm_head` cannot be assigned.")
