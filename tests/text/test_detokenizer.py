"""Text comes in final pieces, and all pieces together are the text of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.interfaces import Tokenizer
from kvloom.testing.checkpoints import EOS
from kvloom.text.detokenizer import INCOMPLETE, MAX_WINDOW_TOKENS, Detokenizer
from kvloom_plugins.tokenizers.hf import AutoTokenizer

TEXTS = ["plain words, and more", "naïve café, déjà vu", "日本語のテキスト", "смешанный текст 123", "👩‍👩‍👧‍👦 family 🎉🎉",
         "  spaces \t and\n\nlines  ", "नमस्ते दुनिया", "\u0301combining first", "a\u200db"]


@pytest.fixture(scope="module")
def byte_tokenizer(small_checkpoint: Path) -> Tokenizer:
    return AutoTokenizer(small_checkpoint)


def pieces(tokenizer: Tokenizer, prompt: list[int], output: list[int], chunk: int = 1, skip: bool = True) -> list[str]:
    text = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [*(text.add(output[i:i + chunk]) for i in range(0, len(output), chunk)), text.finish()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_pieces_make_the_whole_text_and_never_show_half_a_character(byte_tokenizer: Tokenizer, text: str, chunk: int) -> None:
    output = byte_tokenizer.encode(text, add_special_tokens=False)
    found = pieces(byte_tokenizer, [1, 2, 3], output, chunk)
    assert "".join(found) == text
    assert not any(INCOMPLETE in piece for piece in found)


@given(text=st.text(max_size=40), prompt=st.text(max_size=10), chunk=st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_any_text_after_any_prompt(byte_tokenizer: Tokenizer, text: str, prompt: str, chunk: int) -> None:
    output = byte_tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces(byte_tokenizer, byte_tokenizer.encode(prompt), output, chunk)) == text


@given(output=st.lists(st.integers(0, 255), max_size=60), chunk=st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_text_give_the_same_as_decoding_them_at_once(byte_tokenizer: Tokenizer, output: list[int], chunk: int) -> None:
    assert "".join(pieces(byte_tokenizer, [], output, chunk)) == byte_tokenizer.decode(output)


def test_endless_bytes_that_are_no_text_do_not_grow_the_window(byte_tokenizer: Tokenizer) -> None:
    text = Detokenizer(byte_tokenizer, [], skip_special_tokens=True)
    for _ in range(20 * MAX_WINDOW_TOKENS):
        text.add([0xFF])
    assert len(text._window) <= 2 * MAX_WINDOW_TOKENS + 2


def test_special_tokens_are_left_out_unless_asked_for(byte_tokenizer: Tokenizer) -> None:
    output = [ord("a"), EOS, ord("b")]
    names = [byte_tokenizer.encode(c, add_special_tokens=False)[0] for c in "ab"]
    output = [names[0], EOS, names[1]]
    assert "".join(pieces(byte_tokenizer, [], output)) == "ab"
    assert "".join(pieces(byte_tokenizer, [], output, skip=False)) == "a</s>b"


def test_half_a_character_at_the_end_of_the_prompt_is_completed_by_the_output(byte_tokenizer: Tokenizer) -> None:
    whole = byte_tokenizer.encode("日", add_special_tokens=False)
    assert "".join(pieces(byte_tokenizer, whole[:2], whole[2:])) == "日"


@pytest.fixture(scope="module", params=["gpt2-tokenizer", "qwen2-tokenizer"])
def real_tokenizer(shared_dir: Path, request: pytest.FixtureRequest) -> Tokenizer:
    return AutoTokenizer(shared_dir / "data" / request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_real_tokenizers(real_tokenizer: Tokenizer, text: str) -> None:
    output = real_tokenizer.encode(text, add_special_tokens=False)
    found = pieces(real_tokenizer, real_tokenizer.encode("Hello"), output)
    assert "".join(found) == real_tokenizer.decode(output)
    assert not any(INCOMPLETE in piece for piece in found)


def test_the_space_before_a_word_is_kept_where_decoding_alone_would_lose_it(shared_dir: Path) -> None:
    tokenizer = AutoTokenizer(shared_dir / "models/stories260k")
    ids = tokenizer.encode("Once upon a time")
    cut = next(i for i in range(2, len(ids)) if tokenizer.token_text(ids[i]) != tokenizer.decode(ids[:i + 1])[len(tokenizer.decode(ids[:i])):])
    assert tokenizer.decode(ids[:cut]) + "".join(pieces(tokenizer, ids[:cut], ids[cut:])) == "Once upon a time"
