"""The process in which grammars are tried: a program of its own, started by `kvloom.text.grammar_gate` by its file's path.

Schemas and regular expressions come from callers, and what a library makes of them may explode; limits of this process bound it. The
first line says which plugin class to make, of which vocabulary; every further one is a grammar. Imports nothing of kvloom itself before
the first line says where things are; the plugin does.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from importlib import import_module
from typing import Any

MAX_PROBLEMS = 64
"""That are told of one grammar."""


def load(asked: dict[str, Any]) -> Any:
    """The grammar library."""
    sys.path[:] = asked["path"]
    component = _named(asked["target"])
    if asked["settings"] is not None:
        settings = _named(asked["settings_model"]).model_validate(asked["settings"])
        component = type(component.__name__, (component,), {"plugin_config": settings})
    vocabulary = _named("kvloom.interfaces.grammar:GrammarVocabulary")
    return component(vocabulary(tuple(map(bytes.fromhex, asked["tokens"]))))


def _named(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def attempt(grammar: Any, num_tokens: int, spec: list[str]) -> list[list[str]]:
    """Validate, compile, and make one mask; what `validate` found. Raises what the library raises."""
    read = _named("kvloom.interfaces.grammar:GrammarSpec")._make(spec)
    problems = grammar.validate(read)
    if problems:
        return [[str(part)[:1000] for part in problem] for problem in problems[:MAX_PROBLEMS]]
    grammar.compile(read).matcher().fill_masks(memoryview(bytearray(-(-num_tokens // 32) * 4)).cast("i"), ())
    return []


def limit(memory_bytes: int) -> None:
    """Bound this process's memory; it cannot raise the bound again."""
    used_pages = int(open("/proc/self/statm").read().split()[0]) if sys.platform == "linux" else 0  # noqa: SIM115
    most = used_pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not come between
    grammar, num_tokens = None, 0
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if grammar is None:
                grammar, num_tokens = load(asked), len(asked["tokens"])
                limit(int(sys.argv[1]))
            else:
                answer = {"problems": attempt(grammar, num_tokens, asked)}
        except (KeyboardInterrupt, SystemExit):
            raise
        except MemoryError:
            answer = {"error": "it needs too much memory"}
        except BaseException as error:  # noqa: BLE001  (a panic of a library in Rust is no Exception)
            who = "" if type(error).__module__ == "kvloom.errors" else f"{type(error).__name__}: "
            answer = {"error": f"{who}{str(error)[:2000]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
