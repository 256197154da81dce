"""Generate with a checkpoint that this script makes itself: random weights, so the text means nothing; the path is the real one.

    scripts/demo [MODEL]        MODEL: directory or hub id of a real checkpoint instead
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from kvloom import LLM, SamplingParams
from kvloom.testing.checkpoints import make_checkpoint

PROMPTS = ["Once upon a time", "The capital of France is", "def fibonacci(n):"]


def main(argv: list[str]) -> None:
    """See the module's docstring."""
    with tempfile.TemporaryDirectory() as scratch:
        if argv:
            model = argv[0]
        else:
            model = str(make_checkpoint(Path(scratch) / "demo", num_hidden_layers=4))
            print("This demo made its own checkpoint: a small Llama with random weights. What it says means nothing.\n")
        with LLM(model) as llm:
            report = llm.llm_engine.report
            started = time.monotonic()
            outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
            first_token_s = min(o.metrics.first_token_time or started for o in outputs) - started
            print(report.text())
            print(f"  first token      {first_token_s:6.2f} s")
            print(f"from the end of imports to the first token: {report.after_imports_s + first_token_s:.2f} s\n")
            print(llm.llm_engine.plan.table() + "\n")
        for output in outputs:
            done = output.outputs[0]
            print(f"{output.prompt!r} -> {done.text!r} ({len(done.token_ids)} tokens, {done.finish_reason})")


if __name__ == "__main__":
    main(sys.argv[1:])
