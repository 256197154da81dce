"""Questions on facts: which of them the training text holds, and which it never does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from demo_model.kinds import KINDS, Kind

HELD_OUT_EVERY = 5


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its full answer, its answer in a word, and its kind."""

    text: str
    answer: str
    word: str
    kind: Kind


def ask(kind: Kind, phrasing: str, number: int) -> Question:
    """The question for fact `number` of a kind."""
    subject, word = kind.facts[number]
    slots = {"x": subject, "X": subject[0].upper() + subject[1:], "y": word, "a": "an" if word[0] in "aeiou" else "a"}
    return Question(phrasing.format(**slots), kind.told.format(**slots), word, kind)


def _questions(kind: Kind, held_out: bool) -> Iterator[Question]:
    for i, phrasing in enumerate(kind.asked):
        for number in range(len(kind.facts)):
            if ((number + i) % HELD_OUT_EVERY == 0) is held_out:
                yield ask(kind, phrasing, number)


def trained() -> list[Question]:
    """The questions of the training text."""
    return [question for kind in KINDS for question in _questions(kind, held_out=False)]


def held_out() -> list[Question]:
    """Questions in phrasings that the training text has with other subjects only."""
    return [question for kind in KINDS for question in _questions(kind, held_out=True)]


def unseen() -> list[Question]:
    """Questions in phrasings that the training text has with no subject."""
    return [ask(kind, phrasing, number) for kind in KINDS for phrasing in kind.unseen for number in range(len(kind.facts))]
