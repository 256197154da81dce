"""Beam search: of all continuations of the live sequences, the most probable ones live on."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

from kvloom.errors import RequestTypeError
from kvloom.interfaces import Branch, Branching, Candidates, Decision, Decoder, FinishedBranch, TokenLogprob
from kvloom.params import BeamSearchParams


class BeamState(NamedTuple):
    """Of one request: what was asked, tokens that end a text, tokens that sequences have now, the prompt's included."""

    params: BeamSearchParams
    eos_token_ids: frozenset[int]
    num_tokens: int
    end_tokens: int


class BeamSearch(Decoder):
    """Each round the best ``2 * beam_width`` next tokens of every beam compete; the `beam_width` best sequences live on.

    A candidate that ends the text finishes its sequence, unless ``ignore_eos``. Nothing stops early: beams run to ``max_tokens``. A
    score is the cumulative log-probability over the number of tokens, the prompt's included and a last end token not, to the power of
    ``length_penalty``.
    """

    def check(self, params: BeamSearchParams) -> None:
        """See `Decoder.check`; `params` are `BeamSearchParams`."""
        if not isinstance(params, BeamSearchParams):
            raise RequestTypeError(f"params must be BeamSearchParams, got {type(params).__name__}", "params", params)
        copy.copy(params).validate()

    def start(self, params: BeamSearchParams, prompt_token_ids: Sequence[int], eos_token_ids: frozenset[int],
              room_tokens: int) -> tuple[BeamState, Branching]:
        """See `Decoder.start`."""
        own = copy.copy(params)
        own.validate()
        max_tokens = min(own.max_tokens, room_tokens)
        width = own.beam_width
        return (BeamState(own, eos_token_ids, len(prompt_token_ids), len(prompt_token_ids) + max_tokens),
                Branching(width, 2 * width, max_tokens, width, own.temperature))

    def decide(self, state: BeamState, candidates: Sequence[Candidates]) -> tuple[BeamState, Decision]:
        """See `Decoder.decide`."""
        state = state._replace(num_tokens=state.num_tokens + 1)
        ends = frozenset() if state.params.ignore_eos else state.eos_token_ids
        finished = [_finished(state, c, t, "stop") for c in candidates for t in c.best if t.token_id in ends]
        going = [(c, t) for c in candidates for t in c.best if t.token_id not in ends]
        going.sort(key=lambda pair: -_score(state, *pair))  # stable, as the sums of equal tokens are
        best = going[:state.params.beam_width]
        if state.num_tokens < state.end_tokens:
            return state, Decision(tuple(Branch(c.branch, t.token_id, t.logprob) for c, t in best), tuple(finished))
        return state, Decision((), (*finished, *(_finished(state, c, t, "length") for c, t in best)))


def _score(state: BeamState, beam: Candidates, following: TokenLogprob) -> float:
    counted = state.num_tokens - (following.token_id in state.eos_token_ids)
    return (beam.cumulative_logprob + following.logprob) / math.pow(max(counted, 1), state.params.length_penalty)


def _finished(state: BeamState, beam: Candidates, last: TokenLogprob, reason: str) -> FinishedBranch:
    score = _score(state, beam, last)
    return FinishedBranch(beam.branch, (last.token_id,), score, beam.cumulative_logprob + last.logprob, reason)
