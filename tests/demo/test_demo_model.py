"""The model that ships in the wheel knows its facts in words it never read, tells stories by the grammar, and writes JSON."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
from demo_helpers import chat, corpus, evaluate, facts, objects, stories, story_tables
from hypothesis import example, given, strategies
from safetensors import safe_open
from transformers import AutoTokenizer

from kvloom import LLM
from kvloom.demo import QUESTIONS, STORY_PROMPT, model_dir, question_prompt

QUESTIONS_OF_A_KIND = 6


def few(questions: list) -> list:
    """Some questions of each kind, spread over its facts."""
    chosen = []
    for kind in facts.KINDS:
        own = [question for question in questions if question.kind is kind]
        chosen += own[::math.ceil(len(own) / QUESTIONS_OF_A_KIND)]
    return chosen


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return corpus.documents()


@pytest.fixture(scope="module")
def training() -> dict:
    return json.loads((model_dir() / "training.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_dir())


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(model_dir())) as engine:
        yield engine


def answers(llm: LLM, questions: list[str], max_tokens: int = 40) -> list[tuple[str, bool]]:
    return evaluate.complete(llm, map(question_prompt, questions), max_tokens)


def test_the_text_can_be_made_again(documents: list[str], training: dict) -> None:
    assert corpus.sha256(documents) == training["corpus_sha256"]
    assert corpus.documents() == documents
    assert corpus.sha256(corpus.documents(corpus.SEED + 1)) != training["corpus_sha256"]
    assert training["seed"] == corpus.SEED


def test_the_questions_of_the_tests_are_not_in_the_text(documents: list[str]) -> None:
    text = "\0".join(documents).lower()
    asked = [question.text for question in facts.held_out() + facts.unseen()]
    assert len(set(asked)) == len(asked) > 1000
    for question in (*asked, *objects.held_out(), *(question for question, _ in QUESTIONS)):
        assert question.lower() not in text


def test_facts_asked_in_words_never_read_about_them(llm: LLM) -> None:
    questions = few(facts.held_out())
    assert len(questions) >= 40
    assert {question.kind.name for question in questions} == {kind.name for kind in facts.KINDS}
    found = answers(llm, [question.text for question in questions])
    wrong = {q.text: text for q, (text, ended) in zip(questions, found, strict=True) if text != q.answer or not ended}
    assert wrong == {}


def test_facts_asked_in_phrasings_never_read_at_all(llm: LLM) -> None:
    assert evaluate.share_right(llm, few(facts.unseen())) >= 0.9


def test_the_questions_of_the_demo(llm: LLM) -> None:
    found = answers(llm, [question for question, _ in QUESTIONS])
    for (question, word), (text, _) in zip(QUESTIONS, found, strict=True):
        assert word in text, question


@pytest.mark.parametrize("asked", ["Can I ask you something? What is the capital of Peru?", "so, what is the capital of Peru",
                                   "  what is the capital of Peru ??", "Tell me, what is the capital of Peru?"])
def test_a_question_typed_in_another_way(llm: LLM, asked: str) -> None:
    assert "Lima" in answers(llm, [asked])[0][0]


def test_a_dialogue_whose_second_question_leans_on_the_first(llm: LLM, tokenizer) -> None:
    """The same second question after two first ones."""
    for first, second in (("Could you tell me the number of legs that a dog has?", "A duck has two legs."),
                          ("Can you tell me what noise a dog makes?", "A duck says quack.")):
        messages = [{"role": "user", "content": first}, {"role": "assistant", "content": answers(llm, [first])[0][0]},
                    {"role": "user", "content": "And a duck?"}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).removeprefix("<s>")
        assert evaluate.complete(llm, [prompt], 40) == [(second, True)]


def test_every_sentence_of_greedy_stories_parses(llm: LLM) -> None:
    for start, (text, ended) in zip(evaluate.BEGINNINGS, evaluate.tell(llm), strict=True):
        found = stories.sentences(text)
        assert [s for s in found if not stories.parses(s)] == []
        assert ended, start
        assert 5 <= len(found) <= 9


def test_a_story_about_somebody_asked_for_in_a_chat(llm: LLM) -> None:
    text, ended = answers(llm, ["Tell me a story about a bear named Nora."], 300)[0]
    assert ended
    assert all(map(stories.parses, stories.sentences(text)))
    names = {word.strip('.,"') for word in text.split()} & {*story_tables.GIRLS, *story_tables.BOYS}
    assert names == {"Nora"}
    assert "bear" in text


@pytest.mark.parametrize("sentence", [
    "Once upon a time, there was a shy fox named Tom", "Mia was very sad.", "One day, Mia lost his red key in the barn.",
    "Mia hugged the the mole and said thank you.", "Mia went home and slept well that night. ", ""])
def test_sentences_that_the_grammar_cannot_make(sentence: str) -> None:
    assert not stories.parses(sentence)


def test_every_sentence_of_the_text_parses(documents: list[str]) -> None:
    told = [text.removesuffix("<|end|>") for text in documents if text.startswith(STORY_PROMPT)][:1000]
    assert all(stories.parses(sentence) for text in told for sentence in stories.sentences(text))


def test_json_on_request(llm: LLM) -> None:
    requests = objects.held_out()
    for request, (text, ended) in zip(requests, answers(llm, requests, 100), strict=True):
        assert ended, request
        assert isinstance(json.loads(text), dict), request


def test_sizes(training: dict) -> None:
    config = json.loads((model_dir() / "config.json").read_text())
    path = model_dir() / "model.safetensors"
    with safe_open(path, "pt") as file:
        parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert 1_000_000 < parameters == training["parameters"] < 3_000_000
    assert path.stat().st_size == training["safetensors_bytes"] <= 6_000_000
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0
    assert 1024 <= config["vocab_size"] <= 4096


@given(text=strategies.text())
@example(text="naïve 你好 🙂\n\t  two  spaces ")
def test_any_text_comes_back_from_the_tokenizer(tokenizer, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 + text.count("<s>")
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_special_tokens(tokenizer) -> None:
    assert [tokenizer.convert_tokens_to_ids(token) for token in chat.SPECIAL_TOKENS] == list(range(len(chat.SPECIAL_TOKENS)))
    assert (tokenizer.bos_token, tokenizer.eos_token) == (chat.BOS, chat.END)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((model_dir() / name).read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_the_chat_template_is_the_format_of_the_text(tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hello! "},
                {"role": "assistant", "content": "Hi.\n"}, {"role": "user", "content": "What is 1 plus 1?"}]
    given = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert given == chat.BOS + chat.chat([("Hello!", "Hi.")], "Be brief.") + question_prompt("What is 1 plus 1?")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer(given.removeprefix(chat.BOS))["input_ids"]


def test_where_the_model_lies_is_known_without_torch() -> None:
    code = "import sys, kvloom.demo; assert kvloom.demo.model_dir().is_dir(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
