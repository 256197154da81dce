"""The command line: thin. One line on a mistake and exit code 2; ``--debug`` shows the traceback."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence

from kvloom.cli.parser import make_parser
from kvloom.errors import KvloomError, MemoryPlanError

Command = Callable[[argparse.Namespace], int]
LINE_CHARACTERS = 1000
"""Most of a message that is shown without ``--debug``."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0, 1 for "no" (a plan that does not fit), 2 for a mistake."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # text of a model may hold what the terminal's encoding does not
        sys.stdout.reconfigure(errors="replace")
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
    """What went wrong; of a long message its beginning, of a memory plan the verdict."""
    lines = [line.strip() for line in str(error).splitlines()]
    if isinstance(error, MemoryPlanError):
        return f"{lines[-1]} (kvloom plan shows the arithmetic)"
    line = " ".join(lines)
    if len(line) > LINE_CHARACTERS:
        line = f"{line[:LINE_CHARACTERS]}... (--debug shows the rest)"
    ours = isinstance(error, KvloomError | OSError | TypeError | ValueError)
    return line if ours else f"{type(error).__name__}: {line}"
