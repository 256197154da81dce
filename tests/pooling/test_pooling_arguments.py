"""Arguments that all of `LLM`'s pooling methods share: each does what docs/api.md says in every one of them, or is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pooling_helpers import (
    as_reward_model,
    assert_idle,
    close,
    edit,
    engine,
    hidden_of,
    make,
    prompts_of,
    recorded_steps,
    unit,
    write_tokenizer,
)
from transformers import AutoTokenizer

from kvloom import LLM, PoolingParams, SamplingParams
from kvloom.errors import ConfigError, RequestTypeError, RequestValidationError, UnsupportedFeatureError
from kvloom.interfaces import Step

QUIET = {"use_tqdm": False}
METHODS = ("encode", "embed", "classify", "reward", "score", "score of embeddings")
PROMPTS = METHODS[:4]
TEXT = " ".join(f"w{i}" for i in range(10, 30))
IDS = [1, *range(10, 30), 2]
LENGTH = 64


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LLM]]:
    """An engine for each method."""
    where = {name: tmp_path_factory.mktemp(name) for name in ("embed", "classify", "reward")}
    make(where["embed"])
    make(where["classify"], kind="ForSequenceClassification", num_labels=1)
    make(where["reward"], "Qwen2", "ForTokenClassification", num_labels=1)
    as_reward_model(where["reward"])
    for directory in where.values():
        write_tokenizer(directory)
    options = {"max_model_len": LENGTH, "scheduling_policy": "priority", "max_num_seqs": 1}
    with (engine(where["embed"], task="embed", skip_tokenizer_init=False, **options) as embedding,
          engine(where["classify"], skip_tokenizer_init=False, **options) as labels, engine(where["reward"], **options) as rewards):
        yield {"encode": embedding, "embed": embedding, "score of embeddings": embedding, "classify": labels, "score": labels, "reward": rewards}


def call(engines: dict[str, LLM], method: str, prompts: list, **arguments: Any) -> list:
    """`method` of as many prompts as there are; what is scored is each prompt with a short text, which comes first."""
    run: Callable[..., list] = getattr(engines[method], method.partition(" ")[0])
    first = ("w5", prompts) if method.startswith("score") else (prompts,)
    return run(*first, **QUIET | arguments)


def ids_of(output: Any, method: str) -> list[int]:
    """The prompt's part of an output's ids."""
    return output.prompt_token_ids[4:] if method == "score of embeddings" else output.prompt_token_ids


def numbers(output: Any) -> torch.Tensor:
    return torch.as_tensor(next(iter(vars(output.outputs).values())))


def computed(steps: list[Step]) -> list[int]:
    """Of the prompts ``[n, n, n]`` which n, in the order in which they were computed; one text that all are compared with is left out."""
    return [new.token_ids[-2] for s in steps for new in s.new if new.token_ids[-2] != 5]


@pytest.mark.parametrize("method", METHODS)
def test_pooling_methods__lora_request_is_refused(engines, method: str) -> None:
    for name in ("lora_request", "prompt_adapter_request")[:1 if method == "reward" else 2]:
        with recorded_steps(engines[method]) as steps, pytest.raises(UnsupportedFeatureError, match=name):
            call(engines, method, [[5]], **{name: object()})
        assert steps == []


@pytest.mark.parametrize("method", METHODS)
def test_pooling_methods__prompt_adapter_request_is_refused_or_unknown(engines, method: str) -> None:
    with pytest.raises(TypeError if method == "reward" else UnsupportedFeatureError, match="prompt_adapter_request"):
        call(engines, method, [[5]], prompt_adapter_request=object())


@pytest.mark.parametrize("method", METHODS)
def test_pooling_methods__use_tqdm_shows_a_bar_and_what_is_no_bar_is_refused_before_anything_is_computed(engines, method: str, capsys) -> None:
    call(engines, method, [[5], [6]], use_tqdm=True)
    assert "Processed prompts: 100%" in capsys.readouterr().err
    call(engines, method, [[5], [6]], use_tqdm=False)
    assert capsys.readouterr().err == ""
    for wrong in ("no", None, 1):
        with recorded_steps(engines[method]) as steps, pytest.raises(RequestTypeError, match="use_tqdm must be True, False or a function"):
            call(engines, method, [[5]], use_tqdm=wrong)
        assert steps == []


@pytest.mark.parametrize("method", METHODS)
def test_pooling_methods__pooling_params_are_for_all_or_one_each(engines, method: str) -> None:
    raw = PoolingParams(use_activation=False)
    for wrong in ({}, "ab", iter([raw, raw]), SamplingParams(), [PoolingParams(), SamplingParams()]):
        with pytest.raises(RequestTypeError) as caught:
            call(engines, method, [[5], [6]], pooling_params=wrong)
        assert caught.value.parameter == "pooling_params"
    if method.startswith("score"):
        with pytest.raises(RequestTypeError, match="one PoolingParams for all pairs"):
            call(engines, method, [[5], [6]], pooling_params=[raw, raw])
    else:
        for wrong in ([], [raw], [raw] * 3):
            with pytest.raises(RequestValidationError, match="lengths of prompts and params must be the same"):
                call(engines, method, [[5], [6]], pooling_params=wrong)
        plain, bare = call(engines, method, [[5]])[0], call(engines, method, [[5]], pooling_params=raw)[0]
        assert torch.equal(numbers(plain), numbers(bare)) == (method == "reward")
        for given in ([PoolingParams(), raw], (PoolingParams(), raw)):
            first, second = call(engines, method, [[5], [5]], pooling_params=given)
            close(numbers(first), numbers(plain))
            close(numbers(second), numbers(bare))
    assert raw == PoolingParams(use_activation=False)
    assert_idle(engines[method])


@pytest.mark.parametrize("method", PROMPTS)
def test_pooling_methods__truncate_prompt_tokens_cuts_token_prompts_at_their_beginning(engines, method: str) -> None:
    for most, kept in ((3, IDS[-3:]), (len(IDS), IDS), (LENGTH, IDS), (-1, IDS)):
        (output,) = call(engines, method, [IDS], truncate_prompt_tokens=most)
        assert output.prompt_token_ids == kept
    (output,) = call(engines, method, [[9] * (LENGTH + 5)], truncate_prompt_tokens=-1)
    assert len(output.prompt_token_ids) == LENGTH


@pytest.mark.parametrize("method", METHODS)
def test_pooling_methods__truncate_prompt_tokens_that_mean_nothing_are_refused(engines, method: str) -> None:
    for wrong in (0, -2, True, 2.0, "5", 10**30):
        with pytest.raises(RequestValidationError) as caught:
            call(engines, method, [[5, 6]], truncate_prompt_tokens=wrong)
        assert caught.value.parameter == "truncate_prompt_tokens"
    with pytest.raises(RequestValidationError, match=f"={LENGTH + 1} is more than the maximum model length of {LENGTH}"):
        call(engines, method, [[5, 6]], truncate_prompt_tokens=LENGTH + 1)
    with pytest.raises(RequestValidationError, match="contradicts the call"):
        call(engines, method, [[5, 6]], truncate_prompt_tokens=8, pooling_params=PoolingParams(truncate_prompt_tokens=9))
    with pytest.raises(RequestValidationError, match="give one of them"):
        call(engines, method, [[5, 6]], truncate_prompt_tokens=8, tokenization_kwargs={"truncate_prompt_tokens": 8})
    assert_idle(engines[method])


@pytest.mark.parametrize("method", ["encode", "embed", "classify", "score of embeddings"])
@pytest.mark.parametrize(("given", "kept"), [
    ({"truncate_prompt_tokens": 5}, [1, 10, 11, 12, 2]), ({"truncation": True, "max_length": 5}, [1, 10, 11, 12, 2]),
    ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, [1, 10, 11, 12, 2]), ({"truncate_prompt_tokens": 5, "truncation_side": "left"}, [1, 27, 28, 29, 2]),
    ({"truncate_prompt_tokens": -1}, IDS), ({"truncation": False}, IDS), ({}, IDS),
], ids=str)
def test_pooling_methods__tokenization_kwargs_cut_texts(engines, method: str, given: dict, kept: list[int]) -> None:
    (output,) = call(engines, method, [TEXT], tokenization_kwargs=given)
    assert ids_of(output, method) == kept
    (plain,) = call(engines, method, [TEXT], truncate_prompt_tokens=5)
    assert ids_of(plain, method) == [1, 10, 11, 12, 2], "the side was for one call"


@pytest.mark.parametrize("method", PROMPTS)
def test_pooling_methods__tokenization_kwargs_cut_token_prompts(engines, method: str) -> None:
    for given, kept in (({}, IDS[-5:]), ({"truncation_side": "left"}, IDS[-5:]), ({"truncation_side": "right"}, IDS[:5])):
        (output,) = call(engines, method, [IDS], tokenization_kwargs={"truncate_prompt_tokens": 5} | given)
        assert output.prompt_token_ids == kept


@pytest.mark.parametrize("side", ["left", "right", None])
def test_score__tokenization_kwargs_cut_pairs_as_transformers_does(engines, side: str | None) -> None:
    llm = engines["score"]
    tokenizer = AutoTokenizer.from_pretrained(llm.llm_engine.config.model.model, **({} if side is None else {"truncation_side": side}))
    given = {"truncation": True, "max_length": 9} | ({} if side is None else {"truncation_side": side})
    (output,) = llm.score("w50 w51", TEXT, tokenization_kwargs=given, **QUIET)
    assert output.prompt_token_ids == tokenizer("w50 w51", TEXT, truncation="longest_first", max_length=9)["input_ids"]
    assert len(output.prompt_token_ids) == 9


@pytest.mark.parametrize("method", METHODS)
def test_pooling_methods__tokenization_kwargs_that_mean_nothing_are_refused(engines, method: str) -> None:
    for wrong, error in (([], RequestTypeError), ({"padding": True}, RequestValidationError), ({"truncation_side": "up"}, RequestValidationError),
                         ({"truncate_prompt_tokens": 0}, RequestValidationError), ({"truncate_prompt_tokens": LENGTH + 1}, RequestValidationError)):
        with recorded_steps(engines[method]) as steps, pytest.raises(error):
            call(engines, method, [[5, 6]], tokenization_kwargs=wrong)
        assert steps == []


@pytest.mark.parametrize("method", METHODS)
def test_pooling_methods__priority_says_who_comes_first(engines, method: str) -> None:
    prompts = [[20 + i] * 3 for i in range(4)]
    with recorded_steps(engines[method]) as steps:
        plain = call(engines, method, prompts, priority=7)
        in_order = computed(steps)
        steps.clear()
        found = call(engines, method, prompts, priority=[3, 1, 2, 0])
        by_priority = computed(steps)
    assert in_order == [20, 21, 22, 23]
    assert by_priority == [23, 21, 22, 20]
    for a, b in zip(plain, found, strict=True):
        close(numbers(a), numbers(b))
    for wrong in ([1], [1, 2, 3, "x"], True, 1.5):
        with pytest.raises((RequestValidationError, RequestTypeError)) as caught:
            call(engines, method, prompts, priority=wrong)
        assert caught.value.parameter == "priority"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [[10**6], [9] * (LENGTH + 1), {"prompt_token_ids": []}, 7, {"prompt": 5}, {"text": "w5"}, None], ids=lambda bad: str(bad)[:20])
def test_pooling_methods__on_error_return_gives_the_error_in_the_place_of_the_prompt(engines, method: str, bad: Any) -> None:
    good = [[20 + i] * 3 for i in range(7)]
    mixed = [*good[:3], bad, *good[3:]]
    alone = call(engines, method, good)
    with recorded_steps(engines[method]) as steps, pytest.raises((RequestValidationError, RequestTypeError)):
        call(engines, method, mixed)
    assert steps == []
    outputs = call(engines, method, mixed, on_error="return")
    assert [o.error is not None for o in outputs] == [False] * 3 + [True] + [False] * 4
    assert outputs[3].outputs is None
    for a, b in zip(alone, [*outputs[:3], *outputs[4:]], strict=True):
        close(numbers(a), numbers(b))
    assert_idle(engines[method])
    with pytest.raises(RequestValidationError, match="on_error must be 'raise' or 'return'"):
        call(engines, method, good, on_error="ignore")


def test_encode__pooling_task_must_be_one_of_the_engine(engines) -> None:
    for wrong in ("sing", "plugin", "classify", ["embed"], 1):
        with pytest.raises(RequestValidationError, match="whose requests may be for embed, token_embed; got") as caught:
            call(engines, "encode", [[5]], pooling_task=wrong)
        assert caught.value.parameter == "pooling_task"


def test_score__cache_salts_of_its_prompts_are_kept(engines) -> None:
    llm, text = engines["score of embeddings"], " ".join(["w33"] * 40)
    salted = {"prompt": text, "cache_salt": "mine"}
    cached = [llm.score(first, "w6", **QUIET)[0].num_cached_tokens for first in (text, salted, salted, {"prompt": text, "cache_salt": "yours"})]
    assert cached[0] == cached[1] == cached[3]
    assert cached[2] >= cached[1] + 32
    cross = engines["score"]
    cached = [cross.score(first, "w6", **QUIET)[0].num_cached_tokens for first in (text, salted, salted)]
    assert cached[:2] == [0, 0]
    assert cached[2] >= 32


def test_score__token_types_of_a_prompt_are_refused_not_dropped(engines) -> None:
    for method in ("score", "score of embeddings"):
        with pytest.raises(RequestValidationError, match="token_type_ids cannot be given to score"):
            call(engines, method, [{"prompt_token_ids": [5], "token_type_ids": [0]}])


def test_score__one_text_for_all_is_computed_once_and_others_each(engines) -> None:
    llm = engines["score of embeddings"]
    for first, computed in (("w9", 4), (["w9"], 4), (["w9"] * 3, 6)):
        with recorded_steps(llm) as steps:
            outputs = llm.score(first, ["w20", "w21", "w22"], pooling_params=PoolingParams(skip_reading_prefix_cache=True), **QUIET)
        assert sum(len(s.new) for s in steps) == computed
        assert len({o.request_id for o in outputs}) == 3


def test_score__without_a_tokenizer_says_what_to_call(engines, tmp_path: Path) -> None:
    model = make(tmp_path)
    with engine(tmp_path, task="embed") as bare:
        for first, what in (([5], "reads the text of token ids.*call embed or classify"), ("w5", "give prompt_token_ids")):
            with pytest.raises(RequestValidationError, match=f"skip_tokenizer_init.*{what}"):
                bare.score(first, [6], **QUIET)
        (prompt,) = prompts_of(1)
        close(bare.embed([prompt], **QUIET)[0].outputs.embedding, unit(hidden_of(model, prompt)[-1]))


@pytest.mark.parametrize("pooling_type", ["ALL", "STEP"])
@pytest.mark.parametrize("kind", ["ForCausalLM", "ForSequenceClassification"])
def test_one_row_a_prompt_is_refused_before_anything_is_computed_where_tokens_have_rows(tmp_path: Path, kind: str, pooling_type: str) -> None:
    labels = kind == "ForSequenceClassification"
    make(tmp_path, kind=kind, num_labels=1)
    write_tokenizer(tmp_path)
    with engine(tmp_path, task="classify" if labels else "embed", skip_tokenizer_init=False, override_pooler_config={"pooling_type": pooling_type}) as llm:
        for method, arguments in (("classify" if labels else "embed", ([[5, 6]],)), ("score", ("w5", "w6"))):
            with recorded_steps(llm) as steps, pytest.raises(RequestValidationError, match=f"one row a prompt.*pools with {pooling_type}.*call encode"):
                getattr(llm, method)(*arguments, on_error="return", **QUIET)
            assert steps == []
        assert llm.encode([[5, 6]], **QUIET)[0].outputs.data.shape[0] == 2


def test_columns_that_multiply_a_result_are_refused(tmp_path: Path) -> None:
    make(tmp_path, kind="ForSequenceClassification", num_labels=3)
    with engine(tmp_path) as llm, pytest.raises(RequestValidationError, match="has 1000000 columns, the label head has 3"):
        llm.encode([[5, 6]], PoolingParams(returned_token_ids=[0] * 10**6), **QUIET)


@pytest.mark.parametrize(("config", "message"), [
    ({"pooling_type": "STEP", "step_tag_id": 10**6}, "out of vocabulary"), ({"pooling_type": "LAST", "step_tag_id": 9}, "step_tag_id belongs to pooling type STEP"),
    ({"step_tag_id": 9}, "step_tag_id belongs to pooling type STEP"),
])
def test_pooler_step_tag_id__that_no_prompt_can_have_is_refused_when_the_engine_is_made(tmp_path: Path, config: dict, message: str) -> None:
    make(tmp_path, kind="ForSequenceClassification", num_labels=3)
    with pytest.raises(ConfigError, match=f"override_pooler_config: .*{message}"):
        engine(tmp_path, override_pooler_config=config)


@pytest.mark.parametrize(("labels", "problem", "activate"), [
    (3, "regression", lambda x: x), (1, "regression", lambda x: x), (3, "multi_label_classification", torch.sigmoid), (3, None, lambda x: x.softmax(-1)),
    (3, "single_label_classification", lambda x: x.softmax(-1)), (1, "single_label_classification", torch.sigmoid), (1, None, torch.sigmoid),
])
def test_scores_of_labels_are_activated_as_the_checkpoint_was_trained(tmp_path: Path, labels: int, problem: str | None, activate: Callable) -> None:
    theirs = make(tmp_path, kind="ForSequenceClassification", num_labels=labels)
    edit(tmp_path, problem_type=problem)
    with engine(tmp_path) as llm, torch.no_grad():
        (prompt,) = prompts_of(1)
        close(llm.classify([prompt], **QUIET)[0].outputs.probs, activate(theirs(torch.tensor([prompt])).logits[0]))


def test_a_problem_type_that_is_none_is_refused(tmp_path: Path) -> None:
    make(tmp_path, kind="ForSequenceClassification", num_labels=3)
    edit(tmp_path, problem_type="ranking")
    with pytest.raises(UnsupportedFeatureError, match="problem_type of config.json='ranking'.*multi_label_classification"):
        engine(tmp_path)
