"""Conversations become prompts as the model's template says, checked against transformers, with exactly one begin-of-text token."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from kvloom import LLM, SamplingParams
from kvloom.demo import QUESTIONS, model_dir
from kvloom.errors import RequestTypeError, RequestValidationError, UnsupportedFeatureError
from kvloom.text.chat import ChatFormatter, ChatOptions
from kvloom.text.templates import TemplateRenderer
from kvloom_plugins.tokenizers.hf import AutoTokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=40)
USER = {"role": "user", "content": "Could you work out 3 plus 4?"}
CONVERSATIONS = [
    [USER], [{"role": "system", "content": "Be brief."}, USER],
    [USER, {"role": "assistant", "content": "7."}, {"role": "user", "content": "And 2 plus 2?"}], [{"role": "user", "content": "  spaces \n"}],
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(model_dir()), dtype="float32") as made:
        yield made


@pytest.fixture(scope="module")
def qwen(shared_dir: Path) -> Iterator[tuple]:
    directory = shared_dir / "data/qwen2-tokenizer"
    renderer = TemplateRenderer()
    yield ChatFormatter(AutoTokenizer(directory), renderer), transformers.AutoTokenizer.from_pretrained(str(directory))
    renderer.close()


def content(output) -> str:
    return output.outputs[0].text


def test_the_demo_model_answers_its_questions_through_chat(llm: LLM) -> None:
    outputs = llm.chat([[{"role": "user", "content": question}] for question, _ in QUESTIONS], GREEDY, use_tqdm=False)
    for output, (_, answer) in zip(outputs, QUESTIONS, strict=True):
        assert answer in content(output)
        assert output.outputs[0].finish_reason == "stop"
        assert output.prompt.startswith("<s><|user|>")


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_text_and_ids_are_transformers(llm: LLM, qwen: tuple, conversation: list, add_generation_prompt: bool) -> None:
    formatter, tokenizer = qwen
    for ours, theirs in ((formatter, tokenizer), (llm.llm_engine.chat, llm.get_tokenizer())):
        rendered = ours.render(conversation, ChatOptions(add_generation_prompt=add_generation_prompt))
        assert rendered.prompt == theirs.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert rendered.prompt_token_ids == theirs.apply_chat_template(conversation, add_generation_prompt=add_generation_prompt, return_dict=False)


@pytest.mark.parametrize("conversation", [c for c in CONVERSATIONS if c[-1]["content"].strip() == c[-1]["content"]])
def test_the_last_message_is_continued_as_transformers_does(qwen: tuple, conversation: list) -> None:
    formatter, tokenizer = qwen
    begun = [*conversation, {"role": "assistant", "content": "Well, it is"}]
    rendered = formatter.render(begun, ChatOptions(add_generation_prompt=False, continue_final_message=True))
    assert rendered.prompt == tokenizer.apply_chat_template(begun, tokenize=False, continue_final_message=True)
    assert rendered.prompt.endswith("Well, it is")


def test_both_ways_to_end_a_prompt_at_once_are_refused(llm: LLM) -> None:
    with pytest.raises(RequestValidationError, match="cannot both be True"):
        llm.chat([USER], GREEDY, continue_final_message=True)


def test_a_dry_run_gives_text_and_ids_and_computes_nothing(llm: LLM) -> None:
    (rendered,) = llm.chat([USER], dry_run=True)
    assert rendered.prompt == "<s><|user|>Could you work out 3 plus 4?<|assistant|>"
    (output,) = llm.chat([USER], GREEDY, use_tqdm=False)
    assert (output.prompt, output.prompt_token_ids) == (rendered.prompt, rendered.prompt_token_ids)


@pytest.mark.parametrize("template", [
    "{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}", "{{ bos_token }}{{ bos_token }}{{ messages[0].content }}"])
def test_there_is_exactly_one_begin_of_text_token(llm: LLM, template: str) -> None:
    (rendered,) = llm.chat([USER], chat_template=template, dry_run=True)
    bos = llm.get_tokenizer().bos_token_id
    assert rendered.prompt_token_ids.count(bos) == 1
    assert rendered.prompt_token_ids[0] == bos


def test_a_tokenizer_without_begin_of_text_gets_none(qwen: tuple) -> None:
    formatter, tokenizer = qwen
    rendered = formatter.render([USER], ChatOptions(chat_template="{{ messages[0].content }}"))
    assert rendered.prompt_token_ids == tokenizer(USER["content"])["input_ids"]


def test_a_template_may_be_a_file(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("Q: {{ messages[-1].content }} A:")
    assert llm.chat([USER], chat_template=str(tmp_path / "own.jinja"), dry_run=True)[0].prompt == "Q: Could you work out 3 plus 4? A:"
    for wrong in ("nowhere.jinja", ""):
        with pytest.raises(RequestValidationError, match="no file that can be read"):
            llm.chat([USER], chat_template=wrong, dry_run=True)


def test_without_a_template_the_error_lists_the_files_looked_at(small_checkpoint: Path, tmp_path: Path) -> None:
    with LLM(str(small_checkpoint), dtype="float32") as llm:
        with pytest.raises(RequestValidationError, match=r"you must provide a chat template.*chat_template\.jinja.*tokenizer_config\.json"):
            llm.chat([USER], GREEDY)
        assert len(llm.chat([USER], SamplingParams(max_tokens=2), use_tqdm=False, chat_template="{{ messages[0].content }}")) == 1


def test_a_model_may_have_a_template_for_tools(tmp_path: Path) -> None:
    directory = tmp_path / "two"
    shutil.copytree(model_dir(), directory)
    (directory / "chat_template.jinja").write_text("plain")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates/tool_use.jinja").write_text("{{ tools[0].function.name }}")
    renderer = TemplateRenderer()
    formatter = ChatFormatter(AutoTokenizer(directory), renderer)
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    assert formatter.render([USER], ChatOptions()).prompt == "plain"
    assert formatter.render([USER], ChatOptions(tools=[tool])).prompt == "look_up"
    renderer.close()


STRING = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
PARTS = "{% for m in messages %}{{ m.role }}:{% for p in m.content %}<{{ p.text }}>{% endfor %};{% endfor %}"
EITHER = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}{% endfor %}"
MIXED = [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}, {"role": "assistant", "content": "c"}]


@pytest.mark.parametrize(("template", "form", "text"), [
    (STRING, "auto", "user:a\nb;assistant:c;"), (STRING, "string", "user:a\nb;assistant:c;"), (PARTS, "auto", "user:<a><b>;assistant:<c>;"),
    (PARTS, "openai", "user:<a><b>;assistant:<c>;"), (EITHER, "auto", "<a><b><c>"), (EITHER, "string", "a\nbc"),
])
def test_contents_reach_the_template_in_the_form_it_takes(llm: LLM, template: str, form: str, text: str) -> None:
    before = copy.deepcopy(MIXED)
    (rendered,) = llm.chat(MIXED, chat_template=template, chat_template_content_format=form, dry_run=True)
    assert rendered.prompt == text
    assert before == MIXED


@pytest.mark.parametrize(("before", "given", "text"), [
    ("{% if messages[0].role != 'system' %}{{ raise_exception('x') }}{% endif %}", {}, ""), ("As {'type': 'text'}: ", {}, "As {'type': 'text'}: "),
    ("{{ lang.upper() }} ", {"chat_template_kwargs": {"lang": "en"}}, "EN "), ("{% for t in tools %}{{ t.name }}{% endfor %} ", {"tools": [{"name": "f"}]}, "f "),
])
def test_a_template_of_parts_is_recognised_whatever_else_it_needs(llm: LLM, before: str, given: dict, text: str) -> None:
    conversation = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    (rendered,) = llm.chat(conversation, chat_template=before + PARTS, dry_run=True, **given)
    assert rendered.prompt == text + "system:<s>;user:<u>;"


def test_a_renderer_that_somebody_else_ended_starts_again(llm: LLM) -> None:
    assert llm.chat([USER], chat_template=PARTS, dry_run=True)[0].prompt
    process = llm.llm_engine.chat._renderer._process._process
    process.kill()
    process.wait()
    (rendered,) = llm.chat([{"role": "user", "content": "u"}], chat_template="{{ 1 }}" + PARTS, dry_run=True)
    assert rendered.prompt == "1user:<u>;"


def test_tools_tool_calls_and_further_variables_reach_the_template(llm: LLM) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]}
    template = "{{ tools | tojson }}|{{ messages[1].tool_calls[0].function.arguments.x }}|{{ messages[1].content is none }}|{{ thinking }}"
    (rendered,) = llm.chat([USER, call], chat_template=template, tools=[{"name": "f"}], chat_template_kwargs={"thinking": "deep"}, dry_run=True)
    assert rendered.prompt == '[{"name": "f"}]|1|True|deep'


@pytest.mark.parametrize(("messages", "error", "message"), [
    (5, RequestTypeError, "list of messages"), ("hi", RequestTypeError, "list of messages"), ([[]], RequestValidationError, "cannot be empty"),
    ([USER, 5], RequestTypeError, "a conversation must be a list"), ([["hi"]], RequestTypeError, "a message must be a dict"),
    ([{"role": "user"}], RequestValidationError, "must have content"), ([{"role": "assistant"}], RequestValidationError, "must have content"),
    ([{"content": "x"}], RequestValidationError, "must have a role"), ([{"role": 5, "content": "x"}], RequestValidationError, "must have a role"),
    ([{"role": "user", "content": 5}], RequestTypeError, "content must be a text or a list of parts"),
    ([{"role": "user", "content": [5]}], RequestTypeError, "must be a text or a dict"),
    ([{"role": "user", "content": [{"type": "smell"}]}], RequestValidationError, "unknown type 'smell'"),
    ([{"role": "user", "content": [{"type": "text"}]}], RequestTypeError, "must have a text in 'text'"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], UnsupportedFeatureError, "only text parts work"),
    ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], RequestValidationError, "no JSON"),
    ([{"role": "pirate", "content": "x"}], RequestValidationError, "the roles are system, user and assistant"),
])
def test_bad_messages_are_refused_before_anything_runs(llm: LLM, messages, error, message: str) -> None:
    with pytest.raises(error, match=message):
        llm.chat(messages, GREEDY, use_tqdm=False)
    assert not llm.llm_engine.has_work
    assert llm.chat([], GREEDY) == []


@pytest.mark.parametrize(("options", "message"), [
    ({"chat_template_content_format": "xml"}, "must be 'auto', 'string' or 'openai'"), ({"chat_template_kwargs": {"messages": []}}, "may not set 'messages'"),
    ({"tools": "x"}, "tools must be a list"), ({"chat_template": 5}, "must be Jinja text"), ({"mm_processor_kwargs": {}}, "mm_processor_kwargs"),
    ({"chat_template_kwargs": {"x": object()}}, "JSON data"), ({"chat_template_kwargs": {"enable_thinking": False}}, "does not read 'enable_thinking'"),
    ({"tools": [{"name": "f"}]}, "tools: the chat template does not read"), ({"chat_template": "{% for %}"}, "cannot be rendered"),
])
def test_bad_options_are_refused(llm: LLM, options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        llm.chat([USER], GREEDY, use_tqdm=False, **options)


def test_one_conversation_that_cannot_be_rendered_leaves_the_others_alone(llm: LLM) -> None:
    conversations = [[{"role": "user", "content": q}] for q, _ in QUESTIONS]
    alone = [content(o) for o in llm.chat(conversations, GREEDY, use_tqdm=False)]
    conversations[2] = [{"role": "pirate", "content": "x"}]
    outputs = llm.chat(conversations, GREEDY, use_tqdm=False, on_error="return")
    assert isinstance(outputs[2].error, RequestValidationError)
    assert [content(o) for i, o in enumerate(outputs) if i != 2] == [t for i, t in enumerate(alone) if i != 2]


def test_messages_travel_as_they_are(llm: LLM) -> None:
    text = 'quotes " \\ \n and {{ braces }} {% raw %} é 日本語 🎉'
    (rendered,) = llm.chat([{"role": "user", "content": text, "name": "n"}], chat_template="{{ messages | tojson }}", dry_run=True)
    assert json.loads(rendered.prompt) == [{"role": "user", "content": text, "name": "n"}]
