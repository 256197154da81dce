"""The command line: thin. One line on a mistake and exit code 2; ``--debug`` shows the traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from kvloom.cli.parser import make_parser
from kvloom.errors import KvloomError, MemoryPlanError

Command = Callable[[argparse.Namespace], int]
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0, 1 for "no" (a plan that does not fit), 2 for a mistake."""
    arguments = make_parser().parse_args(argv)
    command: Command = arguments.run
    try:
        return command(arguments)
    except BrokenPipeError:  # `kvloom ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        return INTERRUPTED
    except Exception as error:
        if arguments.debug:
            raise
        print(f"kvloom: {one_line(error)}", file=sys.stderr)
        return 2


def one_line(error: Exception) -> str:
    """What went wrong, and where there is more."""
    lines = str(error).strip().splitlines() or [""]
    line = lines[-1 if isinstance(error, MemoryPlanError) else 0].strip()
    if not isinstance(error, KvloomError | OSError | TypeError | ValueError):
        line = f"{type(error).__name__}: {line}"
    if isinstance(error, MemoryPlanError):
        return f"{line} (kvloom plan shows the arithmetic)"
    return line if len(lines) == 1 else f"{line} (--debug shows {len(lines) - 1} more lines)"
