"""An engine's load takes its weights and little more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvloom.testing.checkpoints import make_checkpoint

MEASURE = """
import re, sys, threading, time
import torch
def anonymous_bytes():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
base = peak = anonymous_bytes()
done = threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous_bytes())
        time.sleep(0.0005)
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
from kvloom import LLM
llm = LLM(sys.argv[1], skip_tokenizer_init=True, dtype=sys.argv[2], kv_cache_memory="2MiB", max_model_len=64, max_num_seqs=8,
          max_num_batched_tokens=64)
done.set()
watcher.join()
print((peak - base) / llm.llm_engine.plan.needs.weights_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_over_importing_torch_is_at_most_the_weights_and_15_percent(tmp_path: Path, dtype: str) -> None:
    """Everything counts: importing kvloom, the plan, the plugins; and for bfloat16 the cast from a float32 file. Cache and steps, whose memory
    is used at the start too, are small."""
    big = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5 if dtype == "float32" else 9, "vocab_size": 4000}
    directory = make_checkpoint(tmp_path / "m", tokenizer=False, **big)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(directory), dtype], capture_output=True, text=True, check=True, timeout=120)
    assert 1 <= float(done.stdout) <= 1.15
