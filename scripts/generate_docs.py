"""Write the parts of docs/ that follow from the code: module list, parameter tables, error tree. A test checks that they are current.

    python scripts/generate_docs.py
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import kvloom.errors
from kvloom.config import OTHER_ARGS, RENAMED, SECTIONS, NoEffect, Unsupported
from kvloom.params import UNSUPPORTED_SAMPLING, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = ("framework", "builtin_models", "builtin_quant", "builtin_samplers", "plugins", "kernels")


def modules() -> str:
    """One line a module: the first line of its docstring."""
    out = []
    for source_root in SOURCE_ROOTS:
        out.append(f"\n{source_root}/\n")
        for path in sorted((ROOT / source_root).rglob("*.py")):
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            if not docstring:
                raise SystemExit(f"{path.relative_to(ROOT)} has no docstring")
            out.append(f"- `{path.relative_to(ROOT / source_root)}` {docstring.split(chr(10) * 2)[0].replace(chr(10), ' ')}")
    return "\n".join(out).lstrip()


def parameters() -> str:
    """The constructor's parameters with default and state."""
    rows = ["| parameter | default | state | meaning |", "|---|---|---|---|"]
    for section in SECTIONS.values():
        for name, field in section.model_fields.items():
            default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)!r}`"
            rows.append(f"| `{name}` | {default} | {_state(section.state(name))} | {_cell(field.description or '')} |")
    return "\n".join(rows)


def other_parameters() -> str:
    """vLLM's names that are no parameters of their own here."""
    rows = ["| name | taken values | state |", "|---|---|---|"]
    rows += [f"| `{old}` | as `{new}` | works, with a note |" for old, new in RENAMED.items()]
    for name, other in OTHER_ARGS.items():
        more = other.state.values if isinstance(other.state, Unsupported) else ()
        taken = "any" if isinstance(other.state, NoEffect) else ", ".join(f"`{v!r}`" for v in (other.default, *more))
        rows.append(f"| `{name}` | {taken} | {_state(other.state)} |")
    return "\n".join(rows)


def sampling() -> str:
    """Fields of SamplingParams with default and state."""
    rows = ["| field | default | state |", "|---|---|---|"]
    for field in fields(SamplingParams):
        state = "unsupported so far" if field.name in UNSUPPORTED_SAMPLING else "works"
        default = field.default.name if field.name == "output_kind" else repr(field.default)  # type: ignore[union-attr]
        rows.append(f"| `{field.name}` | `{default}` | {state} |")
    return "\n".join(rows)


def error_tree() -> str:
    """The tree that errors.py draws."""
    return f"```\n{(kvloom.errors.__doc__ or '').split(chr(10) * 2)[1]}\n```"


def _state(state: NoEffect | Unsupported | None) -> str:
    if isinstance(state, NoEffect):
        return f"no effect: {_cell(state.reason)}"
    if isinstance(state, Unsupported):
        works = f" (`{'`, `'.join(map(repr, state.values))}` too)" if state.values else ""
        return f"unsupported so far unless the default{works}: {_cell(state.works)}"
    return "works"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "modules": ("docs/architecture.md", modules),
    "parameters": ("docs/api.md", parameters),
    "other-parameters": ("docs/api.md", other_parameters),
    "sampling": ("docs/api.md", sampling),
    "errors": ("docs/errors.md", error_tree),
}
"""Marker in the page -> page, text."""


def updated(page: str, text: str) -> str:
    """`text` of a page with its generated parts replaced."""
    for marker, (where, make) in PARTS.items():
        if where == page:
            begin, end = f"<!-- {marker} -->\n", f"<!-- /{marker} -->\n"
            head, rest = text.split(begin)
            text = head + begin + make() + "\n" + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    for page in sorted({where for where, _ in PARTS.values()}):
        path = ROOT / page
        path.write_text(updated(page, path.read_text()))
