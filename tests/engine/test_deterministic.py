"""``deterministic=True``: a request's tokens and log-probabilities have the same bits whatever happens beside it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvloom import LLM, SamplingParams
from kvloom.errors import ConfigError
from kvloom.live_request import Call
from kvloom.testing.checkpoints import make_checkpoint

NUMBERS = random.Random(0)
PROMPTS = [[NUMBERS.randrange(256) for _ in range(n)] for n in (600, 3, 33, 17)]
"""The first is longer than the keys that are summed in one go (512)."""
NEIGHBOURS = [[NUMBERS.randrange(256) for _ in range(NUMBERS.randint(1, 90))] for _ in range(29)]
SEEDED = SamplingParams(max_tokens=12, ignore_eos=True, seed=7, temperature=0.8, logprobs=3)
UNSEEDED = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("long") / "m", max_position_embeddings=1024, num_key_value_heads=1)


def engine(checkpoint: Path, dtype: str, **values: Any) -> LLM:
    return LLM(str(checkpoint), dtype=dtype, skip_tokenizer_init=True, deterministic=True, **values)


def bits(outputs: list[Any]) -> list[Any]:
    return [(o.outputs[0].token_ids, [[(i, p.logprob.hex(), p.rank) for i, p in row.items()] for row in o.outputs[0].logprobs]) for o in outputs]


@pytest.fixture(scope="module")
def alone(long_checkpoint: Path, dtype: str) -> list[Any]:
    with engine(long_checkpoint, dtype, enforce_eager=True, enable_prefix_caching=False) as llm:
        return [bits(llm.generate([p], SEEDED, use_tqdm=False))[0] for p in PROMPTS]


@pytest.mark.parametrize("chunk_tokens", [16, 64, 0])
def test_deterministic__holds_beside_neighbours_in_any_order_with_chunks_and_a_warm_cache(
        long_checkpoint: Path, dtype: str, alone: list[Any], chunk_tokens: int) -> None:
    with engine(long_checkpoint, dtype, long_prefill_token_threshold=chunk_tokens) as llm:
        for neighbours in (0, 4, 29):
            asked = [(p, SEEDED, i) for i, p in enumerate(PROMPTS)] + [(p, UNSEEDED, -1) for p in NEIGHBOURS[:neighbours]]
            random.Random(neighbours).shuffle(asked)
            outputs = llm.generate([p for p, _, _ in asked], [s for _, s, _ in asked], use_tqdm=False)
            found = {i: o for (_, _, i), o in zip(asked, outputs, strict=True) if i >= 0}
            assert bits([found[i] for i in range(len(PROMPTS))]) == alone
            assert (found[0].num_cached_tokens > 0) == bool(neighbours)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_deterministic__holds_where_threads_share_a_context_and_where_they_share_rows(long_checkpoint: Path, dtype: str, alone: list[Any]) -> None:
    """What is alone has its keys divided among the threads, in pieces of 512; beside others it has not. `alone` is of one thread."""
    with engine(long_checkpoint, dtype, enable_prefix_caching=False) as llm:
        assert [bits(llm.generate([p], SEEDED, use_tqdm=False))[0] for p in PROMPTS] == alone
        asked = [SEEDED] * len(PROMPTS) + [UNSEEDED] * len(NEIGHBOURS)
        assert bits(llm.generate([*PROMPTS, *NEIGHBOURS], asked, use_tqdm=False)[:len(PROMPTS)]) == alone


def test_deterministic__holds_over_preemptions(long_checkpoint: Path, dtype: str, alone: list[Any]) -> None:
    with engine(long_checkpoint, dtype, enable_prefix_caching=False, long_prefill_token_threshold=100) as llm:
        running, call, count = llm.llm_engine, Call(), 0
        running.submit(call, [*PROMPTS, *NEIGHBOURS[:4]], [SEEDED] * len(PROMPTS) + [UNSEEDED] * 4, [0] * (len(PROMPTS) + 4))
        while running.has_work:
            count += 1
            if count in (5, 12, 15):
                for sequence_id in range(len(PROMPTS)):
                    running.engine.scheduler.preempt(sequence_id)
            running.step()
    outputs = [output for _, output in sorted(call.take(), key=lambda done: done[0])][:len(PROMPTS)]
    assert all(o.metrics.num_preemptions > 0 for o in outputs)
    assert bits(outputs) == alone


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("width", [92, 96])
def test_deterministic__holds_for_every_activation_and_for_widths_that_are_no_whole_vectors(tmp_path: Path, dtype: str, act: str, width: int) -> None:
    checkpoint = make_checkpoint(tmp_path / "m", hidden_act=act, intermediate_size=width)
    prompts = [p[-90:] for p in [*PROMPTS, *NEIGHBOURS[:3]]]
    with engine(checkpoint, dtype, enable_prefix_caching=False) as llm:
        alone = [bits(llm.generate([p], SEEDED, use_tqdm=False))[0] for p in prompts]
        assert bits(llm.generate(prompts, SEEDED, use_tqdm=False)) == alone


@pytest.mark.parametrize(("values", "reason"), [
    ({"attention_backend": "torch"}, "torch: deterministic=True, and its results may depend on other rows"),
    ({"dtype": "float16"}, "Unquantized: float16 is multiplied by torch here"),
    ({"task": "embed"}, "task 'embed': what is pooled over chunks"),
])
def test_deterministic__is_refused_where_it_cannot_be_kept(small_checkpoint: Path, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        LLM(str(small_checkpoint), deterministic=True, **values)


def test_deterministic__is_refused_to_a_model_that_does_not_promise_it(install: Any, tmp_path: Path) -> None:
    install("acme", {"acme-models": """
from kvloom import hookimpl
KVLOOM_API = {"models": 0}
from kvloom_models.llama import LlamaForCausalLM
class Own(LlamaForCausalLM):
    row_invariant = False
@hookimpl
def kvloom_register_models(registry):
    registry.add("OwnForCausalLM", "acme_0:Own", config="kvloom_models.config:LlamaConfig")
"""})
    with pytest.raises(ConfigError, match=r"OwnForCausalLM \(.*acme.*\): it does not say that rows are computed each for itself"):
        LLM(str(make_checkpoint(tmp_path / "m", "OwnForCausalLM", model_type="llama")), deterministic=True)
