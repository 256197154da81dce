"""What a start says of itself: every phase in seconds, what was chosen, what was refused and why, what the KV cache holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from kvloom import LLM


def test_the_phases_are_all_of_the_start(small_checkpoint: Path) -> None:
    with LLM(str(small_checkpoint), dtype="float32") as llm:
        report = llm.llm_engine.report
    names = [name for name, _ in report.phases]
    assert len(set(names)) == len(names)
    assert {"configuration", "plugins", "import torch", "import tokenizer", "model files", "tokenizer", "kernels", "memory plan", "weights",
            "worker", "KV cache", "scheduler"} == set(names)
    assert all(seconds >= 0 for _, seconds in report.phases)
    assert 0.95 * report.total_s <= sum(seconds for _, seconds in report.phases) <= report.total_s


def test_the_report_names_what_was_chosen_and_what_was_refused_and_why(small_checkpoint: Path) -> None:
    with LLM(str(small_checkpoint), dtype="float16", num_gpu_blocks_override=9) as llm:
        text = llm.llm_engine.report.text()
    assert "attention backend: torch (refused: cpu: computes in float32 or bfloat16" in text
    assert "dtype: float16" in text
    assert "KV cache: 9 blocks, 128 tokens" in text


@pytest.fixture
def as_before() -> Iterator[None]:
    """Capturing configures structlog, and later tests want it as it is by default."""
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("as_before")
def test_one_log_event_has_it_all(small_checkpoint: Path) -> None:
    with structlog.testing.capture_logs() as events, LLM(str(small_checkpoint), dtype="float32") as llm:
        report = llm.llm_engine.report
    (event,) = [e for e in events if e["event"] == "engine started"]
    assert event["model"] == str(small_checkpoint)
    assert event["kv_blocks"] == report.kv_blocks
    assert event["kv_tokens"] == report.kv_tokens
    assert list(event["phases_s"]) == [name for name, _ in report.phases]
    assert any(note.startswith("attention backend: ") for note in event["notes"])
