"""`scripts/gpu_check graphs`: engines that repeat captured decode steps give the tokens of engines that run every step call by call.

A captured step may have more rows than the one that it serves, and a product of more rows may add in another order. Where two tokens
are as good as each other for the dtype, a request may go on with either; what follows is another text, and is not compared.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from gpu_device import need_gpu
from gpu_exact import KV_BYTES
from gpu_models import MODELS, model, prompts
from gpu_table import Checked, Section, finish

BATCHES = (1, 2, 5, 16, 33)
"""Requests at once: most are no power of two, and all shrink while requests end."""
NEW = 40
"""Tokens of the longest output; others have less."""

TIES = {"float32": 1e-4, "bfloat16": 0.25}
"""Log-probabilities of tokens between which rounding may decide. In bfloat16, logits of this size are rounded to multiples of 0.03, and
those of two implementations differ by up to 0.2 (see `gpu_exact`)."""


class Chosen(NamedTuple):
    """One output token, and the log-probabilities of the best tokens there."""

    token: int
    best: dict[int, float]


Outputs = list[list[Chosen]]
"""Of the requests of one batch."""


@contextmanager
def counted(device: str) -> Iterator[list[int]]:
    """How often a captured step was repeated meanwhile: one entry each time."""
    if device == "cpu":
        from kvloom_kernels.plan import Plan as Captured
    else:
        from torch.cuda import CUDAGraph as Captured
    repeats: list[int] = []
    original = Captured.replay

    def replay(self: Any, *args: Any) -> Any:
        repeats.append(1)
        return original(self, *args)

    with patch.object(Captured, "replay", replay):
        yield repeats


def answers(directory: Path, device: str, dtype: str, eager: bool, batches: Sequence[int], longest: int) -> tuple[list[Outputs], int]:
    """Of each batch, and how many steps were repeated."""
    from kvloom import LLM, SamplingParams

    found = []
    with counted(device) as repeats, LLM(
            str(directory), device=device, dtype=dtype, enforce_eager=eager, skip_tokenizer_init=True, max_model_len=longest + NEW,
            max_num_seqs=max(batches), kv_cache_memory=KV_BYTES, enable_prefix_caching=False, seed=0) as llm:
        for number, count in enumerate(batches):
            params = [SamplingParams(temperature=0, max_tokens=NEW - i % 7 * 5, ignore_eos=True, detokenize=False, logprobs=5)
                      for i in range(count)]
            asked = [{"prompt_token_ids": prompt} for prompt in prompts(count, longest, number)]
            found.append([
                [Chosen(token, {t: entry.logprob for t, entry in best.items()})
                 for token, best in zip(done.outputs[0].token_ids, done.outputs[0].logprobs, strict=True)]
                for done in llm.generate(asked, params, use_tqdm=False)])
    return found, len(repeats)


def parting(eager: Sequence[Chosen], captured: Sequence[Chosen]) -> tuple[int, float]:
    """How many tokens are equal until one is not, and by how much the eager engine found that one worse; 0 where all are equal."""
    for i, (a, b) in enumerate(zip(eager, captured, strict=True)):
        if a.token != b.token:
            return i, a.best[a.token] - a.best.get(b.token, -math.inf)
    return len(eager), 0.0


def compare(name: str, dtype: str, eager: tuple[list[Outputs], int], captured: tuple[list[Outputs], int]) -> Checked:
    """Each engine's outputs, and how many steps it repeated."""
    wrong, equal, total, ties = [], 0, 0, 0
    for one, other in zip(eager[0], captured[0], strict=True):
        parted = [parting(a, b) for a, b in zip(one, other, strict=True)]
        equal, total = equal + sum(count for count, _ in parted), total + sum(map(len, one))
        ties += sum(count < len(a) for (count, _), a in zip(parted, one, strict=True))
        wrong += [f"{name}, {dtype}: of {len(one)} requests, the one numbered {i} has another token {count}, worse by {worse:.3g}"
                  for i, (count, worse) in enumerate(parted) if not worse <= TIES[dtype]]
    if eager[1]:
        wrong.append(f"{name}, {dtype}: enforce_eager=True repeated {eager[1]} captured steps")
    if not captured[1]:
        wrong.append(f"{name}, {dtype}: nothing was captured, or nothing repeated: the log says why")
    return (name, dtype, f"{equal} of {total}", str(ties), str(captured[1])), wrong


def run(device: str = "cuda", names: Sequence[str] = tuple(MODELS), batches: Sequence[int] = BATCHES, longest: int = 900,
        **changes: Any) -> list[Section]:
    """All models in both dtypes; `changes` of their config.json are for tests."""
    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            directory = model(Path(folder), name, **changes)
            for dtype in ("float32", "bfloat16"):
                results = [answers(directory, device, dtype, eager, batches, longest) for eager in (True, False)]
                row, found = compare(name, dtype, *results)
                rows.append(row)
                wrong += found
    note = (f"Batches of {', '.join(map(str, batches))} requests of 1 to {longest} tokens. Requests part where two tokens are as good: "
            f"{TIES['float32']} of log-probability in float32, {TIES['bfloat16']} in bfloat16.")
    columns = ("model", "dtype", "tokens equal", "requests that part", "steps repeated")
    return [Section("Captured decode steps against steps call by call", columns, tuple(rows), (note,), tuple(wrong))]


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", help="a file for the tables as JSON; printed else")
    given = parser.parse_args(argv)
    need_gpu("gpu_graphs")
    return finish(run(), given.out)


if __name__ == "__main__":
    sys.exit(main())
