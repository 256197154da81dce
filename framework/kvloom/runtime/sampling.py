"""The end of a step: logits of the asking rows -> processors -> tokens, with the log-probabilities that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from kvloom.errors import RequestError
from kvloom.interfaces.sampling import Sampler, SamplingRows
from kvloom.interfaces.step import RowError, RowResult, TokenRange
from kvloom.runtime.batch import BatchState
from kvloom.runtime.grammar import StepMasks
from kvloom.runtime.logits import LogitsPipeline, SequenceProcessors
from kvloom.runtime.logprobs import Found, arrived, candidates, prompt_candidates
from kvloom.runtime.outbox import Outbox
from kvloom.runtime.table import Array
from kvloom_kernels.transfer import to_device

NOT_FINITE = "its logits are not finite: the model computed NaN or infinity for it"
LogitsOf = Callable[[Tensor], Tensor]
"""``hidden [r, H] -> logits [r, V]`` of the model."""


class RowSampler:
    """Samples the rows of a step. Nothing it remembers changes before all of them are sampled."""

    def __init__(self, sampler: Sampler, pipeline: LogitsPipeline, state: BatchState) -> None:
        self._sampler, self._pipeline, self._state = sampler, pipeline, state

    def sample(self, ranges: Sequence[TokenRange], rows: Array, positions: Array, raw: Tensor,
               again: Callable[[], Tensor], outbox: Outbox, masks: StepMasks | None = None) -> list[RowResult]:
        """One result a range.

        Args:
            ranges: those whose last position is sampled.
            rows, positions: ``[S]`` row in the batch state, and position that the sampled token will have.
            raw: ``[S, V]`` logits of the last positions; may be changed in place.
            again: computes them once more.
            outbox: brings what was sampled to the host.
            masks: of the rows that have a grammar.
        """
        processors = [self._state.processors[row] for row in rows]
        if masks is not None:
            masks.apply(raw)
        wanted = self._state.num_candidates[rows]
        asking = np.flatnonzero(wanted >= 0)
        # Where log-probabilities are wanted, raw logits must outlive the processors, which work in place.
        changes = masks is not None or any(p.states for p in processors)
        logits = raw.clone() if raw.dtype is torch.float32 and changes and len(asking) else raw.float()
        logits = self._pipeline.apply(logits, processors)
        if masks is not None:
            masks.force(logits)
        done = self._sampler.sample(logits, self._sampling_rows(ranges, rows, positions))
        there = done.token_ids.clamp(0, raw.shape[-1] - 1)  # see `_checked`
        self._state.write_sampled(rows, positions, there)
        found = self._logprobs(raw, there, rows, wanted, asking, outbox)
        arrives = outbox.add(done.token_ids, *([] if done.finite is None else [done.finite]))
        token_ids, *finite = (tensor.numpy() for tensor in arrives())  # the host waits for the device here, and nowhere else
        logprobs = {int(asking[i]): (row,) for i, row in arrived(found).items()}
        unsampled = dict(done.failed) | dict.fromkeys(np.flatnonzero(~finite[0]).tolist() if finite else (), NOT_FINITE)
        failed = self._failures(unsampled, processors, again, masks)
        token_ids = self._checked(token_ids, raw.shape[-1], failed)
        for s, (sequence, token_id) in enumerate(zip(processors, token_ids.tolist(), strict=True)):
            if (sequence.states or sequence.grammar) and s not in failed:
                failed |= self._advance(s, sequence, token_id)
        return [RowResult(r.sequence_id, error=failed[s]) if s in failed else RowResult(r.sequence_id, (token_id,), logprobs.get(s))
                for s, (r, token_id) in enumerate(zip(ranges, token_ids.tolist(), strict=True))]

    def _sampling_rows(self, ranges: Sequence[TokenRange], rows: Array, positions: Array) -> SamplingRows:
        state = self._state
        return SamplingRows(
            sequence_ids=np.array([r.sequence_id for r in ranges]),
            row_starts=np.arange(len(ranges) + 1),
            params=[p for p in (state.params[row] for row in rows) if p is not None],
            temperatures=state.temperatures[rows],
            seeds=state.seeds[rows],
            sample_indices=state.sample_indices[rows],
            positions=positions,
        )

    def _logprobs(self, raw: Tensor, token_ids: Tensor, rows: Array, wanted: Array,
                  asking: Array, outbox: Outbox) -> list[Found]:
        """Of the rows that ask, by their place among those."""
        if not len(asking):
            return []
        if len(asking) < len(wanted):
            index = to_device(asking, raw.device)
            raw, token_ids = raw[index], token_ids[index]
        return candidates(_scaled(raw, self._state.score_temperatures[rows[asking]]), token_ids, wanted[asking].tolist(), outbox)

    def _checked(self, token_ids: Array, vocab_size: int, failed: dict[int, RowError]) -> Array:
        """The ids; 0 in the place of one that there is not, whose row fails."""
        outside = (token_ids < 0) | (token_ids >= vocab_size)
        for s in np.flatnonzero(outside).tolist():
            failed.setdefault(s, RowError("RequestFailedError", f"the sampler {type(self._sampler).__name__} gave the token id "
                                                                f"{token_ids[s]}: there are 0 to {vocab_size - 1}"))
        return np.where(outside, 0, token_ids)

    def _failures(self, unsampled: Mapping[int, str], processors: Sequence[SequenceProcessors],
                  again: Callable[[], Tensor], masks: StepMasks | None) -> dict[int, RowError]:
        """Of rows that could not be sampled, for these reasons, or whose grammar or processors failed."""
        failed = {s: self._failure(s, reason, processors, again, masks) for s, reason in unsampled.items()}
        failed |= {} if masks is None else {s: _row_error(error) for s, error in masks.failed.items()}
        return failed | {s: _row_error(p.error) for s, p in enumerate(processors) if p.error is not None}

    def _failure(self, s: int, reason: str, processors: Sequence[SequenceProcessors],
                 again: Callable[[], Tensor], masks: StepMasks | None) -> RowError:
        """Why a row could not be sampled: its logits are computed again, and its processors run one by one."""
        if processors[s].error is not None or not processors[s].states:
            return RowError("RequestFailedError", reason)
        logits = again()
        if masks is not None:
            masks.apply(logits)
        return RowError("RequestFailedError", self._pipeline.blame(logits[s:s + 1].float().clone(), processors[s]))

    def _advance(self, s: int, sequence: SequenceProcessors, token_id: int) -> dict[int, RowError]:
        try:
            self._pipeline.advance(sequence, (token_id,))
            if sequence.grammar is not None:
                sequence.grammar.advance((token_id,))
        except RequestError as error:
            return {s: _row_error(error)}
        return {}

    def prompt_logprobs(self, r: TokenRange, row: int, hidden: Tensor, logits_of: LogitsOf,
                        outbox: Outbox) -> list[list[Found]] | None:
        """Of the prompt tokens after each of the range's positions, in parts; None when nobody asked. ``hidden [num_tokens, H]``."""
        wanted = int(self._state.num_prompt_candidates[row])
        end = min(r.start + r.num_tokens, int(self._state.prompt_tokens[row]) - 1)
        if wanted < 0 or end <= r.start:
            return None
        following = self._state.tables.token_ids.tensor[row, r.start + 1:end + 1].long()
        return prompt_candidates(hidden[:end - r.start], following, wanted, logits_of, outbox)


def _scaled(logits: Tensor, temperatures: Array) -> Tensor:
    """``[r, V]`` divided by each row's temperature, 0 leaves it alone."""
    if not temperatures.any():
        return logits
    divisors = np.where(temperatures > 0, temperatures, np.float32(1))
    return logits.float() / to_device(divisors, logits.device)[:, None]


def _row_error(error: RequestError) -> RowError:
    return RowError(type(error).__name__, str(error))
