"""What `LLM` does besides serving requests: calls on workers, its tokenizer, sleep, profiles, the prefix cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from kvloom.errors import RequestTypeError, RequestValidationError, UnsupportedFeatureError, shown
from kvloom.interfaces import Worker
from kvloom.other_arguments import refuses_arguments
from kvloom.param_checks import check_int, check_number

if TYPE_CHECKING:
    from kvloom.running import RunningEngine

R = TypeVar("R")
ENGINES_OWN = frozenset(name for name, value in vars(Worker).items() if not name.startswith("_") and callable(value))
"""Methods of workers that change what the engine counts on."""
LONGEST_TIMEOUT_S = 10.0**6


@refuses_arguments
class Maintenance(ABC):
    """A base of `LLM`."""

    @property
    @abstractmethod
    def llm_engine(self) -> RunningEngine:
        """The running engine."""

    # -- workers

    def collective_rpc(self, method: str | Callable[..., R], timeout: float | None = None, args: Sequence[Any] = (),
                       kwargs: Mapping[str, Any] | None = None) -> list[R]:
        """Call a worker's method by name, or a function with the worker as its first argument; one result a worker, by rank.

        A call cannot be stopped. One that is late goes on: until it ends, requests and further calls are refused, and `close` works.

        Args:
            method: its name, or a function.
            timeout: seconds to wait; None: as long as it takes.
            args, kwargs: for it.

        Raises:
            RequestTypeError: `method` is neither, or `args` or `kwargs` are no arguments.
            RequestValidationError: a method that the engine itself calls, such as "sleep": it would not know.
            AttributeError: workers have no such method.
            TimeoutError: it took longer than `timeout`.
            EngineStateError: an earlier call was late and still runs.
            Exception: whatever the method raises.
        """
        _check_callable("method", method, or_text=True)
        _check_arguments(args, kwargs)
        if isinstance(method, str) and method in ENGINES_OWN:
            instead = f"use LLM.{method}()" if hasattr(self, method) else "give a function that does what you need"
            raise RequestValidationError(f"collective_rpc({method!r}): only the engine calls that method of its workers, or it would "
                                         f"not know what they do; {instead}", "method", method)
        if timeout is not None:
            timeout = check_number("timeout", timeout, 0, LONGEST_TIMEOUT_S, above_low=True)
        return self.llm_engine.call_workers("collective_rpc()", method, timeout, args, kwargs)

    def apply_model(self, func: Callable[[Any], R]) -> list[R]:
        """Call a function with the torch module on every worker, in process; one result a worker.

        Args:
            func: gets the module.

        Raises:
            RequestTypeError: it is no function.
            Exception: whatever it raises.
        """
        _check_callable("func", func)
        return self.llm_engine.call_workers("apply_model()", lambda worker: func(worker.model))

    # -- tokenizer

    def get_tokenizer(self) -> Any:
        """The tokenizer library's own object."""
        return self.llm_engine.rules.need_tokenizer("get_tokenizer()", "tokenizer", "use set_tokenizer").underlying

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Use another tokenizer for later requests: its end-of-text token and chat template too.

        Args:
            tokenizer: of the transformers library, or a `kvloom.interfaces.Tokenizer`.

        Raises:
            RequestTypeError: it is neither.
            RequestValidationError: it knows token ids that the model does not.
            EngineStateError: requests are under way.
        """
        self.llm_engine.set_tokenizer(tokenizer)

    # -- memory

    def reset_prefix_cache(self, device: Any = None) -> bool:
        """Forget cached prefixes, those on the host too. False, and nothing happens, while requests hold blocks.

        Args:
            device: of vLLM: whose cache; None or this engine's device, by its name.

        Raises:
            UnsupportedFeatureError: another device.
        """
        names = self.llm_engine.device_names
        if device is not None and str(getattr(device, "name", device)).lower() not in names:
            raise UnsupportedFeatureError("device", device, f"this engine's blocks are on {names[0]!r}; leave it out")
        return self.llm_engine.reset_prefix_cache()

    def sleep(self, level: int = 1) -> None:
        """Give memory back until `wake_up`. Cached prefixes are forgotten; requests are refused meanwhile. Asleep already: a warning.

        Args:
            level: 1 drops the KV cache and keeps the weights on the host; on a CPU device they are there anyway. 2 drops both, and
                `wake_up` reads the checkpoint again.

        Raises:
            EngineStateError: without ``enable_sleep_mode=True``, or while requests are under way.
            RequestValidationError: another level.
        """
        if level == 0 and not isinstance(level, bool):
            raise UnsupportedFeatureError("level", level, "between calls of LLM nothing runs that could be paused; use 1 or 2")
        self.llm_engine.sleep(check_int("level", level, 1, 2))

    def wake_up(self, tags: Iterable[str] | None = None) -> bool:
        """Take memory again. True when everything is awake; awake already: a warning.

        Args:
            tags: parts to wake, of "weights" and "kv_cache"; None wakes both. When that raises, everything sleeps as before.

        Raises:
            RequestTypeError, RequestValidationError: other tags.
            MemoryPlanError: the memory was taken by others meanwhile.
        """
        return self.llm_engine.wake_up(tags)

    # -- profiles

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """Record what steps of this thread do with torch's profiler, until `stop_profile`.

        Args:
            profile_prefix: what the files' names begin with.

        Raises:
            EngineStateError: without ``profile_dir=...``, or when it was started already, here or by somebody else.
            ConfigError: the folder cannot be made.
        """
        if profile_prefix is not None and not isinstance(profile_prefix, str):
            raise RequestTypeError(f"profile_prefix must be text, got {shown(profile_prefix)}", "profile_prefix", profile_prefix)
        self.llm_engine.start_profile(profile_prefix or "")

    def stop_profile(self) -> list[str]:
        """Write the traces: one Chrome trace file a worker; their paths.

        Raises:
            EngineStateError: it was not started, or in another thread.
            ConfigError: a file cannot be written.
        """
        return self.llm_engine.stop_profile()


def _check_callable(name: str, value: object, *, or_text: bool = False) -> None:
    if not callable(value) and not (or_text and isinstance(value, str)):
        what = "a method's name or a function" if or_text else "a function"
        raise RequestTypeError(f"{name} must be {what}, got {shown(value)}", name, value)


def _check_arguments(args: object, kwargs: object) -> None:
    if not isinstance(args, list | tuple):
        raise RequestTypeError(f"args must be a list or tuple of arguments, got {shown(args)}", "args", args)
    if kwargs is not None and not (isinstance(kwargs, Mapping) and all(isinstance(name, str) for name in kwargs)):
        raise RequestTypeError(f"kwargs must be a dict from names to arguments, or None, got {shown(kwargs)}", "kwargs", kwargs)
