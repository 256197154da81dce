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


def test_a_stop_string_that_ended_while_min_tokens_waited_is_not_found_later(byte_tokenizer: Tokenizer) -> None:
    assert watch(byte_tokenizer, "a.bcd", stop=["never there", "."], min_tokens=3) == (None, "a.bcd", 5)
    assert watch(byte_tokenizer, "a.bcd", stop=["never there", ".bcd"], min_tokens=3) == (".bcd", "a", 5)


def in_tokens(tokenizer: Tokenizer, output: list[int], **params) -> tuple[str | None, str, int]:
    """(stop string, text, tokens taken), a token at a time; what `take` gives never changes and makes the text."""
    found, shown = StopStringWatch(tokenizer, [], SamplingParams(**params)), ""
    for token_id in output:
        stopped = found.add([token_id])
        shown += found.take()
        assert found.text.startswith(shown)
        if stopped is not None:
            break
    found.finish()
    assert found.add(output) == found.found, "later tokens are left out"
    assert shown + found.take() == found.text
    assert found.take() == ""
    return found.found, found.text, found.num_tokens


@pytest.fixture(scope="module")
def words(shared_dir: Path) -> Tokenizer:
    return AutoTokenizer(shared_dir / "data/gpt2-tokenizer")


@pytest.fixture(scope="module")
def stories(shared_dir: Path) -> Tokenizer:
    return AutoTokenizer(shared_dir / "models/stories260k")


@pytest.mark.parametrize(("text", "stop", "found", "before", "tokens"), [
    (" Hello world again", "lo wor", "lo wor", " Hel", 2),         # across token borders
    (" Hello world again", "ell", "ell", " H", 1),                 # inside one token
    (" Hello world again", ["again", "l", "H"], "l", " He", 1),    # several in one piece: first in the list
    (" Hello world again", ["o w", "r"], "o w", " Hell", 2),       # in the same piece, the second began there
    ("日本語。終わり", "。終", "。終", "日本語", None),            # characters of several tokens
    ("done 🎉🎉 really", "🎉 r", "🎉 r", "done 🎉", None),
    (" Hello world", "worlds", None, " Hello world", 2),
])
@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_in_real_tokens(words: Tokenizer, text: str, stop, found: str | None, before: str, tokens: int | None, include: bool) -> None:
    output = words.encode(text, add_special_tokens=False)
    got = in_tokens(words, output, stop=stop, include_stop_str_in_output=include)
    assert got[:2] == (found, before + (found or "") if include else before)
    assert tokens is None or got[2] == tokens


def run_of_bytes(tokenizer: Tokenizer, text: str) -> list[int]:
    vocabulary = tokenizer.underlying.get_vocab()
    return [vocabulary[f"<0x{byte:02X}>"] for byte in text.encode()]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_in_what_was_held_back_until_the_end_is_found(words: Tokenizer, stories: Tokenizer, include: bool) -> None:
    output = [*stories.encode("Once", add_special_tokens=False), *run_of_bytes(stories, "日本!")]
    assert in_tokens(stories, output, stop="本", include_stop_str_in_output=include) == ("本", "Once日本" if include else "Once日", len(output))
    half = words.encode("a🎉", add_special_tokens=False)[:-1]
    assert in_tokens(words, half, stop="a\ufffd", include_stop_str_in_output=include)[:2] == ("a\ufffd", "a\ufffd" if include else "")
    assert in_tokens(words, half, stop="\ufffd", min_tokens=len(half))[:2] == (None, "a\ufffd"), "no text after min_tokens"


@given(output=st.lists(st.integers(0, 520), max_size=40), stops=st.lists(st.text("aeo t日\ufffd", min_size=1, max_size=4), max_size=3),
       include=st.booleans(), skip=st.booleans())
def test_what_is_taken_is_never_cut(stories: Tokenizer, output: list[int], stops: list[str], include: bool, skip: bool) -> None:
    found, text, taken = in_tokens(stories, output, stop=stops, include_stop_str_in_output=include, skip_special_tokens=skip)
    whole = stories.decode(output, skip_special_tokens=skip)
    assert text == whole if found is None else whole.startswith(text)
    if found is None:
        assert taken == len(output)
        assert not any(stop in whole for stop in stops)
    elif include:
        assert text.endswith(found)


def test_text_is_shown_as_soon_as_it_cannot_begin_a_stop_string(byte_tokenizer: Tokenizer) -> None:
    def shown(**params) -> list[str]:
        found = StopStringWatch(byte_tokenizer, [], SamplingParams(**params))
        given = []
        for token_id in byte_tokenizer.encode("abcdef", add_special_tokens=False):
            found.add([token_id])
            given.append(found.take())
        return given

    assert shown(stop=["xyz", "q"]) == ["", "", "a", "b", "c", "d"]
    assert shown(stop=["xyz"], include_stop_str_in_output=True) == shown(stop="q") == shown() == list("abcdef")


class CharTokenizer:
    """An id is a character."""

    special_token_ids = byte_token_ids = frozenset()
    vocab_size = 256

    def decode(self, token_ids, **options) -> str:
        return "".join(map(chr, token_ids))


def test_what_is_searched_and_copied_for_a_piece_does_not_grow_with_the_output() -> None:
    found = StopStringWatch(CharTokenizer(), [], SamplingParams(stop=["never there", "nor there"]))
    for count in range(1, 5_000):
        found.add([0xE9])
        assert len(found._recent) <= len("never there") - 1  # searched with the next piece
        assert len(found._waiting) == count  # appended to, never joined
    assert found.text == "\xe9" * 4_999


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
        with pytest.raises(RequestValidationError, match="give stop_token_ids"):
            llm.generate([[1]], SamplingParams(stop="x"), use_tqdm=False)
        assert not llm.llm_engine.has_work
