"""Stories from a sentence grammar: a generator, and a recognizer of its sentences made from the same tables."""

from __future__ import annotations

import random
import re
from functools import cache

from demo_model import story_tables as tables

_SLOT = re.compile(r"\{(\w+)\}")
_BETWEEN_SENTENCES = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]"))\s+(?=[A-Z"])""")
HEROES = {"girl": tables.GIRLS, "boy": tables.BOYS}


def templates() -> list[str]:
    """Every sentence template."""
    return [*tables.OPENINGS, *tables.HABITS, *tables.ENDINGS, *(line for plot, _ in tables.PLOTS for step in plot for line in step)]


def cast(rng: random.Random, **given: str) -> dict[str, str]:
    """What fills each slot throughout one story; `given` fixes some of them."""
    sex = rng.choice(("girl", "boy"))
    if "hero" in given:
        sex = "girl" if given["hero"] in tables.GIRLS else "boy"
    words = {slot: rng.choice(choices) for slot, choices in tables.WORDS.items()}
    return words | {"hero": rng.choice(HEROES[sex])} | given | tables.PRONOUNS[sex]


def story(rng: random.Random, **given: str) -> str:
    """Six to nine sentences: an opening, perhaps a habit, a plot, one or two endings."""
    words = cast(rng, **given)
    plot, optional = rng.choice(tables.PLOTS)
    lines = [rng.choice(tables.OPENINGS)]
    if rng.random() < 0.5:
        lines.append(rng.choice(tables.HABITS))
    lines += [rng.choice(step) for i, step in enumerate(plot) if i not in optional or rng.random() < 0.6]
    lines += rng.sample(tables.ENDINGS, 1 if len(lines) > 7 else rng.choice((1, 2)))
    return " ".join(line.format(**words) for line in lines)


def sentences(text: str) -> list[str]:
    """A story cut into its sentences. A sentence may hold a quoted one: the grammar goes on in lower case after it."""
    return [sentence for sentence in _BETWEEN_SENTENCES.split(text.strip()) if sentence]


def parses(sentence: str) -> bool:
    """Whether the grammar can make this sentence."""
    return any(pattern.fullmatch(sentence) for pattern in _patterns())


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(_pattern(template, sex)) for template in templates() for sex in HEROES)


def _pattern(template: str, sex: str) -> str:
    """The sentences of a template with a girl or a boy as the hero. A slot that comes again must hold the same word."""
    choices = {**tables.WORDS, "hero": HEROES[sex], **{slot: (word,) for slot, word in tables.PRONOUNS[sex].items()}}
    seen: set[str] = set()
    parts: list[str] = []
    for i, part in enumerate(_SLOT.split(template)):
        if i % 2 == 0:
            parts.append(re.escape(part))
        elif part in seen:
            parts.append(f"(?P={part})")
        else:
            seen.add(part)
            parts.append(f"(?P<{part}>{'|'.join(map(re.escape, choices[part]))})")
    return "".join(parts)
