"""Every form of a prompt, end to end; and those that are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from api_helpers import Truth, assert_idle, ids, lively_checkpoint, recorded_steps, run

from kvloom import LLM, SamplingParams, TextPrompt, TokensPrompt
from kvloom.errors import RequestTypeError, RequestValidationError, UnsupportedFeatureError
from kvloom.testing.checkpoints import BOS, EOS, VOCAB_SIZE

MAX_MODEL_LEN = 64
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), dtype="float32", max_model_len=MAX_MODEL_LEN) as made:
        yield made


@pytest.fixture(scope="module")
def without_bos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """Its tokenizer adds nothing."""
    directory = lively_checkpoint(tmp_path_factory.mktemp("bare") / "m")
    content = json.loads((directory / "tokenizer.json").read_text())
    content["post_processor"] = None
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with LLM(str(directory), dtype="float32") as made:
        yield made


@pytest.fixture(scope="module")
def bare(checkpoint: Path) -> Iterator[LLM]:
    """Without a tokenizer."""
    with LLM(str(checkpoint), dtype="float32", skip_tokenizer_init=True) as made:
        yield made


def check(llm: LLM, truth: Truth, prompts, computed: list[list[int]], texts: list[str | None]) -> None:
    """What was computed, what was shown, and that the tokens are the model's for it."""
    outputs = run(llm, prompts, GREEDY)
    assert [o.prompt_token_ids for o in outputs] == computed
    assert [o.prompt for o in outputs] == texts
    assert ids(outputs) == [truth.greedy(prompt, 5) for prompt in computed]


def refused(llm: LLM, prompts, error: type[Exception], message: str):
    """Nothing is computed, nothing stays, and a good call afterwards gives exactly its own output."""
    with recorded_steps(llm) as steps, pytest.raises(error, match=message) as caught:
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert steps == []
    assert_idle(llm)
    assert len(run(llm, [[1, 2]], GREEDY)) == 1
    return caught.value


HI = [BOS, *b"Hi"]


def test_prompt__a_text_gets_the_tokenizers_special_tokens(llm: LLM, truth: Truth) -> None:
    check(llm, truth, "Hi", [HI], ["Hi"])


def test_prompt__texts_in_a_list_give_an_output_each_in_order(llm: LLM, truth: Truth) -> None:
    check(llm, truth, ["Hi", "é", "Hi"], [HI, [BOS, *"é".encode()], HI], ["Hi", "é", "Hi"])
    check(llm, truth, ("Hi", "x"), [HI, [BOS, *b"x"]], ["Hi", "x"])


def test_prompt__a_text_in_a_dictionary(llm: LLM, truth: Truth) -> None:
    check(llm, truth, {"prompt": "Hi"}, [HI], ["Hi"])
    check(llm, truth, [TextPrompt(prompt="Hi"), {"prompt": "x", "cache_salt": "s"}], [HI, [BOS, *b"x"]], ["Hi", "x"])


def test_prompt__a_text_that_is_none_or_no_text_is_a_type_error(llm: LLM) -> None:
    assert refused(llm, {"prompt": 5}, TypeError, "must be a text").parameter == "prompt"
    refused(llm, ["a", {"prompt": ["a"]}], TypeError, "must be a text")


def test_prompt__token_ids_in_a_dictionary_get_no_special_tokens(llm: LLM, truth: Truth) -> None:
    given = [{"prompt_token_ids": [72, 105]}, TokensPrompt(prompt_token_ids=HI, prompt="shown"), {"prompt_token_ids": (7, EOS, BOS)}]
    check(llm, truth, given, [[72, 105], HI, [7, EOS, BOS]], [None, "shown", None])


def test_prompt__bare_token_ids_are_one_prompt(llm: LLM, truth: Truth) -> None:
    check(llm, truth, [1, 2, 3], [[1, 2, 3]], [None])
    check(llm, truth, (4, 5), [[4, 5]], [None])


def test_prompt__bare_lists_of_token_ids_are_several(llm: LLM, truth: Truth) -> None:
    check(llm, truth, [[1, 2], [3]], [[1, 2], [3]], [None, None])
    check(llm, truth, [range(3), (4, 5)], [[0, 1, 2], [4, 5]], [None, None])


def test_prompt__a_list_may_mix_all_forms(llm: LLM, truth: Truth) -> None:
    given = ["Hi", {"prompt_token_ids": [9]}, [1, 2], {"prompt": "x"}]
    check(llm, truth, given, [HI, [9], [1, 2], [BOS, *b"x"]], ["Hi", None, None, "x"])


def test_prompt__an_empty_list_gives_an_empty_list(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []
    assert llm.generate([]) == []
    assert llm.generate([], []) == []


@pytest.mark.parametrize("given", [None, 5, 2.5, ..., b"Hi", [None], ["a", None], ["a", 5], [1, "a"], [[1, "a"]], [[1.0]], [[True]], {"a"}],
                         ids=repr)
def test_prompt__other_things_are_a_type_error(llm: LLM, given) -> None:
    assert isinstance(refused(llm, given, RequestTypeError, "prompt"), TypeError)


@pytest.mark.parametrize("given", [{}, {"text": "a"}, {"prompt_token_ids": None}, {"prompt": None}, ["a", {"promt": "a"}]], ids=repr)
def test_prompt__a_dictionary_without_a_known_key_is_a_type_error(llm: LLM, given) -> None:
    refused(llm, given, TypeError, "must contain text, tokens, or embeddings")


@pytest.mark.parametrize("given", [{"encoder_prompt": "a", "decoder_prompt": "b"}, {"encoder_prompt": "a", "decoder_prompt": None}], ids=repr)
def test_prompt__for_an_encoder_and_a_decoder_is_a_type_error_on_a_decoder_only_model(llm: LLM, given) -> None:
    refused(llm, given, TypeError, "Cannot pass encoder-decoder prompt to decoder-only models")
    refused(llm, ["a", given], TypeError, "Cannot pass encoder-decoder prompt to decoder-only models")


@pytest.mark.parametrize(("key", "value"), [("prompt_embeds", torch.zeros(2, 64)), ("multi_modal_data", {"image": 1}), ("mm_processor_kwargs", {"x": 1}),
                                            ("token_type_ids", [0, 0, 0]), ("multi_modal_uuids", {"image": ["x"]})])
def test_prompt__keys_of_later_features_are_refused_by_name(llm: LLM, key: str, value) -> None:
    error = refused(llm, ["a", {"prompt_token_ids": [1, 2, 3], key: value}], UnsupportedFeatureError, key)
    assert isinstance(error, ValueError)


def test_prompt__keys_of_later_features_may_be_none(llm: LLM, truth: Truth) -> None:
    check(llm, truth, {"prompt": "Hi", "multi_modal_data": None, "mm_processor_kwargs": None}, [HI], ["Hi"])


def test_prompt__an_empty_text_is_the_tokenizers_bos_alone(llm: LLM, truth: Truth) -> None:
    check(llm, truth, "", [[BOS]], [""])
    check(llm, truth, ["", {"prompt": ""}], [[BOS], [BOS]], ["", ""])


def test_prompt__an_empty_text_cannot_be_empty_where_the_tokenizer_adds_nothing(without_bos: LLM) -> None:
    assert run(without_bos, "Hi", GREEDY)[0].prompt_token_ids == list(b"Hi")
    for given in ("", ["a", ""], {"prompt": ""}):
        assert refused(without_bos, given, RequestValidationError, "cannot be empty").value == ""


@pytest.mark.parametrize("given", [{"prompt_token_ids": []}, [[]], [[1], []], ["a", {"prompt_token_ids": []}]], ids=repr)
def test_prompt__no_token_ids_cannot_be_empty(llm: LLM, given) -> None:
    assert refused(llm, given, RequestValidationError, "cannot be empty").parameter == "prompt_token_ids"


@pytest.mark.parametrize("bad", [VOCAB_SIZE, -1, 10**9, 2**70])
@pytest.mark.parametrize("tokenizer", [True, False])
def test_prompt__an_id_out_of_the_vocabulary_is_refused_with_and_without_a_tokenizer(llm: LLM, bare: LLM, bad: int, tokenizer: bool) -> None:
    engine = llm if tokenizer else bare
    for given in ([[1], [2, bad, 3]], {"prompt_token_ids": [bad]}, [bad, 1]):
        error = refused(engine, given, RequestValidationError, "is out of vocabulary")
        assert (error.parameter, error.value) == ("prompt_token_ids", bad)
    assert len(run(engine, [[0, VOCAB_SIZE - 1]], GREEDY)) == 1


def test_prompt__a_text_needs_a_tokenizer(bare: LLM) -> None:
    refused(bare, ["a"], RequestValidationError, "skip_tokenizer_init is True")
    assert run(bare, {"prompt_token_ids": [1], "prompt": "known"}, GREEDY)[0].prompt == "known"


def test_prompt__one_token_less_than_the_model_takes_gives_exactly_one(llm: LLM, truth: Truth) -> None:
    prompt = [i % 250 for i in range(MAX_MODEL_LEN - 1)]
    (output,) = run(llm, [prompt], GREEDY)
    assert ids([output]) == [truth.greedy(prompt, 1)]
    assert output.outputs[0].finish_reason == "length"
    (output,) = run(llm, "x" * (MAX_MODEL_LEN - 2), GREEDY)
    assert len(output.outputs[0].token_ids) == 1


@pytest.mark.parametrize("prompt_tokens", [MAX_MODEL_LEN, MAX_MODEL_LEN + 1, 10_000])
def test_prompt__as_long_as_the_model_or_longer_is_refused(llm: LLM, prompt_tokens: int) -> None:
    for given in ([[1], [1] * prompt_tokens], "x" * (prompt_tokens - 1)):
        error = refused(llm, given, RequestValidationError, f"longer than the maximum model length of {MAX_MODEL_LEN}")
        assert error.value in (prompt_tokens, len(given))  # a text far too long is not encoded: its characters are counted


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("bad", [[VOCAB_SIZE], [1] * 100, None, {"prompt_token_ids": []}], ids=lambda v: repr(v)[:20])
def test_prompt__a_bad_one_anywhere_refuses_the_whole_call_and_the_next_is_clean(llm: LLM, place: int, bad) -> None:
    prompts = ["first", "second"]
    prompts.insert(place, bad)
    with recorded_steps(llm) as steps, pytest.raises((RequestValidationError, RequestTypeError)):
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert steps == []
    assert_idle(llm)
    (output,) = run(llm, ["good"], GREEDY)
    assert output.prompt == "good"


def test_prompt__what_the_caller_gave_is_not_changed(llm: LLM) -> None:
    prompts = ["Hi", {"prompt": "x", "cache_salt": "s"}, {"prompt_token_ids": [1, 2], "prompt": "y"}, [3, 4], {"prompt": "z", "multi_modal_data": None}]
    before = copy.deepcopy(prompts)
    outputs = run(llm, prompts, SamplingParams(n=2, max_tokens=3, truncate_prompt_tokens=1))
    for output in outputs:
        output.prompt_token_ids.append(9)
    assert prompts == before


def test_prompt__prompts_of_different_salts_share_no_blocks(checkpoint: Path) -> None:
    prompt = list(range(40))
    with LLM(str(checkpoint), dtype="float32") as llm:
        found = [run(llm, {"prompt_token_ids": prompt} | salt, GREEDY)[0].num_cached_tokens
                 for salt in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": "a"}, {})]
    assert found == [0, 0, 0, 32, 32]
