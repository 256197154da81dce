"""Write the module list of docs/architecture.md: one line a module, the first line of its docstring.

    python scripts/module_list.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/architecture.md"
SOURCE_ROOTS = ("framework", "builtin_models", "builtin_quant", "builtin_samplers", "plugins", "kernels")
BEGIN, END = "<!-- modules -->\n", "<!-- /modules -->\n"


def module_lines() -> str:
    """A Markdown list of every module under the source roots."""
    out = []
    for source_root in SOURCE_ROOTS:
        out.append(f"\n{source_root}/\n")
        for path in sorted((ROOT / source_root).rglob("*.py")):
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            if not docstring:
                raise SystemExit(f"{path.relative_to(ROOT)} has no docstring")
            out.append(f"- `{path.relative_to(ROOT / source_root)}` {docstring.split(chr(10) * 2)[0].replace(chr(10), ' ')}")
    return "\n".join(out).lstrip() + "\n\n"


def page_with(lines: str) -> str:
    """The page with its module list replaced."""
    head, rest = PAGE.read_text().split(BEGIN)
    return head + BEGIN + lines + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page_with(module_lines()))
