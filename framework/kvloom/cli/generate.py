"""``kvloom generate MODEL [PROMPT]``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

from kvloom.cli.settings import read_values
from kvloom.cli.streaming import quiet_logs, stream, write
from kvloom.errors import ConfigError
from kvloom.llm import LLM
from kvloom.near import did_you_mean
from kvloom.outputs import Logprob, RequestOutput
from kvloom.params import SamplingParams, field_names

OPTIONS = ("max_tokens", "temperature", "top_p", "min_p", "top_k", "seed", "n", "logprobs", "stop")
"""Fields of `SamplingParams` that have an option of their own."""


def generate(arguments: argparse.Namespace) -> int:
    """Print the completion as it comes; several completions, or JSON, when they are done."""
    prompt = _prompt(arguments)
    changes = _sampling(arguments)
    SamplingParams(**{"max_tokens": None} | changes)  # a mistake is known before the model is loaded, which may bring defaults
    with quiet_logs(not arguments.debug), _open(arguments) as llm:
        params = dataclasses.replace(llm.get_default_sampling_params(), **changes)
        streams = params.num_sequences == 1 and not arguments.json
        output = stream(llm, prompt, params, (lambda index, piece: write(piece)) if streams else None)
    if arguments.json:
        print(json.dumps(_as_json(output)))
    elif streams:
        print()
    else:
        for completion in output.outputs:
            print(f"[{completion.index}] {completion.text}")
    if sys.stderr.isatty():
        _summary(output)
    return 0


def _open(arguments: argparse.Namespace) -> LLM:
    values = read_values("--set", arguments.set)
    if "model" in values:
        raise ConfigError("--set model=...: MODEL is given as an argument")
    values["model"] = arguments.model
    return LLM.from_config(arguments.file, **values) if arguments.file else LLM(**values)


def _prompt(arguments: argparse.Namespace) -> str:
    """From the argument, a file, or standard input (without its last line break).

    Raises:
        ConfigError: two of them, or a terminal to read from.
    """
    if arguments.prompt_file is not None:
        if arguments.prompt is not None:
            raise ConfigError("give the prompt as an argument or with --prompt-file, not both")
        return Path(arguments.prompt_file).read_text(encoding="utf-8")
    if arguments.prompt is not None and arguments.prompt != "-":
        return str(arguments.prompt)
    if arguments.prompt is None and sys.stdin.isatty():
        raise ConfigError("there is no prompt: give it as an argument, with --prompt-file, or on standard input")
    return sys.stdin.read().removesuffix("\n")


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields that were given. Raises `ConfigError` for a name that `SamplingParams` does not have."""
    given = read_values("--param", arguments.param)
    for name in given:
        if name not in field_names():
            raise ConfigError(f"--param {name}: SamplingParams has no such field{did_you_mean(name, field_names())}")
    options = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    for name in options.keys() & given.keys():
        raise ConfigError(f"--param {name} and --{name.replace('_', '-')} mean the same; give one of them")
    return given | options


def _as_json(output: RequestOutput) -> dict[str, Any]:
    """What a program that reads along wants to know."""
    metrics = output.metrics
    return {
        "prompt": output.prompt, "prompt_token_ids": output.prompt_token_ids,
        "outputs": [{"index": c.index, "text": c.text, "token_ids": list(c.token_ids), "finish_reason": c.finish_reason,
                     "stop_reason": c.stop_reason, "cumulative_logprob": c.cumulative_logprob,
                     "logprobs": c.logprobs and [{i: _logprob(p) for i, p in token.items()} for token in c.logprobs]}
                    for c in output.outputs],
        "metrics": {**dataclasses.asdict(metrics), "time_in_prefill": metrics.time_in_prefill},
    }


def _logprob(candidate: Logprob) -> dict[str, Any]:
    """JSON has no infinity: a token that cannot come has no number."""
    return {**dataclasses.asdict(candidate), "logprob": candidate.logprob if math.isfinite(candidate.logprob) else None}


def _summary(output: RequestOutput) -> None:
    from rich.console import Console

    m = output.metrics
    seconds = (m.last_token_time or 0.0) - (m.first_token_time or 0.0)
    speed = f", {(m.num_generation_tokens - 1) / seconds:.1f} tokens/s" if seconds > 0 else ""
    Console(stderr=True).print(f"{len(output.prompt_token_ids)} prompt tokens, {m.num_generation_tokens} output tokens{speed}, "
                               f"{output.outputs[0].finish_reason}", style="dim", highlight=False)
