"""`scripts/gpu_check exact`: whole engines on a GPU against transformers, on small random models.

float32: transformers computes prompt and output in one piece; each token of ours has the highest logit there, or lies below it by no
more than rounding does. bfloat16: our log-probabilities of all tokens, and those of transformers in bfloat16, against those of
transformers in float32 with the same weights; ours may be `ERRORS` times as far off.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_device import need_gpu
from gpu_models import MODELS, model, prompts
from gpu_table import Checked, Section, finish

TIE = 1e-4
"""Logits have a standard deviation of 2, and two float32 implementations differ by about 1e-5: closer than this, either may be the
highest. Of 4096 such logits the two highest are that close once in some thousand tokens."""
MOST_TIES = 2
"""That may be decided otherwise, of about a thousand tokens."""
ERRORS = {"mean": 1.5, "99 %": 1.6, "most": 4.0}
"""How much further from float32 our log-probabilities may be than transformers' are, both in bfloat16."""
LEAST_ERROR = 2e-3
"""Errors below it count as it: nothing is rounded finer than this in bfloat16 logits."""

KV_BYTES = 2**30


class Answer(NamedTuple):
    """One request's tokens, and the log-probabilities of all of them but the first of the prompt."""

    tokens: list[int]
    prompt_tokens: int
    logprobs: list[float]


def ours(directory: Path, device: str, dtype: str, asked: Sequence[Sequence[int]], new: int, **kwargs: Any) -> list[Answer]:
    """Greedy, with steps so small that long prompts come in several chunks beside others that decode."""
    from kvloom import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=0, prompt_logprobs=0)
    with LLM(str(directory), device=device, dtype=dtype, skip_tokenizer_init=True, max_model_len=max(map(len, asked)) + new,
             max_num_seqs=len(asked), max_num_batched_tokens=512, kv_cache_memory=KV_BYTES, seed=0, **kwargs) as llm:
        outputs = llm.generate([{"prompt_token_ids": list(p)} for p in asked], params, use_tqdm=False)
    answers = []
    for prompt, done in zip(asked, outputs, strict=True):
        if done.error is not None:
            raise SystemExit(f"a request failed: {done.error}")
        tokens = [*prompt, *done.outputs[0].token_ids]
        entries = [*done.prompt_logprobs[1:], *done.outputs[0].logprobs]
        answers.append(Answer(tokens, len(prompt), [entry[t].logprob for entry, t in zip(entries, tokens[1:], strict=True)]))
    return answers


class Transformers:
    """transformers' model of a checkpoint."""

    def __init__(self, directory: Path, device: str, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self.device = device
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").to(device).eval()

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """``[T, V]`` float32: row i is what comes after token i."""
        return self.model(torch.tensor([tokens], device=self.device), use_cache=False).logits[0].float()

    def logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        """``[T - 1]``: of each token after the first."""
        chosen = torch.tensor(tokens[1:], device=self.device)[:, None]
        return self.logits(tokens)[:-1].log_softmax(-1).gather(1, chosen)[:, 0]


def below_the_best(truth: Transformers, answer: Answer) -> torch.Tensor:
    """``[output tokens]``: by how much each token's logit is below the highest one."""
    rows = truth.logits(answer.tokens)[answer.prompt_tokens - 1:-1]
    chosen = torch.tensor(answer.tokens[answer.prompt_tokens:], device=rows.device)[:, None]
    return rows.max(-1).values - rows.gather(1, chosen)[:, 0]


def check_tokens(name: str, directory: Path, device: str, asked: Sequence[Sequence[int]], new: int) -> Checked:
    """float32: the tokens."""
    truth = Transformers(directory, device, torch.float32)
    below = [below_the_best(truth, answer) for answer in ours(directory, device, "float32", asked, new)]
    every = torch.cat(below)
    ties, wrong = int(((every > 0) & (every <= TIE)).sum()), int((~(every <= TIE)).sum())
    found = []
    if wrong:
        request, token = next((i, int((~(b <= TIE)).nonzero()[0])) for i, b in enumerate(below) if (~(b <= TIE)).any())
        found.append(f"{name}, float32: {wrong} of {len(every)} tokens are not the best; first token {token} of request {request} "
                     f"({len(asked[request])} tokens of prompt), {float(below[request][token]):.3g} below it")
    if ties > MOST_TIES:
        found.append(f"{name}, float32: {ties} of {len(every)} tokens are not the best by less than {TIE}: too many for rounding")
    compared = f"{len(every) - ties - wrong} of {len(every)} tokens equal, {ties} ties"
    return (name, "float32", compared, f"{float(every.max()):.1e}", ""), found


def spread(errors: torch.Tensor) -> dict[str, float]:
    """The figures that `ERRORS` bounds."""
    return {"mean": float(errors.mean()), "99 %": float(errors.quantile(0.99)), "most": float(errors.max())}


def excess(ours: dict[str, float], theirs: dict[str, float]) -> list[str]:
    """What of our errors is more than may be; NaN is."""
    return [f"{what} {ours[what]:.4f}, {theirs[what]:.4f} by transformers in bfloat16 (at most {bound} times that)"
            for what, bound in ERRORS.items() if not ours[what] <= bound * max(theirs[what], LEAST_ERROR)]


def check_logprobs(name: str, directory: Path, device: str, asked: Sequence[Sequence[int]], new: int) -> Checked:
    """bfloat16: the log-probabilities."""
    answers = ours(directory, device, "bfloat16", asked, new)
    truth, rounded = (Transformers(directory, device, dtype) for dtype in (torch.float32, torch.bfloat16))
    expected = [truth.logprobs(a.tokens) for a in answers]
    by_us = torch.cat([(torch.tensor(a.logprobs, device=device) - e).abs() for a, e in zip(answers, expected, strict=True)])
    by_them = torch.cat([(rounded.logprobs(a.tokens) - e).abs() for a, e in zip(answers, expected, strict=True)])
    mine, theirs = spread(by_us), spread(by_them)
    text = [" / ".join(f"{value:.4f}" for value in figures.values()) for figures in (mine, theirs)]
    return ((name, "bfloat16", f"{len(by_us)} log-probabilities", *text), [f"{name}, bfloat16: {e}" for e in excess(mine, theirs)])


def run(device: str = "cuda", names: Sequence[str] = tuple(MODELS), count: int = 20, longest: int = 1500, new: int = 48,
        **changes: Any) -> list[Section]:
    """All models in both dtypes; `changes` of their config.json are for tests."""
    torch.backends.cuda.matmul.allow_tf32 = False
    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            directory, asked = model(Path(folder), name, **changes), prompts(count, longest, number)
            for check in (check_tokens, check_logprobs):
                row, found = check(name, directory, device, asked, new)
                rows.append(row)
                wrong += found
    note = (f"{count} requests of 1 to {longest} tokens, {new} new ones each, at once, prompts in chunks. Below the best / errors of "
            f"log-probabilities: {', '.join(ERRORS)}, against transformers in float32.")
    columns = ("model", "dtype", "compared", "off by", "transformers in bfloat16, off by")
    return [Section("Against transformers", columns, tuple(rows), (note,), tuple(wrong))]


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", help="a file for the tables as JSON; printed else")
    given = parser.parse_args(argv)
    need_gpu("gpu_exact")
    return finish(run(), given.out)


if __name__ == "__main__":
    sys.exit(main())
