"""`LLM.chat`, argument by argument."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvloom import LLM, SamplingParams
from kvloom.errors import RequestTypeError, RequestValidationError, UnsupportedFeatureError
from kvloom.testing.checkpoints import BOS

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
TEMPLATE = ("{% if tools %}{{ tools[0].function.name }}:{% endif %}{% for m in messages %}({{ m.role }}){{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}(assistant){% endif %}{{ mood or '' }}")
HELLO, BYE = [{"role": "user", "content": "Hello"}], [{"role": "user", "content": "Bye"}]
NAMES = ["self", "messages", "sampling_params", "use_tqdm", "lora_request", "chat_template", "chat_template_content_format",
         "add_generation_prompt", "continue_final_message", "tools", "mm_processor_kwargs"]


@pytest.fixture(scope="module")
def llm(small_checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(small_checkpoint), dtype="float32", chat_template=TEMPLATE) as made:
        yield made


def chat(llm: LLM, messages: Any = HELLO, params: Any = GREEDY, **arguments: Any) -> list:
    return llm.chat(messages, params, use_tqdm=False, **arguments)


def test_chat__signature_has_vllms_names_in_vllms_order() -> None:
    assert list(inspect.signature(LLM.chat).parameters)[:len(NAMES)] == NAMES


def test_chat__messages_are_one_conversation_or_many(llm: LLM) -> None:
    (hello,), both = chat(llm), chat(llm, [HELLO, BYE])
    assert [o.prompt for o in both] == ["(user)Hello(assistant)", "(user)Bye(assistant)"]
    assert hello.prompt_token_ids == [BOS, *b"(user)Hello(assistant)"]
    assert both[0].outputs[0].token_ids == hello.outputs[0].token_ids
    assert chat(llm, []) == []


@pytest.mark.parametrize("messages", [None, "Hello", 3, [3], [[3]], [HELLO, []], [[{"content": "no role"}]], [{"role": "user", "content": 3}]])
def test_chat__messages_that_are_none_are_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises((RequestTypeError, RequestValidationError)):
        chat(llm, messages)
    assert not llm.llm_engine.has_work
    assert len(chat(llm)) == 1


def test_chat__does_what_generate_does_with_the_rendered_text(llm: LLM) -> None:
    (answer,), (completed,) = chat(llm), llm.generate("(user)Hello(assistant)", GREEDY, use_tqdm=False)
    assert (answer.prompt_token_ids, answer.outputs[0].token_ids) == (completed.prompt_token_ids, completed.outputs[0].token_ids)


def test_chat__sampling_params_are_one_for_all_or_one_each_or_the_defaults(llm: LLM) -> None:
    one, two = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    assert [len(o.outputs[0].token_ids) for o in chat(llm, [HELLO, BYE], two)] == [2, 2]
    assert [len(o.outputs[0].token_ids) for o in chat(llm, [HELLO, BYE], [one, two])] == [1, 2]
    assert len(chat(llm, HELLO, None)[0].outputs[0].token_ids) <= 16
    with pytest.raises(RequestValidationError, match="lengths of prompts and params must be the same"):
        chat(llm, HELLO, [one, two])


def test_chat__use_tqdm_shows_a_bar_or_nothing(llm: LLM, capsys) -> None:
    llm.chat(HELLO, GREEDY)
    assert "Processed prompts" in capsys.readouterr().err
    chat(llm)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["lora_request", "mm_processor_kwargs"])
def test_chat__lora_request_and_mm_processor_kwargs_are_refused_so_far(llm: LLM, name: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=name):
        chat(llm, **{name: {"x": 1}})


def test_chat__chat_template_wins_over_the_engines(llm: LLM) -> None:
    (rendered,) = chat(llm, chat_template="{{ messages[0].content }}?", dry_run=True)
    assert rendered.prompt == "Hello?"
    for bad, error in (("/no/such/file", RequestValidationError), (3, RequestTypeError), ("{% if %}", RequestValidationError)):
        with pytest.raises(error, match="template"):
            chat(llm, chat_template=bad)


@pytest.mark.parametrize(("form", "text"), [("string", "Hello"), ("auto", "Hello"), ("openai", "[{'type': 'text', 'text': 'Hello'}]")])
def test_chat__chat_template_content_format_is_how_contents_reach_the_template(llm: LLM, form: str, text: str) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    for messages in (HELLO, parts):
        (rendered,) = chat(llm, messages, chat_template_content_format=form, dry_run=True)
        assert rendered.prompt == f"(user){text}(assistant)"
    with pytest.raises(RequestValidationError, match="must be 'auto', 'string' or 'openai'"):
        chat(llm, chat_template_content_format="html")


def test_chat__add_generation_prompt_begins_the_answer(llm: LLM) -> None:
    assert chat(llm, add_generation_prompt=False, dry_run=True)[0].prompt == "(user)Hello"


def test_chat__continue_final_message_goes_on_with_it(llm: LLM) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Well"}]
    (rendered,) = chat(llm, messages, add_generation_prompt=False, continue_final_message=True, dry_run=True)
    assert rendered.prompt == "(user)Hello(assistant)Well"
    with pytest.raises(RequestValidationError, match="cannot both be True"):
        chat(llm, messages, continue_final_message=True)


def test_chat__tools_reach_the_template(llm: LLM) -> None:
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    assert chat(llm, tools=tools, dry_run=True)[0].prompt == "clock:(user)Hello(assistant)"
    with pytest.raises(RequestTypeError, match="tools must be a list of JSON objects"):
        chat(llm, tools=["clock"])


def test_chat__chat_template_kwargs_are_further_variables(llm: LLM) -> None:
    assert chat(llm, chat_template_kwargs={"mood": "!"}, dry_run=True)[0].prompt == "(user)Hello(assistant)!"
    with pytest.raises(RequestValidationError, match="may not set 'messages'"):
        chat(llm, chat_template_kwargs={"messages": []})


def test_chat__priority_is_one_for_all_or_one_each(small_checkpoint: Path) -> None:
    with LLM(str(small_checkpoint), chat_template=TEMPLATE, scheduling_policy="priority", max_num_seqs=1) as llm:
        outputs = chat(llm, [HELLO, BYE], priority=[1, 0])
        assert outputs[1].metrics.finished_time < outputs[0].metrics.finished_time
        with pytest.raises(RequestValidationError, match="priority"):
            chat(llm, [HELLO, BYE], priority=[1])


def test_chat__on_error_return_puts_errors_in_their_places(llm: LLM) -> None:
    good, bad, alone = *chat(llm, [HELLO, [{"content": "no role"}]], on_error="return"), chat(llm)[0]
    assert isinstance(bad.error, RequestValidationError)
    assert good.outputs[0].token_ids == alone.outputs[0].token_ids
    with pytest.raises(RequestValidationError, match="on_error must be"):
        chat(llm, on_error="ignore")


def test_chat__dry_run_computes_nothing(llm: LLM) -> None:
    before = llm.request_counter.counter
    (rendered,) = chat(llm, dry_run=True)
    assert rendered.prompt_token_ids == [BOS, *b"(user)Hello(assistant)"]
    assert llm.request_counter.counter == before


def test_chat__needs_a_tokenizer(small_checkpoint: Path) -> None:
    with LLM(str(small_checkpoint), skip_tokenizer_init=True, chat_template=TEMPLATE) as llm, pytest.raises(
            RequestValidationError, match="Unable to get tokenizer because skip_tokenizer_init is True"):
        chat(llm)
