"""`scripts/gpu_check bench`: what a decode step of a whole engine takes, against the time in which a copy moves what it must read."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_limits import Shape
from bench_models import model
from gpu_attention import limits
from gpu_device import need_gpu
from gpu_models import random_ids
from gpu_table import Section, finish, percent

MODEL = "qwen3-0.6b"
ROWS = (1, 128)
CONTEXT_TOKENS, NEW_TOKENS = 1024, 129
ROUNDS = 3


def step_s(llm: Any, rows: int, context_tokens: int, new_tokens: int) -> float:
    """Seconds of a decode step of so many rows, everything between two tokens counted: median of `ROUNDS` calls."""
    from kvloom import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    seconds = []
    for number in range(ROUNDS + 1):
        asked = [{"prompt_token_ids": ids} for ids in random_ids([context_tokens] * rows, number)]
        metrics = [done.metrics for done in llm.generate(asked, params, use_tqdm=False)]
        first, last = (max(getattr(m, name) for m in metrics) for name in ("first_token_time", "last_token_time"))
        step = (last - first) / (new_tokens - 1)
        if first - min(m.first_token_time for m in metrics) > step:
            raise SystemExit("the prompts were not computed in one step: not all rows decode all the time")
        seconds.append(step)
    return statistics.median(seconds[1:])


def section(found: Sequence[tuple[int, float]], shape: Shape, copy_bytes_s: float, context_tokens: int, new_tokens: int) -> Section:
    """The table, from rows and the seconds of their steps."""
    lines = []
    for rows, seconds in found:
        read = shape.weight_bytes + rows * (context_tokens + new_tokens / 2) * shape.kv_bytes
        lines.append((str(rows), f"{1e3 * seconds:.3f}", f"{rows / seconds:.0f}", f"{read / 1e6:.0f}",
                      percent(read / copy_bytes_s / seconds)))
    note = (f"{MODEL}'s shape in bfloat16, {context_tokens} tokens of prompt, {new_tokens - 1} steps, with sampler and host; read: "
            f"weights and each context's keys and values, at the {copy_bytes_s / 1e12:.2f} TB/s of a copy in the same run.")
    return Section("Decode step", ("rows", "ms", "tok/s", "MB to read", "share of the copy's rate"), tuple(lines), (note,))


def run(folder: Path, device: str = "cuda", rows: Sequence[int] = ROWS, context_tokens: int = CONTEXT_TOKENS,
        new_tokens: int = NEW_TOKENS, name: str = MODEL, copy_bytes_s: float | None = None) -> list[Section]:
    """Measure."""
    from kvloom import LLM

    directory = model(folder, name)
    copy_bytes_s = copy_bytes_s or limits(device).copy_bytes_s
    with LLM(str(directory), device=device, dtype="bfloat16", skip_tokenizer_init=True, max_model_len=context_tokens + new_tokens,
             max_num_seqs=max(rows), max_num_batched_tokens=max(rows) * context_tokens, enable_prefix_caching=False, seed=0) as llm:
        found = [(count, step_s(llm, count, context_tokens, new_tokens)) for count in rows]
    return [section(found, Shape(directory), copy_bytes_s, context_tokens, new_tokens)]


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is, or is made")
    parser.add_argument("--out", help="a file for the tables as JSON; printed else")
    given = parser.parse_args(argv)
    need_gpu("gpu_decode")
    return finish(run(given.folder), given.out)


if __name__ == "__main__":
    sys.exit(main())
