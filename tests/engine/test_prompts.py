"""The forms that a prompt may have."""

from __future__ import annotations

import pytest

from kvloom.errors import RequestTypeError, RequestValidationError, UnsupportedFeatureError
from kvloom.prompts import ParsedPrompt, check_token_ids, parse_prompts

TEXT, IDS = ParsedPrompt("a", None), ParsedPrompt(None, (1, 2))


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


@pytest.mark.parametrize("key", ["multi_modal_data", "prompt_embeds", "encoder_prompt"])
def test_keys_of_later_features_are_refused_by_name(key: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=key):
        parse_prompts({"prompt": "a", key: {"x": 1}})


@pytest.mark.parametrize("bad", [-1, 10, 10**30])
def test_an_id_out_of_the_vocabulary_is_named(bad: int) -> None:
    check_token_ids([0, 9], 10)
    with pytest.raises(RequestValidationError, match=f"Token id {bad} is out of vocabulary: ids of this model are 0 to 9"):
        check_token_ids([0, bad, 9], 10)
