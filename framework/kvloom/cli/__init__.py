"""The command line: thin. One line on a mistake and exit code 2; ``--debug`` shows the traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from kvloom import __version__
from kvloom.errors import KvloomError

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0, 1 for "no" (a plan that does not fit), 2 for a mistake."""
    arguments = _parser().parse_args(argv)
    command: Command = arguments.run
    try:
        return command(arguments)
    except BrokenPipeError:  # `kvloom ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KvloomError, OSError, TypeError) as error:
        if arguments.debug:
            raise
        print(f"kvloom: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvloom", description="A plugin-first LLM inference engine.")
    parser.add_argument("--version", action="version", version=f"kvloom {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_plugins(commands.add_parser("plugins", help="what is installed, and what it offers"))
    plan = commands.add_parser("plan", help="what a model needs of memory, from config.json and headers alone")
    plan.add_argument("model", metavar="MODEL", help="directory or hub id")
    _add_settings(plan)
    plan.set_defaults(run=_lazy("kvloom.cli.plan", "plan"))
    config = commands.add_parser("config", help="the configuration").add_subparsers(required=True, metavar="COMMAND")
    show = config.add_parser("show", help="value and origin of every parameter")
    _add_settings(show)
    show.set_defaults(run=_lazy("kvloom.cli.config", "show"))
    return parser


def _add_plugins(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="installed plugins; reads metadata only, imports none of them")
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(run=_lazy("kvloom.cli.plugins", "list_plugins"))
    show = commands.add_parser("show", help="what one plugin registers; imports it")
    show.add_argument("plugin", metavar="NAME", help="entry-point name")
    show.add_argument("--json", action="store_true", help="as JSON")
    show.set_defaults(run=_lazy("kvloom.cli.plugins", "show_plugin"))


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file", metavar="FILE", help="YAML file with parameters of LLM")
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="one parameter of LLM; wins over the file")


def _lazy(module: str, name: str) -> Command:
    """Import the command's module when it runs: listing plugins must not import torch."""
    def run(arguments: argparse.Namespace) -> int:
        from importlib import import_module

        command: Command = getattr(import_module(module), name)
        return command(arguments)

    return run
