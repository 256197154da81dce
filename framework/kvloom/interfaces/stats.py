"""What observers are told. Plain numbers, made once a step."""

from __future__ import annotations

from typing import NamedTuple


class StepStats(NamedTuple):
    """One committed step.

    Fields:
        step_id: rises by one.
        num_tokens: tokens computed.
        num_running, num_waiting: requests after the commit.
        num_preempted: requests that gave way in this step.
        free_blocks, total_blocks: of the KV pool; free ones may still hold cached prefixes.
        seconds: from schedule to commit.
        blocks_out, blocks_in: KV blocks moved to the host tier and back.
    """

    step_id: int
    num_tokens: int
    num_running: int
    num_waiting: int
    num_preempted: int
    free_blocks: int
    total_blocks: int
    seconds: float
    blocks_out: int = 0
    blocks_in: int = 0
