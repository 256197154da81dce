"""The process in which chat templates are rendered: a program of its own, started by `kvloom.text.templates` by its file's path.

Templates come from checkpoints and callers, so they are foreign code: jinja2's sandbox keeps them from everything but their
variables, and limits of this process bound what the sandbox does not, work and memory. One JSON object a line comes in, one goes out.
Imports nothing of kvloom.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

MAX_TEMPLATES = 32
"""Compiled templates that are kept."""


class Generation(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` marks assistant text for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own form)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        """See `jinja2.ext.Extension.parse`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: object) -> None:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(str(message))


def to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
            sort_keys: bool = False) -> str:
    """The filter ``tojson`` as chat templates expect it: jinja2's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(form: str) -> str:
    """Local time, for templates that tell the model the date."""
    return datetime.now().strftime(form)


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """With what templates of the Hugging Face format may use."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                        extensions=[Generation, jinja2.ext.loopcontrols])
    made.filters["tojson"] = to_json
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return made


ENVIRONMENT = make_environment()


@lru_cache(maxsize=MAX_TEMPLATES)
def compiled(template: str) -> jinja2.Template:
    """A template, once."""
    return ENVIRONMENT.from_string(template)


@lru_cache(maxsize=MAX_TEMPLATES)
def reads(template: str) -> frozenset[str]:
    """Variables that a template reads and does not set itself before."""
    return frozenset(jinja2.meta.find_undeclared_variables(ENVIRONMENT.parse(template))) - ENVIRONMENT.globals.keys()


def answer_to(asked: dict[str, Any]) -> dict[str, Any]:
    """To one question. One without variables is whether the template can be compiled."""
    if asked["variables"] is None:
        compiled(asked["template"])
        return {"text": ""}
    unread = next((name for name in asked["must_read"] if name not in reads(asked["template"])), None)
    if unread is not None:
        return {"unread": unread, "reads": sorted(reads(asked["template"]))}
    return {"text": render(asked["template"], asked["variables"], asked["max_characters"])}


def render(template: str, variables: dict[str, Any], max_characters: int) -> str:
    """The text. Raises `jinja2.TemplateError`, or whatever the template runs into."""
    pieces: list[str] = []
    length = 0
    for piece in compiled(template).generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > max_characters:
            raise jinja2.TemplateError(f"its text has more than {max_characters} characters")
    return "".join(pieces)


def limit(memory_bytes: int) -> None:
    """Bound this process's memory; it cannot raise the bound again."""
    used_pages = int(open("/proc/self/statm").read().split()[0]) if sys.platform == "linux" else 0  # noqa: SIM115
    most = used_pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def main() -> None:
    """Answer until standard input ends."""
    limit(int(sys.argv[1]))
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = answer_to(asked)
        except MemoryError:
            answer = {"error": "it needs too much memory"}
        except Exception as error:  # noqa: BLE001  (whatever a template runs into is its own failure)
            answer = {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
