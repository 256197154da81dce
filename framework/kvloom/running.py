"""A running engine: admits prompts, steps, and turns ended requests into outputs. `LLM` is a thin layer over it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from kvloom.config import EngineConfig
from kvloom.core import Engine, Finish, Request, RequestSpec
from kvloom.errors import RequestFailedError, RequestValidationError
from kvloom.hooks.loader import PluginSet
from kvloom.hooks.origin import Origin
from kvloom.interfaces import Executor, SequenceView, Tokenizer
from kvloom.logs import get_logger
from kvloom.outputs import RequestOutput
from kvloom.params import SamplingParams
from kvloom.prompts import ParsedPrompt, check_token_ids
from kvloom.start_report import StartReport
from kvloom.text.output import output_text, request_output, stopped_by_token
from kvloom.text.stop_strings import StopStringWatch

if TYPE_CHECKING:
    from kvloom.runtime.logits import LogitsPipeline
    from kvloom.runtime.memory import MemoryPlan


@dataclass(frozen=True, slots=True)
class RequestRules:
    """What turns a prompt and its parameters into a request of this engine.

    Args:
        seed: the engine's, for requests without one.
        vocab_size: ids that the model embeds.
        eos_token_id, extra_eos_token_ids: see `RequestSpec`.
        cache_root: of this model, see `RequestSpec`.
    """

    seed: int
    vocab_size: int
    eos_token_id: int | None
    extra_eos_token_ids: frozenset[int]
    cache_root: bytes

    @classmethod
    def of(cls, seed: int, vocab_size: int, end_token_ids: Sequence[int], tokenizer: Tokenizer | None,
           cache_root: bytes) -> RequestRules:
        """The end of text is the tokenizer's; without one, the first of `end_token_ids`."""
        eos = tokenizer.eos_token_id if tokenizer is not None else None
        if eos is None and end_token_ids:
            eos = end_token_ids[0]
        return cls(seed, vocab_size, eos, frozenset(end_token_ids) - {eos}, cache_root)

    def spec(self, token_ids: Sequence[int], sampling: SamplingParams, number: int, priority: int) -> RequestSpec:
        """One request. `number` counts requests over the life of the engine: without a seed equal prompts differ, a rerun repeats."""
        seed = sampling.seed
        if seed is None:
            seed = int.from_bytes(blake2b(struct.pack("<QQ", self.seed % 2**64, number), digest_size=8).digest(), "little")
        return RequestSpec(tuple(token_ids), sampling, priority, self.eos_token_id, self.extra_eos_token_ids, seed % 2**64,
                           cache_root=self.cache_root)


@dataclass(frozen=True, slots=True)
class _Admitted:
    """A request in the engine: its public id, its prompt's text, and its own text where stop strings are looked for."""

    request_id: str
    text: str | None
    watch: StopStringWatch | None = None


class RunningEngine:
    """Owns the parts of an engine. Not thread-safe.

    Args:
        config: it was started with.
        pipeline: the logits processors, for checking requests.
        plan: the memory plan that its worker follows.
        report: what the start took and chose.
    """

    def __init__(self, config: EngineConfig, engine: Engine, executor: Executor, plugins: PluginSet, tokenizer: Tokenizer | None,
                 rules: RequestRules, pipeline: LogitsPipeline, plan: MemoryPlan, report: StartReport) -> None:
        self.config, self.engine, self.executor, self.plugins = config, engine, executor, plugins
        self.tokenizer, self.rules, self.plan, self.report = tokenizer, rules, plan, report
        self._pipeline = pipeline
        self._admitted: dict[int, _Admitted] = {}
        self._next_number = 0

    @property
    def model_name(self) -> str:
        """See `EngineInfo`."""
        return self.config.model.model

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return self.engine.has_work

    def stats(self) -> Mapping[str, float]:
        """See `EngineInfo`."""
        scheduler = self.engine.scheduler
        return {"num_running": scheduler.num_running, "num_waiting": scheduler.num_waiting,
                "free_blocks": scheduler.num_free_blocks, "total_blocks": scheduler.num_usable_blocks}

    def announce(self) -> None:
        """Tell observers that the engine is ready."""
        get_logger().info("engine started", model=self.model_name, seconds=round(self.report.total_s, 2),
                          blocks=self.plan.num_blocks, tokens=self.plan.capacity_tokens)
        self._observe("kvloom_engine_started", self)

    def admit(self, prompts: Sequence[ParsedPrompt], params: Sequence[SamplingParams], priorities: Sequence[int]) -> dict[int, int]:
        """Check and queue all prompts, or none: sequence id -> place in `prompts`.

        Raises:
            RequestValidationError: one of them cannot be served.
        """
        specs = [self.rules.spec(self._encode(prompt), sampling, self._next_number + i, priority)
                 for i, (prompt, sampling, priority) in enumerate(zip(prompts, params, priorities, strict=True))]
        for spec in specs:  # what processors refuse, they refuse here; the worker makes its own states
            self._pipeline.start(SequenceView(-1, spec.sample_index, spec.prompt_token_ids, spec.sampling, self.rules.vocab_size,
                                              spec.end_token_ids))
        admitted = [_Admitted(str(self._next_number + i), prompt.text, self._watch(spec))
                    for i, (spec, prompt) in enumerate(zip(specs, prompts, strict=True))]
        places: dict[int, int] = {}
        try:
            for place, (spec, about) in enumerate(zip(specs, admitted, strict=True)):
                request = self.engine.add(spec)
                places[request.sequence_id] = place
                self._admitted[request.sequence_id] = about
        except BaseException:
            self.abort(places)
            raise
        self._next_number += len(specs)
        return places

    def _watch(self, spec: RequestSpec) -> StopStringWatch | None:
        if not spec.sampling.stop_strings:
            return None
        return StopStringWatch(self.need_tokenizer("stop strings"), spec.prompt_token_ids, spec.sampling)

    def _encode(self, prompt: ParsedPrompt) -> Sequence[int]:
        token_ids: Sequence[int] | None = prompt.token_ids
        if token_ids is None:
            token_ids = self.need_tokenizer("text prompts").encode(prompt.text or "")
        if not token_ids:
            raise RequestValidationError("The prompt cannot be empty: the tokenizer made no token of it", "prompt", prompt.text)
        check_token_ids(token_ids, self.rules.vocab_size)
        return token_ids

    def need_tokenizer(self, what: str) -> Tokenizer:
        """The tokenizer. Raises `RequestValidationError` that says what needs it."""
        if self.tokenizer is None:
            raise RequestValidationError(f"Unable to get tokenizer because skip_tokenizer_init is True, and {what} need one; "
                                         "give prompt_token_ids", "prompt", what)
        return self.tokenizer

    def step(self) -> Iterator[tuple[int, RequestOutput | RequestFailedError]]:
        """One step; ``(sequence id, output)`` of each request that ended, or why it failed."""
        for request in self.engine.step():
            admitted = self._admitted.get(request.sequence_id)
            if admitted is None:
                continue
            if admitted.watch is not None:
                self._look_for_stops(request, admitted.watch)
            if request.finish is not None:
                yield request.sequence_id, self._end(request, request.finish)

    def _look_for_stops(self, request: Request, watch: StopStringWatch) -> None:
        """Feed new tokens; end the request at a stop string."""
        new = request.token_ids[request.prompt_tokens + watch.num_tokens:]
        found = watch.add(new[:-1] if stopped_by_token(request) and not request.spec.sampling.include_stop_str_in_output else new)
        if found is None and request.finish is not None:
            watch.finish()
        elif found is not None and request.finish is None:
            self.engine.finish(request.sequence_id, "stop", found)

    def _end(self, request: Request, finish: Finish) -> RequestOutput | RequestFailedError:
        admitted = self._admitted.pop(request.sequence_id)
        if finish.reason == "error":
            return request.error or RequestFailedError(f"request {admitted.request_id} failed")
        try:
            text = output_text(request, self.tokenizer) if admitted.watch is None else admitted.watch.text
            output = request_output(admitted.request_id, admitted.text, request, text)
        except Exception as error:  # noqa: BLE001  (a tokenizer that cannot decode fails this request, not the engine)
            failure = RequestFailedError(f"request {admitted.request_id} cannot be decoded: {type(error).__name__}: {error}")
            failure.__cause__ = error
            return failure
        self._observe("kvloom_request_finished", output)
        return output

    def abort(self, sequence_ids: Iterable[int]) -> None:
        """Forget requests, and finish the steps that still contain them."""
        for sequence_id in sequence_ids:
            self.engine.abort(sequence_id)
            self._admitted.pop(sequence_id, None)

    def reset_prefix_cache(self) -> bool:
        """See `LLM.reset_prefix_cache`."""
        return self.engine.scheduler.forget_prefixes()

    def close(self) -> None:
        """Free the model and the cache."""
        self.executor.close()

    def _observe(self, hook: str, value: Any) -> None:
        """An onlooker must not end requests: one that raises is named in the log."""
        observers: Iterable[tuple[Origin, Callable[[Any], object]]] = self.plugins.observers[hook]
        for origin, observer in observers:
            try:
                observer(value)
            except Exception as error:  # noqa: BLE001  (see above)
                get_logger().warning("observer failed", hook=hook, plugin=str(origin), error=repr(error), exc_info=error)
