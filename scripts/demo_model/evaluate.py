"""Asks a model directory, with kvloom, what the training text lacks: ``python -m demo_model.evaluate DIRECTORY``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from demo_model import facts, objects
from demo_model.facts import Question
from demo_model.stories import parses, sentences
from kvloom import LLM, SamplingParams
from kvloom.demo import STORY_PROMPT, question_prompt

BEGINNINGS = (STORY_PROMPT, *(f"{STORY_PROMPT}, {rest}" for rest in (
    "there was a shy fox named", "there was a bear", "a clever mouse named Ella", "in a quiet valley, there", "by the sea,",
    "there was a puppy named Oscar")))


def complete(llm: LLM, prompts: Iterable[str], max_tokens: int) -> list[tuple[str, bool]]:
    """Greedy texts, and whether each ended by itself."""
    outputs = llm.generate(list(prompts), SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)
    return [(output.outputs[0].text.strip(), output.outputs[0].finish_reason == "stop") for output in outputs]


def share_right(llm: LLM, questions: list[Question], show: bool = False) -> float:
    """The share of questions whose full answer comes, and nothing more."""
    answers = complete(llm, (question_prompt(question.text) for question in questions), 40)
    wrong = [(question, text) for question, (text, ended) in zip(questions, answers, strict=True)
             if text != question.answer or not ended]
    if show:
        print(Counter(question.kind.name for question, _ in wrong))
        for question, text in wrong:
            print(f"  {question.text} -> {text}")
    return 1 - len(wrong) / len(questions)


def share_of_json(llm: LLM, prompts: list[str]) -> float:
    """The share of requests that are answered with JSON, and nothing more."""
    return sum(ended and _is_json(text) for text, ended in complete(llm, map(question_prompt, prompts), 100)) / len(prompts)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def tell(llm: LLM) -> list[tuple[str, bool]]:
    """Whole greedy stories from `BEGINNINGS`, and whether each ended by itself."""
    outputs = llm.generate(list(BEGINNINGS), SamplingParams(temperature=0, max_tokens=300), use_tqdm=False)
    return [(start + output.outputs[0].text, output.outputs[0].finish_reason == "stop")
            for start, output in zip(BEGINNINGS, outputs, strict=True)]


def share_of_sentences(llm: LLM, show: bool = False) -> float:
    """The share of the sentences of greedy stories that the grammar can make."""
    found = [sentence for text, _ in tell(llm) for sentence in sentences(text)]
    if show:
        print("\n".join(f"  {'' if parses(s) else 'NOT: '}{s}" for s in found))
    return sum(map(parses, found)) / len(found)


def shares_right(directory: Path, show: bool = False) -> dict[str, float]:
    """All shares, rounded to four digits."""
    with LLM(str(directory)) as llm:
        shares = {
            "share_of_held_out_questions_right": share_right(llm, facts.held_out(), show),
            "share_of_unseen_phrasings_right": share_right(llm, facts.unseen(), show),
            "share_of_story_sentences_parsed": share_of_sentences(llm, show),
            "share_of_held_out_requests_json": share_of_json(llm, objects.held_out()),
        }
    return {name: round(share, 4) for name, share in shares.items()}


if __name__ == "__main__":
    print(json.dumps(shares_right(Path(sys.argv[1]), show=True), indent=1))
