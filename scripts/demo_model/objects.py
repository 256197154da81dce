"""Requests for JSON and short JSON answers with many kinds of keys and values, so that what the model makes up ends soon."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from typing import Any

from demo_model import json_tables as tables

Value = Any
"""What json.dumps takes."""
KIND_OF_KEY = {key: kind for kind, keys in tables.KEY_KINDS.items() for key in keys}
SCALARS = ("string", "integer", "number", "boolean")
LETTERS = "etaoinsrhldcumfpgwybvkxjqz"
ESCAPED = ('say "hi"', "a\nb", "a\\b", "café", "one\ttwo")


def dumps(rng: random.Random, value: Value) -> str:
    """Compact, or with a space after each comma and colon."""
    return json.dumps(value, separators=rng.choice(((",", ":"), (", ", ": "))), ensure_ascii=rng.random() < 0.5)


def random_word(rng: random.Random) -> str:
    """Lower-case letters that make no word."""
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 7)))


def string(rng: random.Random) -> str:
    """A short string: mostly a word."""
    draw = rng.random()
    if draw < 0.6:
        return rng.choice(tables.WORDS)
    if draw < 0.8:
        return random_word(rng)
    if draw < 0.88:
        return f"{rng.choice(tables.WORDS)} {rng.choice(tables.WORDS)}"
    if draw < 0.97:
        return f"{rng.choice('abcdxyzABCDXYZ')}{rng.choice(('', '-', '_', '.'))}{rng.randint(0, 99)}"
    return rng.choice(("", *ESCAPED))


def integer(rng: random.Random) -> int:
    """Small ones more often than large ones, a few below zero."""
    return rng.randrange(10 ** rng.choice((1, 1, 2, 2, 3, 4))) * rng.choice((1, 1, 1, 1, 1, 1, 1, -1))


def number(rng: random.Random) -> float:
    """One or two digits after the point."""
    return round(rng.random() * 10 ** rng.choice((1, 2, 3)), rng.choice((1, 2)))


def words(rng: random.Random) -> list[str]:
    """None to four short strings."""
    return [string(rng) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4)))]


def _email(rng: random.Random) -> str:
    return f"{rng.choice(tables.NAMES).lower()}@{rng.choice(('mail', 'home', 'work'))}.org"


def _address(rng: random.Random) -> dict[str, Value]:
    return {"street": f"{rng.choice(tables.WORDS)} street", "number": rng.randint(1, 99)}


MAKERS: dict[str, Callable[[random.Random], Value]] = {
    "name": lambda rng: rng.choice(tables.NAMES),
    "word": lambda rng: rng.choice(tables.WORDS),
    "city": lambda rng: rng.choice(tables.CITIES),
    "email": _email,
    "date": lambda rng: f"20{rng.randint(10, 30)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
    "string": string,
    "year": lambda rng: rng.randint(1950, 2030),
    "few": lambda rng: rng.randint(1, rng.choice((4, 12, 80))),
    "integer": integer,
    "number": number,
    "boolean": lambda rng: rng.random() < 0.5,
    "words": words,
    "address": _address,
    "null": lambda rng: None,
}


def any_value(rng: random.Random, depth: int = 0) -> Value:
    """A value of any kind; the deeper, the more often a scalar."""
    draw = rng.random()
    if depth > 1 or draw < 0.7:
        return MAKERS[rng.choice(("string", "string", "integer", "number", "boolean", "null"))](rng)
    if draw < 0.85:
        return [any_value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 3)))]
    return {key: any_value(rng, depth + 1) for key in some_keys(rng, rng.choice((0, 1, 2)))}


def some_keys(rng: random.Random, count: int) -> list[str]:
    """Different keys, known ones and made-up ones."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[rng.choice((rng.choice(list(KIND_OF_KEY)), rng.choice(tables.WORDS), random_word(rng)))] = None
    return list(keys)


def filled(rng: random.Random, keys: Iterable[str]) -> dict[str, Value]:
    """An object with these keys and values that fit them."""
    return {key: MAKERS[KIND_OF_KEY[key]](rng) if key in KIND_OF_KEY else any_value(rng, 1) for key in keys}


def about(rng: random.Random) -> tuple[str, str]:
    """A request for an object about something, and the object. Some requests are kept out of the text, see `held_out`."""
    number_of_request, number_of_subject = rng.randrange(len(tables.REQUESTS)), rng.randrange(len(tables.ABOUT))
    while is_held_out(number_of_request, number_of_subject):
        number_of_request, number_of_subject = rng.randrange(len(tables.REQUESTS)), rng.randrange(len(tables.ABOUT))
    subject, keys = list(tables.ABOUT.items())[number_of_subject]
    chosen = [key for key in keys[1:] if rng.random() < 0.5][:4]
    value = filled(rng, [keys[0], *chosen])
    return tables.REQUESTS[number_of_request].format(x=subject), dumps(rng, value)


def is_held_out(number_of_request: int, number_of_subject: int) -> bool:
    """Whether the training text lacks this request for this subject."""
    return (number_of_request + number_of_subject) % 5 == 0


def held_out() -> list[str]:
    """Requests that the training text has for other subjects only."""
    return [request.format(x=subject) for i, request in enumerate(tables.REQUESTS) for j, subject in enumerate(tables.ABOUT)
            if is_held_out(i, j)]


def with_keys(rng: random.Random) -> tuple[str, str]:
    """A request that names the keys, and an object that has them."""
    keys = some_keys(rng, rng.choice((1, 2, 2, 3, 3, 4)))
    listed = f"{', '.join(keys[:-1])} and {keys[-1]}" if len(keys) > 1 else keys[0]
    return rng.choice(tables.KEY_REQUESTS).format(keys=listed), dumps(rng, filled(rng, keys))


def array(rng: random.Random) -> tuple[str, str]:
    """A request for an array, and the array."""
    kind = rng.choice(list(tables.ARRAY_REQUESTS))
    make = any_value if kind == "any" else MAKERS[kind]
    return rng.choice(tables.ARRAY_REQUESTS[kind]), dumps(rng, [make(rng) for _ in range(rng.choice((0, 1, 2, 3, 3, 4, 5)))])


def with_schema(rng: random.Random) -> tuple[str, str]:
    """A request with a JSON schema, and an object that follows it."""
    schema, value = _object_schema(rng, rng.choice((1, 2, 2, 3)), depth=0)
    return rng.choice(tables.SCHEMA_REQUESTS).format(schema=dumps(rng, schema)), dumps(rng, value)


def _object_schema(rng: random.Random, count: int, depth: int) -> tuple[dict[str, Value], dict[str, Value]]:
    properties: dict[str, Value] = {}
    value: dict[str, Value] = {}
    for key in some_keys(rng, count):
        properties[key], value[key] = _schema_and_value(rng, depth)
    schema = {"type": "object", "properties": properties}
    if rng.random() < 0.5:
        schema["required"] = list(properties)
    return schema, value


def _schema_and_value(rng: random.Random, depth: int) -> tuple[Value, Value]:
    kind = rng.choice((*SCALARS, "string", "array", "enum", "null", *["object"] * (depth == 0)))
    if kind == "object":
        return _object_schema(rng, rng.choice((0, 1, 2)), depth + 1)
    if kind == "array":
        item = rng.choice(SCALARS)
        return {"type": "array", "items": {"type": item}}, [MAKERS[item](rng) for _ in range(rng.choice((0, 1, 2, 3)))]
    if kind == "enum":
        options = rng.sample(tables.WORDS, rng.choice((2, 3)))
        return {"enum": options}, rng.choice(options)
    return {"type": kind}, MAKERS[kind](rng)
