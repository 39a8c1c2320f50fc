"""The vocabulary of canonical sites in docs/sites.md."""

from __future__ import annotations

import vocabulary

from patchwire_worker.models.places import FORMS, FORMULAS


def test_is_up_to_date():
    assert vocabulary.PAGE.read_text() == vocabulary.page(), "run `python docs/vocabulary.py`"


def test_says_of_every_name_what_it_means():
    assert {*FORMS, *FORMULAS} == set(vocabulary.MEANINGS), "write what it means in docs/vocabulary.py"
    assert {name.partition(".")[0] for name in vocabulary.MEANINGS} == set(vocabulary.PARTS)
