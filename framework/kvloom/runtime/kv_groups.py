"""Which layers share a block table. Layers of equal retention do; a retention with many layers is cut into several groups.

All groups draw on one pool, and the j-th layer of every group lives in the j-th KV tensor, so a block is as large as the largest
group and whatever a smaller group leaves of it is lost. With 24 full and 8 window layers::

    one group each    block = 24 pages    a full block fills it, a window block wastes 16 of 24
    cut at 8 layers   block =  8 pages    3 full groups + 1 window group, nothing is wasted

Small cuts waste nothing but make more groups, and each costs a gather every step. So the largest cut is taken that
leaves at most one page of 16 empty; a cut at one layer always qualifies.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from kvloom.interfaces import KVGroup, LayerStateSpec, StateKind

MAX_EMPTY_SHARE = 1 / 16
"""Pages of a block that may stay empty, averaged over the groups."""


def group_layers(specs: Sequence[LayerStateSpec], block_tokens: int) -> tuple[KVGroup, ...]:
    """Group the layers of a model. Layers that keep nothing (NONE) or read another's state (SHARED) are in no group.

    Args:
        specs: one a layer, in order.
        block_tokens: tokens in a block of every group.
    """
    layers: dict[tuple[StateKind, int | None], list[int]] = {}
    for i, spec in enumerate(specs):
        if spec.kind not in (StateKind.NONE, StateKind.SHARED):
            layers.setdefault(spec.retention, []).append(i)
    cut = _layers_per_group([len(members) for members in layers.values()])
    groups: list[KVGroup] = []
    for (kind, window_tokens), members in layers.items():
        for part in _split(members, _ceil(len(members), cut)):
            groups.append(KVGroup(len(groups), kind, tuple(part), block_tokens, window_tokens))
    return tuple(groups)


def _layers_per_group(counts: list[int]) -> int:
    """The largest cut that wastes little; it depends on how many layers each retention has."""
    total = sum(counts)
    for cut in range(max(counts, default=1), 1, -1):
        parts = [_ceil(n, cut) for n in counts]
        pages = max(_ceil(n, p) for n, p in zip(counts, parts, strict=True))
        if sum(parts) * pages * (1 - MAX_EMPTY_SHARE) <= total:
            return cut
    return 1


def _split(members: list[int], parts: int) -> list[list[int]]:
    """Consecutive runs whose lengths differ by one at most, the longer ones first."""
    size, longer = divmod(len(members), parts)
    starts = [i * size + min(i, longer) for i in range(parts + 1)]
    return [members[a:b] for a, b in pairwise(starts)]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
