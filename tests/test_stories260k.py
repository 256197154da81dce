"""A real trained Llama gives its golden tokens, however its work is cut up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvloom import LLM, SamplingParams

pytestmark = pytest.mark.usefixtures("shared_dir")


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> list[dict]:
    return json.loads((shared_dir / "models/stories260k/golden_greedy.json").read_text())


def engine(shared_dir: Path, **kwargs) -> LLM:
    return LLM(str(shared_dir / "models/stories260k"), dtype="float32", **kwargs)


def generate(llm: LLM, rows: list[dict]) -> list:
    params = [SamplingParams(temperature=0, max_tokens=r["max_new_tokens"]) for r in rows]
    return llm.generate([{"prompt_token_ids": r["prompt_ids"]} for r in rows], params, use_tqdm=False)


def assert_golden(outputs: list, rows: list[dict]) -> None:
    assert [list(o.outputs[0].token_ids) for o in outputs] == [r["greedy_ids"] for r in rows]


def test_alone(shared_dir: Path, golden: list[dict]) -> None:
    with engine(shared_dir) as llm:
        for row in golden:
            assert_golden(generate(llm, [row]), [row])


def test_all_in_one_batch_with_the_golden_text(shared_dir: Path, golden: list[dict]) -> None:
    with engine(shared_dir) as llm:
        outputs = generate(llm, golden)
    assert_golden(outputs, golden)
    assert [r["prompt"] + o.outputs[0].text for o, r in zip(outputs, golden, strict=True)] == [r["text"] for r in golden]


def test_text_prompts_give_the_golden_prompt_ids(shared_dir: Path, golden: list[dict]) -> None:
    rows = [r for r in golden if r["prompt"]]
    with engine(shared_dir) as llm:
        outputs = llm.generate([r["prompt"] for r in rows], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    assert [o.prompt_token_ids for o in outputs] == [r["prompt_ids"] for r in rows]


def test_in_chunks_of_16(shared_dir: Path, golden: list[dict]) -> None:
    with engine(shared_dir, max_num_batched_tokens=16, max_num_seqs=16) as llm:
        assert_golden(generate(llm, golden), golden)


def test_with_a_warm_cache(shared_dir: Path, golden: list[dict]) -> None:
    prompts = [dict(r, prompt_ids=r["prompt_ids"] + r["greedy_ids"][:60], greedy_ids=r["greedy_ids"][60:],
                    max_new_tokens=r["max_new_tokens"] - 60) for r in golden if len(r["greedy_ids"]) > 60]
    with engine(shared_dir) as llm:
        assert_golden(generate(llm, golden), golden)
        warm = generate(llm, prompts)
    assert_golden(warm, prompts)
    assert all(o.num_cached_tokens > 0 for o in warm)


def test_with_a_pool_so_small_that_requests_give_way(shared_dir: Path, golden: list[dict]) -> None:
    with engine(shared_dir, num_gpu_blocks_override=40) as llm:
        outputs = generate(llm, golden)
    assert_golden(outputs, golden)
    assert sum(o.metrics.num_preemptions for o in outputs) > 0
