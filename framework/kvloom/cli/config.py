"""``kvloom config show``."""

from __future__ import annotations

import argparse

from kvloom.cli.settings import read_config


def show(arguments: argparse.Namespace) -> int:
    """One line a parameter: name, value, origin. Secrets are masked."""
    given = {text.partition("=")[0] for text in arguments.set}
    placeholder = {} if arguments.file or "model" in given else {"model": "-"}
    rows = read_config(arguments, **placeholder).rows()
    width = max(len(name) for name, _, _ in rows)
    for name, value, origin in rows:
        shown = "(must be given)" if placeholder and name == "model" else repr(value)
        print(f"{name:<{width}}  {shown:<24}  {'-' if placeholder and name == 'model' else origin}")
    return 0


