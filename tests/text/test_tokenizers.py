"""The tokenizers of the transformers library behind our contract."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvloom.errors import ModelError, UnsupportedFeatureError
from kvloom.text.detokenizer import Detokenizer
from kvloom_plugins.tokenizers.hf import AutoTokenizer, SlowTokenizer
from kvloom_plugins.tokenizers.pieces import reader_of

REAL = ["data/gpt2-tokenizer", "data/qwen2-tokenizer", "models/stories260k"]


@pytest.fixture(scope="module", params=REAL)
def tokenizer(request: pytest.FixtureRequest, shared_dir: Path) -> AutoTokenizer:
    return AutoTokenizer(shared_dir / request.param)


@pytest.fixture
def spelling(tmp_path: Path) -> Path:
    """Files of the one kind of tokenizer that still has a choice about spaces: Wav2Vec2's, a Python one."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Wav2Vec2CTCTokenizer"}))
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "B": 6, "C": 7}))
    return tmp_path


def test_special_tokens_are_exactly_those_that_decode_leaves_out(tokenizer: AutoTokenizer) -> None:
    for token_id in [*range(300), *range(tokenizer.vocab_size - 300, tokenizer.vocab_size)]:
        kept = tokenizer.decode([token_id, *tokenizer.encode("a")]) != tokenizer.decode(tokenizer.encode("a"))
        assert kept is (token_id not in tokenizer.special_token_ids)


def test_only_byte_fallback_has_byte_tokens(shared_dir: Path) -> None:
    found = {folder: AutoTokenizer(shared_dir / folder).byte_token_ids for folder in REAL}
    assert [len(found[folder]) for folder in REAL] == [0, 0, 256]
    assert found[REAL[2]] == frozenset(range(3, 259))


@pytest.mark.parametrize("unknown", [-1, 2**20, 2**33, -2**70])
def test_ids_that_the_tokenizer_does_not_know_have_no_text(tokenizer: AutoTokenizer, unknown: int) -> None:
    ids = tokenizer.encode("Hello there", add_special_tokens=False)
    assert tokenizer.decode([unknown, *ids[:1], tokenizer.vocab_size, *ids[1:], unknown]) == "Hello there"
    assert tokenizer.token_text(unknown) == tokenizer.token_text(tokenizer.vocab_size) == ""
    text = Detokenizer(tokenizer, [unknown], skip_special_tokens=True)
    assert text.add([unknown, *ids]) + text.finish() == "Hello there"


def test_every_token_has_a_text_that_is_decoded_once(tokenizer: AutoTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [tokenizer.token_text(i) for i in range(-2, tokenizer.vocab_size + 2)]
    monkeypatch.setattr(AutoTokenizer, "decode", None)
    assert texts == [tokenizer.token_text(i) for i in range(-2, tokenizer.vocab_size + 2)]
    assert len(tokenizer._texts) <= tokenizer.vocab_size
    assert "\ufffd" in texts, "a byte alone"


def test_spaces_are_not_cleaned_up(tokenizer: AutoTokenizer) -> None:
    for text in ("it 's , is n't .  Yes !", "   ", " a", "a \n\n b "):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_spaces_between_special_tokens_where_the_tokenizer_has_the_choice(spelling: Path) -> None:
    made = SlowTokenizer(spelling)
    ids = [5, 1, 6, 2, 7]
    assert made.decode(ids, skip_special_tokens=False) == "A <s> B </s> C"
    assert made.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False) == "A<s>B</s>C"
    assert made.decode(ids) == made.decode(ids, spaces_between_special_tokens=False) == "ABC"
    for spaces, whole in ((True, "A <s> B </s> C"), (False, "A<s>B</s>C")):
        text = Detokenizer(made, [], skip_special_tokens=False, spaces_between_special_tokens=spaces)
        assert "".join(text.add([i]) for i in ids) + text.finish() == whole


def test_fast_tokenizers_have_no_such_choice(tokenizer: AutoTokenizer) -> None:
    ids = [*sorted(tokenizer.special_token_ids), *tokenizer.encode("a"), *sorted(tokenizer.special_token_ids)]
    one, other = (tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=spaces) for spaces in (True, False))
    assert one == other


@pytest.mark.parametrize("folder", REAL)
def test_slow_is_refused_where_only_a_fast_one_exists(shared_dir: Path, folder: str) -> None:
    with pytest.raises(ModelError, match=r"tokenizer_mode='slow'.*has only the fast .*'auto'"):
        SlowTokenizer(shared_dir / folder)


def test_slow_and_auto_are_the_same_python_tokenizer(spelling: Path) -> None:
    slow, auto = SlowTokenizer(spelling), AutoTokenizer(spelling)
    assert not slow.is_fast
    assert type(slow.underlying) is type(auto.underlying)
    assert slow.encode("ABBA") == auto.encode("ABBA") == [5, 6, 6, 5]


def test_a_directory_without_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"looked for tokenizer.json, .*found none of them"):
        AutoTokenizer(tmp_path)


def test_the_bytes_of_tokens_are_their_text(tokenizer: AutoTokenizer) -> None:
    texts = ["Hello, world", "naïve café", "日本語 テスト", "emoji 🙂🙃 done", '{"a": [1, 2.5, null],\n\t"b": "x\\n"}', "  two  spaces ", "\r\n", "a\u0301", "\U0001F469\u200D\U0001F680", "ὀδύς"]
    for text in texts:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, token_ids)).decode() in (decoded := tokenizer.decode(token_ids), f" {decoded}")


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_bytes_of_any_tokens_put_together_are_what_they_are_decoded_to(tokenizer: AutoTokenizer, data: st.DataObject) -> None:
    start = tokenizer.encode("x", add_special_tokens=False)
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1).filter(lambda i: i not in tokenizer.byte_token_ids), max_size=8))
    found = b"".join(map(tokenizer.token_bytes, [*start, *token_ids])).decode(errors="replace")
    assert found in (decoded := tokenizer.decode([*start, *token_ids]), f" {decoded}")


def test_byte_fallback_tokens_are_their_byte(shared_dir: Path) -> None:
    tokenizer = AutoTokenizer(shared_dir / REAL[2])
    assert [tokenizer.token_bytes(3 + i) for i in range(256)] == [bytes([i]) for i in range(256)]


def test_tokens_without_a_text_have_no_bytes(tokenizer: AutoTokenizer) -> None:
    for token_id in (*tokenizer.special_token_ids, -1, tokenizer.vocab_size, 2**40):
        assert tokenizer.token_bytes(token_id) == b""


def test_a_tokenizer_whose_tokens_depend_on_their_neighbours_says_so(spelling: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="no token_bytes"):
        SlowTokenizer(spelling).token_bytes(5)


@pytest.mark.parametrize(("decoder", "name", "expected"), [
    ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}, "▁a▁b", b" a b"), ({"type": "WordPiece", "prefix": "##"}, "##a", None), (None, "a", None),
    ({"type": "ByteLevel"}, "Ġé", b" \xe9"), ({"type": "ByteLevel"}, "a b", b"a b"), ({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}, "<0xe9>", b"\xe9"),
    ({"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"Regex": "x"}, "content": " "}]}, "x", None), ({"type": "Sequence", "decoders": [{"type": "Fuse"}]}, "<0xE9>", b"<0xE9>"),
])
def test_names_are_read_as_the_decoder_has_it(decoder: dict | None, name: str, expected: bytes | None) -> None:
    reader = reader_of(decoder)
    assert (None if reader is None else reader(name)) == expected


def test_threads_that_cut_texts_and_threads_that_do_not_stay_apart(shared_dir: Path) -> None:
    tokenizer = AutoTokenizer(shared_dir / "data/qwen2-tokenizer")
    text = "one two three four five six seven eight nine ten"
    whole = tokenizer.encode(text)
    ways = [(lambda: tokenizer.encode(text), whole), (lambda: tokenizer.encode_within(text, 5, keep_end=False), whole[:5]),
            (lambda: tokenizer.encode_within(text, 5, keep_end=True), whole[-5:])]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: ways[i % 3][0]() == ways[i % 3][1], range(9000)))
    assert all(found)
