"""The training text: all documents from one seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable

from demo_model import dialogues, facts, objects
from demo_model.chat import END, chat
from demo_model.stories import story

SEED = 20260
STORIES, TOLD_STORIES, DIALOGUES = 5000, 1500, 4500
ABOUT, WITH_KEYS, ARRAYS, WITH_SCHEMA = 2500, 5000, 1000, 1500
QUESTION_REPEATS = 4
"""How often each question of the text comes alone, each time typed in its own way."""


def documents(seed: int = SEED) -> list[str]:
    """Every document, shuffled, each with its end, without its beginning-of-text token."""
    rng = random.Random(seed)
    questions = facts.trained()
    out = [story(rng) + END for _ in range(STORIES)]
    out += [dialogues.told_story(rng) for _ in range(TOLD_STORIES)]
    out += [dialogues.question(rng, question) for _ in range(QUESTION_REPEATS) for question in questions]
    out += [dialogues.dialogue(rng, questions) for _ in range(DIALOGUES)]
    makers = ((objects.about, ABOUT), (objects.with_keys, WITH_KEYS), (objects.array, ARRAYS), (objects.with_schema, WITH_SCHEMA))
    out += [chat([make(rng)]) for make, count in makers for _ in range(count)]
    rng.shuffle(out)
    return out


def sha256(texts: Iterable[str]) -> str:
    """Of the documents, in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
