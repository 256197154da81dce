"""Steps and results as bytes (msgpack), for executors whose workers live in other processes.

NamedTuples travel as arrays in field order, dataclasses as arrays of their fields; sender and receiver are one version of
kvloom. Tuples come back as tuples.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgpack

from kvloom.errors import InternalError, UnsupportedFeatureError
from kvloom.interfaces.grammar import GrammarSpec
from kvloom.interfaces.step import (
    BlockCopy,
    BlockMove,
    EncoderWork,
    NewSequence,
    Pooled,
    RowError,
    RowResult,
    Step,
    StepResult,
    TokenLogprob,
    TokenRange,
)
from kvloom.params import PoolingParams, RequestOutputKind, SamplingParams

_STEP, _RESULT = "step", "result"


def to_wire(message: Step | StepResult) -> bytes:
    """Serialise.

    Raises:
        UnsupportedFeatureError: parameters hold something that is no plain data (a callable).
    """
    if isinstance(message, Step):
        sequences = [[_sequence(s) for s in some] for some in (message.new, message.resumed)]
        rest = (message.ranges, message.preempted, message.finished, message.copies, message.swap_out, message.swap_in,
                message.encoder)
        return _pack((_STEP, message.step_id, *sequences, *rest))
    return _pack((_RESULT, message.step_id, [(*row[:-1], row.error and _values(row.error)) for row in message.rows]))


def from_wire(data: bytes) -> Step | StepResult:
    """The message that `to_wire` was given.

    Raises:
        InternalError: `data` is not one.
    """
    kind, step_id, *parts = msgpack.unpackb(data, use_list=False, strict_map_key=False)
    if kind == _STEP:
        return _read_step(step_id, *parts)
    if kind == _RESULT:
        return StepResult(step_id, tuple(map(_read_row, parts[0])))
    raise InternalError(f"{kind!r} is no message between an engine and its workers")


def _pack(value: Any) -> bytes:
    return msgpack.packb(value, default=_refuse)  # type: ignore[no-any-return]  # msgpack has no types


def _refuse(value: Any) -> Any:
    raise UnsupportedFeatureError("a request parameter", value, "to another process only plain data can travel: numbers, text, lists")


def _values(data: RowError | NewSequence) -> tuple[Any, ...]:
    return tuple(getattr(data, f.name) for f in fields(data))


def _sequence(new: NewSequence) -> tuple[Any, ...]:
    values = {f.name: getattr(new, f.name) for f in fields(new)}
    values["sampling"], values["pooling"] = _params(new.sampling), _params(new.pooling)
    return tuple(values.values())


def _params(params: SamplingParams | PoolingParams | None) -> bytes | None:
    """As bytes of their own: unlike a step's, their sequences are lists."""
    return None if params is None else _pack({f.name: getattr(params, f.name) for f in fields(params)})


def _read_sampling(data: bytes | None) -> SamplingParams | None:
    if data is None:
        return None
    named = msgpack.unpackb(data, strict_map_key=False)
    return SamplingParams(**named | {"output_kind": RequestOutputKind(named["output_kind"])})


def _read_sequence(values: tuple[Any, ...]) -> NewSequence:
    named = dict(zip((f.name for f in fields(NewSequence)), values, strict=True))
    named["sampling"] = _read_sampling(named["sampling"])
    named["grammar"] = named["grammar"] and GrammarSpec._make(named["grammar"])
    named["pooling"] = named["pooling"] and PoolingParams(**msgpack.unpackb(named["pooling"]))
    return NewSequence(**named)


def _read_step(step_id: int, new: Any, resumed: Any, ranges: Any, preempted: Any, finished: Any, copies: Any, swap_out: Any,
               swap_in: Any, encoder: Any) -> Step:
    return Step(
        step_id,
        ranges=tuple(map(TokenRange._make, ranges)),
        new=tuple(map(_read_sequence, new)),
        resumed=tuple(map(_read_sequence, resumed)),
        preempted=preempted,
        finished=finished,
        copies=tuple(map(BlockCopy._make, copies)),
        swap_out=tuple(map(BlockMove._make, swap_out)),
        swap_in=tuple(map(BlockMove._make, swap_in)),
        encoder=tuple(map(EncoderWork._make, encoder)),
    )


def _read_row(values: tuple[Any, ...]) -> RowResult:
    row = RowResult(*values)
    return row._replace(
        logprobs=_read_logprobs(row.logprobs),
        prompt_logprobs=_read_logprobs(row.prompt_logprobs),
        pooled=row.pooled and Pooled(*row.pooled),
        error=row.error and RowError(*row.error),  # type: ignore[misc]  # still the plain tuple that travelled
    )


def _read_logprobs(positions: Any) -> tuple[tuple[TokenLogprob, ...], ...] | None:
    return None if positions is None else tuple(tuple(map(TokenLogprob._make, candidates)) for candidates in positions)
