"""Decoders of plugins in `LLM.beam_search`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_helpers import Truth, assert_idle

from kvloom import LLM, BeamSearchParams
from kvloom.errors import RequestFailedError, RequestValidationError

DECODER = """
from pydantic import BaseModel
from kvloom import hookimpl
from kvloom.errors import RequestValidationError
from kvloom.interfaces import Branch, Branching, Decision, Decoder, FinishedBranch
KVLOOM_API = {"decoders": 0}
@hookimpl
def kvloom_register_decoders(registry):
    registry.add("fork-then-greedy", "acme_0:ForkThenGreedy")
class ForkThenGreedy(Decoder):
    '''The `ways` best first tokens, each followed greedily.'''
    def check(self, params):
        if params["ways"] < 0:
            raise RequestValidationError("ways must be positive", "ways", params["ways"])
    def start(self, params, prompt_token_ids, eos_token_ids, room_tokens):
        if params["ways"] == 0:
            raise RequestValidationError("ways must be at least 1", "ways", 0)
        tokens = params.get("tokens", 4)
        return (params, tokens), Branching(params["ways"], params["ways"], tokens, params["ways"])
    def decide(self, state, candidates):
        params, left = state
        if params.get("breaks") == left:
            raise KeyError("lost")
        if params.get("unknown") == left:
            return state, Decision((Branch(0, 10**6, -1.0),))
        if left == 1:
            ended = [FinishedBranch(c.branch, (c.best[0].token_id,), -c.branch, c.cumulative_logprob + c.best[0].logprob, "length") for c in candidates]
            return state, Decision((), tuple(ended))
        if len(candidates) == 1 and not candidates[0].token_ids:
            live = [Branch(0, c.token_id, c.logprob) for c in candidates[0].best]
        else:
            live = [Branch(c.branch, c.best[0].token_id, c.best[0].logprob) for c in candidates]
        return (params, left - 1), Decision(tuple(live))
"""


@pytest.fixture
def forking(install, checkpoint: Path) -> Iterator[LLM]:
    install("acme", {"acme": DECODER})
    with LLM(str(checkpoint), dtype="float32") as made:
        yield made


def test_beam_search__a_strangers_decoder_comes_through_the_same_door(forking: LLM, truth: Truth) -> None:
    (output,) = forking.beam_search([[1, 2, 3]], {"ways": 3, "tokens": 6}, decoder="fork-then-greedy")
    first = truth.after([1, 2, 3]).topk(3).indices.tolist()
    assert [s.tokens for s in output.sequences] == [[1, 2, 3, t, *truth.greedy([1, 2, 3, t], 5)] for t in first]
    assert_idle(forking)


@pytest.mark.parametrize(("params", "error", "message"), [
    ({"ways": 0}, RequestValidationError, "ways must be at least 1"), ({}, RequestFailedError, "raised KeyError: 'ways'"),
    ({"ways": 2, "breaks": 2}, RequestFailedError, "raised KeyError: 'lost'"), ({"ways": 2, "unknown": 3}, RequestFailedError, "chose the token 1000000"),
    ({"ways": 2, "tokens": 0}, RequestFailedError, "needs what cannot be"), ({"ways": 2, "tokens": 10**6}, RequestFailedError, "needs what cannot be"),
    ({"ways": 30}, RequestValidationError, "needs 30 candidates"),
], ids=str)
def test_beam_search__a_decoder_that_breaks_is_named_and_the_engine_goes_on(forking: LLM, params: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        forking.beam_search([[1, 2, 3]], params, decoder="fork-then-greedy")
    if error is RequestFailedError:
        assert "decoder 'fork-then-greedy' (plugin 'acme' of acme 1.0)" in str(caught.value)
    assert_idle(forking)
    good, bad = forking.beam_search([[1, 2, 3], "b"], BeamSearchParams(2, 3))
    assert len(good.sequences) == len(bad.sequences) == 2


@pytest.mark.parametrize("prompts", [[], [[1, 2, 3]]], ids=["no prompts", "a prompt"])
def test_beam_search__a_decoder_looks_at_its_parameters_before_there_is_a_prompt(forking: LLM, prompts: list) -> None:
    for on_error in ("raise", "return"):
        with pytest.raises(RequestValidationError, match="ways must be positive"):
            forking.beam_search(prompts, {"ways": -1}, decoder="fork-then-greedy", on_error=on_error)
        with pytest.raises(RequestFailedError, match=r"decoder 'fork-then-greedy' \(plugin 'acme' of acme 1.0\) raised KeyError: 'ways'"):
            forking.beam_search(prompts, {}, decoder="fork-then-greedy", on_error=on_error)
    assert_idle(forking)
    assert len(forking.beam_search(prompts, {"ways": 2}, decoder="fork-then-greedy")) == len(prompts)
