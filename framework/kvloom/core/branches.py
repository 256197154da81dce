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
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvloom.core.stop import Finish
from kvloom.errors import RequestFailedError
from kvloom.interfaces.decoder import Branch, Branching, Candidates, Decision
from kvloom.interfaces.step import TokenLogprob

if TYPE_CHECKING:
    from kvloom.core.request import Request

End = Callable[["Request", Finish, RequestFailedError | None], None]
Fork = Callable[["Request", Branch], "Request"]
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

    def places_kept_from(self, request: Request) -> int:
        """Places on the worker that its branches have not taken, and no other request may take: none before one of them has one."""
        taken = sum(b.has_place for b in self.branches)
        return self.rule.needs.max_branches - taken if taken or request.group is self else 0

    def go_on(self, decided: Sequence[Branch], fork: Fork) -> list[Request]:
        """Make what was decided: each parent's first child in place, further ones by `fork`. Returns parents without children."""
        parents, in_place = self.branches, dict[int, int]()
        children: dict[int, Request] = {}
        for place, branch in enumerate(decided):  # forks first: they take their parent as it is
            if in_place.setdefault(branch.parent, place) != place:
                children[place] = fork(parents[branch.parent], branch)
        for number, place in in_place.items():
            parents[number].go_on(decided[place])
            children[place] = parents[number]
        self.branches = [children[place] for place in range(len(decided))]
        return [parent for number, parent in enumerate(parents) if number not in in_place]

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


class BranchGroups:
    """The branching requests that live, by their root's id.

    Ending and forking sequences is the scheduler's work: ``end(sequence, why, error)``, ``fork(parent, branch)``.
    """

    def __init__(self) -> None:
        self._groups: dict[int, BranchGroup] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[BranchGroup]:
        return iter(self._groups.values())

    def add(self, root: Request) -> None:
        """Take note of a request, if it is a branching one."""
        if root.group is not None:
            self._groups[root.sequence_id] = root.group

    def find(self, sequence_id: int, request: Request | None) -> BranchGroup | None:
        """The group that goes by this id, also when its root, `request`, was dropped."""
        return self._groups.get(sequence_id) if request is None else request.group

    def lives(self, group: BranchGroup) -> bool:
        """Whether it has not ended."""
        return group.root.sequence_id in self._groups

    def end(self, group: BranchGroup, end: End, finish: Finish, error: RequestFailedError | None = None) -> None:
        """It ends as a whole. Its root says why, also when that branch was dropped long ago. Ended ones are left alone."""
        if self._groups.pop(group.root.sequence_id, None) is None:
            return
        for branch in group.branches:
            end(branch, finish, error)
        group.branches = []
        group.root.finish, group.root.error = finish, error
        group.root.metrics.finished_time = time.monotonic()

    def decide(self, group: BranchGroup, end: End, fork: Fork) -> None:
        """If its round is over: parents go on, forks are made, what nothing continues is dropped."""
        if not group.is_undecided:
            return
        try:
            decided = group.decide()
        except RequestFailedError as error:
            self.end(group, end, Finish("error"), error)
            return
        for parent in group.go_on(decided, fork):
            end(parent, DROPPED, None)
        if not group.branches:
            self.end(group, end, group.finish)
