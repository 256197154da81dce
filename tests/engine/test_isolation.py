"""One bad request of eight: seven give the same tokens as undisturbed, the eighth carries the error, and the next call works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kvloom import LLM, SamplingParams
from kvloom.errors import RequestFailedError

PROMPTS = [[i + 1, 7, 30 + i] for i in range(8)]
BAD = 3
GOOD = [SamplingParams(temperature=1.0, seed=i, max_tokens=8, ignore_eos=True, logprobs=1) for i in range(8)]
PLUGIN = """
import torch
from pydantic import BaseModel
from kvloom import hookimpl
from kvloom.interfaces import LogitsProcessor
KVLOOM_API = {"logits_processors": 0}
@hookimpl
def kvloom_register_logits_processors(registry):
    registry.add("breaks", "acme_0:Breaks", config=How)
class How(BaseModel):
    how: str
class Breaks(LogitsProcessor):
    def new_state(self, parameters, sequence):
        if parameters.how == "state" and sequence.sequence_id >= 0:
            raise OSError("no state")
        return [parameters.how, 0]
    def apply(self, logits, states):
        for row, (how, made) in enumerate(states):
            if made < 3:
                continue
            if how == "raise":
                raise RuntimeError("cannot go on")
            if how == "shape":
                return logits[:, :5]
            if how == "nan":
                logits[row, 5] = float("nan")
            if how == "nothing":
                logits[row] = -float("inf")
        return logits
    def advance(self, state, token_ids):
        if state[0] == "advance" and state[1] == 3:
            raise KeyError("lost")
        state[1] += len(token_ids)
"""


@pytest.fixture(scope="module")
def undisturbed(small_checkpoint: Path) -> list:
    with LLM(str(small_checkpoint), dtype="float32") as llm:
        return [tokens(o) for o in llm.generate(PROMPTS, GOOD, use_tqdm=False)]


@pytest.fixture
def llm(install, small_checkpoint: Path) -> Iterator[LLM]:
    install("acme", {"acme": PLUGIN})
    with LLM(str(small_checkpoint), dtype="float32") as made:
        yield made


def tokens(output) -> tuple:
    (done,) = output.outputs
    return tuple(done.token_ids), round(done.cumulative_logprob, 4)


def check(llm: LLM, undisturbed: list, bad: SamplingParams, message: str) -> None:
    params = [bad if i == BAD else p for i, p in enumerate(GOOD)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False, on_error="return")
    for i, output in enumerate(outputs):
        if i == BAD:
            assert isinstance(output.error, RequestFailedError)
            assert message in str(output.error)
        else:
            assert output.error is None
            assert tokens(output) == undisturbed[i]
    with pytest.raises(RequestFailedError) as caught:
        llm.generate(PROMPTS, params, use_tqdm=False)
    assert message in str(caught.value)
    scheduler = llm.llm_engine.engine.scheduler
    scheduler.check_integrity()
    assert scheduler.num_free_blocks == scheduler.num_usable_blocks
    assert [tokens(o) for o in llm.generate(PROMPTS, GOOD, use_tqdm=False)] == undisturbed


WHO = "logits processor 'breaks' (plugin 'acme' of acme 1.0)"


@pytest.mark.parametrize(("how", "message"), [
    ("raise", f"{WHO} raised RuntimeError: cannot go on"), ("shape", f"{WHO} gave the shape (1, 5) for (1, 288)"),
    ("nan", f"{WHO} left NaN or infinity in its logits"), ("nothing", f"{WHO} left no allowed token in its logits"),
    ("state", f"{WHO} raised OSError: no state"), ("advance", f"{WHO} raised KeyError: 'lost'"),
])
@pytest.mark.parametrize("n", [1, 3])
def test_a_plugin_that_breaks_fails_the_request_that_asked_for_it(llm: LLM, undisturbed: list, how: str, message: str, n: int) -> None:
    bad = SamplingParams(temperature=1.0, n=n, seed=9, max_tokens=8, ignore_eos=True, extra_args={"breaks": {"how": how}})
    check(llm, undisturbed, bad, message)


def explode(ids: list, logits: torch.Tensor) -> torch.Tensor:
    raise ArithmeticError(f"after {len(ids)}")


def cut(ids: list, logits: torch.Tensor) -> torch.Tensor:
    return logits[:3]


def poison(ids: list, logits: torch.Tensor) -> torch.Tensor:
    return logits * float("nan")


@pytest.mark.parametrize(("function", "message"), [
    (explode, "the function explode raised ArithmeticError: after 0"), (cut, "the function cut gave (3,) for logits of the shape (288,)"),
    (poison, "the function poison left NaN in the logits"), (lambda ids, logits: None, "gave NoneType for logits"),
])
def test_a_function_that_breaks_fails_its_own_request(llm: LLM, undisturbed: list, function: Callable, message: str) -> None:
    check(llm, undisturbed, SamplingParams(max_tokens=8, ignore_eos=True, logits_processors=[function]), message)


def test_the_cause_is_the_plugins_own_exception(llm: LLM) -> None:
    bad = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, extra_args={"breaks": {"how": "raise"}})
    (output,) = llm.generate([PROMPTS[0]], bad, use_tqdm=False, on_error="return")
    cause = output.error.__cause__
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert isinstance(cause, RuntimeError)
    assert len(output.outputs[0].token_ids) == 3
    assert output.outputs[0].finish_reason == "error"


def break_model(llm: LLM, broken_token: int) -> Callable[[], None]:
    """The forward raises whenever a step computes this token; gives back what undoes it."""
    (original,) = llm.apply_model(lambda model: model.forward)

    def forward(inputs, ctx):
        if bool((inputs.token_ids == broken_token).any()):
            raise MemoryError("this token is too much")
        return original(inputs, ctx)

    llm.apply_model(lambda model: setattr(model, "forward", forward))
    return lambda: llm.apply_model(lambda model: setattr(model, "forward", original))


@pytest.mark.parametrize("values", [{}, {"long_prefill_token_threshold": 2}, {"max_num_seqs": 3}, {"enable_prefix_caching": False}], ids=str)
def test_a_model_that_raises_for_one_request_fails_that_one(small_checkpoint: Path, undisturbed: list, values: dict) -> None:
    broken = 99
    prompts = [[*p[:2], broken] if i == BAD else p for i, p in enumerate(PROMPTS)]
    assert not any(broken in t for t, _ in undisturbed)
    with LLM(str(small_checkpoint), dtype="float32", **values) as llm:
        repair = break_model(llm, broken)
        outputs = llm.generate(prompts, GOOD, use_tqdm=False, on_error="return")
        assert [tokens(o) for i, o in enumerate(outputs) if i != BAD] == [t for i, t in enumerate(undisturbed) if i != BAD]
        assert "MemoryError: this token is too much" in str(outputs[BAD].error)
        assert isinstance(outputs[BAD].error.__cause__, MemoryError)
        repair()
        assert [tokens(o) for o in llm.generate(PROMPTS, GOOD, use_tqdm=False)] == undisturbed
        llm.llm_engine.engine.scheduler.check_integrity()


def test_a_failure_that_does_not_come_again_costs_nobody_anything(small_checkpoint: Path, undisturbed: list) -> None:
    with LLM(str(small_checkpoint), dtype="float32") as llm:
        (original,) = llm.apply_model(lambda model: model.forward)
        calls = []

        def forward(inputs, ctx):
            calls.append(1)
            if len(calls) in (2, 15):
                raise ConnectionError("once")
            return original(inputs, ctx)

        llm.apply_model(lambda model: setattr(model, "forward", forward))
        assert [tokens(o) for o in llm.generate(PROMPTS, GOOD, use_tqdm=False)] == undisturbed


def test_a_sampler_that_raises_is_tried_singly_too(install, small_checkpoint: Path, undisturbed: list) -> None:
    install("acme", {"acme": """
from kvloom import hookimpl
from kvloom_samplers.token_sampler import TokenSampler
KVLOOM_API = {"samplers": 0}
@hookimpl
def kvloom_register_samplers(registry):
    registry.add("default", "acme_0:Picky")
class Picky(TokenSampler):
    def sample(self, logits, rows):
        if 3 in rows.seeds and (rows.positions[rows.seeds == 3] == 6).any():
            raise LookupError("not this one")
        return super().sample(logits, rows)
"""})
    with LLM(str(small_checkpoint), dtype="float32", providers={"samplers": {"default": "acme"}}) as llm:
        outputs = llm.generate(PROMPTS, GOOD, use_tqdm=False, on_error="return")
    assert "LookupError: not this one" in str(outputs[BAD].error)
    assert [tokens(o) for i, o in enumerate(outputs) if i != BAD] == [t for i, t in enumerate(undisturbed) if i != BAD]


@pytest.mark.parametrize("token_id", [-1, 288, 2**40])
def test_a_sampler_that_makes_tokens_up_fails_their_rows(install, small_checkpoint: Path, undisturbed: list, token_id: int) -> None:
    install("acme", {"acme": f"""
from kvloom import hookimpl
from kvloom_samplers.token_sampler import TokenSampler
KVLOOM_API = {{"samplers": 0}}
@hookimpl
def kvloom_register_samplers(registry):
    registry.add("default", "acme_0:Inventive")
class Inventive(TokenSampler):
    def sample(self, logits, rows):
        done = super().sample(logits, rows)
        for row in ((rows.seeds == 3) & (rows.positions == 6)).nonzero()[0]:
            done.token_ids[row] = {token_id}
        return done
"""})
    with LLM(str(small_checkpoint), dtype="float32", providers={"samplers": {"default": "acme"}}) as llm:
        outputs = llm.generate(PROMPTS, GOOD, use_tqdm=False, on_error="return")
    assert f"gave the token id {token_id}: there are 0 to 287" in str(outputs[BAD].error)
    assert [tokens(o) for i, o in enumerate(outputs) if i != BAD] == [t for i, t in enumerate(undisturbed) if i != BAD]


def test_a_tokenizer_that_cannot_decode_fails_its_request(small_checkpoint: Path, undisturbed: list) -> None:
    with LLM(str(small_checkpoint), dtype="float32") as llm:
        tokenizer = llm.llm_engine.tokenizer
        original = type(tokenizer).decode
        unwanted = [i for i in undisturbed[BAD][0] if i < 256][:2]

        def decode(token_ids, **options):
            if set(unwanted) <= set(token_ids):
                raise UnicodeError("what is this")
            return original(tokenizer, token_ids, **options)

        tokenizer.decode = decode
        outputs = llm.generate(PROMPTS, GOOD, use_tqdm=False, on_error="return")
        assert "UnicodeError: what is this" in str(outputs[BAD].error)
        assert [tokens(o) for i, o in enumerate(outputs) if i != BAD] == [t for i, t in enumerate(undisturbed) if i != BAD]
