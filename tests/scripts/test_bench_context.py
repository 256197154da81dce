"""`scripts/bench_context`: it measures what it says, and its limits are those of the model's shape."""

from __future__ import annotations

from pathlib import Path

import pytest
from repository import ROOT
from script_helpers import imported_script

from kvloom import LLM

bench = imported_script(ROOT / "scripts/bench_context")
FOUND = {"read_bytes_s": 1e9, "flop_s": 1e12}


def test_each_context_and_batch_has_its_costs(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(bench, "limits", lambda: FOUND)
    bench.main([str(small_checkpoint), "--contexts", "40,100", "--batches", "1,3", "--new", "5", "--rounds", "2", "--chunk", "64"])
    out = capsys.readouterr().out
    assert "up to 64 tokens a step; this machine reads 1.0 GB/s and multiplies 1.00 TFLOP/s" in out
    header, _, *lines = [line.strip("|").split("|") for line in out.splitlines() if line.startswith("|")]
    assert tuple(cell.strip() for cell in header) == bench.COLUMNS
    assert [(int(line[0]), int(line[1])) for line in lines] == [(40, 1), (40, 3), (100, 1), (100, 3)]
    for line in lines:
        assert float(line[2]) > 0
        assert float(line[6]) > 0


def test_what_must_be_read_and_multiplied_is_the_models(small_checkpoint: Path) -> None:
    shape = bench.Shape(small_checkpoint)
    assert (shape.kv_bytes, shape.attention_flop) == (2 * 2 * 2 * 16 * 2, 4 * 2 * 4 * 16)  # 2 layers, 4 heads on 2, of 16
    row = bench.Row(1000, 4, 1.0, 1.0)
    assert bench.least_decode_s(shape, row, 10, 1e9) * 1e9 == pytest.approx(shape.weight_bytes / 4 + shape.kv_bytes * 1005)
    read_s, multiplied_s = bench.least_prefill_s(shape, row, 400, FOUND)
    assert read_s * 1e9 * 4000 == pytest.approx(10 * shape.weight_bytes + 4 * shape.kv_bytes * (400 + 800 + 1000))
    seen = sum(range(1, 1001))
    assert multiplied_s * 1e12 * 1000 == pytest.approx(1000 * shape.layer_flop + shape.logits_flop + seen * shape.attention_flop)


def test_a_decode_that_computes_its_prompt_again_is_no_measurement(small_checkpoint: Path) -> None:
    prompts = bench.prompts_of(64, 2, 256)
    with (LLM(str(small_checkpoint), dtype="float32", skip_tokenizer_init=True, enable_prefix_caching=False) as llm,
          pytest.raises(SystemExit, match="did not come from the prefix cache")):
        bench.run(llm, prompts, 3)


@pytest.mark.parametrize("wrong", [["--new", "1"], ["--contexts", "16"], ["--rounds", "0"], ["--batches", "0"]], ids=str)
def test_what_cannot_be_measured_is_refused(small_checkpoint: Path, wrong: list[str]) -> None:
    with pytest.raises(SystemExit, match="must be at least 2"):
        bench.main([str(small_checkpoint), *wrong])
