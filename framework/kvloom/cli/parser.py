"""What the command line takes. Commands are imported when they run: listing plugins must not import torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from kvloom import __version__


class Parser(argparse.ArgumentParser):
    """A mistake is one line."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        print(f"kvloom: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def make_parser() -> argparse.ArgumentParser:
    """The whole command line; ``run`` of what it parses is the command."""
    parser = Parser(prog="kvloom", description="A plugin-first LLM inference engine.")
    parser.add_argument("--version", action="version", version=f"kvloom {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake, and what is logged while starting")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="complete a prompt; streams"))
    _add_render(commands.add_parser("render", help="text and token ids that a model's chat template makes of messages"))
    demo = commands.add_parser("demo", help="the small model that comes with kvloom tells a story and answers questions")
    demo.add_argument("--seed", type=int, help="another story: sampled instead of the likeliest words")
    demo.set_defaults(run=_lazy("kvloom.cli.demo", "demo"))
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


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory or hub id")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="its text; left out or -: standard input")
    parser.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file")
    sampling = parser.add_argument_group("sampling", "what is not given comes from the model's generation_config.json")
    sampling.add_argument("--max-tokens", metavar="N", type=int)
    for name in ("temperature", "top-p", "min-p"):
        sampling.add_argument(f"--{name}", metavar="X", type=float)
    for name in ("top-k", "seed", "n", "logprobs"):
        sampling.add_argument(f"--{name}", metavar="N", type=int)
    sampling.add_argument("--stop", metavar="TEXT", action="append", help="end at this text; may be given several times")
    sampling.add_argument("--param", metavar="NAME=VALUE", action="append", default=[], help="any other field of SamplingParams")
    parser.add_argument("--json", action="store_true", help="one JSON object when all is done, instead of streaming text")
    _add_settings(parser)
    parser.set_defaults(run=_lazy("kvloom.cli.generate", "generate"))


def _add_render(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory or hub id; only its tokenizer is read")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="one user message")
    parser.add_argument("--messages", metavar="FILE", help="a JSON list of messages")
    parser.add_argument("--tools", metavar="FILE", help="a JSON list of tools")
    parser.add_argument("--chat-template", metavar="JINJA", help="text or file, instead of the model's own")
    parser.add_argument("--continue-final-message", action="store_true", help="end with the last message, do not begin the answer")
    parser.add_argument("--json", action="store_true", help="as JSON")
    _add_settings(parser)
    parser.set_defaults(run=_lazy("kvloom.cli.render", "render"))


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


def _lazy(module: str, name: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        from importlib import import_module

        command: Callable[[argparse.Namespace], int] = getattr(import_module(module), name)
        return command(arguments)

    return run
