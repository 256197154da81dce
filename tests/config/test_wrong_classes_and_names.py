"""What a parameter names and cannot be used: refused with the parameter's name and what to do, before weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from parameter_helpers import engine, scores

from kvloom.errors import ConfigError, ModelError
from kvloom.interfaces import LogitsProcessor, SchedulingPolicy
from kvloom.runtime.worker import DeviceWorker


class Fussy(LogitsProcessor):
    """Cannot be made without arguments."""

    def __init__(self, needed: int) -> None:
        self.needed = needed

    start = step = apply = lambda *args: None


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: DeviceWorker) -> tuple[str, ...]:
        raise AssertionError("weights are read")

    monkeypatch.setattr(DeviceWorker, "_load_model", read)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("worker_extension_cls", int, "must be a plain class of methods"),
    ("worker_extension_cls", DeviceWorker, "which workers have already"),
    ("logits_processors", [int], r"logits_processors\[0\].*must be a subclass"),
    ("logits_processors", [LogitsProcessor], r"logits_processors\[0\].*cannot be made: TypeError"),
    ("logits_processors", [Fussy], r"logits_processors\[0\].*cannot be made: TypeError"),
    ("scheduler_cls", SchedulingPolicy, "scheduler_cls.*cannot be made: TypeError"),
    ("attention_backend", "FLASH_ATTN", "attention_backend='FLASH_ATTN' .*leave it at 'auto'"),
    ("attention_backend", "nope", "attention_backend='nope': nothing is registered"),
    ("load_format", "gguf", "load_format='gguf' .*use the repository's safetensors"),
    ("load_format", "fastsafetensors", "load_format='fastsafetensors' .*reads the same files"),
    ("distributed_executor_backend", "mp", "distributed_executor_backend='mp' .*leave it out"),
    ("tokenizer_mode", "mistral", "'mistral' .*Hugging Face format"),
    ("swap_space", 1e300, "swap_space=1e.300"),
    ("cpu_offload_gb", 1e300, "cpu_offload_gb=1e.300"),
    ("tokenizer", "", "tokenizer=''"),
    ("revision", "", "revision=''"),
    ("served_model_name", 1, "^served_model_name=1: .*string, or: .*tuple$"),
    ("hf_token", 1, r"^hf_token=\*\*\*: .*boolean, or: .*string$"),
])
def test_it_is_refused_by_name(small_checkpoint: Path, name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine(small_checkpoint, **{name: value})


@pytest.mark.parametrize("architectures", ["LlamaForCausalLM", [3], {"a": 1}, [None]])
def test_architectures__that_are_no_list_of_names_are_the_models_fault(small_checkpoint: Path, architectures: Any) -> None:
    with pytest.raises(ModelError, match="architectures must be a list of names"):
        engine(small_checkpoint, hf_overrides={"architectures": architectures})


def test_revision__of_a_directory_has_no_effect_and_the_log_says_so(
        small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.undo()
    with engine(small_checkpoint) as llm:
        expected = scores(llm)
    with engine(small_checkpoint, revision="v1", tokenizer_revision="v2") as llm:
        assert scores(llm) == expected
    said = capsys.readouterr().err
    assert "revision='v1' has no effect" in said
    assert "tokenizer_revision='v2' has no effect" in said
