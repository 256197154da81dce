"""A running engine: admits prompts, steps, and turns ended requests into outputs. `LLM` is a thin layer over it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvloom.config import EngineConfig
from kvloom.core import Engine, RequestSpec
from kvloom.errors import KvloomError, RequestError, RequestFailedError, UnsupportedFeatureError
from kvloom.hooks.loader import PluginSet
from kvloom.hooks.origin import Origin
from kvloom.interfaces import Executor, Tokenizer
from kvloom.live_request import Call, LiveRequest, LiveSequence, OnText
from kvloom.logs import get_logger
from kvloom.outputs import RequestMetrics, RequestOutput
from kvloom.params import SamplingParams
from kvloom.prompts import ParsedPrompt, parse_prompt
from kvloom.request_rules import RequestRules
from kvloom.start_report import StartReport
from kvloom.text.output import request_output
from kvloom.text.sequence_text import SequenceText

if TYPE_CHECKING:
    from kvloom.runtime.memory import MemoryPlan

REFUSALS = (RequestError, UnsupportedFeatureError)
"""What a bad request raises."""


class RunningEngine:
    """Owns the parts of an engine. Not thread-safe; several calls may be under way in one thread.

    Args:
        config: it was started with.
        rules: what requests become.
        defaults: sampling parameters of requests that bring none.
        plan: the memory plan that its worker follows.
        report: what the start took and chose.
    """

    def __init__(self, config: EngineConfig, engine: Engine, executor: Executor, plugins: PluginSet, rules: RequestRules,
                 defaults: SamplingParams, plan: MemoryPlan, report: StartReport) -> None:
        self.config, self.engine, self.executor, self.plugins = config, engine, executor, plugins
        self.rules, self.defaults, self.plan, self.report = rules, defaults, plan, report
        self._live: dict[int, tuple[LiveRequest, LiveSequence]] = {}
        self._next_number = 0

    @property
    def model_name(self) -> str:
        """See `EngineInfo`."""
        return self.config.model.model

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None with ``skip_tokenizer_init``."""
        return self.rules.tokenizer

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
        self._observe("kvloom_engine_started", self)

    # -- requests come

    def submit(self, call: Call, prompts: Sequence[Any], params: Sequence[SamplingParams], priorities: Sequence[int], *,
               return_errors: bool = False, on_text: OnText | None = None, first_place: int = 0) -> None:
        """Check and queue all prompts, or none.

        Args:
            call: gets the outputs.
            prompts: in any form that `parse_prompt` takes.
            return_errors: a prompt that cannot be served becomes an output with the error, and the others are queued.
            first_place: place of the first prompt in the call.

        Raises:
            RequestError, UnsupportedFeatureError: one of them cannot be served, and `return_errors` is False.
        """
        ready: list[tuple[LiveRequest, list[RequestSpec]]] = []
        refused: list[tuple[LiveRequest, KvloomError]] = []
        for i, (prompt, sampling, priority) in enumerate(zip(prompts, params, priorities, strict=True)):
            live = LiveRequest(str(self._next_number + i), None, first_place + i, call, on_text)
            try:
                parsed = parse_prompt(prompt)
                live.prompt = parsed.text
                ready.append((live, self._checked(parsed, sampling, self._next_number + i, priority)))
            except REFUSALS as error:
                if not return_errors:
                    raise
                refused.append((live, error))
        refused += self._queue(ready, return_errors=return_errors)
        self._next_number += len(prompts)
        for live, reason in refused:
            call.deliver(live.place, _refusal(live, reason))

    def _checked(self, prompt: ParsedPrompt, params: SamplingParams, number: int, priority: int) -> list[RequestSpec]:
        specs = self.rules.specs(prompt, params, number, priority)
        arrival_s = time.monotonic()
        return [replace(s, arrival_s=arrival_s) for s in specs]

    def _queue(self, ready: Sequence[tuple[LiveRequest, list[RequestSpec]]], *,
               return_errors: bool) -> list[tuple[LiveRequest, KvloomError]]:
        """Hand them to the scheduler; those that it refuses, or with `return_errors` False: all or none."""
        refused: list[tuple[LiveRequest, KvloomError]] = []
        try:
            for live, specs in ready:
                live.call.pending[live.place] = live
                try:
                    self._add(live, specs)
                except REFUSALS as error:
                    if not return_errors:
                        raise
                    refused.append((live, error))
        except BaseException:
            for live, _ in ready:
                self._forget(live)
            raise
        return refused

    def _add(self, live: LiveRequest, specs: Sequence[RequestSpec]) -> None:
        leader: int | None = None
        for spec in specs:
            request = self.engine.add(replace(spec, leader=leader))
            leader = request.sequence_id if leader is None else leader
            sequence = LiveSequence(request, self._text(spec, live))
            live.sequences.append(sequence)
            self._live[request.sequence_id] = live, sequence
        live.num_running = len(specs)

    def _text(self, spec: RequestSpec, live: LiveRequest) -> SequenceText | None:
        """Followed token by token where stop strings may end it or somebody reads along."""
        if self.tokenizer is None or not (spec.sampling.stop_strings or live.on_text):
            return None
        return SequenceText(self.tokenizer, spec.prompt_token_ids, spec.sampling)

    # -- requests go

    def step(self) -> None:
        """One step; requests that end are delivered to their calls."""
        for request in self.engine.step():
            if request.sequence_id not in self._live:
                continue
            live, sequence = self._live[request.sequence_id]
            try:
                piece = self._read(sequence, wanted=live.on_text is not None)
            except Exception as error:  # noqa: BLE001  (a tokenizer that cannot decode fails this request, not the engine)
                self._deliver(live, _decode_failure(live, error))
                continue
            if live.on_text is not None and piece:
                live.on_text(request.spec.sample_index, piece)
            live.num_running -= request.finish is not None
            if request.error is not None or not live.num_running:
                self._deliver(live, request.error)

    def _read(self, sequence: LiveSequence, *, wanted: bool) -> str:
        """Follow a sequence's text as far as somebody needs it, and end it at a stop string; what may be shown of it now."""
        request, text = sequence.request, sequence.text
        if text is None:
            return ""
        found = text.follow(request)
        if found is not None and request.finish is None:
            self.engine.finish(request.sequence_id, "stop", found)
        return text.take() if wanted else ""

    def _deliver(self, live: LiveRequest, error: KvloomError | None) -> None:
        try:
            output = request_output(live, self.tokenizer, error)
        except Exception as raised:  # noqa: BLE001  (see `step`)
            output = _refusal(live, error or _decode_failure(live, raised))
        self._forget(live)
        self._observe("kvloom_request_finished", output)
        live.call.deliver(live.place, output)

    def _forget(self, live: LiveRequest) -> None:
        for sequence in live.sequences:
            self.engine.abort(sequence.request.sequence_id)
            self._live.pop(sequence.request.sequence_id, None)
        live.call.pending.pop(live.place, None)

    def abort(self, call: Call) -> None:
        """Forget what a call still waits for."""
        for live in list(call.pending.values()):
            self._forget(live)

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


def _decode_failure(live: LiveRequest, error: Exception) -> RequestFailedError:
    failure = RequestFailedError(f"request {live.request_id} cannot be decoded: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _refusal(live: LiveRequest, error: KvloomError) -> RequestOutput:
    """The output of a request that has none."""
    now_s = time.monotonic()
    metrics = RequestMetrics(now_s, finished_time=now_s)
    token_ids = list(live.sequences[0].request.spec.prompt_token_ids) if live.sequences else []
    return RequestOutput(live.request_id, live.prompt, token_ids, None, [], True, metrics, error=error)
