"""``kvloom demo``: the model that comes with kvloom tells a story and answers questions."""

from __future__ import annotations

import argparse
import sys
import time

from kvloom.cli.streaming import quiet_logs, stream, write
from kvloom.demo import QUESTIONS, STORY_PROMPT, model_dir, question_prompt
from kvloom.llm import LLM
from kvloom.params import SamplingParams

STORY_TOKENS = 200
ANSWER_TOKENS = 40


def demo(arguments: argparse.Namespace) -> int:
    """A story, then questions with their answers; greedy, so the same on every machine, unless there is a seed."""
    started_s = time.monotonic()
    with quiet_logs(not arguments.debug), LLM(str(model_dir()), dtype="float32", max_num_seqs=8) as llm:
        if sys.stderr.isatty() or arguments.debug:
            print(f"started in {time.monotonic() - started_s:.1f} s", file=sys.stderr)
        sampling = {"temperature": 0.0} if arguments.seed is None else {"temperature": 0.8, "seed": arguments.seed}
        write(STORY_PROMPT)
        stream(llm, STORY_PROMPT, SamplingParams(max_tokens=STORY_TOKENS, **sampling), lambda index, piece: write(piece))
        print("\n")
        answering = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
        for question, _ in QUESTIONS:
            print(f"{_bold('Q:')} {question}")
            write(f"{_bold('A:')} ")
            stream(llm, question_prompt(question), answering, lambda index, piece: write(piece))
            print("\n")
    return 0


def _bold(text: str) -> str:
    if not sys.stdout.isatty():
        return text
    from rich.console import Console

    console = Console()
    with console.capture() as captured:
        console.print(text, style="bold", end="", highlight=False)
    return captured.get()
