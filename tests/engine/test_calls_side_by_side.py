"""Several calls under way in one thread: whatever ends one of them, the others get everything that is theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvloom import LLM, SamplingParams
from kvloom.errors import EngineClosedError, InternalError, RequestFailedError
from kvloom.live_request import Call

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def llm(small_checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(small_checkpoint), dtype="float32") as made:
        yield made


def leave(ids: list, logits: torch.Tensor) -> torch.Tensor:
    raise KeyboardInterrupt


def test_an_interruption_ends_the_requests_of_its_step_and_everybody_hears_of_it(llm: LLM) -> None:
    others = llm.generate_iter(["a", "b"], GREEDY, max_in_flight=1, on_error="return")
    first = next(others)
    assert first.error is None
    call = Call()
    llm.llm_engine.submit(call, ["c"], [GREEDY], [0])
    with pytest.raises(KeyboardInterrupt):
        llm.generate("d", SamplingParams(max_tokens=3, logits_processors=[leave]), use_tqdm=False)
    while call.num_unfinished:
        llm.llm_engine.step()
    ((_, output),) = call.take()
    assert "KeyboardInterrupt" in str(output.error)
    assert [o.error for o in others] == [None]
    assert len(llm.generate("e", GREEDY, use_tqdm=False)) == 1


def test_a_reader_that_raises_takes_nothing_from_the_others(llm: LLM) -> None:
    engine, reading, other = llm.llm_engine, Call(), Call()

    def raises(index: int, piece: str) -> None:
        raise BrokenPipeError("gone")

    engine.submit(reading, ["Hello"], [GREEDY], [0], on_text=raises)
    engine.submit(other, ["World", "again"], [GREEDY] * 2, [0] * 2)
    while other.num_unfinished:
        try:
            engine.step()
        except BrokenPipeError:
            engine.abort(reading)
    assert [o.error for _, o in other.take()] == [None, None]
    assert not engine.has_work


def test_a_call_from_inside_a_step_fails_the_request_that_made_it(llm: LLM) -> None:
    def again(ids: list, logits: torch.Tensor) -> torch.Tensor:
        llm.generate("inner", GREEDY, use_tqdm=False)
        return logits

    alone = llm.generate(["x", "y"], GREEDY, use_tqdm=False)
    bad = SamplingParams(temperature=0, max_tokens=6, logits_processors=[again])
    outputs = llm.generate(["x", "bad", "y"], [GREEDY, bad, GREEDY], use_tqdm=False, on_error="return")
    assert "called from inside the engine" in str(outputs[1].error)
    assert [outputs[i].outputs[0].token_ids for i in (0, 2)] == [o.outputs[0].token_ids for o in alone]


def test_a_closed_engine_ends_the_loops_over_it(llm: LLM) -> None:
    outputs = llm.generate_iter((str(i) for i in range(100)), GREEDY, max_in_flight=2, on_error="return")
    assert next(outputs).error is None
    llm.close()
    with pytest.raises(EngineClosedError):
        list(outputs)


def test_waiting_for_nothing_is_a_bug_and_says_so(llm: LLM) -> None:
    with pytest.raises(InternalError, match="the engine has none"):
        llm.llm_engine.step()


def test_a_tokenizer_that_breaks_at_admission_leaves_nothing_behind(llm: LLM) -> None:
    tokenizer = llm.llm_engine.tokenizer

    def decode(token_ids, **options):
        raise RuntimeError("no")

    tokenizer.decode = decode
    outputs = llm.generate(["a", "b"], [GREEDY, SamplingParams(max_tokens=3, stop=["x"])], use_tqdm=False, on_error="return")
    assert "RuntimeError: no" in str(outputs[1].error)
    with pytest.raises(RequestFailedError, match="RuntimeError: no"):
        llm.generate("a", SamplingParams(max_tokens=3, stop=["x"]), use_tqdm=False)
    assert not llm.llm_engine.has_work


def test_an_error_that_is_kept_does_not_keep_the_steps_tensors(llm: LLM) -> None:
    def fail(ids: list, logits: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    (output,) = llm.generate(["a"], SamplingParams(max_tokens=3, logits_processors=[fail]), use_tqdm=False, on_error="return")
    error: BaseException | None = output.error
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            held = [v for v in trace.tb_frame.f_locals.values() if isinstance(v, torch.Tensor)]
            assert not held or trace.tb_frame.f_code.co_filename == __file__
            trace = trace.tb_next
        error = error.__cause__


def test_what_a_sequence_brought_is_forgotten_with_it(llm: LLM) -> None:
    llm.generate(["a"], SamplingParams(max_tokens=2, logits_processors=[lambda ids, logits: logits]), use_tqdm=False)
    llm.generate(["b"], GREEDY, use_tqdm=False)  # the worker hears of the end with the next step
    (state,) = llm.llm_engine.executor.call(lambda worker: worker._runner._state)
    assert sum(p is not None for p in state.params) <= 1
    assert not any(p.states for p in state.processors)
