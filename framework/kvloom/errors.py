"""Every exception that kvloom raises on purpose.

KvloomError
├── ConfigError (ValueError)               a parameter or configuration value is wrong, before anything was built
│   ├── UnknownKeyError                    a key that does not exist, with the near name
│   ├── UnsupportedFeatureError            a value that kvloom does not support so far; says what works
│   ├── UnsupportedMethodError (AttributeError)  a method of another version of vLLM, with what to use here
│   └── MemoryPlanError                    weights, activations and KV cache do not fit; the message is the table
├── ModelError (ValueError)                the model directory cannot be used
│   ├── UnsupportedArchitectureError       no registered model has this architecture
│   └── CheckpointError                    missing, unused, wrong-shaped or lying tensors; unsafe formats
├── PluginError (ValueError)               anything between an entry point and a ready component
│   ├── PluginLoadError                    a named plugin cannot be imported or raised; the cause is its own exception
│   ├── PluginVersionError                 written for another version of a contract
│   ├── PluginConflictError                two distributions offer one name and the configuration does not choose
│   ├── PluginHookError                    a misspelt hook, or one with the wrong arguments
│   ├── NotRegisteredError                 nothing is registered under this name; near names and providers
│   └── ManifestMismatchError              a worker resolved other plugins than the engine
├── RequestError                           one request; its neighbours are untouched
│   ├── RequestValidationError (ValueError)  has .parameter and .value
│   │   └── LocalMediaError (RuntimeError)  a local media file that may not be read
│   ├── RequestTypeError (TypeError)       has .parameter and .value
│   └── RequestFailedError                 it failed while it ran; the cause is the plugin's or the model's exception
├── EngineStateError (RuntimeError)        not now: it sleeps, requests are under way, a late call still runs, ...
├── EngineClosedError                      the engine was closed
└── InternalError                          a bug of ours; please report it with the traceback

A foreign exception is translated at the boundary where it enters (pydantic in config/, safetensors in runtime/weights.py,
entry points in hooks/loader.py) and stays reachable as ``__cause__``.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

SHOWN_CHARACTERS, SHOWN_ITEMS = 200, 20
"""Most of a value that a message repeats."""


def shown(value: object) -> str:
    """`value` for a message: bounded in time and length, whatever a request sends, and it never raises."""
    try:
        text = _shown(value, depth=3)
    except Exception:  # noqa: BLE001  (a __repr__ of somebody's own)
        text = f"<{type(value).__name__}>"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _shown(value: object, depth: int) -> str:
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to print more than 4300 digits
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        return repr(value[:SHOWN_CHARACTERS + 1])
    if isinstance(value, dict | list | tuple | set | frozenset):
        if not depth:
            return "..."
        if isinstance(value, dict):
            parts = [f"{_shown(k, depth - 1)}: {_shown(v, depth - 1)}" for k, v in islice(value.items(), SHOWN_ITEMS)]
        else:
            parts = [_shown(item, depth - 1) for item in islice(value, SHOWN_ITEMS)]
        more = ", ..." if len(value) > SHOWN_ITEMS else ""
        left, right = ("[", "]") if isinstance(value, list) else ("(", ")") if isinstance(value, tuple) else ("{", "}")
        return f"{left}{', '.join(parts)}{more}{right}"
    return repr(value)


class KvloomError(Exception):
    """Base of everything that kvloom raises on purpose."""


class ConfigError(KvloomError, ValueError):
    """A parameter or configuration value is wrong; raised before anything was built."""


class UnknownKeyError(ConfigError):
    """A configuration key or parameter that does not exist."""


class UnsupportedFeatureError(ConfigError):
    """A value that kvloom does not support so far.

    Attributes:
        parameter: the parameter's name.
        value: what was given.
        works: what can be given instead, as a phrase.
    """

    def __init__(self, parameter: str, value: object, works: str) -> None:
        super().__init__(f"{parameter}={shown(value)} is not supported so far; {works}")
        self.parameter, self.value, self.works = parameter, value, works


class UnsupportedMethodError(ConfigError, AttributeError):
    """A method of another version of vLLM, with what to use here."""


class MemoryPlanError(ConfigError):
    """The model, its activations and the KV cache do not fit. The message is the plan's table and the value that would work."""


class ModelError(KvloomError, ValueError):
    """The model directory or hub id cannot be used."""


class UnsupportedArchitectureError(ModelError):
    """No registered model implements an architecture that config.json names."""


class CheckpointError(ModelError):
    """The checkpoint's files do not hold what the model needs, or are in a format that is never loaded."""


class PluginError(KvloomError, ValueError):
    """Anything between an entry point and a ready component."""


class PluginLoadError(PluginError):
    """A plugin could not be imported, or its hook raised. ``__cause__`` is its own exception with its own traceback."""


class PluginVersionError(PluginError):
    """A plugin was written for another version of a contract."""


class PluginConflictError(PluginError):
    """Two distributions offer one name, and the configuration does not choose."""


class PluginHookError(PluginError):
    """A plugin implements a hook that does not exist, or with arguments that the hook does not have."""


class NotRegisteredError(PluginError):
    """Nothing is registered under this name."""


class ManifestMismatchError(PluginError):
    """A worker process resolved other plugins than the engine's process."""


class RequestError(KvloomError):
    """Something about one request."""


class _ArgumentError(RequestError):
    """Shared by the two argument errors: which parameter, and what was given."""

    def __init__(self, message: str, parameter: str | None = None, value: Any = None) -> None:
        super().__init__(message)
        self.parameter, self.value = parameter, value


class RequestValidationError(_ArgumentError, ValueError):
    """A request's value is out of range, empty, too long or contradictory. Has ``.parameter`` and ``.value``."""


class LocalMediaError(RequestValidationError, RuntimeError):
    """A message names a local file, and ``allowed_local_media_path`` is empty or elsewhere."""


class RequestTypeError(_ArgumentError, TypeError):
    """A request's argument has the wrong type. Has ``.parameter`` and ``.value``."""


class RequestFailedError(RequestError):
    """A request failed while it ran. ``__cause__`` is what went wrong; the other requests go on."""


class EngineStateError(KvloomError, RuntimeError):
    """The engine cannot do this in the state that it is in. The message names the state and what leads out of it; nothing was done."""


class EngineClosedError(KvloomError):
    """The engine was closed; make a new one."""


class InternalError(KvloomError):
    """A bug of ours: an invariant does not hold. Please report it with the traceback."""
