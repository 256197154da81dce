"""The device side as executors see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvloom.errors import ConfigError
from kvloom.interfaces.grammar import GrammarVocabulary
from kvloom.interfaces.state import KVGroup
from kvloom.interfaces.step import Step, StepResult


@dataclass(frozen=True, slots=True)
class HostTierReport:
    """Host memory for KV blocks that leave the device, and what moving them costs there.

    Args:
        num_blocks: host blocks that the worker allocates; their ids are 1 .. num_blocks.
        block_bytes: one block over all layers of a group.
        bytes_per_s: bandwidth between device and host, one way.
        tokens_per_s: that the device computes in a prompt.

    Raises:
        ConfigError: a figure that is none.
    """

    num_blocks: int
    block_bytes: int
    bytes_per_s: float
    tokens_per_s: float

    def __post_init__(self) -> None:
        figures = (self.block_bytes, self.bytes_per_s, self.tokens_per_s)
        if self.num_blocks < 0 or not all(0 < figure < math.inf for figure in figures):
            raise ConfigError(f"a worker's host tier needs positive figures, got {self}")

    def worth_tokens(self, num_groups: int) -> int:
        """Tokens of a column (a block of each group) from which on moving it out and in costs less than computing them again."""
        return max(1, math.ceil(2 * num_groups * self.block_bytes / self.bytes_per_s * self.tokens_per_s))


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker has to say once its model is loaded.

    Args:
        rank: of the worker.
        groups: KV groups of its model; equal on every rank of a stage.
        num_blocks: KV blocks it can hold.
        manifest_hash: hash of the plugins it resolved; must equal the engine's.
        timings_s: (phase, seconds), for the start report.
        notes: lines for the start report: chosen backends, why others were refused, threads.
        host_tier: where blocks go that leave the device; None recomputes their tokens.
    """

    rank: int
    groups: tuple[KVGroup, ...]
    num_blocks: int
    manifest_hash: str
    timings_s: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()
    host_tier: HostTierReport | None = None


class Worker(Protocol):
    """One rank: a model shard, its weights and its KV tensors. Methods are called one at a time, in this order: `load`, `allocate`,
    then `execute` and the others any number of times, then `close`. Between `sleep` and `wake_up` nothing is executed."""

    rank: int

    @property
    def model(self) -> Any:
        """The torch module."""

    @property
    def held_bytes(self) -> int:
        """Memory of its device that its process holds."""

    def load(self) -> WorkerReport:
        """Build the model, load its weights, plan memory."""

    def allocate(self, num_blocks: int) -> None:
        """Make the KV tensors: the smallest `num_blocks` of all ranks."""

    def execute(self, step: Step) -> StepResult:
        """Run a step.

        When it raises, its deltas count as taken over and nothing else has changed: the same step, or `Step.only` of it, may come
        again under the same id and then only computes.
        """

    def forget_recorded(self) -> None:
        """A function of somebody else ran on this worker: steps that were recorded before may not be what the model computes now."""

    def set_vocabulary(self, make_vocabulary: Callable[[], GrammarVocabulary]) -> None:
        """Later grammars are over other tokens: there is another tokenizer. No sequence is under way.

        Args:
            make_vocabulary: called with the first of them.
        """

    def sleep(self, level: int) -> None:
        """Give memory back. What is given back already stays so.

        Args:
            level: 1 drops the KV tensors and keeps the weights on the host, where they may be anyway. 2 drops both.
        """

    def wake_up(self, tags: Sequence[str]) -> None:
        """Take memory again; what is there already is left alone. When it raises, `sleep` may be called again.

        Args:
            tags: of ``"weights"`` (as they were, or as `load` loads them) and ``"kv_cache"`` (with as many blocks as before, empty).
        """

    def start_profile(self, directory: str, prefix: str) -> None:
        """Record what steps do. Raises `EngineStateError` when that is being done."""

    def stop_profile(self) -> str:
        """Write a Chrome trace into the directory; its file. Raises `EngineStateError` when nothing is recorded."""

    def close(self) -> None:
        """Free everything."""


class WorkerFactory(Protocol):
    """Makes the worker of a rank; picklable-free: across processes it is rebuilt from configuration and manifest."""

    def __call__(self, rank: int) -> Worker: ...
