"""A running engine: admits prompts, steps, and turns ended requests into outputs. `LLM` is a thin layer over it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import finalize

from kvloom.config import EngineConfig
from kvloom.core import Engine, Request, RequestSpec
from kvloom.decoding import NamedDecoder, find_decoder
from kvloom.errors import (
    EngineClosedError,
    InternalError,
    KvloomError,
    RequestError,
    RequestFailedError,
    RequestTypeError,
    UnsupportedFeatureError,
)
from kvloom.hooks.loader import PluginSet
from kvloom.hooks.origin import Origin
from kvloom.interfaces import Executor, Tokenizer
from kvloom.interrupts import held
from kvloom.live_request import Call, LiveRequest, LiveSequence, MakeOutput, OnText, Params
from kvloom.logs import get_logger
from kvloom.other_versions import OtherEngineVersions
from kvloom.params import SamplingParams
from kvloom.prompts import ParsedPrompt, parse_prompt
from kvloom.request_counter import RequestCounter
from kvloom.request_rules import RequestRules
from kvloom.runtime.host_memory import held_bytes
from kvloom.sleep import Sleeper
from kvloom.start_report import StartReport
from kvloom.text.chat import ChatFormatter
from kvloom.text.sequence_text import SequenceText
from kvloom.turn import Turn
from kvloom.upkeep import Upkeep

if TYPE_CHECKING:
    from kvloom.runtime.memory import MemoryPlan

REFUSALS = (RequestError, UnsupportedFeatureError)
"""What a bad request raises."""


class RunningEngine(Upkeep, OtherEngineVersions):
    """Owns the parts of an engine. Several calls may be under way, in one thread or in several, which take turns step by step.

    Args:
        config: it was started with.
        rules: what requests become.
        defaults: sampling parameters of requests that bring none.
        plan: the memory plan that its worker follows.
        report: what the start took and chose.
        device_names: what its device is called.
    """

    def __init__(self, config: EngineConfig, engine: Engine, executor: Executor, plugins: PluginSet, rules: RequestRules,
                 defaults: SamplingParams, plan: MemoryPlan, report: StartReport, device_names: tuple[str, ...]) -> None:
        self.config, self.engine, self.executor, self.plugins = config, engine, executor, plugins
        self.rules, self.defaults, self.plan, self.report = rules, defaults, plan, report
        self.device_names = device_names
        self.sleeper = Sleeper(executor, lambda: sum(executor.call(held_bytes)))
        self._chat: ChatFormatter | None = None
        self._changed: deque[Request] = deque()  # by steps, and not looked at yet
        self._turn, self._is_closed = Turn(), False
        self._dropped: deque[Call] = deque()  # whose callers gave up while it was not their turn
        self._live: dict[int, tuple[LiveRequest, LiveSequence]] = {}
        self.numbers = RequestCounter()
        self._decoders: dict[str, NamedDecoder] = {}
        finalize(self, executor.close).atexit = False  # an engine that is dropped without close() gives its memory back at once too

    @property
    def model_name(self) -> str:
        """See `EngineInfo`."""
        return self.config.model.name

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None with ``skip_tokenizer_init``."""
        return self.rules.tokenizer

    def decoder(self, name: str) -> NamedDecoder:
        """The decoding algorithm of this name, made once an engine. Raises `RequestValidationError` when there is none."""
        if not isinstance(name, str):
            raise RequestTypeError(f"decoder must be a name, got {type(name).__name__}", "decoder", name)
        if name not in self._decoders:
            self._decoders[name] = find_decoder(self.plugins.registries["decoders"], name)
        return self._decoders[name]

    @property
    def num_live(self) -> int:
        """See `Upkeep`."""
        return len(self._live)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return self.engine.has_work or any(r.sequence_id in self._live for r in self._changed)

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """For what may not be called by two threads at once, nor from inside itself."""
        with self._turn.take(what):
            if self._is_closed:
                raise EngineClosedError("the engine was closed; make a new LLM")
            self._forget_dropped()
            yield

    def _check_ready(self) -> None:
        self.sleeper.check_awake()
        self.executor.check_ready()

    def stats(self) -> Mapping[str, float]:
        """See `EngineInfo`."""
        scheduler = self.engine.scheduler
        return {"num_running": scheduler.num_running, "num_waiting": scheduler.num_waiting,
                "free_blocks": scheduler.num_free_blocks, "total_blocks": scheduler.num_usable_blocks}

    def announce(self) -> None:
        """Tell observers that the engine is ready."""
        self._observe("kvloom_engine_started", self)

    # -- requests come

    def submit(self, call: Call, prompts: Sequence[Any], params: Sequence[Params], priorities: Sequence[int], *,
               return_errors: bool = False, on_text: OnText | None = None, first_place: int = 0) -> None:
        """Check and queue all prompts, or none.

        Args:
            call: gets the outputs.
            prompts: in any form that `parse_prompt` takes.
            params: how to sample each, or a decoder in its place.
            return_errors: a prompt that cannot be served becomes an output with the error, and the others are queued.
            on_text: told of new text as it comes; what it raises, `step` raises.
            first_place: place of the first prompt in the call.

        Raises:
            RequestError, UnsupportedFeatureError: one of them cannot be served, and `return_errors` is False.
            EngineStateError: it sleeps, or a late call still runs.
        """
        with self._alone("submit"):
            self._check_ready()
            ready: list[tuple[LiveRequest, list[RequestSpec]]] = []
            refused: list[tuple[LiveRequest, KvloomError]] = []
            for i, (prompt, own, priority) in enumerate(zip(prompts, params, priorities, strict=True)):
                live = LiveRequest(str(self.numbers.counter + i), None, first_place + i, call, MakeOutput.of(own), on_text)
                try:
                    ready.append((live, self._read_prompt(live, prompt, own, self.numbers.counter + i, priority)))
                except REFUSALS as error:
                    if not return_errors:
                        raise
                    refused.append((live, error))
            with held():
                refused += self._queue(ready, return_errors=return_errors)
                self.numbers.counter += len(prompts)
        for live, reason in refused:
            call.deliver(live.place, live.output.refused(live, reason))

    def check(self, prompts: Sequence[Any], params: Sequence[Params], priorities: Sequence[int]) -> None:
        """What `submit` would raise for prompts that are submitted later; nothing is queued."""
        with self._alone("check"):
            for i, (prompt, own, priority) in enumerate(zip(prompts, params, priorities, strict=True)):
                live = LiveRequest(str(self.numbers.counter + i), None, i, Call(), MakeOutput.of(own))
                for spec in self._read_prompt(live, prompt, own, self.numbers.counter + i, priority):
                    self.engine.scheduler.check(spec)

    def _read_prompt(self, live: LiveRequest, prompt: Any, params: Params, number: int, priority: int) -> list[RequestSpec]:
        """A request's sequences, with their texts. Whatever goes wrong here is this request's failure, as a `RequestError`."""
        try:
            parsed = parse_prompt(prompt)
            live.prompt = parsed.text
            specs = self._checked(parsed, params, number, priority)
            live.texts = [self._text(spec, live) for spec in specs]
            live.num_running = len(specs)
        except REFUSALS:
            raise
        except Exception as error:
            raise _failure(live, "cannot be read", error) from error
        return specs

    def _checked(self, prompt: ParsedPrompt, params: Params, number: int, priority: int) -> list[RequestSpec]:
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
        for spec, text in zip(specs, live.texts, strict=True):
            sequence = LiveSequence(self.engine.add(replace(spec, leader=leader)), text)
            live.sequences.append(sequence)
            leader = sequence.request.sequence_id if leader is None else leader
            self._live[sequence.request.sequence_id] = live, sequence

    def _text(self, spec: RequestSpec, live: LiveRequest) -> SequenceText | None:
        """Followed token by token where stop strings may end it or somebody reads along."""
        sampling = spec.sampling
        if self.tokenizer is None or sampling is None or not sampling.detokenize or not (sampling.stop_strings or live.on_text):
            return None
        return SequenceText(self.tokenizer, spec.prompt_token_ids, sampling)

    # -- requests go

    def step(self, call: Call | None = None) -> None:
        """One step; requests that end are delivered to their calls. Ctrl-C is heard at its end.

        Args:
            call: who waits; nothing happens when another thread's step has ended all its requests.

        Raises:
            InternalError: there is nothing to do, so whoever waits would wait for ever.
            EngineStateError: a late call still runs; no request has ended.
        """
        with held(), self._alone("a step"):
            if call is not None and not call.num_unfinished:
                return
            self._check_ready()
            if not self.has_work:
                raise InternalError("a call waits for requests, but the engine has none")
            if not self._changed:
                try:
                    self._changed.extend(self.engine.step())
                finally:
                    self._changed.extend(self.engine.take_interrupted())
            while self._changed:  # what an exception leaves here is looked at next time
                self._look_at(self._changed.popleft())

    def _look_at(self, request: Request) -> None:
        if request.sequence_id not in self._live:
            return
        live, sequence = self._live[request.sequence_id]
        try:
            piece = self._read(sequence, wanted=live.on_text is not None)
        except Exception as error:  # noqa: BLE001  (a tokenizer that cannot decode fails this request, not the engine)
            self._deliver(live, _failure(live, "cannot be decoded", error))
            return
        if live.on_text is not None and piece:
            live.on_text(request.spec.sample_index, piece)
        if request.finish is not None and not sequence.is_over:
            sequence.is_over = True
            live.num_running -= 1
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
            output = live.output.ended(live, self.tokenizer, error)
        except Exception as raised:  # noqa: BLE001  (see `_look_at`)
            output = live.output.refused(live, error or _failure(live, "cannot be decoded", raised))
        self._forget(live)
        live.call.deliver(live.place, output)
        self._observe("kvloom_request_finished", output)

    def _forget(self, live: LiveRequest) -> None:
        for sequence in live.sequences:
            self.engine.abort(sequence.request.sequence_id)
            self._live.pop(sequence.request.sequence_id, None)
        live.call.pending.pop(live.place, None)

    def abort(self, call: Call) -> None:
        """Forget what a call still waits for: now, or when the turn comes next."""
        if not call.pending:
            return
        self._dropped.append(call)
        with held(), self._turn.try_to_take() as is_mine:
            if is_mine:
                self._forget_dropped()

    def _forget_dropped(self) -> None:
        while self._dropped:
            for live in list(self._dropped.popleft().pending.values()):
                self._forget(live)

    def close(self) -> None:
        """Free the model and the cache. Raises `RequestFailedError` when a step is under way."""
        with self._turn.take("close"):
            if self._is_closed:
                return
            self._is_closed = True
        if self._chat is not None:
            self._chat.close()
        if self.rules.grammars is not None:
            self.rules.grammars.close()
        self.executor.close()

    def _observe(self, hook: str, value: Any) -> None:
        """An onlooker must not end requests: one that raises is named in the log."""
        observers: Iterable[tuple[Origin, Callable[[Any], object]]] = self.plugins.observers[hook]
        for origin, observer in observers:
            try:
                observer(value)
            except Exception as error:  # noqa: BLE001  (see above)
                get_logger().warning("observer failed", hook=hook, plugin=str(origin), error=repr(error), exc_info=error)


def _failure(live: LiveRequest, what: str, error: Exception) -> RequestFailedError:
    failure = RequestFailedError(f"request {live.request_id} {what}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
