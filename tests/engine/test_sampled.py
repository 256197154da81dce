"""A seeded request gives the same tokens whatever its neighbours, order, chunking, cache state and preemptions; its neighbours too."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from kvloom import LLM, SamplingParams
from kvloom.errors import RequestValidationError
from kvloom.live_request import Call
from kvloom.testing.checkpoints import VOCAB_SIZE

NUMBERS = random.Random(0)
PROMPTS = [[NUMBERS.randrange(256) for _ in range(n)] for n in (3, 40, 17, 1, 33, 20)]
PARAMS = [SamplingParams(max_tokens=20, ignore_eos=True, seed=seed, **changes) for seed, changes in enumerate([
    {}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 20, "repetition_penalty": 1.3}, {"temperature": 1.5, "min_p": 0.02, "presence_penalty": 0.8},
    {"frequency_penalty": 0.5, "logit_bias": {5: 3.0}, "n": 3}, {"allowed_token_ids": list(range(64)), "min_tokens": 4, "stop_token_ids": [1]},
])]


def engine(checkpoint: Path, **values) -> LLM:
    return LLM(str(checkpoint), dtype="float32", skip_tokenizer_init=True, **values)


def tokens(outputs) -> list[list[int]]:
    """Of all completions, one after the other."""
    return [[i for c in o.outputs for i in c.token_ids] for o in outputs]


@pytest.fixture(scope="module")
def alone(small_checkpoint: Path) -> list[list[int]]:
    with engine(small_checkpoint, enable_prefix_caching=False) as llm:
        return [tokens(llm.generate([p], s, use_tqdm=False))[0] for p, s in zip(PROMPTS, PARAMS, strict=True)]


@pytest.mark.parametrize("values", [{}, {"long_prefill_token_threshold": 7}, {"max_num_seqs": 2}, {"num_gpu_blocks_override": 9},
                                    {"enable_prefix_caching": False}, {"max_num_seqs": 3, "long_prefill_token_threshold": 5, "num_gpu_blocks_override": 7}], ids=str)
def test_together_in_any_order_and_with_a_warm_cache(small_checkpoint: Path, alone: list, values: dict) -> None:
    with engine(small_checkpoint, **values) as llm:
        assert tokens(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == alone
        outputs = llm.generate(PROMPTS[::-1], PARAMS[::-1], use_tqdm=False)
    assert tokens(outputs) == alone[::-1]
    if "num_gpu_blocks_override" in values:
        assert sum(o.metrics.num_preemptions for o in outputs) > 0


def test_with_forced_preemptions(small_checkpoint: Path, alone: list) -> None:
    with engine(small_checkpoint) as llm:
        running, call, count = llm.llm_engine, Call(), 0
        running.submit(call, PROMPTS, PARAMS, [0] * len(PROMPTS))
        while running.has_work:
            count += 1
            if count in (4, 9, 15):
                for sequence_id in range(len(PROMPTS) + 2):
                    running.engine.scheduler.preempt(sequence_id)
            running.step()
    outputs = [output for _, output in sorted(call.take(), key=lambda done: done[0])]
    assert all(o.metrics.num_preemptions >= 2 for o in outputs)
    assert tokens(outputs) == alone


@pytest.mark.parametrize("n", [1, 2, 5])
def test_how_many_completions_are_asked_for_changes_none_of_them(small_checkpoint: Path, n: int) -> None:
    params = SamplingParams(max_tokens=10, ignore_eos=True, seed=4, temperature=0.9, presence_penalty=0.3)
    with engine(small_checkpoint) as llm:
        (most,), (some,) = (llm.generate([PROMPTS[1]], replace(params, n=k), use_tqdm=False) for k in (7, n))
    assert [c.token_ids for c in some.outputs] == [c.token_ids for c in most.outputs[:n]]
    assert len({tuple(c.token_ids) for c in most.outputs}) == 7


def test_min_tokens_puts_the_end_off(small_checkpoint: Path) -> None:
    with engine(small_checkpoint) as llm:
        stops = list(range(VOCAB_SIZE - 1))
        short = SamplingParams(temperature=1.0, seed=1, stop_token_ids=stops, max_tokens=10)
        longer = SamplingParams(temperature=1.0, seed=1, stop_token_ids=stops, max_tokens=10, min_tokens=5)
        lengths = [len(t) for t in tokens(llm.generate([[1, 2]] * 2, [short, longer], use_tqdm=False))]
    assert lengths[0] == 1
    assert lengths[1] == 6


def test_ids_out_of_the_vocabulary_are_refused_at_admission(small_checkpoint: Path) -> None:
    with engine(small_checkpoint) as llm:
        for params in (SamplingParams(logit_bias={VOCAB_SIZE: 1.0}), SamplingParams(allowed_token_ids=[VOCAB_SIZE])):
            with pytest.raises(RequestValidationError, match="out of vocabulary"):
                llm.generate([[1], [2]], [SamplingParams(), params], use_tqdm=False)
            assert not llm.llm_engine.has_work


def test_a_strangers_processor_is_used_and_its_failure_fails_the_call(install, small_checkpoint: Path) -> None:
    source = """
from kvloom import hookimpl
from kvloom.interfaces import LogitsProcessor
KVLOOM_API = {"logits_processors": 0}
@hookimpl
def kvloom_register_logits_processors(registry):
    registry.add("always-9", "acme_0:AlwaysNine")
class AlwaysNine(LogitsProcessor):
    @classmethod
    def parameters(cls, params, tokenizer):
        return params.seed if params.seed in (99, 100) else None
    def new_state(self, parameters, sequence):
        return parameters
    def apply(self, logits, states):
        if 100 in states:
            raise RuntimeError("cannot")
        logits[:, 9] = 1e9
        return logits
"""
    install("acme", {"acme": source})
    from kvloom.errors import RequestFailedError

    with engine(small_checkpoint) as llm:
        mine, other = SamplingParams(seed=99, max_tokens=3, ignore_eos=True), SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        expected = tokens(llm.generate([[1, 2]], other, use_tqdm=False))[0]
        assert tokens(llm.generate([[1, 2]] * 2, [mine, other], use_tqdm=False)) == [[9, 9, 9], expected]
        with pytest.raises(RequestFailedError, match=r"logits processor 'always-9' \(plugin 'acme' of acme 1\.0\) raised RuntimeError: cannot"):
            llm.generate([[1, 2]], SamplingParams(seed=100), use_tqdm=False)
        assert tokens(llm.generate([[1, 2]], other, use_tqdm=False))[0] == expected


@pytest.mark.parametrize("temperature", [0, 1e-6])
def test_tiny_temperatures_are_greedy_whatever_else_is_asked_for(small_checkpoint: Path, temperature: float) -> None:
    with engine(small_checkpoint) as llm:
        greedy = tokens(llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False))
        tiny = SamplingParams(temperature=temperature, top_k=50, top_p=0.9, seed=3, max_tokens=8, ignore_eos=True)
        assert tokens(llm.generate(PROMPTS, tiny, use_tqdm=False)) == greedy
