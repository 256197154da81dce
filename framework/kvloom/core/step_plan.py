"""A step while it is being made, and the check of what came back."""

from __future__ import annotations

from kvloom.core.request import Request
from kvloom.errors import InternalError
from kvloom.interfaces.step import BlockCopy, BlockIds, BlockMove, NewSequence, Step, StepResult, TokenRange


class StepPlan:
    """Ranges of the next step, and what is left of its token budget.

    Attributes:
        budget_tokens: tokens that may still be added.
        out_of_blocks: a running request could not get a block: nobody new is let in.
        copies: of blocks, before the forward.
    """

    __slots__ = ("_new", "_ranges", "_resumed", "budget_tokens", "copies", "out_of_blocks")

    def __init__(self, budget_tokens: int) -> None:
        self.budget_tokens = budget_tokens
        self.out_of_blocks = False
        self.copies: list[BlockCopy] = []
        self._ranges: list[TokenRange] = []
        self._new: list[NewSequence] = []
        self._resumed: list[NewSequence] = []

    def add(self, request: Request, num_tokens: int, new_blocks: BlockIds) -> None:
        """The next `num_tokens` tokens of a sequence that the worker knows."""
        self._ranges.append(request.schedule(num_tokens, new_blocks))
        self.budget_tokens -= num_tokens

    def introduce(self, request: Request, num_tokens: int) -> None:
        """The first range since the worker last knew the sequence; its blocks travel in the `NewSequence`."""
        sequences = self._resumed if request.num_preemptions else self._new
        sequences.append(request.as_new_sequence())
        request.is_untold = False
        self.add(request, num_tokens, ())

    def __len__(self) -> int:
        return len(self._ranges)

    def seal(self, step_id: int, preempted: list[int], finished: list[int], swap_out: tuple[BlockMove, ...] = (),
             swap_in: tuple[BlockMove, ...] = ()) -> Step:
        """The frozen step."""
        return Step(step_id, tuple(self._ranges), tuple(self._new), tuple(self._resumed), tuple(preempted), tuple(finished),
                    tuple(self.copies), swap_out, swap_in)


def check_result(step: Step, result: StepResult) -> None:
    """Refuse a result that does not belong to the step, before anything of it is used.

    Raises:
        InternalError: another step's result, rows of other sequences, or a row with too few or too many tokens.
    """
    if result.step_id != step.step_id or len(result.rows) != len(step.ranges):
        raise InternalError(f"step {step.step_id} with {len(step.ranges)} ranges was answered by a result of step "
                            f"{result.step_id} with {len(result.rows)} rows")
    for r, row in zip(step.ranges, result.rows, strict=True):
        if row.sequence_id != r.sequence_id:
            raise InternalError(f"step {step.step_id}: a range of sequence {r.sequence_id} got a row of {row.sequence_id}")
        if len(row.token_ids) + (row.pooled is not None) != r.sample and row.error is None:
            raise InternalError(f"step {step.step_id}, sequence {r.sequence_id}: {len(row.token_ids)} tokens"
                                f"{'' if row.pooled is None else ' and a pooled result'} for a range with sample={r.sample}")
