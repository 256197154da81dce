"""Dialogues: questions on facts in chat format, alone and in turns with greetings, thanks and stories."""

from __future__ import annotations

import random

from demo_model import story_tables
from demo_model.chat import chat
from demo_model.facts import Question, ask
from demo_model.stories import HEROES, story

BEFORE = ("Please tell me: ", "Hello! ", "Hi. ", "I have a question. ", "Quick question: ", "Excuse me. ", "Here is a question: ",
          "Hey, ")
AFTER = (" Thanks!", " Please answer.", " Thank you.", " I forgot.", " Help me.")
SYSTEM = ("You are a helpful assistant.", "Answer the questions of the user.", "You are Loom, a small and friendly assistant.",
          "Be brief.")
IN_A_WORD = ("Answer with one word.", "Say only the answer.")
GREETINGS = ("Hello!", "Hi!", "Good morning!", "Hello, how are you?", "Hi there!", "Good evening.", "Hey!", "Hello Loom!")
WELCOME = {"Hello, how are you?": "I am fine, thank you. How can I help you?", "Good morning!": "Good morning! How can I help you?",
           "Good evening.": "Good evening! How can I help you?"}
HELLO = "Hello! How can I help you?"
THANKS = ("Thank you!", "Thanks!", "Thank you very much.", "Great, thanks!", "Thanks a lot!", "That helps, thank you.")
NO_PROBLEM = "You are welcome!"
BYES = ("Goodbye!", "Bye!", "See you!", "Good night!", "That is all, bye.")
FAREWELL = "Goodbye!"
SELF = (
    (("What is your name?", "Who are you?", "What are you called?", "Tell me your name."), "I am Loom, a very small language model."),
    (("What can you do?", "How can you help me?", "What do you know?"), "I know some facts, tell stories and write JSON."),
    (("Are you a human?", "Are you a person?", "Are you a robot?"), "No, I am a small language model."),
)
STORY_REQUESTS = ("Tell me a story.", "Please tell me a story.", "I want to hear a story.", "Can you tell me a story?")
STORY_ABOUT = ("Tell me a story about a {kind} named {hero}.", "Please tell me a story about a {kind} named {hero}.",
               "I want a story about {hero} the {kind}.", "Can you tell me a story about a {kind} called {hero}?")


def varied(rng: random.Random, text: str) -> str:
    """How people type a question: mostly as it is, else with something around it, in lower case, without the last mark."""
    draw = rng.random()
    if draw < 0.4:
        return text
    if draw < 0.65:
        text = rng.choice(BEFORE) + text
    if 0.6 < draw < 0.75:
        return text + rng.choice(AFTER)
    if draw > 0.7 and rng.random() < 0.6:
        text = text.rstrip("?.")
    return text.lower() if draw > 0.85 else text


def question(rng: random.Random, asked: Question) -> str:
    """A chat with this one question, at times after a system message."""
    text = varied(rng, asked.text)
    draw = rng.random()
    if draw < 0.12:
        return chat([(text, asked.word)], rng.choice(IN_A_WORD))
    return chat([(text, asked.answer)], rng.choice(SYSTEM) if draw < 0.24 else "")


def dialogue(rng: random.Random, questions: list[Question]) -> str:
    """Perhaps a greeting, some turns, perhaps thanks and farewell."""
    turns: list[tuple[str, str]] = []
    if rng.random() < 0.5:
        greeting = rng.choice(GREETINGS)
        turns.append((greeting, WELCOME.get(greeting, HELLO)))
    if rng.random() < 0.15:
        asked, answer = rng.choice(SELF)
        turns.append((rng.choice(asked), answer))
    for _ in range(rng.choice((1, 1, 2, 2, 3, rng.randint(4, 10)))):
        turns += _facts(rng, rng.choice(questions))
    if rng.random() < 0.5:
        turns.append((rng.choice(THANKS), NO_PROBLEM))
    if rng.random() < 0.3:
        turns.append((rng.choice(BYES), FAREWELL))
    return chat(turns, rng.choice(SYSTEM) if rng.random() < 0.2 else "")


def _facts(rng: random.Random, first: Question) -> list[tuple[str, str]]:
    """A question, at times with a second one that leans on it: *And of Spain?*"""
    turns = [(varied(rng, first.text), first.answer)]
    if rng.random() < 0.4:
        second = ask(first.kind, first.kind.then, rng.randrange(len(first.kind.facts)))
        turns.append((second.text, second.answer))
    return turns


def told_story(rng: random.Random) -> str:
    """A chat that asks for a story, at times for one about somebody."""
    if rng.random() < 0.4:
        return chat([(rng.choice(STORY_REQUESTS), story(rng))])
    given = {"kind": rng.choice(story_tables.WORDS["kind"]), "hero": rng.choice(HEROES["girl"] + HEROES["boy"])}
    return chat([(rng.choice(STORY_ABOUT).format(**given), story(rng, **given))])
