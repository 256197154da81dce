"""One test a parameter of cache, scheduler, device and plugins, named after it: what docs/api.md says of it is what an engine does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parameter_helpers import GREEDY, PROMPT, SAMPLED, engine, observer, plugin, run, scores, token_ids

from kvloom import LLM, SamplingParams
from kvloom.errors import ConfigError, MemoryPlanError, PluginConflictError, RequestValidationError
from kvloom.testing.checkpoints import VOCAB_SIZE

LAST_FIRST = '''
from kvloom.interfaces import SchedulingPolicy
class Lifo(SchedulingPolicy):
    """The newest request first."""
    def sort_key(self, request):
        return (-request.sequence_id,)
'''


def usable_blocks(llm: LLM) -> int:
    return llm.llm_engine.engine.scheduler.num_usable_blocks


# -- cache

@pytest.mark.parametrize(("given", "tokens"), [(4, 4), (None, 16), (32, 32), (7, 7)])
def test_block_size__is_the_unit_in_which_prefixes_are_shared(small_checkpoint: Path, given: int | None, tokens: int) -> None:
    with engine(small_checkpoint, block_size=given) as llm:
        cold, warm = run(llm, [PROMPT])[0], run(llm, [PROMPT])[0]
        assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, (len(PROMPT) - 1) // tokens * tokens)
        assert token_ids([cold]) == token_ids([warm])


def test_kv_cache_memory__is_taken_as_bytes_or_text_and_bounds_the_blocks(small_checkpoint: Path) -> None:
    blocks = {}
    for size in (2**20, "1MiB", "2 MiB"):
        with engine(small_checkpoint, kv_cache_memory=size) as llm:
            blocks[size] = usable_blocks(llm)
            assert len(scores(llm)[0]) == 6
            block_bytes = llm.llm_engine.plan.needs.block_bytes
    assert blocks[2**20] == blocks["1MiB"] == 2**20 // block_bytes - 1
    assert blocks["2 MiB"] == 2**21 // block_bytes - 1
    with pytest.raises(MemoryPlanError, match="kv_cache_memory="):
        engine(small_checkpoint, kv_cache_memory="16KiB")
    with engine(small_checkpoint) as llm:  # None: enough for max_num_seqs requests of max_model_len, where memory allows
        assert usable_blocks(llm) >= blocks["2 MiB"]


def test_num_gpu_blocks_override__is_exact_and_one_is_the_null_block(small_checkpoint: Path) -> None:
    with engine(small_checkpoint, num_gpu_blocks_override=5, kv_cache_memory="1MiB") as llm:
        assert usable_blocks(llm) == 4
        (fits,) = run(llm, [[1] * 60], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
        assert len(fits.outputs[0].token_ids) == 5
        with pytest.raises(RequestValidationError, match="can never fit.*KV cache has 4"):
            run(llm, [[1] * 60])


@pytest.mark.parametrize(("given", "cached"), [(True, 48), (None, 48), (False, 0)])
def test_enable_prefix_caching__computes_equal_beginnings_once(small_checkpoint: Path, given: bool | None, cached: int) -> None:
    with engine(small_checkpoint, enable_prefix_caching=given) as llm:
        cold, warm = run(llm, [PROMPT])[0], run(llm, [PROMPT])[0]
        assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, cached)
        assert token_ids([cold]) == token_ids([warm])


# -- scheduler

@pytest.mark.parametrize(("given", "together"), [(1, 1), (3, 3), (None, 5)])
def test_max_num_seqs__bounds_what_runs_at_once(install, small_checkpoint: Path, given: int | None, together: int) -> None:
    steps = observer(install)
    with engine(small_checkpoint, max_num_seqs=given) as llm:
        outputs = run(llm, [[i] for i in range(5)])
    assert max(step.num_running for step in steps) == together
    assert {len(ids) for ids in token_ids(outputs)} == {6}


def test_max_num_batched_tokens__is_the_budget_of_a_step(install, small_checkpoint: Path) -> None:
    steps, one_token = observer(install), SamplingParams(temperature=0, max_tokens=1)

    def tokens_of_steps(prompts: list, **values) -> list[int]:
        steps.clear()
        with engine(small_checkpoint, enable_prefix_caching=False, **values) as llm:
            run(llm, prompts, one_token)
        return [step.num_tokens for step in steps]

    assert tokens_of_steps([[1] * 100], max_num_batched_tokens=32, max_num_seqs=8) == [32, 32, 32, 4]
    assert tokens_of_steps([[1] * 400] * 6) == [2048, 352]
    assert tokens_of_steps([[1] * 400] * 6, enable_chunked_prefill=False) == [2000, 400]
    with pytest.raises(ConfigError, match="max_num_batched_tokens=8 must be at least max_num_seqs=9"):
        engine(small_checkpoint, max_num_batched_tokens=8, max_num_seqs=9)


def test_max_num_batched_tokens__is_the_models_length_where_prompts_are_not_cut_and_that_is_more(install, small_checkpoint: Path) -> None:
    steps = observer(install)
    with engine(small_checkpoint, enable_chunked_prefill=False, hf_overrides={"max_position_embeddings": 4000}) as llm:
        run(llm, [[1] * 3000], SamplingParams(temperature=0, max_tokens=1))
    assert [step.num_tokens for step in steps] == [3000]


@pytest.mark.parametrize(("given", "chunks"), [(0, [20]), (7, [7, 7, 6]), (30, [20])])
def test_long_prefill_token_threshold__bounds_one_request_in_one_step(install, small_checkpoint: Path, given: int, chunks: list[int]) -> None:
    steps = observer(install)
    with engine(small_checkpoint, long_prefill_token_threshold=given) as llm:
        run(llm, [[1] * 20], SamplingParams(temperature=0, max_tokens=1))
        steps.clear()
        run(llm, [[2] * 20, [3] * 20], SamplingParams(temperature=0, max_tokens=1))
    assert [step.num_tokens for step in steps] == [2 * tokens for tokens in chunks]


@pytest.mark.parametrize(("given", "chunks"), [(True, [40, 20]), (None, [40, 20]), (False, [30, 30])])
def test_enable_chunked_prefill__cuts_prompts_at_the_budget(install, small_checkpoint: Path, given: bool | None, chunks: list[int]) -> None:
    steps = observer(install)
    with engine(small_checkpoint, enable_chunked_prefill=given, max_num_batched_tokens=40, max_model_len=40, max_num_seqs=4) as llm:
        run(llm, [[1] * 30, [2] * 30], SamplingParams(temperature=0, max_tokens=1))
    assert [step.num_tokens for step in steps] == chunks
    if given is False:
        with pytest.raises(ConfigError, match="max_num_batched_tokens=40 must be at least max_model_len=41"):
            engine(small_checkpoint, enable_chunked_prefill=False, max_num_batched_tokens=40, max_model_len=41, max_num_seqs=4)


@pytest.mark.parametrize(("policy", "order"), [("fcfs", [0, 1, 2]), ("priority", [1, 2, 0]), ("lifo", [2, 1, 0])])
def test_scheduling_policy__decides_who_is_served_first(install, small_checkpoint: Path, policy: str, order: list[int]) -> None:
    install("acme", {"acme": plugin("schedulers", "lifo", LAST_FIRST)})
    with engine(small_checkpoint, scheduling_policy=policy, max_num_seqs=1) as llm:
        outputs = run(llm, [[1], [2], [3]], priority=[5, 0, 0])
    assert sorted(range(3), key=lambda i: outputs[i].metrics.finished_time) == order


def test_scheduling_policy__that_nobody_registered_is_refused(small_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="(?s)scheduling_policy='lottery'.*fcfs.*priority"):
        engine(small_checkpoint, scheduling_policy="lottery")


# -- device

def test_attention_backend__computes_the_same_under_every_name(install, small_checkpoint: Path) -> None:
    install("acme", {"acme": plugin("attention_backends", "mine", """
from kvloom_plugins.attention.reference import ReferenceAttention
class Mine(ReferenceAttention):
    CALLS = []
    def attend(self, *args, **kwargs):
        self.CALLS.append(1)
        return super().attend(*args, **kwargs)
""")})
    import acme_0  # what the fixture installed

    seen = {}
    for name in ("auto", "cpu", "torch", "reference", "mine"):
        with engine(small_checkpoint, attention_backend=name) as llm:
            seen[name] = scores(llm)
            assert f"attention backend: {'cpu' if name == 'auto' else name}" in llm.llm_engine.report.text()
        assert bool(acme_0.Mine.CALLS) == (name == "mine")
    for ids, logprob in seen.values():
        assert ids == seen["reference"][0]
        assert logprob == pytest.approx(seen["reference"][1], abs=1e-4)
    with pytest.raises(ValueError, match="did you mean 'cpu'"):
        engine(small_checkpoint, attention_backend="cpv")
    with pytest.raises(ConfigError, match="computes in float32 or bfloat16|no attention backend"):
        engine(small_checkpoint, attention_backend="cpu", dtype="float16")


def test_distributed_executor_backend__is_where_steps_run(install, small_checkpoint: Path) -> None:
    install("acme", {"acme": plugin("executors", "counting", """
from kvloom_plugins.executors.in_process import InProcessExecutor
class Counting(InProcessExecutor):
    STEPS = []
    def submit(self, step):
        self.STEPS.append(step.step_id)
        super().submit(step)
""")})
    import acme_0  # what the fixture installed

    seen = {}
    for name in ("uni", None, "counting"):
        with engine(small_checkpoint, distributed_executor_backend=name) as llm:
            seen[name] = scores(llm)
        assert len(acme_0.Counting.STEPS) == (6 if name == "counting" else 0)  # a prompt's step and five of one token
    assert seen["uni"] == seen[None] == seen["counting"]
    with pytest.raises(ConfigError, match="(?s)distributed_executor_backend='ray'.*counting.*uni"):
        engine(small_checkpoint, distributed_executor_backend="ray")


# -- features

def test_max_logprobs__bounds_the_candidates_that_a_request_may_ask_for(small_checkpoint: Path) -> None:
    def asking(count: int) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=1, logprobs=count)

    for bound, works, refused in ((4, 4, 5), (20, 20, 21), (0, 0, 1), (-1, -1, None), (-1, 1000, None)):
        with engine(small_checkpoint, max_logprobs=bound) as llm:
            (output,) = run(llm, [[1]], asking(works))
            assert len(output.outputs[0].logprobs[0]) == (VOCAB_SIZE if bound == -1 else max(works, 1))
            if refused is not None:
                for params in (asking(refused), asking(-1), SamplingParams(max_tokens=1, prompt_logprobs=refused)):
                    with pytest.raises(RequestValidationError, match="raise max_logprobs"):
                        run(llm, [[1]], params)


# -- plugins

def test_plugins__says_which_run_besides_the_built_in_ones(install, small_checkpoint: Path, tmp_path: Path) -> None:
    install("acme", {"acme": plugin("schedulers", "lifo", LAST_FIRST)})
    file = tmp_path / "engine.yaml"
    file.write_text(f"model: {small_checkpoint}\ndtype: float32\nscheduling_policy: lifo\n")
    for llm in (engine(small_checkpoint, scheduling_policy="lifo"), engine(small_checkpoint, scheduling_policy="lifo", plugins=["acme"]),
                LLM.from_config(file, plugins=["acme"])):
        with llm:
            assert len(scores(llm)[0]) == 6
    for start in (lambda: engine(small_checkpoint, scheduling_policy="lifo", plugins=[]), lambda: LLM.from_config(file)):
        with pytest.raises(ConfigError, match="(?s)scheduling_policy='lifo'.*installed, not enabled"):
            start()
    with engine(small_checkpoint, plugins=[]) as llm:
        assert len(scores(llm)[0]) == 6
    with pytest.raises(ValueError, match="'acne', which is not installed; did you mean 'acme'"):
        engine(small_checkpoint, plugins=["acne"])


NAMED = '''
from kvloom.interfaces import LogitsProcessor, Stage
from pydantic import BaseModel
class Settings(BaseModel):
    token_id: int = 3
KVLOOM_CONFIG = Settings
class Always(LogitsProcessor):
    """Requests with the seed 99 only get the plugin's token."""
    @classmethod
    def parameters(cls, params, tokenizer):
        return cls.plugin_config.token_id if params.seed == 99 else None
    def new_state(self, parameters, sequence):
        return parameters
    def apply(self, logits, states):
        for row, token_id in enumerate(states):
            logits[row, token_id] = 1e9
        return logits
'''


@pytest.mark.parametrize(("given", "token_id"), [({}, 3), ({"acme": {}}, 3), ({"acme": {"token_id": 7}}, 7)])
def test_plugin_config__reaches_the_plugins_components(install, small_checkpoint: Path, given: dict, token_id: int) -> None:
    install("acme", {"acme": plugin("logits_processors", "always", NAMED)})
    with engine(small_checkpoint, plugin_config=given) as llm:
        assert token_ids(run(llm, [[1]], SamplingParams(seed=99, max_tokens=2, ignore_eos=True))) == [[token_id] * 2]


@pytest.mark.parametrize(("given", "message"), [
    ({"acme": {"token_id": "many"}}, "plugin 'acme' of acme 1.0: token_id"), ({"acne": {}}, "did you mean 'acme'"), ({"acme": 1}, "plugin_config"),
])
def test_plugin_config__that_the_plugin_does_not_take_is_refused(install, small_checkpoint: Path, given: dict, message: str) -> None:
    install("acme", {"acme": plugin("logits_processors", "always", NAMED)})
    for plugins in (["acme"], None):
        with pytest.raises(ConfigError, match=message):
            engine(small_checkpoint, plugin_config=given, plugins=plugins)


def test_providers__chooses_between_distributions_that_offer_one_name(install, small_checkpoint: Path) -> None:
    install("acme", {"acme": plugin("schedulers", "lifo", LAST_FIRST)})
    install("bolt", {"bolt": plugin("schedulers", "lifo", LAST_FIRST.replace("-request", "request")).replace("acme_0", "bolt_0")})
    with pytest.raises(PluginConflictError, match=r"'acme' of acme 1\.0.*'bolt' of bolt 1\.0.*providers="):
        engine(small_checkpoint, scheduling_policy="lifo")
    for chosen, order in (("acme", [1, 0]), ("bolt", [0, 1])):
        with engine(small_checkpoint, scheduling_policy="lifo", max_num_seqs=1, providers={"schedulers": {"lifo": chosen}}) as llm:
            outputs = run(llm, [[1], [2]], [GREEDY, SAMPLED])
        assert sorted(range(2), key=lambda i: outputs[i].metrics.finished_time) == order


# -- values of which some come later

@pytest.mark.parametrize("given", ["auto"])
def test_kv_cache_dtype__is_the_models(small_checkpoint: Path, given: str) -> None:
    for dtype, item_bytes in (("float32", 4), ("bfloat16", 2)):
        with engine(small_checkpoint, kv_cache_dtype=given, dtype=dtype) as llm:
            assert len(scores(llm)[0]) == 6
            assert llm.llm_engine.plan.needs.block_bytes == 2 * 2 * 2 * 16 * 16 * item_bytes  # layers, K and V, heads, head size, tokens


@pytest.mark.parametrize("given", ["auto", "cpu"])
def test_device__is_the_cpu_where_there_is_no_gpu(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with engine(small_checkpoint, device=given) as llm:
        (devices,) = llm.apply_model(lambda model: {p.device.type for p in model.parameters()})
        assert devices == {"cpu"}
        assert len(scores(llm)[0]) == 6
