"""Every architecture gives transformers' tokens and logits, however its work is cut up, cached or interrupted."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from replays import assert_repeated, replayed
from variants import VARIANTS, make

from kvloom import LLM, RequestOutput, SamplingParams
from kvloom.live_request import Call

OUTPUT_TOKENS, CANDIDATES = 40, 48
"""Outputs grow over two borders of blocks and over every window of `VARIANTS`, and last until each of 33 requests gave way."""
RUNS = {1: [(True, False), (False, True)], 8: [(True, False), (False, True)],
        33: [(preempt, warm) for preempt in (False, True) for warm in (False, True)]}
"""By requests at once: is each preempted, and is there a cache of the run before?"""
SMALLEST_GAP, LOGIT_TOLERANCE = 1e-3, 1e-4
OF_THE_LARGEST = 8e-6
"""Tolerance of logits that are large: with YaRN they reach 32, and transformers' own in float32 are off by 5e-5 from those in float64."""
GREEDY = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)


@dataclass
class Truth:
    """Prompts with the tokens and logits that transformers gives for them."""

    directory: Path
    prompts: list[list[int]]
    outputs: list[list[int]]
    logits: list[torch.Tensor]


def engine(directory: Path, **values) -> LLM:
    """`max_model_len` is the trained context: dynamic scaling is computed once for it, and compared within it."""
    return LLM(str(directory), skip_tokenizer_init=True, dtype="float32", max_model_len=256, **values)


@pytest.fixture(scope="module", params=VARIANTS)
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """One engine's tokens are only proposals: transformers, given each prefix, must choose the same token by a clear gap.

    That is its greedy path, computed in one forward a prompt.
    """
    directory = tmp_path_factory.mktemp(request.param)
    model = make(request.param, directory)
    numbers = random.Random(request.param)
    lengths = [1, 2, 15, 16, 17, 31, 33, 48, 64, 65, 100]
    prompts = [[numbers.randrange(101) for _ in range(lengths[i] if i < len(lengths) else numbers.randint(1, 90))]
               for i in range(CANDIDATES)]
    with engine(directory) as llm:
        outputs = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, GREEDY, use_tqdm=False)]
    found = Truth(directory, [], [], [])
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1:-1]
        best = logits.topk(2).values
        if (best[:, 0] - best[:, 1]).min() > SMALLEST_GAP:  # else rounding decides, which proves nothing
            assert output == logits.argmax(-1).tolist()
            found.prompts.append(prompt)
            found.outputs.append(output)
            found.logits.append(logits)
    assert len(found.prompts) >= max(RUNS)
    return found


def drive(llm: LLM, prompts: list[list[int]], *, preempt: bool) -> list[RequestOutput]:
    """Like `LLM.generate`; with `preempt` every request has to give way once, at different times."""
    running, call = llm.llm_engine, Call()
    running.submit(call, prompts, [GREEDY] * len(prompts), [0] * len(prompts))
    sequences = [live.sequences[0].request.sequence_id for live in call.pending.values()]
    waiting_for = dict(enumerate(sequences, start=3)) if preempt else {}
    count = 0
    while running.has_work:
        count += 1
        for when, sequence_id in list(waiting_for.items()):
            if count >= when and running.engine.scheduler.preempt(sequence_id):
                del waiting_for[when]
        running.step()
    return [output for _, output in sorted(call.take(), key=lambda done: done[0])]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in outputs]


@pytest.mark.parametrize("most_tokens", [16, 64, 0], ids=lambda n: f"at-most-{n or 'any'}")
def test_tokens_over_batches_chunks_caches_and_preemptions(truth: Truth, most_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(truth.directory, long_prefill_token_threshold=most_tokens) as llm, replayed(monkeypatch) as seen:
        for batch, preempt, warm in ((batch, *run) for batch, runs in RUNS.items() for run in runs):
            prompts, expected = truth.prompts[:batch], truth.outputs[:batch]
            if not warm:
                assert llm.reset_prefix_cache()
            outputs = drive(llm, prompts, preempt=preempt)
            assert tokens(outputs) == expected, f"{batch=} {preempt=} {warm=}"
            assert all((o.metrics.num_preemptions >= 1) == preempt for o in outputs)
            hits = [o.num_cached_tokens for o in outputs if len(o.prompt_token_ids) > 16]
            assert all(hits) == warm or not hits
        assert_repeated(seen)


def test_a_pool_too_small_for_all_makes_requests_give_way(truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(truth.directory, num_gpu_blocks_override=64) as llm, replayed(monkeypatch) as seen:
        outputs = llm.generate(truth.prompts[:33], GREEDY, use_tqdm=False)
        assert tokens(outputs) == truth.outputs[:33]
        assert sum(o.metrics.num_preemptions for o in outputs) >= 1
        assert_repeated(seen)


class LogitsRecorder:
    """Stands in for a model's `logits` and keeps what it gave."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def install(self, model: torch.nn.Module) -> None:
        original: Callable = model.logits

        def record(hidden: torch.Tensor, ctx: object) -> torch.Tensor:
            logits = original(hidden, ctx)
            self.seen.append(logits.clone())
            return logits

        model.logits = record


@pytest.mark.parametrize(("backend", "most_tokens"), [("cpu", 0), ("cpu", 16), ("torch", 0), ("reference", 16)])
def test_logits(truth: Truth, backend: str, most_tokens: int) -> None:
    with engine(truth.directory, long_prefill_token_threshold=most_tokens, attention_backend=backend) as llm:
        recorder = LogitsRecorder()
        llm.apply_model(recorder.install)
        by_length = sorted(zip(truth.prompts, truth.logits, strict=True), key=lambda both: len(both[0]))
        for prompt, expected in (by_length[0], by_length[len(by_length) // 2], by_length[-1]):
            recorder.seen.clear()
            llm.generate([prompt], GREEDY, use_tqdm=False)
            tolerance = max(LOGIT_TOLERANCE, OF_THE_LARGEST * float(expected.abs().max()))
            torch.testing.assert_close(torch.cat(recorder.seen), expected, atol=tolerance, rtol=0)
