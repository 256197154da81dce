"""Stop strings are found as soon as the text completes one, wherever token borders lie."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom import LLM, SamplingParams
from kvloom.errors import RequestValidationError
from kvloom.interfaces import Tokenizer
from kvloom.text.stop_strings import StopStringWatch
from kvloom_plugins.tokenizers.hf import AutoTokenizer


@pytest.fixture(scope="module")
def byte_tokenizer(small_checkpoint: Path) -> Tokenizer:
    return AutoTokenizer(small_checkpoint)


def watch(tokenizer: Tokenizer, text: str, **params) -> tuple[str | None, str, int]:
    """(stop string, text, tokens taken) of an output with this text, a byte a token."""
    found = StopStringWatch(tokenizer, [], SamplingParams(**params))
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        if found.add([token_id]) is not None:
            return found.found, found.text, found.num_tokens
    found.finish()
    return None, found.text, found.num_tokens


@given(text=st.text("ab日", max_size=20), stops=st.lists(st.text("ab日", min_size=1, max_size=3), min_size=1, max_size=3), include=st.booleans())
def test_the_first_completed_stop_string_cuts_the_text(byte_tokenizer: Tokenizer, text: str, stops: list[str], include: bool) -> None:
    expected = (None, text)
    for end in range(1, len(text) + 1):  # text grows by a character
        hit = next((s for s in stops if text[:end].endswith(s)), None)
        if hit is not None:
            expected = (hit, text[:end] if include else text[:end - len(hit)])
            break
    found, got, _ = watch(byte_tokenizer, text, stop=stops, include_stop_str_in_output=include)
    assert (found, got) == expected


def test_stop_strings_wait_for_min_tokens(byte_tokenizer: Tokenizer) -> None:
    assert watch(byte_tokenizer, "a.b.c.", stop=".")[1:] == ("a", 2)
    assert watch(byte_tokenizer, "a.b.c.", stop=".", min_tokens=3)[1:] == ("a.b", 4)


def test_a_long_output_is_searched_in_linear_time(byte_tokenizer: Tokenizer) -> None:
    searched = 0

    class Counted(str):
        def find(self, *args: object) -> int:
            nonlocal searched
            searched += len(self) - args[1]
            return super().find(*args)

    found = StopStringWatch(byte_tokenizer, [], SamplingParams(stop="never"))
    for token_id in byte_tokenizer.encode("a" * 2000, add_special_tokens=False):
        found.text = Counted(found.text)
        found.add([token_id])
    assert searched <= 2000 * 10


@pytest.fixture(scope="module")
def llm(small_checkpoint: Path):
    with LLM(str(small_checkpoint), dtype="float32") as made:
        yield made


def text_of(llm: LLM, **params) -> tuple[str, list[int], str, object]:
    base = {"temperature": 1.0, "seed": 3, "max_tokens": 40, "ignore_eos": True, "allowed_token_ids": list(range(60, 90))}
    outputs = llm.generate([[1, 2], [3, 4]], [SamplingParams(**base, **params), SamplingParams(**base)], use_tqdm=False)
    assert len(outputs[1].outputs[0].token_ids) == 40, "the neighbour goes on"
    done = outputs[0].outputs[0]
    return done.text, list(done.token_ids), done.finish_reason, done.stop_reason


@pytest.mark.parametrize("include", [False, True])
def test_generate_ends_at_a_stop_string(llm: LLM, include: bool) -> None:
    whole, ids, *_ = text_of(llm)
    stop = whole[10:12]
    text, token_ids, reason, stop_reason = text_of(llm, stop=["never there", stop], include_stop_str_in_output=include)
    place = whole.index(stop)
    assert text == whole[:place + len(stop) if include else place]
    assert (reason, stop_reason) == ("stop", stop)
    assert token_ids == ids[:len(token_ids)]
    assert len(token_ids) == place + len(stop)
    scheduler = llm.llm_engine.engine.scheduler
    assert scheduler.num_free_blocks == scheduler.num_usable_blocks


def test_stop_strings_that_never_come_change_nothing(llm: LLM) -> None:
    assert text_of(llm, stop="never there") == text_of(llm)


def test_the_text_of_a_stop_token_is_kept_only_if_asked_for(llm: LLM) -> None:
    whole, ids, *_ = text_of(llm)
    first = ids.index(ids[5])
    for stop in (None, ["never there"]):
        assert text_of(llm, stop=stop, stop_token_ids=[ids[5]])[0] == whole[:first]
        assert text_of(llm, stop=stop, stop_token_ids=[ids[5]], include_stop_str_in_output=True)[0] == whole[:first + 1]


def test_stop_strings_need_text(small_checkpoint: Path) -> None:
    with pytest.raises(RequestValidationError, match="detokenize=True"):
        SamplingParams(stop="x", detokenize=False)
    with LLM(str(small_checkpoint), skip_tokenizer_init=True) as llm:
        with pytest.raises(RequestValidationError, match="stop strings need one"):
            llm.generate([[1]], SamplingParams(stop="x"), use_tqdm=False)
        assert not llm.llm_engine.has_work
