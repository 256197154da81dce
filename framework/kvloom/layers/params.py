"""Which part of a checkpoint tensor this rank keeps, and where it lands in a fused parameter. Pure arithmetic over `ParamSpec`.

    checkpoint tensor of shard "k"            parameter of the fused layer on this rank
    [ rank 0 | rank 1 | ... ]   --source-->   [ q | k | v ]   <--target--

Every quantization format is described by the same few fields, so nothing here knows a format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kvloom.errors import ConfigError, PluginError
from kvloom.interfaces.quant import LinearShape, MergeRule, ParamSpec

Index = tuple[slice | int, ...]


class Span(NamedTuple):
    """This rank's features [start, stop) out of `whole`, stored in room for `room` of them (more than there are: padding)."""

    start: int
    stop: int
    room: int
    whole: int

    @classmethod
    def all_of(cls, features: int) -> Span:
        """An axis that is not divided."""
        return cls(0, features, features, features)

    @classmethod
    def part(cls, features: int, index: int, parts: int) -> Span:
        """One of `parts` equal parts; the caller has checked that they are equal."""
        size = features // parts
        return cls(index * size, (index + 1) * size, size, features)

    @classmethod
    def padded_part(cls, features: int, index: int, parts: int, multiple: int) -> Span:
        """One of `parts` parts of equal room, a multiple of `multiple`; the last ones may hold less than their room."""
        room = features if parts == 1 else math.ceil(features / parts / multiple) * multiple
        return cls(min(index * room, features), min((index + 1) * room, features), room, features)


class Placement(NamedTuple):
    """Copy ``tensor[source]`` of one shard to ``parameter[target]``."""

    source: Index
    target: Index


@dataclass(frozen=True)
class ParamPlan:
    """One parameter of a layer on this rank.

    Args:
        shape, dtype: of the parameter; dtype by name.
        specs, placements: by shard.
        padded: whether some elements belong to no checkpoint tensor; they are zero.
    """

    shape: tuple[int, ...]
    dtype: str
    merge: MergeRule
    specs: Mapping[str | None, ParamSpec]
    placements: Mapping[str | None, Placement]
    padded: bool = False


def in_span(shape: LinearShape) -> Span:
    """Input features of this rank. Raises `ConfigError` when they do not divide."""
    if shape.sharded_axis != "in":
        return Span.all_of(shape.in_features)
    _check_divides(shape.prefix, "input", shape.in_features, shape.size)
    return Span.part(shape.in_features, shape.rank, shape.size)


def out_spans(shape: LinearShape) -> dict[str | None, Span]:
    """Output features of this rank, by shard. Raises `ConfigError` when they do not divide."""
    if shape.sharded_axis != "out":
        return {shard: Span.all_of(features) for shard, features in shape.shards}
    replicas = dict(shape.replicas)
    spans: dict[str | None, Span] = {}
    for shard, features in shape.shards:
        ranks_per_part = replicas.get(shard, 1)
        _check_divides(shape.prefix, "output", features, shape.size // ranks_per_part)
        spans[shard] = Span.part(features, shape.rank // ranks_per_part, shape.size // ranks_per_part)
    return spans


def plan_param(name: str, specs: Mapping[str | None, ParamSpec], inputs: Span, outputs: Mapping[str | None, Span]) -> ParamPlan:
    """Lay out one parameter.

    Args:
        name: checkpoint name of the first shard's tensor, for messages.
        specs: by shard, in the order in which the shards lie side by side.
        inputs, outputs: this rank's features; outputs by shard.

    Raises:
        PluginError: the specs of a quantization method contradict each other or the layer.
        ConfigError: the tensor-parallel size cuts through a packed element or a group.
    """
    first = next(iter(specs.values()))
    if any((s.dtype, s.merge, s.out_axis) != (first.dtype, first.merge, first.out_axis) for s in specs.values()):
        raise PluginError(f"{name}: the fused shards {list(specs)} must agree in dtype, merge and out_axis, got {dict(specs)}")
    sources = {shard: _rank_part(name, spec, inputs, outputs[shard]) for shard, spec in specs.items()}
    targets, shape = _merge(name, first, {shard: room for shard, (_, room) in sources.items()})
    placements: dict[str | None, Placement] = {}
    for shard, (source, _) in sources.items():
        filled = tuple(t if isinstance(t, int) else slice(t.start, t.start + _length(s))
                       for t, s in zip(targets[shard], _aligned(source, targets[shard]), strict=True))
        placements[shard] = Placement(source, filled)
    padded = any(_length(s) != n for source, room in sources.values() for s, n in zip(source, room, strict=True))
    return ParamPlan(shape, first.dtype, first.merge, dict(specs), placements, padded)


def _rank_part(name: str, spec: ParamSpec, inputs: Span, outputs: Span) -> tuple[tuple[slice, ...], tuple[int, ...]]:
    """What this rank reads of one shard's tensor, and how many elements it keeps room for, axis by axis."""
    source, room = [], []
    for axis, elements in enumerate(spec.shape):
        span = inputs if axis == spec.in_axis else outputs if axis == spec.out_axis else None
        if span is None or span.room == span.whole:
            source.append(slice(0, elements))
            room.append(elements)
            continue
        per_element = _features_per_element(spec, axis)
        if math.ceil(span.whole / per_element) != elements:
            raise PluginError(f"{name}: axis {axis} of {spec} has {elements} elements of {per_element} features, "
                              f"the layer has {span.whole} features there")
        if span.room % per_element:  # every start is a multiple of the room, or the end
            raise ConfigError(f"{name}: tensor_parallel_size would cut features [{span.start}, {span.stop}) out of {span.whole}, "
                              f"but {per_element} features are stored together; choose a size that keeps them whole")
        source.append(slice(math.ceil(span.start / per_element), math.ceil(span.stop / per_element)))
        room.append(span.room // per_element)
    return tuple(source), tuple(room)


def _features_per_element(spec: ParamSpec, axis: int) -> int:
    """How many of the layer's features one element along `axis` stands for."""
    packed = spec.pack_factor if axis == spec.pack_axis else 1
    if spec.group is None:
        return packed
    if isinstance(spec.group, tuple):
        return packed * spec.group[0 if axis == spec.out_axis else 1]
    return packed * (spec.group if axis == spec.in_axis else 1)


def _merge(name: str, spec: ParamSpec, rooms: Mapping[str | None, tuple[int, ...]]) -> tuple[
        dict[str | None, tuple[slice | int, ...]], tuple[int, ...]]:
    """Where each shard's room lies in the fused parameter, and the parameter's shape."""
    shapes = list(rooms.values())
    if spec.merge is MergeRule.STACK:
        _check_equal(name, spec, shapes)
        return {shard: (i, *map(_from_zero, room)) for i, (shard, room) in enumerate(rooms.items())}, (len(rooms), *shapes[0])
    if spec.merge is MergeRule.EQUAL or len(rooms) == 1:
        _check_equal(name, spec, shapes)
        return {shard: tuple(map(_from_zero, room)) for shard, room in rooms.items()}, shapes[0]
    axis = spec.out_axis
    if axis is None:
        raise PluginError(f"{name}: shards {list(rooms)} are to be concatenated, but {spec} has no out_axis")
    _check_equal(name, spec, [room[:axis] + room[axis + 1:] for room in shapes])
    targets: dict[str | None, tuple[slice | int, ...]] = {}
    offset = 0
    for shard, room in rooms.items():
        targets[shard] = tuple(slice(offset, offset + n) if i == axis else slice(0, n) for i, n in enumerate(room))
        offset += room[axis]
    return targets, (*shapes[0][:axis], offset, *shapes[0][axis + 1:])


def _aligned(source: tuple[slice, ...], target: Index) -> tuple[slice, ...]:
    """`source` with an entry for the stacking axis that only the target has."""
    return (slice(0, 1),) * (len(target) - len(source)) + source


def _from_zero(length: int) -> slice:
    return slice(0, length)


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _check_divides(prefix: str, side: str, features: int, parts: int) -> None:
    if features % parts:
        raise ConfigError(f"{prefix}: {features} {side} features cannot be divided over {parts} tensor-parallel ranks; "
                          f"choose a tensor_parallel_size that divides {features}")


def _check_equal(name: str, spec: ParamSpec, shapes: list[tuple[int, ...]]) -> None:
    if any(shape != shapes[0] for shape in shapes):
        raise PluginError(f"{name}: merge rule {spec.merge.value!r} needs shards of one shape, got {shapes}")
