"""The memory plan: what weights, activations and KV cache need, what there is, and which value would work if that is too little.

The engine and ``kvloom plan`` make the same plan from the same numbers, before anything of the model's size is allocated.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kvloom.errors import MemoryPlanError
from kvloom.interfaces import KVGroup, ModelConfig
from kvloom.runtime.host_memory import DeviceMemory
from kvloom.runtime.kv_groups import group_layers
from kvloom.runtime.kv_tensors import block_bytes, page_bytes
from kvloom.runtime.logprobs import CHUNK_ROWS
from kvloom.runtime.memory_table import plan_table
from kvloom.runtime.weights import wanted_tensors

if TYPE_CHECKING:
    from kvloom.config import EngineConfig
    from kvloom.runtime.builder import BuiltModel, ModelSource

MAX_DEFAULT_BYTES = 4 * 2**30
"""Most that the KV cache takes of a CPU's memory unless the configuration says more."""
NULL_BLOCKS = 1
"""Block 0 belongs to nobody."""
MARGIN = 1 / 16
"""Suggested values also work with this much less free memory, where there is such a value: it is never the same twice."""


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """What the model and the configuration ask for.

    Args:
        weights_bytes: parameters of this rank.
        activations_bytes: see `activation_bytes`; on a GPU what the largest step took.
        recorded_bytes: of recorded decode steps, beside that.
        share: of the device's memory, that this engine may take in all; None: a bounded part of what is free.
        groups: KV groups of the model.
        block_bytes: one block over all layers that share it.
        kv_bytes_per_token: state of one token in all layers.
        max_model_len: tokens of the longest sequence.
        max_num_seqs: sequences at once.
        chunked: whether a prompt may be computed over several steps.
        kv_cache_bytes: what the configuration gives the KV cache; None: the default.
        num_blocks: what the configuration wants exactly, block 0 included; wins over `kv_cache_bytes`. Sequences of
            `max_model_len` tokens need not fit then: requests are refused one by one.
    """

    weights_bytes: int
    activations_bytes: int
    groups: tuple[KVGroup, ...]
    block_bytes: int
    kv_bytes_per_token: int
    max_model_len: int
    max_num_seqs: int
    chunked: bool = True
    kv_cache_bytes: int | None = None
    num_blocks: int | None = None
    recorded_bytes: int = 0
    share: float | None = None

    @property
    def fixed_bytes(self) -> int:
        """All but the KV cache."""
        return self.weights_bytes + self.activations_bytes + self.recorded_bytes

    def sequence_blocks(self, max_model_len: int) -> int:
        """Most blocks that one sequence holds: what the scheduler's admission counts. The last token is never stored."""
        tokens = max(1, max_model_len - 1)
        return sum(g.max_blocks(tokens, 1 if self.chunked else tokens) for g in self.groups)

    def cache_bytes(self, max_model_len: int, sequences: int = 1) -> int:
        """Smallest KV cache that holds `sequences` sequences of `max_model_len` tokens."""
        return (NULL_BLOCKS + sequences * self.sequence_blocks(max_model_len)) * self.block_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Needs, what there is, and the KV cache that follows.

    Args:
        budget_bytes: what the KV cache may take.
        budget_reason: where the budget comes from, as a phrase.
        num_blocks: KV blocks to allocate, block 0 included.
    """

    needs: MemoryNeeds
    memory: DeviceMemory
    budget_bytes: int
    budget_reason: str
    num_blocks: int

    @property
    def cache_bytes(self) -> int:
        """What the blocks take."""
        return self.num_blocks * self.needs.block_bytes

    @property
    def room_bytes(self) -> int:
        """Free memory that weights and activations leave; negative when they do not fit."""
        return self.memory.free_bytes - self.needs.fixed_bytes

    @property
    def capacity_tokens(self) -> int:
        """Tokens of short sequences that the cache holds; long ones need less where layers have a window."""
        groups = self.needs.groups
        return (self.num_blocks - NULL_BLOCKS) // len(groups) * groups[0].block_tokens if groups and self.num_blocks else 0

    @property
    def problem(self) -> str | None:
        """Why this cannot run, as a phrase; None when it can."""
        needs, needed = self.needs, self.needs.cache_bytes(self.needs.max_model_len)
        if self.room_bytes < 0:
            return "weights and activations alone do not fit into the free memory"
        if self.cache_bytes > self.room_bytes:
            return "weights, activations and KV cache together do not fit into the free memory"
        if needs.num_blocks is None and self.cache_bytes < needed:
            return f"one sequence of max_model_len={needs.max_model_len} tokens does not fit into the KV cache"
        return None

    @property
    def sequences(self) -> int:
        """Sequences of max_model_len tokens that fit at once."""
        each = self.needs.sequence_blocks(self.needs.max_model_len)
        return (self.num_blocks - NULL_BLOCKS) // each if each else self.needs.max_num_seqs

    def suggestions(self) -> tuple[tuple[str, int], ...]:
        """``((parameter, value), ...)``: each one alone makes the plan fit. Empty when it fits, or when no such value exists."""
        if self.problem is None:
            return ()
        cautious = replace(self.memory, free_bytes=int(self.memory.free_bytes * (1 - MARGIN)))
        return plan_memory(self.needs, cautious)._fitting_values() or self._fitting_values()

    def _fitting_values(self) -> tuple[tuple[str, int], ...]:
        needs = self.needs
        if not needs.block_bytes:  # no cache whose size could be changed
            return ()
        if needs.num_blocks is not None:
            fitting = self.room_bytes // needs.block_bytes
            return (("num_gpu_blocks_override", fitting),) if fitting > NULL_BLOCKS else ()
        found = []
        needed = needs.cache_bytes(needs.max_model_len)
        if self.cache_bytes <= self.room_bytes and (tokens := self._longest()) > 1:
            found.append(("max_model_len", tokens))
        if needed <= self.room_bytes:
            # Given too little: exactly what is needed. Given too much: as much as there is.
            whole_blocks = self.room_bytes // needs.block_bytes * needs.block_bytes
            found.append(("kv_cache_memory", needed if self.cache_bytes < needed else whole_blocks))
        return tuple(found)

    def _longest(self) -> int:
        """Longest max_model_len whose sequence fits into the budget."""
        lengths = range(self.needs.max_model_len + 1)
        return bisect_right(lengths, self.budget_bytes, key=self.needs.cache_bytes) - 1

    def table(self) -> str:
        """The plan as text, with its verdict as the last line."""
        return plan_table(self)

    def check(self) -> None:
        """Raises `MemoryPlanError` with the table when this cannot run."""
        if self.problem is not None:
            raise MemoryPlanError(self.table())


def plan_memory(needs: MemoryNeeds, memory: DeviceMemory) -> MemoryPlan:
    """Decide how large the KV cache is. Never raises: see `MemoryPlan.problem` and `MemoryPlan.check`."""
    if not needs.block_bytes:
        return MemoryPlan(needs, memory, 0, "no layer keeps state", 0)
    if needs.num_blocks is not None:
        return MemoryPlan(needs, memory, needs.num_blocks * needs.block_bytes, "num_gpu_blocks_override", needs.num_blocks)
    if needs.kv_cache_bytes is not None:
        return _with_blocks(MemoryPlan(needs, memory, needs.kv_cache_bytes, "kv_cache_memory", 0))
    budget, reason = min(
        *_bounds(needs, memory),
        (max(0, memory.free_bytes - needs.fixed_bytes), "what weights and activations leave"),
        (needs.cache_bytes(needs.max_model_len, needs.max_num_seqs), f"{needs.max_num_seqs} sequences of max_model_len"),
        key=lambda choice: choice[0],
    )
    return _with_blocks(MemoryPlan(needs, memory, budget, reason, 0))


def _bounds(needs: MemoryNeeds, memory: DeviceMemory) -> list[tuple[int, str]]:
    """What the KV cache may take of a device unless the configuration says how much: of a GPU, which is there for that, what this
    engine's share leaves; of the host, which has other uses, a part."""
    if needs.share is not None:
        return [(max(0, int(needs.share * memory.total_bytes) - needs.fixed_bytes),
                 f"gpu_memory_utilization={needs.share} of the device, less weights and activations")]
    return [(MAX_DEFAULT_BYTES, "the default's upper bound"), (memory.free_bytes // 4, "a quarter of what this process may still use")]


def _with_blocks(plan: MemoryPlan) -> MemoryPlan:
    return replace(plan, num_blocks=plan.budget_bytes // plan.needs.block_bytes)


def memory_needs(config: EngineConfig, source: ModelSource, built: BuiltModel, offloaded_bytes: int = 0) -> MemoryNeeds:
    """Needs of a model that was built, on the meta device or a real one.

    Args:
        offloaded_bytes: of the weights, which are not kept on the device.
    """
    cache = config.cache
    limits = config.limits(source.max_model_len, chunkable=built.model.chunkable)
    groups = group_layers(built.model.state_specs(), cache.block_size)
    shapes = {layer: built.backends[layer].state_shapes() for group in groups for layer in group.layers}
    page = sum(page_bytes(s) for s in shapes.values())
    return MemoryNeeds(
        weights_bytes=sum(t.size_bytes for t in wanted_tensors(built.model).values()) - offloaded_bytes,
        activations_bytes=activation_bytes(source.config, source.dtype, limits.max_num_batched_tokens, limits.max_num_seqs,
                                           generates="generate" in built.model.tasks),
        groups=groups,
        block_bytes=block_bytes(groups, shapes),
        kv_bytes_per_token=-(-page // cache.block_size),
        max_model_len=source.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        chunked=limits.chunked,
        kv_cache_bytes=cache.kv_cache_memory,
        num_blocks=cache.num_gpu_blocks_override,
        recorded_bytes=source.device.captured_bytes(recorded_step_bytes(config, source, limits.max_num_seqs)),
        share=cache.gpu_memory_utilization if source.device.own_share else None,
    )


def recorded_step_bytes(config: EngineConfig, source: ModelSource, max_num_seqs: int) -> int:
    """Memory of the largest decode step that is recorded; 0 where none is."""
    if source.pooling is not None or config.device.enforce_eager:
        return 0
    return decode_bytes(source.config, source.dtype, max_num_seqs)


def activation_bytes(config: ModelConfig, dtype: torch.dtype, max_num_batched_tokens: int, max_num_seqs: int, *,
                     generates: bool = True) -> int:
    """Estimate of the largest sum of a step's tensors that live at one time.

    With T tokens, R = min(max_num_seqs, T) sampled rows (or as many prompt rows whose log-probabilities are wanted, see
    `CHUNK_ROWS`) and e bytes an element::

        T e 3 H                           residual, normed input, output
        T e max((2 Hq + 2 Hk) D, 3 I)     q, k, v and attention's output, or gate, up and their product
        R V (e + 8)                       logits, their float32 copy, and one more of it in the sampler: where text is generated

    What an attention backend takes inside is not counted.
    """
    tokens, rows = max_num_batched_tokens, min(max(max_num_seqs, CHUNK_ROWS), max_num_batched_tokens)
    logits_bytes = rows * config.vocab_size * (dtype.itemsize + 8) if generates else 0
    return tokens * _token_elements(config) * dtype.itemsize + logits_bytes


def scratch_bytes(config: ModelConfig, dtype: torch.dtype, tokens: int) -> int:
    """Memory to cut a step's hidden states from: twice what `activation_bytes` counts for them, since pieces that are free may lie
    apart. What of it is not needed for that is not touched."""
    return tokens * 2 * _token_elements(config) * dtype.itemsize


def decode_bytes(config: ModelConfig, dtype: torch.dtype, rows: int) -> int:
    """The same for recorded decode steps of `rows` rows, with their logits, which may be float32."""
    return scratch_bytes(config, dtype, rows) + rows * config.vocab_size * torch.float32.itemsize


def _token_elements(config: ModelConfig) -> int:
    attention = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    return 3 * config.hidden_size + max(attention, 3 * config.intermediate_size)


__all__ = ["MemoryNeeds", "MemoryPlan", "activation_bytes", "decode_bytes", "group_layers", "memory_needs", "plan_memory",
           "recorded_step_bytes", "scratch_bytes"]
