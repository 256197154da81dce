"""Names of other versions of vLLM: arguments, attributes and methods."""

from __future__ import annotations

import gc
import inspect
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvloom import LLM, SamplingParams
from kvloom.config.compat import OTHER_ENGINE_ATTRIBUTES, OTHER_METHODS
from kvloom.errors import EngineClosedError, RequestTypeError, RequestValidationError, UnsupportedFeatureError, UnsupportedMethodError
from kvloom.other_arguments import OTHER_ARGUMENTS
from kvloom.running import RunningEngine
from kvloom.testing.checkpoints import BOS

ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
LEFT, RIGHT = [[BOS, *b"abcdef"][-3:]], [[BOS, *b"abcdef"][:3]]


@pytest.fixture(scope="module")
def llm(small_checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(small_checkpoint), dtype="float32", max_model_len=40, chat_template=TEMPLATE) as made:
        yield made


def prompt_ids(outputs: list) -> list[list[int]]:
    return [output.prompt_token_ids for output in outputs]


CUTS = [
    ({"truncate_prompt_tokens": 3}, LEFT), ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, LEFT),
    ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, RIGHT), ({"truncation": True, "max_length": 3}, LEFT),
    ({"truncation": True, "max_length": 3, "truncation_side": "right"}, RIGHT), ({"truncate_prompt_tokens": 50}, [[BOS, *b"abcdef"]]),
    ({"truncate_prompt_tokens": -1}, [[BOS, *b"abcdef"]]), ({"truncation": False}, [[BOS, *b"abcdef"]]), ({}, [[BOS, *b"abcdef"]]),
    (None, [[BOS, *b"abcdef"]]),
]


@pytest.mark.parametrize(("given", "expected"), CUTS)
def test_generate__tokenization_kwargs_cut_texts_and_token_prompts(llm: LLM, given: Any, expected: list) -> None:
    for prompt in ("abcdef", {"prompt": "abcdef"}, [BOS, *b"abcdef"], {"prompt_token_ids": [BOS, *b"abcdef"]}):
        assert prompt_ids(llm.generate(prompt, ONE, use_tqdm=False, tokenization_kwargs=given)) == expected


@pytest.mark.parametrize(("given", "expected"), CUTS)
def test_chat__tokenization_kwargs_cut_conversations(llm: LLM, given: Any, expected: list) -> None:
    conversation = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "def"}]
    assert prompt_ids(llm.chat(conversation, ONE, use_tqdm=False, tokenization_kwargs=given)) == expected


@pytest.mark.parametrize("given", [{"truncation": True}, {"truncate_prompt_tokens": -1}])
@pytest.mark.parametrize(("side", "kept"), [("left", slice(-39, None)), ("right", slice(39))])
def test_generate__tokenization_kwargs_cut_to_what_leaves_room_for_a_token(llm: LLM, given: dict, side: str, kept: slice) -> None:
    text = "".join(map(chr, range(40, 120))) * 200  # more characters than are worth encoding
    (output,) = llm.generate(text, ONE, use_tqdm=False, tokenization_kwargs={**given, "truncation_side": side})
    assert output.prompt_token_ids == [BOS, *text.encode()][kept]
    assert len(output.outputs[0].token_ids) == 1


@pytest.mark.parametrize(("given", "error", "message"), [
    ([1], RequestTypeError, "must be a dict, got list"), ({"max_len": 3}, RequestValidationError, "unknown key 'max_len'; did you mean 'max_length'"),
    ({3: 3}, RequestValidationError, "unknown key 3"), ({"truncate_prompt_tokens": 0}, RequestValidationError, "at least 1"),
    ({"truncate_prompt_tokens": -2}, RequestValidationError, "truncate_prompt_tokens"), ({"truncate_prompt_tokens": True}, RequestValidationError, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 3.0}, RequestValidationError, "truncate_prompt_tokens"), ({"max_length": 3}, RequestValidationError, "only with truncation=True"),
    ({"truncation": "yes", "max_length": 3}, RequestValidationError, "truncation"), ({"truncation": True, "max_length": 0}, RequestValidationError, "max_length"),
    ({"truncation_side": "top"}, RequestValidationError, "truncation_side must be 'left' or 'right'"),
    ({"truncate_prompt_tokens": 3, "max_length": 3}, RequestValidationError, "give one of them"),
])
def test_generate__tokenization_kwargs_that_make_no_sense_are_refused(llm: LLM, given: Any, error: type[Exception], message: str) -> None:
    for call in (lambda: llm.generate("a", ONE, tokenization_kwargs=given), lambda: llm.chat([{"role": "user", "content": "a"}], ONE, tokenization_kwargs=given)):
        with pytest.raises(error, match=message):
            call()
    assert not llm.llm_engine.has_work


def test_generate__tokenization_kwargs_and_params_that_both_cut_are_refused(llm: LLM) -> None:
    params = SamplingParams(max_tokens=1, truncate_prompt_tokens=2)
    with pytest.raises(RequestValidationError, match="give one of them"):
        llm.generate("abc", params, tokenization_kwargs={"truncate_prompt_tokens": 3})
    first, second = llm.generate(["abc", "def"], [ONE, params], use_tqdm=False)
    assert (len(first.prompt_token_ids), len(second.prompt_token_ids)) == (4, 2)


@pytest.mark.parametrize("name", OTHER_METHODS)
def test_methods_of_other_versions__say_what_to_use_here(llm: LLM, name: str) -> None:
    with pytest.raises(UnsupportedMethodError, match=f"LLM.{name} is not supported; ") as caught:
        getattr(llm, name)
    assert OTHER_METHODS[name] in str(caught.value)
    assert not hasattr(llm, name)


def test_methods_of_other_versions__and_unknown_names_differ(llm: LLM) -> None:
    with pytest.raises(AttributeError, match="'LLM' object has no attribute 'generatee'"):
        getattr(llm, "generatee")  # noqa: B009  (mypy knows that it is not there)
    assert not [name for name in OTHER_METHODS if name in vars(LLM)]


@pytest.mark.parametrize("name", OTHER_ENGINE_ATTRIBUTES)
def test_llm_engine_of_other_versions__says_what_to_use_here(llm: LLM, name: str) -> None:
    with pytest.raises(UnsupportedMethodError, match=f"llm_engine.{name} is not supported; ") as caught:
        getattr(llm.llm_engine, name)
    assert OTHER_ENGINE_ATTRIBUTES[name] in str(caught.value)
    assert name not in dir(RunningEngine)
    with pytest.raises(AttributeError, match="'RunningEngine' object has no attribute 'stepp'"):
        getattr(llm.llm_engine, "stepp")  # noqa: B009  (mypy knows that it is not there)


PAIRS = [(method, name) for method, other in OTHER_ARGUMENTS.items() for name in other]
ARGUMENTS: dict[str, tuple] = {"score": ("a", "b"), "beam_search": ("a", None), "set_tokenizer": (None,),
                               **dict.fromkeys(("generate", "generate_iter", "chat", "encode", "embed", "classify", "reward"), ("a",))}


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_arguments_of_other_versions__are_refused_with_what_to_do(llm: LLM, method: str, name: str) -> None:
    assert name not in inspect.signature(getattr(llm, method)).parameters
    with pytest.raises(UnsupportedFeatureError) as caught:
        getattr(llm, method)(*ARGUMENTS.get(method, ()), **{name: "something"})
    assert f"LLM.{method}.{name}='something'" in str(caught.value)
    assert OTHER_ARGUMENTS[method][name].instead in str(caught.value)


def test_arguments_of_other_versions__with_their_defaults_are_taken(llm: LLM) -> None:
    assert llm.reset_prefix_cache(reset_running_requests=False, reset_connector=False) is True
    assert len(llm.generate("a", ONE, use_tqdm=False, mm_processor_kwargs=None)) == 1


@pytest.mark.parametrize("method", OTHER_ARGUMENTS)
def test_arguments_of_other_versions__and_misspelt_ones_differ(llm: LLM, method: str) -> None:
    parameters = inspect.signature(getattr(llm, method)).parameters.values()
    names = [p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY and len(p.name) > 6]
    wrong = f"{names[0][:-2]}{names[0][-1]}{names[0][-2]}" if names else "nonsense"
    message = rf"LLM\.{method}\(\) got an unexpected keyword argument '{wrong}'" + (f"; did you mean '{names[0]}'" if names else "")
    with pytest.raises(TypeError, match=message):
        getattr(llm, method)(**{wrong: 1})


def test_llm_engine__and_engine_class_are_the_running_engine(llm: LLM, small_checkpoint: Path) -> None:
    assert isinstance(llm.llm_engine, RunningEngine)
    assert llm.engine_class is RunningEngine
    other = LLM(str(small_checkpoint))
    other.close()
    for name in ("llm_engine", "engine_class", "request_counter", "default_sampling_params"):
        with pytest.raises(EngineClosedError):
            getattr(other, name)


def test_engine_class__is_that_of_llm_engine(llm: LLM) -> None:
    assert llm.engine_class is type(llm.llm_engine)


def test_request_counter__is_the_number_of_the_next_request(llm: LLM) -> None:
    before = llm.request_counter.counter
    outputs = llm.generate(["a", "b"], ONE, use_tqdm=False)
    assert [o.request_id for o in outputs] == [str(before), str(before + 1)]
    assert llm.request_counter.counter == before + 2
    assert next(llm.request_counter) == before + 2
    assert llm.generate("a", ONE, use_tqdm=False)[0].request_id == str(before + 3)


def test_default_sampling_params__are_what_the_generation_config_changes(llm: LLM, small_checkpoint: Path) -> None:
    assert llm.default_sampling_params == {}
    with LLM(str(small_checkpoint), override_generation_config={"temperature": 0.5, "max_new_tokens": 7, "top_p": 1.0}) as other:
        assert other.default_sampling_params == {"temperature": 0.5, "max_tokens": 7}
        other.default_sampling_params["temperature"] = 0.0
        assert other.get_default_sampling_params().temperature == 0.5


def test_get_default_sampling_params__gives_a_new_object_each_time(llm: LLM) -> None:
    first = llm.get_default_sampling_params()
    first.max_tokens = 3
    assert llm.get_default_sampling_params() == SamplingParams()


def test_get_world_size__counts_the_workers(llm: LLM) -> None:
    assert llm.get_world_size() == len(llm.collective_rpc(lambda worker: worker.rank)) == 1


def test_get_tokenizer__gives_the_librarys_own_object(llm: LLM) -> None:
    assert llm.get_tokenizer().encode("ab") == [BOS, *b"ab"]


def test_apply_model__calls_with_the_torch_module_and_passes_exceptions_on(llm: LLM) -> None:
    assert llm.apply_model(lambda model: sum(p.numel() for p in model.parameters()) > 0) == [True]
    with pytest.raises(ZeroDivisionError):
        llm.apply_model(lambda model: 1 / 0)
    assert len(llm.generate("a", ONE, use_tqdm=False)) == 1


def test_reset_prefix_cache__forgets_beginnings(llm: LLM) -> None:
    prompt = list(range(1, 34))
    cached = [llm.generate(prompt, ONE, use_tqdm=False)[0].num_cached_tokens for _ in range(2)]
    assert llm.reset_prefix_cache() is True
    assert (cached, llm.generate(prompt, ONE, use_tqdm=False)[0].num_cached_tokens) == ([0, 32], 0)
    with pytest.raises(UnsupportedFeatureError, match="device='gpu' is not supported"):
        llm.reset_prefix_cache(device="gpu")


def test_repr__shows_the_model(llm: LLM, small_checkpoint: Path) -> None:
    (tree,) = llm.apply_model(repr)
    assert repr(llm) == f"LLM(model={str(small_checkpoint)!r})\n{tree}"
    other = LLM(str(small_checkpoint))
    other.close()
    assert repr(other) == "LLM(closed)"


def test_close__frees_the_model_and_may_be_called_twice(small_checkpoint: Path) -> None:
    with LLM(str(small_checkpoint), chat_template=TEMPLATE) as made:
        (model,) = made.apply_model(weakref.ref)
        made.chat([{"role": "user", "content": "a"}], ONE, use_tqdm=False)
        made.close()
        made.close()
        gc.collect()
        assert model() is None
        with pytest.raises(EngineClosedError):
            made.generate("a")


def test_a_deleted_llm_is_gone_with_its_model(small_checkpoint: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = LLM(str(small_checkpoint))
        made.generate("a", ONE, use_tqdm=False)
        (model,) = made.apply_model(weakref.ref)
        engine, alive = weakref.ref(made.llm_engine), weakref.ref(made)
        del made
        assert alive() is None
        gc.collect()
    assert engine() is None
    assert model() is None


def test_from_config__is_the_constructor_with_a_files_values(llm: LLM, small_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(f"model: {small_checkpoint}\ndtype: float32\nmax_model_len: 20\nchat_template: '{TEMPLATE}'\n")
    for overrides, bound in (({}, 20), ({"max_model_len": 30}, 30)):
        with LLM.from_config(file, **overrides) as made:
            assert made.llm_engine.config.model.max_model_len == bound
            (output,), (expected,) = (each.generate("abc", ONE, use_tqdm=False) for each in (made, llm))
            assert output.outputs[0].token_ids == expected.outputs[0].token_ids
