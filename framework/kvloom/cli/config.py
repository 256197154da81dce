"""``kvloom config show``."""

from __future__ import annotations

import argparse

from kvloom.cli.settings import read_config
from kvloom.cli.tables import print_rows


def show(arguments: argparse.Namespace) -> int:
    """One line a parameter: name, value, origin. Secrets are masked."""
    given = {text.partition("=")[0] for text in arguments.set}
    placeholder = {} if arguments.file or "model" in given else {"model": "-"}
    rows = [(name, repr(value), origin) for name, value, origin in read_config(arguments, **placeholder).rows()]
    if placeholder:
        rows = [(name, "(must be given)", "-") if name == "model" else (name, value, origin) for name, value, origin in rows]
    print_rows(("parameter", "value", "origin"), rows)
    return 0


