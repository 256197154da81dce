"""What the scheduler tells the workers (`Step`) and what comes back (`StepResult`). Frozen, torch-free, msgpack-able.

One rule covers prefill, chunk, decode, speculative and resumed work: *compute tokens [start, start + num_tokens)
of this sequence*. A step carries deltas; the worker keeps token ids and block tables of the sequences it knows. Nothing here may
come from a client unchecked: ids are the engine's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from kvloom.interfaces.grammar import GrammarSpec
from kvloom.params import PoolingParams, SamplingParams

BlockIds = tuple[tuple[int, ...], ...]
"""One tuple of block ids per KV group. Id 0 is the null block: it belongs to nobody and is never read unmasked."""


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that a worker has to know from this step on: a new one, or one resumed after a preemption.

    Args:
        sequence_id: the engine's own id, never reused.
        token_ids: every token known so far, prompt first.
        prompt_tokens: how many of them are the prompt.
        computed_tokens: tokens whose state is already in the blocks (prefix cache hit, fork, moved back by this step).
        block_ids: the sequence's whole block table, by group; ``len == ceil(tokens / block_tokens)`` up to the first
            range of this step. Entries that fell out of a window are 0.
        sampling: set for generation; its ``n`` siblings are sequences of their own.
        pooling: set for pooling tasks.
        seed: key of the counter-based generator (64 bit): the request's seed, or one derived from the engine's.
        sample_index: 0..n-1 within the request; part of the random counter.
        adapter: content hash of the adapter to apply, or None.
        media: content hashes of encoder inputs with the token offset of each, see `EncoderWork`.
        extras: named per-token integers the model asked for (``token_type_ids``), each as long as the prompt.
        end_token_ids: that end a text, for processors that put that off.
        processors: name of each logits processor that the request asks for, with its parameters as plain data.
        score_temperature: candidates' log-probabilities are of logits divided by it; 0 leaves the logits alone.
        grammar: what the output must be, or None.
    """

    sequence_id: int
    token_ids: tuple[int, ...]
    prompt_tokens: int
    computed_tokens: int
    block_ids: BlockIds
    sampling: SamplingParams | None = None
    pooling: PoolingParams | None = None
    seed: int = 0
    sample_index: int = 0
    adapter: str | None = None
    media: tuple[tuple[str, int], ...] = ()
    extras: dict[str, tuple[int, ...]] = field(default_factory=dict)
    end_token_ids: tuple[int, ...] = ()
    processors: tuple[tuple[str, Any], ...] = ()
    score_temperature: float = 0.0
    grammar: GrammarSpec | None = None


class TokenRange(NamedTuple):
    """Compute tokens [start, start + num_tokens) of one sequence. Rows of a step keep the order of ``Step.ranges``.

    Fields:
        sequence_id: whose tokens.
        start: first position to compute; everything before it is in the blocks.
        num_tokens: how many positions; the first ``num_tokens - len(draft_token_ids)`` are tokens of the sequence.
        new_blocks: block ids appended to the sequence's table, by group; ``()`` when there are none.
        sample: whether the sequence's last known position is computed: its logits are sampled (the successor is not known to
            anybody), or the sequence is pooled.
        pending: how many of the range's trailing tokens are results of earlier steps that were not committed yet: the
            worker already holds them, the scheduler does not ("row r of step k").
        draft_token_ids: proposed successors that this step verifies (speculation).
        given: the range's last tokens, where a decoder chose them: they replace what the worker sampled.
    """

    sequence_id: int
    start: int
    num_tokens: int
    new_blocks: BlockIds = ()
    sample: bool = False
    pending: int = 0
    draft_token_ids: tuple[int, ...] = ()
    given: tuple[int, ...] = ()


class BlockCopy(NamedTuple):
    """Copy a whole block before the step's forward (a fork's partly filled last block), and put the copy in the source's place, which
    is the last of the sequence's table. Made in their order, once however often the step comes: the source may be written since."""

    group: int
    source: int
    target: int
    sequence_id: int


class BlockMove(NamedTuple):
    """Move a block between device and host tier (swap). Blocks to the host move before, blocks back also before, the forward."""

    group: int
    device_block: int
    host_block: int


class EncoderWork(NamedTuple):
    """Run an encoder on one input of a sequence in this step and keep its output until the sequence finishes.

    ``item`` is the content hash that `NewSequence.media` names; ``tokens`` the number of encoder output rows.
    """

    sequence_id: int
    item: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of device work.

    Order on the worker: forget `finished` and `preempted`, `swap_out`, `swap_in`, add `new` and `resumed`, `copies`, then
    encoders, forward, sampling over `ranges`. Everything before the encoders, and the blocks that ranges append, are its deltas: a
    worker takes them over once, however often the step comes.
    """

    step_id: int
    ranges: tuple[TokenRange, ...]
    new: tuple[NewSequence, ...] = ()
    resumed: tuple[NewSequence, ...] = ()
    preempted: tuple[int, ...] = ()
    finished: tuple[int, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    swap_out: tuple[BlockMove, ...] = ()
    swap_in: tuple[BlockMove, ...] = ()
    encoder: tuple[EncoderWork, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that this step computes."""
        return sum(r.num_tokens for r in self.ranges)

    def only(self, r: TokenRange) -> Step:
        """This step again, for one of its ranges: what a worker gets after the whole raised."""
        return replace(self, ranges=(r,))


class TokenLogprob(NamedTuple):
    """One candidate of one position: token id, natural-log probability, rank (1 = best)."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class RowError:
    """Why one row failed. Crosses processes, so it is data: type name, message, traceback text, plugin if one is to blame."""

    type_name: str
    message: str
    traceback: str = ""
    plugin: str | None = None


class Pooled(NamedTuple):
    """A pooled result: little-endian float32 numbers, row after row. One axis (embedding, scores of labels), or two (a row a token)."""

    shape: tuple[int, ...]
    data: bytes


class RowResult(NamedTuple):
    """What one range of a step produced.

    Fields:
        sequence_id: whose.
        token_ids: 0 tokens (a chunk that was not sampled), 1, or up to 1 + drafts accepted tokens.
        logprobs: per token the candidates asked for, sampled token first; None when not asked.
        prompt_logprobs: the same for the prompt tokens that follow this range's positions: of prompt position
            ``start + 1`` on, as far as the prompt goes.
        pooled: of a sequence that is pooled, with its last range.
        error: set when only this row failed.
    """

    sequence_id: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[tuple[TokenLogprob, ...], ...] | None = None
    prompt_logprobs: tuple[tuple[TokenLogprob, ...], ...] | None = None
    pooled: Pooled | None = None
    error: RowError | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Results of a step, one row per range, in the order of ``Step.ranges``."""

    step_id: int
    rows: tuple[RowResult, ...]
