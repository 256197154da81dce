"""`LLM`: prompts in, `RequestOutput`s out."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, Self, TypeVar

from tqdm import tqdm

from kvloom.config import EngineConfig
from kvloom.errors import EngineClosedError, RequestFailedError, RequestTypeError, RequestValidationError, UnsupportedFeatureError
from kvloom.outputs import RequestOutput
from kvloom.params import SamplingParams, check_int
from kvloom.prompts import parse_prompts
from kvloom.running import RunningEngine
from kvloom.startup import start_engine

P = ParamSpec("P")
R = TypeVar("R")


def _warn_positional(init: Callable[P, None]) -> Callable[P, None]:
    """Positional arguments after `model` still work, with a warning while ``LLM.DEPRECATE_INIT_POSARGS``."""

    @functools.wraps(init)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        if len(args) > 2 and getattr(args[0], "DEPRECATE_INIT_POSARGS", False):
            warnings.warn("LLM(model, ...): pass everything after model by keyword", DeprecationWarning, stacklevel=2)
        init(*args, **kwargs)

    return wrapper


class LLM:
    """A model, its tokenizer and its KV cache, ready to generate. Parameter names and meanings are vLLM's; docs/api.md lists
    each with its state. Every keyword of docs/api.md is taken, unknown ones are a TypeError.

    Use it as a context manager, or call `close`, to give the memory back.

    Raises:
        ConfigError, ModelError, PluginError: before anything of the model's size was allocated, where that is possible.
    """

    DEPRECATE_LEGACY: ClassVar[bool] = True
    DEPRECATE_INIT_POSARGS: ClassVar[bool] = True

    @_warn_positional
    def __init__(
        self,
        model: str,
        tokenizer: str | None = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        allowed_local_media_path: str = "",
        tensor_parallel_size: int = 1,
        dtype: Any = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        seed: int | None = None,
        gpu_memory_utilization: float = 0.9,
        swap_space: float = 4,
        cpu_offload_gb: float = 0,
        enforce_eager: bool | None = None,
        max_seq_len_to_capture: int | None = 8192,
        disable_custom_all_reduce: bool = False,
        disable_async_output_proc: bool = False,
        hf_overrides: Any = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        task: str = "auto",
        override_pooler_config: Any = None,
        compilation_config: Any = None,
        **kwargs: Any,
    ) -> None:
        self._start(EngineConfig.from_kwargs(**_given(locals()), **kwargs))

    @classmethod
    def from_config(cls, path: str | Path, **overrides: Any) -> Self:
        """The engine that a YAML file describes; keys are the constructor's names, `overrides` win.

        Only built-in plugins and those that the file names under ``plugins:`` run.

        Raises:
            UnknownKeyError: ``file:line: unknown key`` with the near name.
        """
        llm = cls.__new__(cls)
        llm._start(EngineConfig.from_file(path, **overrides))
        return llm

    def _start(self, config: EngineConfig) -> None:
        self._engine: RunningEngine | None = start_engine(config)

    @property
    def llm_engine(self) -> RunningEngine:
        """The running engine: its scheduler, tokenizer, plan and start report."""
        if self._engine is None:
            raise EngineClosedError("this LLM was closed; make a new one")
        return self._engine

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        guided_options_request: Any = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts; results in their order.

        Every prompt is checked before the first one is queued; when anything raises, nothing stays in the engine.

        Args:
            prompts: a text, a list of token ids, ``{"prompt": ...}``, ``{"prompt_token_ids": [...]}``, or a list of these.
            sampling_params: one for all, or one a prompt; None takes `get_default_sampling_params`.
            use_tqdm: show a progress bar.
            priority: lower is served earlier, with ``scheduling_policy="priority"``; one for all or one a prompt.

        Raises:
            RequestValidationError, RequestTypeError: a bad prompt or parameter; nothing was computed.
            RequestFailedError: a request failed while it ran.
        """
        for name, value in (("lora_request", lora_request), ("prompt_adapter_request", prompt_adapter_request),
                            ("guided_options_request", guided_options_request)):
            if value is not None:
                raise UnsupportedFeatureError(name, value, "leave it out")
        engine = self.llm_engine
        parsed = parse_prompts(prompts)
        params = self._one_each(len(parsed), sampling_params)
        request_ids = engine.admit(parsed, params, _priorities(len(parsed), priority))
        return self._run(engine, request_ids, use_tqdm)

    def get_default_sampling_params(self) -> SamplingParams:
        """What ``sampling_params=None`` means."""
        return SamplingParams()

    def get_tokenizer(self) -> Any:
        """The tokenizer library's own object."""
        return self.llm_engine.need_tokenizer("get_tokenizer()").underlying

    def apply_model(self, function: Callable[[Any], R]) -> list[R]:
        """Call `function` with the torch module on every worker, in process; one result a worker."""
        return self.llm_engine.executor.call(lambda worker: function(worker.model))

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes. False, and nothing happens, while requests hold blocks."""
        return self.llm_engine.reset_prefix_cache()

    def close(self) -> None:
        """Give back the model's and the cache's memory. Calling it twice is fine."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _one_each(self, count: int, given: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
        """The engine's own copies, one a prompt, checked again since the caller may have changed them."""
        if given is None:
            given = self.get_default_sampling_params()
        if not isinstance(given, SamplingParams) and len(given) != count:
            raise RequestValidationError(f"The lengths of prompts and params must be the same: {count} and {len(given)}.",
                                         "sampling_params", len(given))
        copies = [p.clone() if isinstance(p, SamplingParams) else p for p in
                  ([given] * count if isinstance(given, SamplingParams) else given)]
        for p in copies:
            if not isinstance(p, SamplingParams):
                raise RequestTypeError(f"sampling_params must be SamplingParams, got {type(p).__name__}", "sampling_params", p)
            p.validate()
        return copies

    def _run(self, engine: RunningEngine, request_ids: Mapping[int, int], use_tqdm: bool) -> list[RequestOutput]:
        """Step until the requests are done; on any exception forget them all."""
        outputs: list[RequestOutput | None] = [None] * len(request_ids)
        bar = tqdm(total=len(request_ids), desc="Processed prompts", dynamic_ncols=True, disable=not use_tqdm)
        try:
            while engine.has_work:
                for sequence_id, output in engine.step():
                    if isinstance(output, RequestFailedError):
                        raise output
                    outputs[request_ids[sequence_id]] = output
                    bar.update()
        except BaseException:
            engine.abort(request_ids)
            raise
        finally:
            bar.close()
        return [_finished(o) for o in outputs]


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those constructor arguments that are not the defaults, so that `kvloom config show` and the log speak of what was given."""
    parameters = inspect.signature(LLM.__init__).parameters
    return {name: value for name, value in arguments.items()
            if name in parameters and name not in ("self", "kwargs") and value is not parameters[name].default}


def _priorities(count: int, given: int | Sequence[int] | None) -> list[int]:
    """One a prompt, checked."""
    values = [given or 0] * count if given is None or isinstance(given, int) else list(given)
    if len(values) != count:
        raise RequestValidationError(f"The lengths of prompts and priority must be the same: {count} and {len(values)}.",
                                     "priority", given)
    return [check_int("priority", v, -(2**31)) for v in values]


def _finished(output: RequestOutput | None) -> RequestOutput:
    if output is None:
        raise RequestFailedError("a request ended without an output")
    return output
