"""Methods of `LLM` that an engine of another task has: one error, which says what this one is for and how to make the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from kvloom.config.pooling import MODELS
from kvloom.errors import RequestValidationError


class Served(NamedTuple):
    """What models with a method are called, and the tasks of engines that have it."""

    models: str
    tasks: tuple[str, ...]


_GENERATE = Served("(conditional) generation models", ("generate",))
METHODS: Mapping[str, Served] = {
    "generate": _GENERATE, "generate_iter": _GENERATE, "chat": _GENERATE, "beam_search": _GENERATE,
    "encode": Served("pooling models", ("embed", "classify", "score", "reward")),
    "embed": Served("embedding models", ("embed",)),
    "classify": Served("models that classify", ("classify", "score")),
    "score": Served("models that embed, or have one label", ("score", "embed", "classify")),
    "reward": Served("reward models", ("reward",)),
}


def check_method(method: str, task: str) -> None:
    """Raises `RequestValidationError` in an engine that does not have this method of `LLM`.

    Args:
        task: of the engine.
    """
    served = METHODS[method]
    if task in served.tasks:
        return
    own = ", ".join(name for name, other in METHODS.items() if task in other.tasks)
    ways = " or ".join(f"task={wanted!r} ({MODELS[wanted]})" for wanted in served.tasks)
    raise RequestValidationError(f"LLM.{method}() is only supported for {served.models}: this engine runs with task={task!r} and has "
                                 f"{own}. Make an LLM with {ways}", "task", task)
