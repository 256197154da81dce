"""The kinds of facts, with the ways to ask for each."""

from __future__ import annotations

from dataclasses import dataclass

from demo_model import fact_tables as tables


@dataclass(frozen=True, slots=True)
class Kind:
    """Facts of one kind: (subject, word) pairs, and how they are asked and told.

    `{x}` is the subject, `{X}` the same at the start of a sentence, `{y}` the word asked for, `{a}` its article. Any phrasing
    of `asked` is in the training text, but not with every subject; those of `unseen` are not in it at all. `then` asks the
    same of another subject.
    """

    name: str
    facts: tuple[tuple[str, str], ...]
    told: str
    asked: tuple[str, ...]
    unseen: tuple[str, ...]
    then: str


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


KINDS = (
    Kind("capital", tables.CAPITALS, "The capital of {x} is {y}.", _lines("""
        What is the capital of {x}?
        Which city is the capital of {x}?
        Name the capital of {x}.
        Tell me the capital of {x}.
        What is {x}'s capital?
        What is the capital city of {x}?
        Do you know the capital of {x}?
        Can you name the capital city of {x}?
        I want to know the capital of {x}.
        What is the name of {x}'s capital city?
        {X} has a capital. What is it called?"""), _lines("""
        Could you tell me what the capital of {x} is?
        Which city do people call the capital of {x}?"""), "And of {x}?"),
    Kind("country of a capital", tables.reverse(tables.CAPITALS), "{X} is the capital of {y}.", _lines("""
        {X} is the capital of which country?
        Which country has the capital {x}?
        {X} is the capital of what country?
        Of which country is {x} the capital?
        What country has {x} as its capital?
        Name the country whose capital is {x}.
        Tell me which country has {x} as its capital.
        Which country's capital is {x}?
        Do you know the country whose capital is {x}?
        The capital is {x}. What is the country?"""), _lines("""
        Can you tell me the country that has {x} as its capital?"""), "And {x}?"),
    Kind("continent", tables.CONTINENTS, "{X} is in {y}.", _lines("""
        On which continent is {x}?
        Which continent is {x} in?
        What continent is {x} on?
        Name the continent of {x}.
        Tell me the continent of {x}.
        {X} is on which continent?
        {X} lies on which continent?
        In which part of the world is {x}?
        Do you know the continent of {x}?
        What is the continent of {x}?"""), _lines("""
        Could you tell me which continent {x} lies on?"""), "And {x}?"),
    Kind("sound", tables.SOUNDS, "{X} says {y}.", _lines("""
        What does {x} say?
        What sound does {x} make?
        What noise does {x} make?
        Which sound does {x} make?
        How does {x} sound?
        What is the sound of {x}?
        Tell me the sound that {x} makes.
        Name the sound of {x}.
        Do you know the sound of {x}?
        What do you hear from {x}?"""), _lines("""
        Can you tell me what noise {x} makes?"""), "And {x}?"),
    Kind("young", tables.YOUNG, "The young of {x} is called {a} {y}.", _lines("""
        What is the young of {x} called?
        What do you call the young of {x}?
        What is the baby of {x} called?
        What do we call the baby of {x}?
        What is the name for the young of {x}?
        How is the young of {x} called?
        {X} has a baby. What is it called?
        Name the young of {x}.
        Tell me the name for the baby of {x}.
        Do you know what the young of {x} is called?"""), _lines("""
        Which word do we use for the baby of {x}?"""), "And of {x}?"),
    Kind("legs", tables.LEGS, "{X} has {y} legs.", _lines("""
        How many legs does {x} have?
        How many legs has {x}?
        What number of legs does {x} have?
        Tell me how many legs {x} has.
        What is the number of legs of {x}?
        On how many legs does {x} walk?
        Count the legs of {x}.
        Do you know how many legs {x} has?
        Say how many legs {x} has.
        {X} has how many legs?"""), _lines("""
        Could you tell me the number of legs that {x} has?"""), "And {x}?"),
    Kind("home", tables.HOMES, "{X} lives in {y}.", _lines("""
        Where does {x} live?
        What does {x} live in?
        What is the home of {x}?
        Where is the home of {x}?
        Tell me where {x} lives.
        Name the home of {x}.
        What is the home of {x} called?
        Do you know where {x} lives?
        Say where {x} lives.
        Where do you find {x} at home?"""), _lines("""
        Can you say where {x} lives?"""), "And {x}?"),
    Kind("colour", tables.COLOURS, "The color of {x} is {y}.", _lines("""
        What color is {x}?
        What is the color of {x}?
        Which color is {x}?
        Which color does {x} have?
        Tell me the color of {x}.
        Name the color of {x}.
        What color does {x} have?
        Do you know the color of {x}?
        Say what color {x} is.
        What is {x}'s color?"""), _lines("""
        Can you tell me which color {x} has?"""), "And {x}?"),
    Kind("opposite", tables.OPPOSITES, "The opposite of {x} is {y}.", _lines("""
        What is the opposite of {x}?
        Which word is the opposite of {x}?
        Tell me the opposite of {x}.
        Name the opposite of {x}.
        What is the contrary of {x}?
        Which word means the opposite of {x}?
        Do you know the opposite of {x}?
        Give me the opposite of {x}.
        What do you call the opposite of {x}?
        The word is {x}. What is its opposite?"""), _lines("""
        Could you tell me what the opposite of {x} is?"""), "And of {x}?"),
    Kind("day after", tables.NEXT_DAYS, "The day after {x} is {y}.", _lines("""
        What day comes after {x}?
        Which day comes after {x}?
        Which day follows {x}?
        What is the day after {x}?
        What is the next day after {x}?
        Name the day after {x}.
        Tell me the day after {x}.
        If today is {x}, what day is tomorrow?
        Today is {x}. What day is tomorrow?
        Do you know the day after {x}?"""), _lines("""
        Can you tell me which day follows {x}?"""), "And after {x}?"),
    Kind("day before", tables.reverse(tables.NEXT_DAYS), "The day before {x} is {y}.", _lines("""
        What day comes before {x}?
        Which day comes before {x}?
        Which day is just before {x}?
        What is the day before {x}?
        What is the last day before {x}?
        Name the day before {x}.
        Tell me the day before {x}.
        If today is {x}, what day was yesterday?
        Today is {x}. What day was yesterday?
        Do you know the day before {x}?"""), _lines("""
        Can you tell me which day comes before {x}?"""), "And before {x}?"),
    Kind("month after", tables.NEXT_MONTHS, "The month after {x} is {y}.", _lines("""
        What month comes after {x}?
        Which month comes after {x}?
        Which month follows {x}?
        What is the month after {x}?
        What is the next month after {x}?
        Name the month after {x}.
        Tell me the month after {x}.
        If it is {x} now, what is the next month?
        {X} is over. Which month is it now?
        Do you know the month after {x}?"""), _lines("""
        Can you tell me which month follows {x}?"""), "And after {x}?"),
    Kind("month before", tables.reverse(tables.NEXT_MONTHS), "The month before {x} is {y}.", _lines("""
        What month comes before {x}?
        Which month comes before {x}?
        Which month is just before {x}?
        What is the month before {x}?
        What is the last month before {x}?
        Name the month before {x}.
        Tell me the month before {x}.
        If it is {x} now, what was the last month?
        {X} has come. Which month was it before?
        Do you know the month before {x}?"""), _lines("""
        Can you tell me which month comes before {x}?"""), "And before {x}?"),
    Kind("letter", tables.NEXT_LETTERS, "The letter after {x} is {y}.", _lines("""
        What letter comes after {x}?
        Which letter comes after {x}?
        Which letter follows {x}?
        What is the letter after {x}?
        What is the next letter after {x}?
        Name the letter after {x}.
        Tell me the letter after {x}.
        After the letter {x}, what comes next?
        Do you know the letter after {x}?
        In the alphabet, what comes after {x}?"""), _lines("""
        Can you tell me which letter follows {x}?"""), "And after {x}?"),
    Kind("number", tables.NEXT_NUMBERS, "The number after {x} is {y}.", _lines("""
        What number comes after {x}?
        Which number comes after {x}?
        Which number follows {x}?
        What is the number after {x}?
        What is the next number after {x}?
        Name the number after {x}.
        Tell me the number after {x}.
        After the number {x}, what comes next?
        Do you know the number after {x}?
        I count to {x}. Which number is next?"""), _lines("""
        Can you tell me which number follows {x}?"""), "And after {x}?"),
    Kind("sum", tables.SUMS, "{X} is {y}.", _lines("""
        What is {x}?
        How much is {x}?
        What does {x} make?
        Tell me what {x} is.
        Add up: {x}.
        Calculate {x}.
        What do you get for {x}?
        Can you add {x}?
        What is the sum of {x}?
        Do you know what {x} is?"""), _lines("""
        Could you work out {x}?"""), "And {x}?"),
)
