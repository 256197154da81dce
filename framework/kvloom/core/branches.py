"""Requests that branch: several sequences that share blocks, and a decision after each round about which go on.

A round is over when every live sequence has its candidates. The decision names children of the live sequences::

    live, undecided    a        b        c        d
    decision           a1  a2   b1       -        d1
                       |    |   |                 |
                       |    forked: a new sequence that shares a's blocks
                       in place: a itself, one token longer        c ends, its blocks come back

Who decides, and what the scores mean, is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvloom.core.stop import Finish
from kvloom.errors import RequestFailedError
from kvloom.interfaces.decoder import Branch, Branching, Candidates, Decision
from kvloom.interfaces.step import TokenLogprob

if TYPE_CHECKING:
    from kvloom.core.request import Request

DROPPED = Finish("dropped")
"""Why a branch ended that nothing continues."""


@dataclass(frozen=True, slots=True)
class BranchRule:
    """Of one request.

    Args:
        needs: see `Branching`.
        decide: called once a round. What it raises fails the request.
    """

    needs: Branching
    decide: Callable[[Sequence[Candidates]], Decision]


class EndedBranch(NamedTuple):
    """One result: output tokens and the candidates of each, and what its `FinishedBranch` said."""

    token_ids: tuple[int, ...]
    logprobs: tuple[tuple[TokenLogprob, ...], ...]
    score: float
    cumulative_logprob: float
    reason: str


class BranchGroup:
    """The sequences of one branching request.

    Attributes:
        root: the sequence that it began with; callers know the request by it, also when it is dropped.
        branches: live sequences, in the order of the last decision.
        results: the best finished ones, best first.
    """

    __slots__ = ("branches", "results", "root", "rule")

    def __init__(self, root: Request, rule: BranchRule) -> None:
        self.root, self.rule = root, rule
        self.branches: list[Request] = [root]
        self.results: list[EndedBranch] = []

    @property
    def is_undecided(self) -> bool:
        """Whether every live sequence has its candidates."""
        return all(b.candidates for b in self.branches)

    @property
    def finish(self) -> Finish:
        """Why the request ended, once nothing lives."""
        return Finish("length" if any(r.reason == "length" for r in self.results) else "stop")

    def decide(self) -> tuple[Branch, ...]:
        """Ask the rule, and take over what finished. What lives on is still to be made.

        Raises:
            RequestFailedError: the rule raised, or decided something that cannot be.
        """
        asked = [Candidates(i, tuple(b.output_token_ids), b.cumulative_logprob, b.candidates) for i, b in enumerate(self.branches)]
        try:
            decision = self.rule.decide(asked)
            problem = self._problem(decision)
        except RequestFailedError:
            raise
        except Exception as error:
            raise RequestFailedError(f"the decoder raised {type(error).__name__}: {error}") from error
        if problem:
            raise RequestFailedError(f"the decoder decided what cannot be: {problem}")
        for ended in decision.finished:
            self._keep(ended.parent, ended.token_ids, EndedBranch((), (), ended.score, ended.cumulative_logprob, ended.reason))
        return decision.live

    def _problem(self, decision: Decision) -> str | None:
        live, finished = decision
        needs = self.rule.needs
        if len(live) > needs.max_branches:
            return f"{len(live)} branches live on, it asked for {needs.max_branches}"
        if any(not 0 <= parent < len(self.branches) for parent in (*(b.parent for b in live), *(b.parent for b in finished))):
            return f"a parent is none of the {len(self.branches)} branches"
        if any(self.branches[b.parent].output_tokens + 1 >= needs.max_tokens for b in live):
            return f"a branch lives on with {needs.max_tokens} tokens, which is its bound"
        if any(not math.isfinite(b.logprob) for b in live) or any(math.isnan(b.score) for b in finished):
            return "a log-probability or score is not a finite number"
        if not live and not (finished or self.results):
            return "nothing lives on, and nothing finished"
        return None

    def _keep(self, parent: int, token_ids: tuple[int, ...], ended: EndedBranch) -> None:
        """Put a finished sequence among the results, unless enough better ones are there."""
        place = next((i for i, r in enumerate(self.results) if r.score < ended.score), len(self.results))
        if place >= self.rule.needs.num_results:
            return
        branch = self.branches[parent]
        logprobs = (*branch.logprobs, branch.candidates) if token_ids else tuple(branch.logprobs)
        self.results.insert(place, ended._replace(token_ids=(*branch.output_token_ids, *token_ids), logprobs=logprobs))
        del self.results[self.rule.needs.num_results:]
