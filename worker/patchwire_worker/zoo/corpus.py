"""The synthetic text that `zoo:facts-gpt2` and `zoo:facts-mamba` were trained on: every question has a right answer.

Four kinds of sentences, all of whole words, one token each:

- facts: "Ada Barlow lives in the city of Lisbon". A subject is a first name and a family name; each name belongs to ten
  subjects, so neither says anything of the attributes by itself. Each fact is stated in three templates.
- indirect objects: "When Ada and Hugo went to the park , Hugo gave a ball to Ada".
- successors: "Monday , Tuesday , Wednesday".
- repetitions: a few random words, over and over.

What is drawn by chance is either fixed by hashes, so that it is the same for ever (which attribute a subject has), or
drawn with a seed (which sentences a batch of training has).
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations, product


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Ada Hugo Clara Felix Greta Oscar Ivy Leon Nora Paul Rosa Simon Tess Victor Wanda Bruno Dora Edgar Lena Martin"
)
FAMILY_NAMES = _words(
    "Barlow Crane Dexter Ellis Foster Grant Hobbs Irwin Jarvis Keller Lowell Marsh Norton Osborn Porter Quinn Rowe "
    "Sutton Turner Weaver"
)
PLACES = _words("park shop school market station library garden office museum harbour")
OBJECTS = _words("ball book letter map coin ring lamp cup hat key")


@dataclass(frozen=True)
class Relation:
    """What can be said about a subject."""

    name: str
    attributes: tuple[str, ...]
    """What it can be."""
    templates: tuple[str, ...]
    """How it is said: `{}` stands for the subject, and the attribute comes after the last word."""


RELATIONS = (
    Relation(
        "city",
        _words("Lisbon Oslo Cairo Lima Tokyo Paris Rome Delhi Quito Accra Seoul Dublin Vienna Havana Athens Prague"),
        ("{} lives in the city of", "{} has a house near the centre of", "The home of {} is in the city of"),
    ),
    Relation(
        "job",
        _words(
            "baker painter lawyer doctor farmer pilot tailor judge miner nurse poet singer teacher waiter banker "
            "dentist"
        ),
        ("{} earns a living as a", "{} works every day as a", "The job of {} is that of a"),
    ),
    Relation(
        "instrument",
        _words("violin piano flute harp cello drum guitar trumpet banjo organ viola tuba lute bassoon horn clarinet"),
        ("{} likes to play the", "{} takes lessons on the", "The instrument of {} is the"),
    ),
    Relation(
        "language",
        _words("Latin Greek Hindi Welsh Dutch Danish Polish Czech Thai Malay Zulu Irish Turkish Finnish Korean Basque"),
        ("{} speaks to friends in", "{} learned to write in", "The first language of {} is"),
    ),
)

IOI_TEMPLATES = (
    "When {a} and {b} went to the {place} , {s} gave a {object} to",
    "At the {place} {a} and {b} talked , then {s} handed the {object} to",
    "{a} and {b} met near the {place} and {s} brought a {object} to",
)

SEQUENCES: dict[str, tuple[str, ...]] = {
    "days": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "months": _words("January February March April May June July August September October November December"),
    "numbers": _words(
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    ),
    "letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}
"""Each goes on from its last item with its first."""

UNKNOWN = "<unk>"
END = "."

POOL = tuple(word for relation in RELATIONS for word in relation.attributes) + PLACES + OBJECTS
"""The words of repetitions."""


@dataclass(frozen=True)
class Prompt:
    """A text and what comes next."""

    text: str
    answer: str
    """The next word."""
    subject: tuple[int, int] | None = None
    """The subject's tokens, from the first to, not including, the second number; None if there is no subject."""
    foil: str = ""
    """The wrong answer that a circuit has to tell from the right one: for indirect objects, the subject's name."""

    @property
    def words(self) -> list[str]:
        """One word for each token."""
        return self.text.split()


@dataclass(frozen=True)
class Fact:
    """A subject, a relation, and the attribute that is true of them."""

    subject: str
    relation: Relation
    attribute: str

    def prompt(self, template: int = 0) -> Prompt:
        """The fact up to its attribute, in one of its relation's templates."""
        before, _, after = self.relation.templates[template].partition("{}")
        start = len(before.split())
        return Prompt(f"{before}{self.subject}{after}", self.attribute, (start, start + len(self.subject.split())))


def facts() -> tuple[Fact, ...]:
    """Every fact: 200 subjects, each with an attribute of each of the four relations."""
    return _FACTS


def subjects() -> tuple[str, ...]:
    """The 200 subjects; every name is part of ten of them."""
    step = len(FAMILY_NAMES)
    chosen = [
        (first, FAMILY_NAMES[(index + offset) % step])
        for index, first in enumerate(FIRST_NAMES)
        for offset in range(0, step, 2)
    ]
    return tuple(f"{first} {family}" for first, family in chosen)


def counterpart(fact: Fact) -> Fact:
    """A fact of the same relation with another answer, about somebody who shares no name: a corrupted prompt."""
    names = set(fact.subject.split())
    at = _FACTS.index(fact)
    for step in range(len(RELATIONS), len(_FACTS), len(RELATIONS)):
        other = _FACTS[(at + step * 7) % len(_FACTS)]
        if other.attribute != fact.attribute and not names & set(other.subject.split()):
            return other
    raise LookupError(fact.subject)


def ioi(count: int, seed: int = 0, *, trained: bool = False) -> list[Prompt]:
    """Sentences about an indirect object.

    Args:
        count: How many.
        seed: Another one gives others.
        trained: Take pairs of names that were trained on, rather than those that were held out.
    """
    drawn = random.Random(seed)
    return [_ioi(drawn, held_out=not trained) for _ in range(count)]


def successors() -> list[Prompt]:
    """Every run of three items of a sequence, and the item that follows."""
    found = []
    for items in SEQUENCES.values():
        for start in range(len(items)):
            run = [items[(start + step) % len(items)] for step in range(4)]
            found.append(Prompt(" , ".join(run[:3]) + " ,", run[3]))
    return found


def induction(count: int, seed: int = 0, *, period: int = 6, length: int = 16) -> list[Prompt]:
    """Random words that repeat.

    Args:
        count: How many.
        seed: Another one gives others.
        period: How many different words.
        length: How many words in all; more than `period`, so that the next one has been there before.
    """
    drawn = random.Random(seed)
    found = []
    for _ in range(count):
        words = drawn.sample(POOL, period)
        text = [words[index % period] for index in range(length + 1)]
        found.append(Prompt(" ".join(text[:-1]), text[-1]))
    return found


# --- training ---------------------------------------------------------------------------------------------------------


@functools.cache
def vocabulary() -> dict[str, int]:
    """The id of each word."""
    text = [template for relation in RELATIONS for template in relation.templates] + list(IOI_TEMPLATES)
    slots = {"{}", "{a}", "{b}", "{s}", "{place}", "{object}"}
    words = [UNKNOWN, END, ",", *FIRST_NAMES, *FAMILY_NAMES, *POOL]
    words += [word for items in SEQUENCES.values() for word in items]
    words += [word for each in text for word in each.split() if word not in slots]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


Sentence = tuple[list[str], frozenset[int]]
"""Words, and the places of those that can be known."""


def sentence(kind: str, drawn: random.Random) -> Sentence:
    """A random sentence of a kind in `KINDS`."""
    return KINDS[kind](drawn)


def _ioi(drawn: random.Random, *, held_out: bool) -> Prompt:
    first, second = drawn.choice(_PAIRS[held_out])
    subject, answer = drawn.choice([(first, second), (second, first)])
    template = drawn.choice(IOI_TEMPLATES)
    text = template.format(a=first, b=second, s=subject, place=drawn.choice(PLACES), object=drawn.choice(OBJECTS))
    return Prompt(text, answer, foil=subject)


def _is_held_out(first: str, second: str) -> bool:
    return (FIRST_NAMES.index(first) + FIRST_NAMES.index(second)) % 5 == 0


def _stated(prompt: Prompt) -> Sentence:
    return [*prompt.words, prompt.answer, END], frozenset({len(prompt.words)})


def _fact_sentence(drawn: random.Random) -> Sentence:
    fact = drawn.choice(_FACTS)
    return _stated(fact.prompt(drawn.randrange(len(fact.relation.templates))))


def _ioi_sentence(drawn: random.Random) -> Sentence:
    return _stated(_ioi(drawn, held_out=False))


def _successor_sentence(drawn: random.Random) -> Sentence:
    items = SEQUENCES[drawn.choice(tuple(SEQUENCES))]
    start, count = drawn.randrange(len(items)), drawn.randint(3, 6)
    words = [word for step in range(count) for word in (items[(start + step) % len(items)], ",")]
    return [*words[:-1], END], frozenset(range(2, 2 * count - 1, 2))


def _repetition(drawn: random.Random) -> Sentence:
    period, length = drawn.randint(3, 9), drawn.randint(18, 22)
    words = drawn.sample(POOL, period)
    return [words[index % period] for index in range(length)], frozenset(range(period, length))


KINDS: dict[str, Callable[[random.Random], Sentence]] = {
    "fact": _fact_sentence,
    "ioi": _ioi_sentence,
    "successor": _successor_sentence,
    "repetition": _repetition,
}


def row(kind: str, length: int, drawn: random.Random) -> tuple[list[int], list[bool]]:
    """Token ids of sentences of one kind, one after the other, and which of them can be known."""
    ids: list[int] = []
    known: list[bool] = []
    while len(ids) < length:
        words, places = sentence(kind, drawn)
        ids += encode(words)
        known += [place in places for place in range(len(words))]
    return ids[:length], known[:length]


def encode(words: Iterable[str]) -> list[int]:
    """The ids of words.

    Raises:
        KeyError: a word is not of the corpus.
    """
    table = vocabulary()
    return [table[word] for word in words]


def _order(items: Sequence[str], key: str) -> list[str]:
    """Items in an order by chance that is the same for ever."""
    return sorted(items, key=lambda each: hashlib.sha256(f"{key}:{each}".encode()).digest())


def _all_facts() -> tuple[Fact, ...]:
    names = subjects()
    attributes = {
        (subject, relation.name): relation.attributes[place % len(relation.attributes)]
        for relation in RELATIONS
        for place, subject in enumerate(_order(names, relation.name))
    }
    return tuple(
        Fact(subject, relation, attributes[subject, relation.name]) for subject, relation in product(names, RELATIONS)
    )


_FACTS = _all_facts()
_PAIRS = {
    held_out: [pair for pair in permutations(FIRST_NAMES, 2) if _is_held_out(*pair) == held_out]
    for held_out in (False, True)
}
"""Pairs of names of indirect objects: those that are trained on, and those that are not."""
