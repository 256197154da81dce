"""The engine's heart, pure Python: requests, blocks, the prefix cache, the scheduler and the step loop. Imports no torch."""

from __future__ import annotations

from kvloom.core.admission import check_prompt_length
from kvloom.core.block_pool import BlockPool
from kvloom.core.branches import BranchGroup, BranchRule, EndedBranch
from kvloom.core.engine import Engine, StepObserver
from kvloom.core.kv_blocks import BlockTable, KVBlocks
from kvloom.core.limits import SchedulerLimits
from kvloom.core.prefix_cache import PrefixCache, root_digest
from kvloom.core.request import Request, RequestSpec, RequestState
from kvloom.core.scheduler import Scheduler
from kvloom.core.stop import Finish, StopRule

__all__ = [
    "BlockPool",
    "BlockTable",
    "BranchGroup",
    "BranchRule",
    "EndedBranch",
    "Engine",
    "Finish",
    "KVBlocks",
    "PrefixCache",
    "Request",
    "RequestSpec",
    "RequestState",
    "Scheduler",
    "SchedulerLimits",
    "StepObserver",
    "StopRule",
    "check_prompt_length",
    "root_digest",
]
