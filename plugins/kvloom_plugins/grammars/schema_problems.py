"""Where in a JSON Schema the parts are that llguidance does not take: its messages name keywords, not places."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from kvloom.interfaces import GrammarProblem

ONE = ("additionalProperties", "items", "contains", "not", "if", "then", "else", "propertyNames", "unevaluatedItems",
       "unevaluatedProperties", "contentSchema")
MANY = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
NAMED = ("properties", "patternProperties", "dependentSchemas")
DEFINITIONS = ("$defs", "definitions")
"""Keywords whose value is a schema, a list of schemas, or schemas by name; those of the last kind only matter where they are used."""
MAX_ROUNDS = 16
MAX_PROBLEMS = 64

Place = tuple[str, dict[str, Any]]
"""JSON pointer, and the schema there."""


def schema_problems(schema: Any, reason: str, fault: Callable[[Any], str | None]) -> list[GrammarProblem]:
    """Everything that is wrong, one a place and keyword.

    Args:
        reason: what the library says of the whole.
        fault: what it says of another schema; None when it takes it. What was named is taken out and the rest is asked for again.
    """
    found: list[GrammarProblem] = []
    rest, said = schema, reason
    for _ in range(MAX_ROUNDS):
        places = [(pointer, here, keyword) for pointer, here in reachable(rest) for keyword in blamed(said, here)]
        for pointer, here, keyword in places:
            found.append(GrammarProblem(pointer, keyword, said))
            here.pop(keyword)
        again = fault(rest) if places and len(found) < MAX_PROBLEMS else None
        if again is None:
            break
        said = again
    return found[:MAX_PROBLEMS] or [GrammarProblem("", "$schema" if reason.startswith("failed to parse") else "schema", reason)]


def blamed(reason: str, here: dict[str, Any]) -> list[str]:
    """The keywords of a schema that a message is about."""
    named = _named_keys(reason)
    if named is not None:
        return [keyword for keyword in here if keyword in named]
    if "oneOf constraints" in reason:
        return [keyword for keyword in here if keyword == "oneOf"]
    if "Unsatisfiable schema" in reason:
        return [keyword for keyword, value in here.items() if isinstance(value, list) and (not value or any(v is False for v in value))]
    if reason.startswith("Resource '"):
        return [keyword for keyword, value in here.items() if keyword in ("$ref", "$schema") and _is_in(value, reason.split("'")[1])]
    return [keyword for keyword, value in here.items() if _is_about(reason, keyword, value)]


def _named_keys(reason: str) -> list[str] | None:
    """Those of ``Unimplemented keys: ["not"]``."""
    _, found, keys = reason.partition("Unimplemented keys: ")
    try:
        listed = json.loads(keys) if found else None
    except ValueError:
        return None
    return listed if isinstance(listed, list) else None


def _is_in(reference: Any, resource: str) -> bool:
    """Whether a reference may be one to a resource: to all of its address, or to the last part."""
    document = reference.partition("#")[0] if isinstance(reference, str) else ""
    return bool(document) and resource.endswith(document)


def _is_about(reason: str, keyword: str, value: Any) -> bool:
    if keyword in ("format", "type"):
        return isinstance(value, str) and reason.endswith((f"Unknown format: {value}", f"Invalid type: {value}"))
    return f"'{keyword}'" in reason or f"{keyword} " in reason or f"{keyword.removesuffix('ies')}y regexes" in reason


def reachable(schema: Any) -> Iterator[Place]:
    """Every schema that takes part in the whole: the whole, those inside, and those that local references lead to; each once."""
    waiting: list[tuple[str, Any]] = [("", schema)]
    seen: set[int] = set()
    while waiting:
        pointer, here = waiting.pop()
        if not isinstance(here, dict) or id(here) in seen:
            continue
        seen.add(id(here))
        yield pointer, here
        inner = list(_inside(pointer, here))
        target = here.get("$ref")
        if isinstance(target, str) and target.startswith("#/"):
            inner.append((target[1:], resolve(schema, target[1:])))
        elif isinstance(target, str):  # an anchor or another document: what is defined may be meant
            inner += [(f"/{name}/{_escaped(key)}", sub) for name in DEFINITIONS for key, sub in _items(schema.get(name))]
        waiting += reversed(inner)


def _inside(pointer: str, here: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for keyword, value in here.items():
        if keyword in NAMED:
            yield from ((f"{pointer}/{keyword}/{_escaped(name)}", sub) for name, sub in _items(value))
        elif keyword in MANY and isinstance(value, list):
            yield from ((f"{pointer}/{keyword}/{i}", sub) for i, sub in enumerate(value))
        elif keyword in ONE:
            yield f"{pointer}/{keyword}", value


def resolve(schema: Any, pointer: str) -> Any:
    """The value that a JSON pointer leads to, None when there is none."""
    here = schema
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(here, dict):
            here = here.get(name)
        elif isinstance(here, list) and name.isdecimal() and len(name) < 8 and int(name) < len(here):
            here = here[int(name)]
        else:
            return None
    return here


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
