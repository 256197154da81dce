"""`SamplingParams`, end to end: when an output ends, what its text is, and which words may not be in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from api_helpers import Truth, assert_idle, complete, ids, lively_checkpoint, recorded_steps, run, writes, written

from kvloom import LLM, RequestOutputKind, SamplingParams
from kvloom.errors import RequestValidationError
from kvloom.live_request import Call
from kvloom.testing.checkpoints import BOS, EOS, VOCAB_SIZE

PROMPT = [5, 6, 7, 7, 100, 3]
SECOND_END = ord("%")
MAX_MODEL_LEN = 100
AB, SPACE_AB, CD, SPACE_CD = 258, 259, 260, 261


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """"%" ends a text too, and "ab", " ab", "cd" and " cd" are one token each."""
    return lively_checkpoint(tmp_path_factory.mktemp("lively") / "m", {"eos_token_id": [EOS, SECOND_END]}, ["ab", "cd"])


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), dtype="float32", max_model_len=MAX_MODEL_LEN) as made:
        yield made


def ended(done) -> tuple[str, str | None, int | str | None, int]:
    """Text, why it ended, and how many tokens it has."""
    return done.text, done.finish_reason, done.stop_reason, len(done.token_ids)


def refused(llm: LLM, params: SamplingParams, parameter: str, prompt=PROMPT) -> None:
    with recorded_steps(llm) as steps, pytest.raises(RequestValidationError) as caught:
        llm.generate(["fine", prompt], [SamplingParams(), params], use_tqdm=False)
    assert steps == []
    assert caught.value.parameter == parameter
    assert_idle(llm)


# -- stop

def test_stop__a_text_or_a_list_ends_the_output_before_it(llm: LLM) -> None:
    for stop in ("c", ["c"], ["x", "c"]):
        assert ended(written(llm, "aXcde", stop=stop)) == ("aX", "stop", "c", 3)


def test_stop__matches_across_tokens_and_keeps_the_token_that_completes_it(llm: LLM) -> None:
    done = written(llm, "one two three", stop="two")
    assert ended(done) == ("one ", "stop", "two", 7)
    assert bytes(done.token_ids) == b"one two"


def test_stop__matches_inside_one_token(llm: LLM) -> None:
    done = written(llm, [ord("x"), SPACE_CD, ord("y")], stop="c")
    assert ended(done) == ("x ", "stop", "c", 2)
    assert list(done.token_ids) == [ord("x"), SPACE_CD]


def test_stop__matches_characters_of_several_bytes(llm: LLM) -> None:
    assert ended(written(llm, "café au lait", stop="é")) == ("caf", "stop", "é", 5)


def test_stop__the_first_in_the_list_that_the_new_text_completes(llm: LLM) -> None:
    assert ended(written(llm, "xabz", stop=["b", "ab"]))[:3] == ("xa", "stop", "b")
    assert ended(written(llm, "xabz", stop=["ab", "b"]))[:3] == ("x", "stop", "ab")


def test_stop__one_that_an_earlier_token_completes_wins_over_the_list(llm: LLM) -> None:
    assert ended(written(llm, "abcdef", stop=["f", "e", "c"])) == ("ab", "stop", "c", 3)


def test_stop__on_the_last_allowed_token_the_reason_is_stop(llm: LLM) -> None:
    assert ended(written(llm, "abcdef", stop="c", max_tokens=3)) == ("ab", "stop", "c", 3)
    assert ended(written(llm, "abcdef", stop="d", max_tokens=3)) == ("abc", "length", None, 3)


def test_stop__the_prompt_is_not_searched(llm: LLM) -> None:
    assert ended(written(llm, "xy", prompt="END EN", stop=["END"]))[:3] == ("xy", "stop", None)
    assert ended(written(llm, "D xy", prompt="EN", stop=["END"]))[0] == "D xy"


def test_stop__each_sample_stops_by_itself(llm: LLM) -> None:
    (output,) = run(llm, [PROMPT], SamplingParams(n=30, seed=1, max_tokens=8, ignore_eos=True, stop=["A", "B", "C"], allowed_token_ids=list(range(60, 80))))
    assert {o.finish_reason for o in output.outputs} == {"stop", "length"}
    for o in output.outputs:
        whole = bytes(o.token_ids).decode()
        assert o.text == (whole[:-1] if o.finish_reason == "stop" else whole)
        assert not {"A", "B", "C"} & set(o.text)
        assert o.stop_reason == (whole[-1] if o.finish_reason == "stop" else None)


def test_stop__needs_text_and_a_tokenizer(checkpoint: Path, llm: LLM) -> None:
    params = SamplingParams(stop="x")
    params.detokenize = False
    refused(llm, params, "stop")
    with LLM(str(checkpoint), dtype="float32", skip_tokenizer_init=True) as bare:
        with pytest.raises(RequestValidationError, match="skip_tokenizer_init") as caught:
            bare.generate([PROMPT], SamplingParams(stop="x"), use_tqdm=False)
        assert caught.value.parameter == "stop"
        assert_idle(bare)


# -- stop_token_ids, end of text

def test_stop_token_ids__the_token_stays_in_the_ids_and_not_in_the_text(llm: LLM) -> None:
    done = written(llm, "hello", stop_token_ids=[1, ord("l")])
    assert ended(done) == ("he", "stop", ord("l"), 3)
    assert bytes(done.token_ids) == b"hel"


def test_stop_token_ids__on_the_last_allowed_token_the_reason_is_stop(llm: LLM) -> None:
    assert ended(written(llm, "hello", stop_token_ids=[ord("l")], max_tokens=3)) == ("he", "stop", ord("l"), 3)


def test_stop_token_ids__end_of_text_among_them_has_no_reason_unless_it_is_ignored(llm: LLM) -> None:
    assert ended(written(llm, "ab", stop_token_ids=[EOS])) == ("ab", "stop", None, 3)
    assert ended(written(llm, "ab", stop_token_ids=[EOS], ignore_eos=True)) == ("ab", "stop", EOS, 3)


def test_stop_token_ids__out_of_the_vocabulary_are_refused(llm: LLM) -> None:
    refused(llm, SamplingParams(stop_token_ids=[1, VOCAB_SIZE]), "stop_token_ids")


def test_ignore_eos__without_it_end_of_text_stops_with_no_reason_and_is_kept_in_the_ids(llm: LLM) -> None:
    done = written(llm, "ab")
    assert ended(done) == ("ab", "stop", None, 3)
    assert done.token_ids[-1] == EOS


def test_ignore_eos__without_it_end_of_text_on_the_last_allowed_token_gives_stop(llm: LLM) -> None:
    assert ended(written(llm, "ab", max_tokens=3)) == ("ab", "stop", None, 3)
    assert ended(written(llm, "ab", max_tokens=2)) == ("ab", "length", None, 2)


def test_ignore_eos__without_it_further_end_tokens_of_the_model_are_the_stop_reason(llm: LLM) -> None:
    assert ended(written(llm, "12%34")) == ("12", "stop", SECOND_END, 3)
    assert ended(written(llm, "12%34", max_tokens=3)) == ("12", "stop", SECOND_END, 3)


def test_ignore_eos__neither_kind_of_end_token_stops_but_stop_token_ids_do(llm: LLM) -> None:
    assert ended(written(llm, [49, EOS, SECOND_END, 50, 51], ignore_eos=True, max_tokens=5)) == ("1%23", "length", None, 5)
    assert ended(written(llm, [49, EOS, SECOND_END, 50, 51], ignore_eos=True, stop_token_ids=[50])) == ("1%", "stop", 50, 4)


# -- max_tokens, min_tokens

def test_max_tokens__ends_with_length_and_16_is_the_default(llm: LLM) -> None:
    assert ended(written(llm, "x" * 30, max_tokens=1)) == ("x", "length", None, 1)
    assert ended(complete(llm, "?", temperature=0, logits_processors=[writes("x" * 30)])) == ("x" * 16, "length", None, 16)


def test_max_tokens__none_goes_on_to_the_models_length(llm: LLM) -> None:
    assert ended(written(llm, "x" * 200, prompt=[1] * 30, max_tokens=None)) == ("x" * 70, "length", None, 70)
    assert ended(written(llm, "x" * 5, prompt=[1] * 30, max_tokens=None)) == ("x" * 5, "stop", None, 6)


def test_max_tokens__more_than_there_is_room_for_ends_at_the_models_length(llm: LLM) -> None:
    assert ended(written(llm, "x" * 200, prompt=[1] * 97, max_tokens=50)) == ("xxx", "length", None, 3)


def test_min_tokens__end_and_stop_tokens_are_impossible_until_then(llm: LLM, truth: Truth) -> None:
    prompt, ends = llm.get_tokenizer()("?")["input_ids"], [EOS, SECOND_END, ord("e")]
    done = written(llm, [SECOND_END, EOS, ord("e")], min_tokens=3, stop_token_ids=[ord("e")])
    expected = truth.greedy(prompt, 3, lambda logits, output: logits.index_fill(0, torch.tensor(ends), -torch.inf))
    assert list(done.token_ids) == [*expected, EOS]
    assert (done.finish_reason, done.stop_reason) == ("stop", None)


def test_min_tokens__end_tokens_that_are_ignored_are_impossible_too(llm: LLM) -> None:
    done = written(llm, [EOS, EOS, EOS, EOS], min_tokens=2, max_tokens=4, ignore_eos=True)
    assert EOS not in done.token_ids[:2]
    assert list(done.token_ids[2:]) == [EOS, EOS]


def test_min_tokens__stop_strings_wait_too(llm: LLM) -> None:
    assert ended(written(llm, "xaxbxaxb", stop="a", min_tokens=3)) == ("xaxbx", "stop", "a", 6)
    assert ended(written(llm, "xaxbxaxb", stop="a", min_tokens=2)) == ("xaxbx", "stop", "a", 6)
    assert ended(written(llm, "xaxbxaxb", stop="a", min_tokens=1)) == ("x", "stop", "a", 2)


def test_min_tokens__more_than_fit_are_refused_also_with_max_tokens_none(llm: LLM) -> None:
    refused(llm, SamplingParams(max_tokens=None, min_tokens=71), "min_tokens", [1] * 30)
    assert len(written(llm, "", prompt=[1] * 30, max_tokens=None, min_tokens=70).token_ids) == 70
    refused(llm, SamplingParams(max_tokens=90, min_tokens=80), "min_tokens", [1] * 30)


# -- what the text is

def test_include_stop_str_in_output__the_text_ends_exactly_at_the_end_of_the_stop_string(llm: LLM) -> None:
    assert ended(written(llm, "one two three", stop="two", include_stop_str_in_output=True)) == ("one two", "stop", "two", 7)
    done = written(llm, [ord("x"), SPACE_CD], stop="c", include_stop_str_in_output=True)
    assert ended(done) == ("x c", "stop", "c", 2)


def test_include_stop_str_in_output__keeps_the_text_of_a_stop_token(llm: LLM) -> None:
    assert ended(written(llm, "hello", stop_token_ids=[ord("l")], include_stop_str_in_output=True)) == ("hel", "stop", ord("l"), 3)
    assert ended(written(llm, "12%", include_stop_str_in_output=True)) == ("12%", "stop", SECOND_END, 3)


@pytest.mark.parametrize("stop", [None, ["never"]])
def test_include_stop_str_in_output__keeps_the_text_of_end_of_text_where_special_tokens_are_shown(llm: LLM, stop) -> None:
    common = {"skip_special_tokens": False, "stop": stop}
    assert written(llm, "hi", include_stop_str_in_output=True, **common).text == "hi</s>"
    assert written(llm, "hi", **common).text == "hi"
    assert written(llm, "hi", include_stop_str_in_output=True, stop=stop).text == "hi"


def test_detokenize__false_leaves_texts_out_but_not_the_prompts(llm: LLM) -> None:
    (output,) = run(llm, "a", SamplingParams(temperature=0, max_tokens=3, detokenize=False, logprobs=1, prompt_logprobs=1, ignore_eos=True))
    (done,) = output.outputs
    assert output.prompt == "a"
    assert output.prompt_token_ids == [BOS, ord("a")]
    assert done.text == ""
    assert len(done.token_ids) == 3
    assert all(c.decoded_token is None for position in [*done.logprobs, *output.prompt_logprobs[1:]] for c in position.values())
    assert ids([output]) == ids(run(llm, "a", SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)))


def test_detokenize__false_still_stops_at_tokens(llm: LLM) -> None:
    assert ended(written(llm, "hello", stop_token_ids=[ord("l")], detokenize=False)) == ("", "stop", ord("l"), 3)


def test_skip_special_tokens__false_shows_them(llm: LLM) -> None:
    what = [ord("a"), BOS, ord("b"), EOS, ord("c")]
    assert written(llm, what, ignore_eos=True, max_tokens=5).text == "abc"
    assert written(llm, what, ignore_eos=True, max_tokens=5, skip_special_tokens=False).text == "a<s>b</s>c"
    assert written(llm, "hi", skip_special_tokens=False).text == "hi", "the token that ended it is not part of the text"


def test_skip_special_tokens__false_lets_stop_strings_find_them(llm: LLM) -> None:
    what = [ord("a"), BOS, ord("b"), EOS]
    assert ended(written(llm, what, stop="<s>", skip_special_tokens=False)) == ("a", "stop", "<s>", 2)
    assert ended(written(llm, what, stop="<s>"))[0] == "ab"


def test_spaces_between_special_tokens__for_tokenizers_in_python_that_have_the_choice(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Wav2Vec2CTCTokenizer"}))
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "B": 6, "C": 7}))
    what = {"prompt": [6], "ignore_eos": True, "max_tokens": 5}
    with LLM(str(checkpoint), tokenizer=str(tmp_path), tokenizer_mode="slow", dtype="float32") as slow:
        assert written(slow, [5, 1, 6, 2, 7], **what, skip_special_tokens=False).text == " A <s> B </s> C", "after B"
        assert written(slow, [5, 1, 6, 2, 7], **what, skip_special_tokens=False, spaces_between_special_tokens=False).text == "A<s>B</s>C"
        assert written(slow, [5, 1, 6, 2, 7], **what).text == "ABC"


def test_spaces_between_special_tokens__means_nothing_to_fast_tokenizers(llm: LLM) -> None:
    what = [ord("a"), BOS, BOS, ord("b")]
    texts = {written(llm, what, skip_special_tokens=False, spaces_between_special_tokens=spaces).text for spaces in (True, False)}
    assert texts == {"a<s><s>b"}


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_output_kind__generate_returns_the_whole_and_leaves_the_callers_object(llm: LLM, kind: RequestOutputKind) -> None:
    params = SamplingParams(temperature=0, max_tokens=7, logprobs=1, output_kind=kind, logits_processors=[writes("abcdefg")])
    (output,) = run(llm, "x", params)
    assert (output.outputs[0].text, len(output.outputs[0].token_ids), len(output.outputs[0].logprobs)) == ("abcdefg", 7, 7)
    assert output.finished
    assert params.output_kind is kind


def test_output_text_buffer_length__derives_from_the_longest_stop_string() -> None:
    assert SamplingParams().output_text_buffer_length == 0
    assert SamplingParams(stop="x").output_text_buffer_length == 0
    assert SamplingParams(stop=["abc", "x", "abcde"]).output_text_buffer_length == 4
    assert SamplingParams(stop=["abc", "abcde"], include_stop_str_in_output=True).output_text_buffer_length == 0


@pytest.mark.parametrize("include", [True, False])
def test_output_text_buffer_length__so_many_characters_wait_while_text_is_read_along(llm: LLM, include: bool) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, stop=["6789", "zz"], include_stop_str_in_output=include, logits_processors=[writes("0123456789ab")])
    pieces, call, engine = [], Call(), llm.llm_engine
    engine.submit(call, ["x"], [params], [0], on_text=lambda index, piece: pieces.append((index, piece)))
    shown = []
    while engine.has_work:
        engine.step()
        shown.append("".join(piece for _, piece in pieces))
    ((_, output),) = call.take()
    assert output.outputs[0].text == shown[-1] == ("0123456789" if include else "012345")
    for count, text in enumerate(shown[:-1], 1):
        assert text == "0123456789"[: max(0, count - params.output_text_buffer_length)]


# -- the prompt

@pytest.mark.parametrize("keep", [1, 3, 7])
def test_truncate_prompt_tokens__the_last_k_are_kept(llm: LLM, keep: int) -> None:
    common = {"temperature": 0, "max_tokens": 5, "ignore_eos": True}
    outputs = run(llm, ["Hello you", list(range(20))], SamplingParams(**common, truncate_prompt_tokens=keep))
    whole = [[BOS, *b"Hello you"], list(range(20))]
    assert [o.prompt_token_ids for o in outputs] == [w[-keep:] for w in whole]
    assert outputs[0].prompt == "Hello you"
    assert ids(outputs) == ids(run(llm, [w[-keep:] for w in whole], SamplingParams(**common)))


def test_truncate_prompt_tokens__more_than_there_are_changes_nothing(llm: LLM) -> None:
    (output,) = run(llm, [PROMPT], SamplingParams(max_tokens=1, truncate_prompt_tokens=1000))
    assert output.prompt_token_ids == PROMPT


def test_truncate_prompt_tokens__minus_one_leaves_room_for_one_token(llm: LLM) -> None:
    prompt = [i % 250 for i in range(300)]
    (output,) = run(llm, [prompt], SamplingParams(max_tokens=20, truncate_prompt_tokens=-1))
    assert output.prompt_token_ids == prompt[-(MAX_MODEL_LEN - 1):]
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (1, "length")
    refused(llm, SamplingParams(max_tokens=20), "prompt_token_ids", prompt)


# -- bad_words

def greedy_without(truth: Truth, prompt: list[int], forbidden) -> list[int]:
    """`forbidden(output)` gives the ids that may not come next."""
    return truth.greedy(prompt, 12, lambda logits, output: logits.index_fill(0, torch.tensor(forbidden(output), dtype=torch.int64), -torch.inf))


def test_bad_words__a_word_of_one_token_never_comes(llm: LLM, truth: Truth) -> None:
    first = chr(truth.greedy(PROMPT, 1)[0])
    expected = greedy_without(truth, PROMPT, lambda output: [ord(first)])
    assert list(complete(llm, PROMPT, temperature=0, max_tokens=12, ignore_eos=True, bad_words=[first]).token_ids) == expected
    assert expected != truth.greedy(PROMPT, 12)


def test_bad_words__the_last_token_of_a_longer_one_is_forbidden_only_after_the_others(llm: LLM) -> None:
    assert written(llm, "xyzyxyz", bad_words=["xyz"]).text.startswith("xy")
    done = written(llm, "zyxzxyz", bad_words=["xyz"])
    assert bytes(done.token_ids[:6]) == b"zyxzxy"
    assert done.token_ids[6] != ord("z")
    assert written(llm, "zyxzxyz").text == "zyxzxyz"


def test_bad_words__the_prompt_does_not_count(llm: LLM) -> None:
    assert written(llm, "z", prompt="xy", bad_words=["xyz"]).text == "z"


def test_bad_words__the_same_word_after_a_space_is_forbidden_where_it_is_as_long(llm: LLM) -> None:
    assert llm.get_tokenizer()("ab ab", add_special_tokens=False)["input_ids"] == [AB, SPACE_AB]
    for token_id in (AB, SPACE_AB):
        assert list(written(llm, [ord("x"), token_id, ord("y")]).token_ids[:2]) == [ord("x"), token_id]
        assert written(llm, [ord("x"), token_id, ord("y")], bad_words=["ab"]).token_ids[1] not in (AB, SPACE_AB)
    assert written(llm, [CD], bad_words=["ab"]).token_ids[0] == CD


def test_bad_words__a_spelling_after_a_space_that_is_longer_does_not_count(llm: LLM) -> None:
    """"z" is one token and " z" two: only the first is forbidden, so a space may be followed by anything else."""
    assert written(llm, " y z", bad_words=["q"]).text == " y z"
    assert written(llm, " z", bad_words=["z"]).token_ids[0] == ord(" ")


def test_bad_words__several_words_and_other_requests_do_not_meet(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=4, bad_words=words, logits_processors=[writes("pqrs")])
              for words in (["q", "rs"], None, ["pqrs"], ["pr"])]
    outputs = [bytes(i % 256 for i in o.outputs[0].token_ids).decode("latin-1") for o in run(llm, [PROMPT] * 4, params)]
    assert outputs[0][1] != "q"
    assert (outputs[0][0], outputs[0][2]) == ("p", "r")
    assert outputs[0][3] != "s"
    assert (outputs[1], outputs[3]) == ("pqrs", "pqrs")
    assert outputs[2][:3] == "pqr"
    assert outputs[2][3] != "s"


def test_bad_words__a_token_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    small = lively_checkpoint(tmp_path / "m", words=["ab", "cd"], vocab_size=260)
    with LLM(str(small), dtype="float32") as llm:
        assert len(complete(llm, [1, 2], max_tokens=3, ignore_eos=True, bad_words=["ab"]).token_ids) == 3
        refused(llm, SamplingParams(bad_words=["ab", "cd"]), "bad_words")


def test_bad_words__need_a_tokenizer(checkpoint: Path) -> None:
    with LLM(str(checkpoint), dtype="float32", skip_tokenizer_init=True) as llm:
        with pytest.raises(RequestValidationError, match="skip_tokenizer_init") as caught:
            llm.generate([[1]], SamplingParams(bad_words=["a"]), use_tqdm=False)
        assert caught.value.parameter == "bad_words"

