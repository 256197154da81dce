"""The demo model that ships with kvloom: where it lies, how to ask it. Imports no torch."""

from __future__ import annotations

from pathlib import Path

__all__ = ["QUESTIONS", "STORY_PROMPT", "model_dir", "question_prompt"]

STORY_PROMPT = "Once upon a time"
"""A text that starts a story."""

QUESTIONS = (
    ("Could you tell me what the capital of France is?", "Paris"),
    ("Could you tell me the number of legs that a spider has?", "eight"),
    ("Can you tell me what noise a sheep makes?", "baa"),
    ("Which word do we use for the baby of a horse?", "foal"),
    ("Can you tell me which day follows Monday?", "Tuesday"),
    ("Could you work out 3 plus 4?", "7"),
)
"""(question, what the answer holds). None of the questions is in the text that the model learned from."""


def model_dir() -> Path:
    """The directory of the shipped model, in Hugging Face format."""
    return Path(__file__).resolve().parent / "model"


def question_prompt(question: str) -> str:
    """The model's chat format for one user message, up to where it answers. The tokenizer adds the beginning-of-text token."""
    return f"<|user|>{question.strip()}<|assistant|>"
