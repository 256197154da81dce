"""`scripts/gpu_check bench`: 256 requests at once through kvloom, and through transformers' continuous batching.

Each engine runs in a process of its own, answers a few requests first, and then all of them; an output of another length than was asked
for ends it.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from bench_models import model
from gpu_device import need_gpu
from gpu_models import random_ids
from gpu_table import Section, finish, ratio

MODEL = "qwen3-0.6b"
REQUESTS = 256
LEAST_TOKENS, MOST_TOKENS = 100, 1024
"""Of a prompt, and of an output."""
ENGINE_LIMIT_S = {"kvloom": 40, "transformers": 70}
SILENT_S = 30
"""Without an answer: transformers' thread is taken to be stuck."""

Requests = list[tuple[list[int], int]]
"""Prompts and how many tokens each gets."""

Run = Callable[[Requests], list[int]]
"""Answers requests; how many tokens each got."""


def make_requests(count: int, least: int, most: int, seed: int) -> Requests:
    """Random lengths and ids: the same for the same arguments."""
    numbers = random.Random(seed)
    sizes = [(numbers.randint(least, most), numbers.randint(least, most)) for _ in range(count)]
    return list(zip(random_ids([prompt for prompt, _ in sizes], seed), [output for _, output in sizes], strict=True))


@contextmanager
def kvloom(directory: Path, device: str, count: int, most: int) -> Iterator[Run]:
    """Ours, with its defaults."""
    from kvloom import LLM, SamplingParams

    with LLM(str(directory), device=device, dtype="bfloat16", skip_tokenizer_init=True, max_model_len=2 * most, max_num_seqs=count,
             enable_prefix_caching=False, seed=0) as llm:

        def run(requests: Requests) -> list[int]:
            params = [SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False) for _, new in requests]
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in requests], params, use_tqdm=False)
            return [len(done.outputs[0].token_ids) for done in outputs]

        yield run


@contextmanager
def transformers(directory: Path, device: str, count: int, most: int) -> Iterator[Run]:
    """Continuous batching, with its defaults, told what will be asked of it, and with flash attention where there is any."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints
    from transformers.utils import is_flash_attn_2_available

    attention = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation=attention).to(device).eval()
    config = GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=-1, pad_token_id=0)
    hints = WorkloadHints(max_prompt_length=most, max_generated_length=most, num_requests=count)
    with loaded.continuous_batching_context_manager(generation_config=config, workload_hints=hints) as manager:

        def run(requests: Requests) -> list[int]:
            got: dict[str, int] = {}
            names = [manager.add_request(prompt, max_new_tokens=new, eos_token_id=-1) for prompt, new in requests]
            heard_s = time.monotonic()
            while len(got) < len(names):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    got[result.request_id], heard_s = len(result.generated_tokens), time.monotonic()
                elif not manager.is_running() or time.monotonic() - heard_s > SILENT_S:
                    raise SystemExit(f"transformers stopped after {len(got)} of {len(names)} requests")
            return [got[name] for name in names]

        yield run


ENGINES: dict[str, Callable[[Path, str, int, int], AbstractContextManager[Run]]] = {
    "kvloom": kvloom, "transformers": transformers}


def measure(engine: str, directory: Path, device: str = "cuda", count: int = REQUESTS, least: int = LEAST_TOKENS,
            most: int = MOST_TOKENS) -> dict[str, float]:
    """Seconds until all were answered, and tokens. What is made once (memory, captured steps) is made before."""
    with ENGINES[engine](directory, device, count, most) as run:
        run(make_requests(min(count, 16), least, min(2 * least, most), 1))
        requests = make_requests(count, least, most, 0)
        begun = time.perf_counter()
        got = run(requests)
        seconds = time.perf_counter() - begun
    if got != [new for _, new in requests]:
        raise SystemExit(f"{engine}: an output has not the length that was asked for")
    return {"seconds": seconds, "prompt_tokens": sum(len(p) for p, _ in requests), "output_tokens": sum(got)}


def run_alone(engine: str, directory: Path, limit_s: float) -> dict[str, float] | str:
    """In a process of its own; its figures, or what went wrong."""
    command = [sys.executable, str(Path(__file__).resolve()), "--engine", engine, "--folder", str(directory.parent)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return f"{engine}: not done in {limit_s:.0f} s"
    if done.returncode:
        return f"{engine}: exit code {done.returncode}"
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def section(found: dict[str, dict[str, float] | str]) -> Section:
    """The table, from each engine's figures or what went wrong with it."""
    rates = {engine: figures["output_tokens"] / figures["seconds"] for engine, figures in found.items() if not isinstance(figures, str)}
    rows = [(engine, f"{figures['seconds']:.1f}", f"{rates[engine]:.0f}",
             f"{(figures['prompt_tokens'] + figures['output_tokens']) / figures['seconds']:.0f}",
             ratio(rates.get("kvloom"), rates[engine])) for engine, figures in found.items() if not isinstance(figures, str)]
    note = f"{REQUESTS} requests, prompts and outputs of {LEAST_TOKENS} to {MOST_TOKENS} tokens, {MODEL}'s shape in bfloat16."
    return Section("Requests at once", ("engine", "s", "output tok/s", "tok/s with prompts", "kvloom / it"), tuple(rows), (note,),
                   tuple(figures for figures in found.values() if isinstance(figures, str)))


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring. With an engine: measures that one, and prints its figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is, or is made")
    parser.add_argument("--engine", choices=ENGINES, help="this one alone")
    parser.add_argument("--out", help="a file for the tables as JSON; printed else")
    given = parser.parse_args(argv)
    need_gpu("gpu_throughput")
    directory = model(given.folder, MODEL)
    if given.engine is not None:
        print(json.dumps(measure(given.engine, directory)))
        return 0
    return finish([section({engine: run_alone(engine, directory, limit_s) for engine, limit_s in ENGINE_LIMIT_S.items()})], given.out)


if __name__ == "__main__":
    sys.exit(main())
