"""The forms that a prompt may have."""

from __future__ import annotations

import numpy as np
import pytest

from kvloom.errors import RequestTypeError, RequestValidationError, UnsupportedFeatureError
from kvloom.prompts import ParsedPrompt, check_token_ids, legacy_prompts, parse_prompt, split_prompts

TEXT, IDS = ParsedPrompt("a", None), ParsedPrompt(None, (1, 2))


def parse_prompts(given) -> list[ParsedPrompt]:
    return [parse_prompt(p) for p in split_prompts(given)]


@pytest.mark.parametrize(("given", "parsed"), [
    ("a", [TEXT]), (["a", "a"], [TEXT, TEXT]), ({"prompt": "a"}, [TEXT]), ({"prompt_token_ids": [1, 2]}, [IDS]),
    ([1, 2], [IDS]), ([[1, 2], (1, 2)], [IDS, IDS]), (["a", {"prompt_token_ids": [1, 2]}], [TEXT, IDS]), ([], []),
    ({"prompt": "a", "prompt_token_ids": [1, 2]}, [ParsedPrompt("a", (1, 2))]), ({"prompt": "a", "multi_modal_data": None}, [TEXT]),
])
def test_every_form_is_taken_in_order(given, parsed) -> None:
    assert parse_prompts(given) == parsed


@pytest.mark.parametrize("given", [None, 5, 2.5, b"a", [b"a"], [None], [1, "a"], [[1, True]], [[1.0]], {"prompt": 5}, {"prompt_token_ids": "12"},
                                   {}, {"text": "a"}, {"prompt_token_ids": None}, [{1, 2}], object()])
def test_other_things_are_a_type_error(given) -> None:
    with pytest.raises(RequestTypeError) as caught:
        parse_prompts(given)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("given", [[[]], {"prompt_token_ids": []}, [[1], []]])
def test_a_prompt_without_tokens_is_refused(given) -> None:
    with pytest.raises(RequestValidationError, match="cannot be empty"):
        parse_prompts(given)


@pytest.mark.parametrize("key", ["multi_modal_data", "prompt_embeds"])
def test_keys_of_later_features_are_refused_by_name(key: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=key):
        parse_prompts({"prompt": "a", key: {"x": 1}})


def test_numpys_integers_are_token_ids() -> None:
    parsed = parse_prompt({"prompt_token_ids": list(np.arange(3))})
    assert parsed.token_ids == (0, 1, 2)
    assert {type(i) for i in parsed.token_ids} == {int}
    with pytest.raises(RequestTypeError, match="tolist"):
        parse_prompt({"prompt_token_ids": np.arange(3)})


def test_token_types_go_with_token_ids_one_each() -> None:
    given = {"prompt_token_ids": [5, 6, 7], "token_type_ids": [0, 0, 1]}
    assert parse_prompts(given) == [ParsedPrompt(None, (5, 6, 7), extras={"token_type_ids": (0, 0, 1)})]
    assert parse_prompts(given | {"token_type_ids": None}) == [ParsedPrompt(None, (5, 6, 7))]


@pytest.mark.parametrize(("given", "error", "message"), [
    ({"prompt_token_ids": [5, 6], "token_type_ids": [0]}, RequestValidationError, "as many as prompt_token_ids: 1 and 2"),
    ({"prompt": "a", "token_type_ids": [0]}, RequestValidationError, "need the prompt_token_ids"),
    ({"prompt_token_ids": [5], "token_type_ids": [True]}, RequestTypeError, "list of integers"),
    ({"prompt_token_ids": [5], "token_type_ids": [0.0]}, RequestTypeError, "list of integers"),
    ({"prompt_token_ids": [5], "token_type_ids": "0"}, RequestTypeError, "list of integers"),
])
def test_token_types_of_another_form_are_refused(given, error, message: str) -> None:
    with pytest.raises(error, match=message):
        parse_prompts(given)


@pytest.mark.parametrize("given", [{"encoder_prompt": "a", "decoder_prompt": None}, [{"prompt": "a", "encoder_prompt": {"x": 1}}]])
def test_encoder_decoder_prompts_are_a_type_error(given) -> None:
    with pytest.raises(RequestTypeError, match="Cannot pass encoder-decoder prompt to decoder-only models"):
        parse_prompts(given)


@pytest.mark.parametrize("salt", ["", 5, "x" * 1025])
def test_a_cache_salt_is_a_short_text(salt) -> None:
    assert parse_prompts({"prompt": "a", "cache_salt": "s"}) == [ParsedPrompt("a", None, "s")]
    with pytest.raises(RequestValidationError, match="cache_salt"):
        parse_prompts({"prompt": "a", "cache_salt": salt})


@pytest.mark.parametrize(("prompts", "ids", "expected"), [
    (None, [1, 2], [[1, 2]]), (None, [[1], [2, 3]], [[1], [2, 3]]), ("a", [1, 2], ["a"]), (["a", "b"], [[1], [2]], ["a", "b"]),
])
def test_texts_win_over_legacy_ids(prompts, ids, expected) -> None:
    assert [p.get("prompt_token_ids") if isinstance(p, dict) else p for p in legacy_prompts(prompts, ids)] == expected


@pytest.mark.parametrize(("prompts", "ids", "error", "message"), [
    (None, [], RequestValidationError, "please provide at least one prompt"), (None, [[]], RequestValidationError, "at least one prompt"),
    ("a", [[1], [2]], RequestValidationError, "The lengths of prompts and prompt_token_ids must be the same"),
    (None, [1, [2]], RequestTypeError, "array of token arrays"), (None, "ab", RequestTypeError, "array of strings"), (None, 5, RequestTypeError, "array"),
])
def test_legacy_ids_that_make_no_prompts_are_refused(prompts, ids, error, message) -> None:
    with pytest.raises(error, match=message):
        legacy_prompts(prompts, ids)


@pytest.mark.parametrize("bad", [-1, 10, 10**30])
def test_an_id_out_of_the_vocabulary_is_named(bad: int) -> None:
    check_token_ids([0, 9], 10)
    with pytest.raises(RequestValidationError, match=f"Token id {bad} is out of vocabulary: ids of this model are 0 to 9"):
        check_token_ids([0, bad, 9], 10)
