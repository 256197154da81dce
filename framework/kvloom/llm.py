"""`LLM`: prompts in, `RequestOutput`s out."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, Self

from kvloom.beam_outputs import BeamSearchOutput
from kvloom.beam_search import search
from kvloom.calls import iterate, run
from kvloom.config import EngineConfig
from kvloom.decoding import Decoding
from kvloom.errors import EngineClosedError, RequestValidationError
from kvloom.interfaces import GrammarProblem
from kvloom.maintenance import Maintenance
from kvloom.other_arguments import refuses_arguments
from kvloom.other_versions import OtherVersions
from kvloom.outputs import RequestOutput
from kvloom.param_checks import check_int
from kvloom.params import SamplingParams
from kvloom.pooling_calls import NOT_GIVEN, PoolingCalls, prompts_of
from kvloom.prompts import LazyPrompt, split_prompts
from kvloom.request_arguments import OnError, check_on_error, one_each, pair_up, priorities_each, refuse_later
from kvloom.running import RunningEngine
from kvloom.start_report import PhaseTimer
from kvloom.startup import start_engine
from kvloom.structured_outputs import StructuredOutputsParams, from_legacy
from kvloom.text.chat import ChatOptions, ContentFormat, RenderedChat, split_conversations
from kvloom.text.tokenization import cut_prompts
from kvloom.wrong_task import check_method

P = ParamSpec("P")


def _warn_positional(init: Callable[P, None]) -> Callable[P, None]:
    """Positional arguments after `model` still work, with a warning while ``LLM.DEPRECATE_INIT_POSARGS``."""

    @functools.wraps(init)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        if len(args) > 2 and getattr(args[0], "DEPRECATE_INIT_POSARGS", False):
            warnings.warn("LLM(model, ...): pass everything after model by keyword", DeprecationWarning, stacklevel=2)
        init(*args, **kwargs)

    return wrapper


@refuses_arguments
class LLM(PoolingCalls, Maintenance, OtherVersions):
    """A model, its tokenizer and its KV cache, ready to generate. Parameter names and meanings are vLLM's; docs/api.md lists
    each with its state. Every keyword of docs/api.md is taken, unknown ones are a TypeError.

    Use it as a context manager, or call `close`, to give the memory back.

    Raises:
        ConfigError, ModelError, PluginError: before anything of the model's size was allocated, where that is possible.
    """

    DEPRECATE_LEGACY: ClassVar[bool] = True
    DEPRECATE_INIT_POSARGS: ClassVar[bool] = True
    _engine: RunningEngine | None = None

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
        given = _given(locals()) | kwargs
        self._start(lambda: EngineConfig.from_kwargs(**given))

    @classmethod
    def from_config(cls, path: str | Path, **overrides: Any) -> Self:
        """The engine that a YAML file describes; keys are the constructor's names, `overrides` win.

        Only built-in plugins and those that the file names under ``plugins:`` run.

        Args:
            path: of the file.
            overrides: the constructor's arguments, on top.

        Raises:
            UnknownKeyError: ``file:line: unknown key`` with the near name.
        """
        llm = cls.__new__(cls)
        llm._start(lambda: EngineConfig.from_file(path, **overrides))
        return llm

    def _start(self, configure: Callable[[], EngineConfig]) -> None:
        timer = PhaseTimer()
        with timer.phase("configuration"):
            config = configure()
        self._engine = start_engine(config, timer)

    @property
    def llm_engine(self) -> RunningEngine:
        """The running engine: its scheduler, tokenizer, plan and start report."""
        if self._engine is None:
            raise EngineClosedError("this LLM was closed, or did not start; make a new one")
        return self._engine

    def generate(
        self,
        prompts: Any = NOT_GIVEN,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        prompt_token_ids: Any = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        guided_options_request: Any = None,
        priority: int | Sequence[int] | None = None,
        *,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        on_error: OnError = "raise",
    ) -> list[RequestOutput]:
        """Complete prompts; results in their order. The caller's objects are not changed.

        Every prompt is checked before the first one is queued; when anything raises, nothing stays in the engine.

        Args:
            prompts: a text, a list of token ids, ``{"prompt": ...}``, ``{"prompt_token_ids": [...]}``, or a list of these.
            sampling_params: one for all, or one a prompt; None takes `get_default_sampling_params`.
            prompt_token_ids: of older versions: token ids beside or instead of `prompts`.
            use_tqdm: show a progress bar, or a function that makes one.
            lora_request, prompt_adapter_request: unsupported so far unless None.
            guided_options_request: of older versions: what the outputs must be, instead of ``structured_outputs``.
            priority: lower is served earlier, with ``scheduling_policy="priority"``; one for all or one a prompt.
            tokenization_kwargs: how prompts are cut: ``truncate_prompt_tokens``, or ``truncation`` and ``max_length``, and
                ``truncation_side``.
            on_error: "return" puts an output with ``error`` in the place of a request that cannot be served or that fails.

        Raises:
            RequestValidationError, RequestTypeError: a bad prompt or parameter; nothing was computed.
            RequestFailedError: a request failed while it ran.
        """
        check_method("generate", self.llm_engine.rules.task)
        refuse_later(lora_request=lora_request, prompt_adapter_request=prompt_adapter_request)
        items = cut_prompts(prompts_of(prompts, prompt_token_ids, warn=self.DEPRECATE_LEGACY), tokenization_kwargs)
        check_on_error(on_error)
        engine = self.llm_engine
        params = one_each(len(items), sampling_params, engine.defaults)
        if guided_options_request is not None:
            params = self._guided(params, guided_options_request)
        return run(engine, items, params, priorities_each(len(items), priority), use_tqdm, on_error)

    def generate_iter(
        self,
        prompts: Iterable[Any],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        max_in_flight: int | None = None,
        priority: int = 0,
        on_error: OnError = "raise",
    ) -> Iterator[RequestOutput]:
        """Complete prompts from an iterable that is read as there is room, and yield outputs as they finish.

        ``request_id`` counts up in the order in which prompts are read. Leaving the loop early forgets the requests under way. Other
        calls may run meanwhile.

        Args:
            prompts: each in one of `generate`'s forms.
            sampling_params: one for all, or an iterable that is read along.
            max_in_flight: requests read and not yielded yet; None: twice ``max_num_seqs``, so that the engine never waits.
            priority, on_error: as in `generate`, for all.

        Raises:
            RequestValidationError, RequestTypeError: as in `generate`; bad prompts raise when they are read.
        """
        check_on_error(on_error)
        check_method("generate_iter", self.llm_engine.rules.task)
        (checked_priority,) = priorities_each(1, priority)
        engine = self.llm_engine
        bound = 2 * engine.config.scheduler.max_num_seqs if max_in_flight is None else check_int("max_in_flight", max_in_flight, 1)
        pairs = pair_up(prompts, sampling_params, engine.defaults)
        return iterate(engine, pairs, bound, checked_priority, on_error)

    def beam_search(
        self,
        prompts: Any,
        params: Any,
        lora_request: Any = None,
        use_tqdm: bool | Callable[..., Any] = False,
        concurrency_limit: int | None = None,
        *,
        decoder: str = "beam_search",
        priority: int | Sequence[int] | None = None,
        on_error: OnError = "raise",
    ) -> list[BeamSearchOutput]:
        """Find the most probable continuations of prompts; results in their order, sequences best first.

        Args:
            prompts: as in `generate`.
            params: `BeamSearchParams`, one for all; or what another `decoder` takes.
            concurrency_limit: prompts that are under way at a time; None sets no bound but the scheduler's.
            decoder: name of a decoding algorithm that a plugin registered.
            use_tqdm, priority, on_error: as in `generate`.

        Raises:
            RequestValidationError, RequestTypeError: a bad prompt or parameter; nothing was computed.
            RequestFailedError: a request failed while it ran.
        """
        check_method("beam_search", self.llm_engine.rules.task)
        refuse_later(lora_request=lora_request)
        items = split_prompts(prompts)
        check_on_error(on_error)
        engine = self.llm_engine
        decoding = Decoding(engine.decoder(decoder), params)
        return search(engine, items, decoding, priorities_each(len(items), priority), use_tqdm, concurrency_limit, on_error)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        chat_template: str | None = None,
        chat_template_content_format: ContentFormat = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        mm_processor_kwargs: Any = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        priority: int | Sequence[int] | None = None,
        on_error: OnError = "raise",
        dry_run: bool = False,
    ) -> list[RequestOutput] | list[RenderedChat]:
        """Answer conversations: the model's chat template makes a prompt of each, `generate` completes it.

        Args:
            messages: a list of ``{"role": ..., "content": ...}``, or a list of such lists.
            chat_template: Jinja text or a file instead of the engine's (``LLM(chat_template=...)``) or the model's own.
            chat_template_content_format: how contents reach the template: "string", "openai" (lists of parts), or as it takes them.
            add_generation_prompt: end with the beginning of the assistant's message.
            continue_final_message: go on with the last message instead.
            tools: JSON objects that describe functions, for the template.
            chat_template_kwargs: further variables of the template, which must read them.
            dry_run: give text and ids of each prompt, and compute nothing.
            sampling_params, use_tqdm, tokenization_kwargs, priority, on_error: as in `generate`.
            lora_request, mm_processor_kwargs: unsupported so far unless None.

        Raises:
            RequestValidationError, RequestTypeError: no template, one that refuses the messages or takes too long, or bad messages.
            RequestFailedError: a request failed while it ran.
        """
        check_method("chat", self.llm_engine.rules.task)
        refuse_later(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        check_on_error(on_error)
        engine = self.llm_engine
        options = ChatOptions(chat_template, chat_template_content_format, add_generation_prompt, continue_final_message, tools,
                              chat_template_kwargs)
        conversations = split_conversations(messages)
        if dry_run:
            return engine.render_chats(conversations, options)
        params = one_each(len(conversations), sampling_params, engine.defaults)
        items = cut_prompts([LazyPrompt(functools.partial(engine.chat_prompt, c, options)) for c in conversations], tokenization_kwargs)
        return run(engine, items, params, priorities_each(len(items), priority), use_tqdm, on_error)

    @classmethod
    @contextmanager
    def deprecate_legacy_api(cls) -> Iterator[None]:
        """A block in which arguments of older versions warn, whatever `DEPRECATE_LEGACY` says."""
        before = cls.DEPRECATE_LEGACY
        cls.DEPRECATE_LEGACY = True
        try:
            yield
        finally:
            cls.DEPRECATE_LEGACY = before

    def _guided(self, params: Sequence[SamplingParams], request: object) -> list[SamplingParams]:
        """Copies that ask for what `guided_options_request` does."""
        if self.DEPRECATE_LEGACY:
            warnings.warn("guided_options_request is deprecated: use SamplingParams(structured_outputs=...)", DeprecationWarning,
                          stacklevel=4)
        asked = from_legacy(request)
        if any(p.structure is not None for p in params):
            raise RequestValidationError("Cannot set both guided_options_request and sampling_params.guided_decoding (or "
                                         "structured_outputs).", "guided_options_request", request)
        return [replace(p, guided_decoding=asked) for p in params]

    def validate_grammar(self, structure: StructuredOutputsParams) -> list[GrammarProblem]:
        """What the grammar backend cannot enforce: where (JSON pointer), which keyword, why. Empty: requests with it are taken.

        Args:
            structure: as a request would give it.

        Raises:
            RequestTypeError: `structure` is something else.
            RequestValidationError: it breaks a limit, or is no grammar at all.
        """
        return self.llm_engine.validate_grammar(structure)

    def get_default_sampling_params(self) -> SamplingParams:
        """What ``sampling_params=None`` means: what generation_config.json says, on top of ``SamplingParams()``. A new object."""
        return self.llm_engine.defaults.clone()

    def close(self) -> None:
        """Give back the model's and the cache's memory. Calling it twice is fine."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those constructor arguments that are not the defaults, so that `kvloom config show` and the log speak of what was given."""
    parameters = inspect.signature(LLM.__init__).parameters
    return {name: value for name, value in arguments.items()
            if name in parameters and name not in ("self", "kwargs") and value is not parameters[name].default}
