"""Rows for people: a rich table on a terminal, plain columns when piped."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def print_rows(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of equal length; the headers only on a terminal."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*headers, box=None, header_style="bold")
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(headers))] if rows else []
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
