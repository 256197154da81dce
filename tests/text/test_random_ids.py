"""Any ids at all, in any chunks: the pieces are the text that decoding at once gives, in time linear in their number."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom import SamplingParams
from kvloom.text.detokenizer import INCOMPLETE, MAX_WINDOW_TOKENS, Detokenizer
from kvloom.text.stop_strings import StopStringWatch
from kvloom_plugins.tokenizers.hf import AutoTokenizer, SlowTokenizer

BEYOND = 300
"""Qwen2's model has so many ids more than its tokenizer."""
REAL = ["data/gpt2-tokenizer", "data/qwen2-tokenizer", "models/stories260k"]


class Counting(AutoTokenizer):
    """Counts the ids that it decodes."""

    decoded = 0

    def decode(self, token_ids: Sequence[int], **options: bool) -> str:
        self.decoded += len(token_ids)
        return super().decode(token_ids, **options)


class Ids:
    """A tokenizer and lists of ids that it, or a model with more ids, knows."""

    def __init__(self, tokenizer: AutoTokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocab = range(tokenizer.vocab_size)
        texts = {i: tokenizer.token_text(i) for i in self.vocab}
        self.parts = [i for i in self.vocab if INCOMPLETE in texts[i] or i in tokenizer.byte_token_ids]
        self.parts_set = frozenset(self.parts)
        self.spaces = [i for i in self.vocab if not texts[i].strip()]
        kinds = [self.vocab, self.parts, self.spaces, sorted(tokenizer.special_token_ids), range(len(self.vocab), len(self.vocab) + BEYOND)]
        one = st.one_of([st.sampled_from(kind) for kind in kinds if kind])
        self.lists = st.one_of([st.lists(st.sampled_from(self.vocab), max_size=80), st.lists(one, max_size=80)])

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module", params=REAL)
def known(request: pytest.FixtureRequest, shared_dir: Path) -> Ids:
    return Ids(Counting(shared_dir / request.param))


@pytest.fixture(scope="module")
def stories(shared_dir: Path) -> Ids:
    return Ids(Counting(shared_dir / "models/stories260k"))


def pieces(tokenizer: AutoTokenizer, prompt: Sequence[int], output: Sequence[int], chunk: int, skip: bool) -> list[str]:
    text = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [*(text.add(output[i:i + chunk]) for i in range(0, len(output), chunk)), text.finish()]


@given(data=st.data(), chunk=st.integers(1, 5), skip=st.booleans())
def test_pieces_are_the_whole_text(known: Ids, data: st.DataObject, chunk: int, skip: bool) -> None:
    output = data.draw(known.lists)
    assert "".join(pieces(known.tokenizer, [], output, chunk, skip)) == known.tokenizer.decode(output, skip_special_tokens=skip)


@given(data=st.data(), chunk=st.integers(1, 5), skip=st.booleans())
def test_pieces_continue_the_text_of_the_prompt(known: Ids, data: st.DataObject, chunk: int, skip: bool) -> None:
    """What the whole text has more than the prompt's. Only where the border lies in a character, or in a run of byte tokens, does the
    prompt's text change at its end: what changed is the output's, but no character that was complete before the last three tokens."""
    prompt, output = data.draw(known.lists), data.draw(known.lists)
    tokenizer = known.tokenizer
    whole = tokenizer.decode(prompt + output, skip_special_tokens=skip)
    found = "".join(pieces(tokenizer, prompt, output, chunk, skip))
    with_text = [i for i in prompt if i in known.vocab and not (skip and i in tokenizer.special_token_ids)]
    ends = [tokenizer.decode(with_text[:max(0, len(with_text) - rest)], skip_special_tokens=skip) for rest in range(4)]
    if not ends[0].endswith(INCOMPLETE) and not (with_text and with_text[-1] in tokenizer.byte_token_ids):
        assert ends[0] + found == whole
    assert found == whole[max(len(os.path.commonprefix([end, whole])) for end in ends):]  # noqa: RUF071  (of texts)


@given(data=st.data(), skip=st.booleans())
def test_whatever_is_shown_stays(known: Ids, data: st.DataObject, skip: bool) -> None:
    """Stronger than the joined text: after each token, all that is shown begins the text of every longer output."""
    output = data.draw(known.lists)
    text, shown = Detokenizer(known.tokenizer, [], skip_special_tokens=skip), ""
    for i, token_id in enumerate(output):
        shown += text.add([token_id])
        assert known.tokenizer.decode(output[:i + 1], skip_special_tokens=skip).startswith(shown)
    assert known.tokenizer.decode(output, skip_special_tokens=skip).startswith(shown)


@given(data=st.data())
def test_nothing_is_held_back_without_need(known: Ids, data: st.DataObject) -> None:
    output = data.draw(st.lists(st.sampled_from(known.vocab).filter(lambda i: i not in known.parts_set), max_size=20))
    text, shown = Detokenizer(known.tokenizer, [], skip_special_tokens=False), ""
    for i, token_id in enumerate(output):
        shown += text.add([token_id])
        assert shown == known.tokenizer.decode(output[:i + 1], skip_special_tokens=False)


@given(data=st.data(), chunk=st.integers(1, 5), skip=st.booleans())
def test_a_python_tokenizer_that_drops_half_characters(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, chunk: int, skip: bool) -> None:
    directory = tmp_path_factory.getbasetemp() / "byt5"
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    tokenizer = SlowTokenizer(directory)
    output = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=80))
    assert "".join(pieces(tokenizer, [], output, chunk, skip)) == tokenizer.decode(output, skip_special_tokens=skip)


def byte_ids(known: Ids, text: bytes) -> list[int]:
    vocabulary = known.tokenizer.underlying.get_vocab()
    return [vocabulary[f"<0x{byte:02X}>"] for byte in text]


def test_a_byte_that_is_no_text_takes_nothing_back(stories: Ids) -> None:
    for text in ("日", "日本", "a日", "é"):
        output = [*stories.ids("Once"), *byte_ids(stories, text.encode()), *byte_ids(stories, b"\xff"), *stories.ids("upon")]
        found = pieces(stories.tokenizer, [], output, 1, True)
        assert "".join(found) == stories.tokenizer.decode(output)
        assert f"{INCOMPLETE}" in "".join(found)


@pytest.mark.parametrize("length", [MAX_WINDOW_TOKENS // 3, 1000])
def test_a_long_run_of_byte_tokens_is_shown_as_it_grows(stories: Ids, length: int) -> None:
    text, shown = Detokenizer(stories.tokenizer, stories.ids("Once"), skip_special_tokens=True), ""
    output = byte_ids(stories, ("日é" * length).encode())
    for i, token_id in enumerate(output):
        shown += text.add([token_id])
        assert 2.5 * len(shown) >= i - MAX_WINDOW_TOKENS - 5
    assert INCOMPLETE not in shown
    assert shown + text.add(stories.ids("upon")) + text.finish() == "日é" * length + " upon"


def test_a_long_run_of_byte_tokens_that_turns_out_to_be_no_text_keeps_what_was_shown(stories: Ids) -> None:
    output = byte_ids(stories, "日".encode() * MAX_WINDOW_TOKENS + b"\xff")
    found = "".join(pieces(stories.tokenizer, [], output, 1, True))
    assert found.startswith("日" * (MAX_WINDOW_TOKENS * 2 // 3))
    assert found.endswith(INCOMPLETE)


@pytest.mark.parametrize("tail", [b"", b"A", b"\xe6\x97"])
def test_a_long_run_of_byte_tokens_that_is_no_text_from_the_start(stories: Ids, tail: bytes) -> None:
    output = byte_ids(stories, b"\xffabc" * MAX_WINDOW_TOKENS + tail) + stories.ids("upon")
    assert "".join(pieces(stories.tokenizer, [], output, 1, True)) == stories.tokenizer.decode(output)


def test_the_prompts_run_of_byte_tokens_is_not_cut(stories: Ids) -> None:
    for characters in (1, 2, 3, 5, MAX_WINDOW_TOKENS):
        prompt = stories.ids("Once") + byte_ids(stories, "🎉".encode() * characters)
        assert "".join(pieces(stories.tokenizer, prompt, byte_ids(stories, "🎉".encode()), 1, True)) == "🎉"
        assert "".join(pieces(stories.tokenizer, prompt[:-1], prompt[-1:], 1, True)) == "🎉"
        assert "".join(pieces(stories.tokenizer, prompt, [], 1, True)) == ""


def test_no_output_has_no_text_whatever_the_prompt_ends_with(known: Ids) -> None:
    for part in known.parts[:300]:
        assert "".join(pieces(known.tokenizer, [*known.ids("Once"), part], [], 1, True)) == ""


@pytest.mark.parametrize("half", [b"\xe6\x97", b"\xf0\x9f\x98"])
def test_half_a_character_at_the_end_of_a_big_chunk_waits(known: Ids, half: bytes) -> None:
    name = known.tokenizer.underlying.backend_tokenizer
    output = known.ids("word " * 200 + "🎉")
    text = Detokenizer(known.tokenizer, [], skip_special_tokens=True)
    assert text.add(output[:-1]) == known.tokenizer.decode(known.ids("word " * 200)), name
    assert text.add(output[-1:]) + text.finish() == "🎉"


PLAIN, ODD = 4, 48
"""Decoded ids for each output id: text, and what is no text."""


@pytest.mark.parametrize("kind", ["text", "parts", "one part", "spaces", "beyond", "special"])
@pytest.mark.parametrize("stop", [None, ["never there", "\n\n\n"]])
def test_the_work_grows_with_the_number_of_tokens_only(known: Ids, kind: str, stop: list[str] | None) -> None:
    many = 1500
    ids = {"text": known.ids("Once upon a time, there was a girl. "), "parts": known.parts, "one part": known.parts[-1:], "spaces": known.spaces,
           "beyond": [len(known.vocab)], "special": sorted(known.tokenizer.special_token_ids)}[kind]
    output = (ids * many)[:many]
    for skip in (True, False):
        text = StopStringWatch(known.tokenizer, known.ids("Hello"), SamplingParams(stop=stop, skip_special_tokens=skip))
        known.tokenizer.decoded = 0
        for token_id in output:
            text.add([token_id])
        assert known.tokenizer.decoded <= (PLAIN if kind == "text" else ODD) * many, known.tokenizer.decoded / many


def test_endless_half_characters_do_not_grow_the_window(known: Ids) -> None:
    for output in ([known.parts[-1]], known.parts[-7:], [len(known.vocab)]):
        if known.tokenizer.byte_token_ids:
            output = [*output, known.ids("a")[-1]]
        text = Detokenizer(known.tokenizer, [], skip_special_tokens=True)
        for token_id in (output * 3000)[:3000]:
            text.add([token_id])
        assert len(text._window) <= MAX_WINDOW_TOKENS
