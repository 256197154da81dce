"""A device that is treated as one with memory of its own: blocks and weights live on the host, and what is computed does not change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lifecycle_helpers import GREEDY, engine, separate_device, tokens

from kvloom.config import EngineConfig
from kvloom.config.cache import CacheSection
from kvloom.errors import ConfigError, InternalError
from kvloom.interfaces import BlockMove, KVGroup, StateKind, Step
from kvloom.interfaces.attention import LayerCache
from kvloom.runtime.builder import open_source
from kvloom.runtime.host_blocks import HostBlocks
from kvloom.runtime.host_memory import host_memory
from kvloom.runtime.model_plan import plan_model
from kvloom.runtime.offload import HostWeights
from kvloom.startup import load_config_plugins
from kvloom.testing.checkpoints import make_checkpoint

GIB = 2**30
LONG = GREEDY.clone()
LONG.max_tokens = 60
MANY = [[i, *range(30)] for i in range(4)]


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two KV groups: full attention below, windows above."""
    return make_checkpoint(tmp_path_factory.mktemp("windowed") / "m", "Qwen2ForCausalLM", tokenizer=False, use_sliding_window=True,
                           sliding_window=24, max_window_layers=1, attention_bias=True)


# -- swap_space

@pytest.mark.parametrize("groups", [1, 2])
def test_swap_space__moves_what_gives_way_and_computes_nothing_twice(install, small_checkpoint: Path, windowed: Path, groups: int) -> None:
    """With room for a request and a half, against an engine where all fit."""
    steps = separate_device(install)
    values = {"skip_tokenizer_init": True, "block_size": 8, "distributed_executor_backend": "separate", "swap_space": 0.1}
    checkpoint = small_checkpoint if groups == 1 else windowed
    with engine(checkpoint, **values) as llm:
        assert len(llm.llm_engine.plan.needs.groups) == groups
        block_bytes = llm.llm_engine.plan.needs.block_bytes
        expected = tokens(llm, MANY, LONG)
    assert not any(s.swap_out or s.swap_in for s in steps)
    steps.clear()
    with engine(checkpoint, num_gpu_blocks_override=19 * groups, **values) as llm:
        outputs = llm.generate(MANY, LONG, use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in outputs] == expected
    assert sum(o.metrics.num_preemptions for o in outputs) > 0
    assert sum(o.metrics.num_recomputed_tokens for o in outputs) == 0
    assert sum(len(s.swap_out) for s in steps) * block_bytes > 0
    assert sum(len(s.swap_in) for s in steps) * block_bytes > 0


def test_swap_space__finds_prefixes_again_that_the_device_had_no_room_for(install, small_checkpoint: Path) -> None:
    separate_device(install)
    values = {"distributed_executor_backend": "separate", "num_gpu_blocks_override": 9, "block_size": 8}
    cached = {}
    for swap_space in (0, 0.1):
        with engine(small_checkpoint, swap_space=swap_space, **values) as llm:
            first = tokens(llm, [MANY[0]])
            for prompt in MANY[1:]:
                tokens(llm, [prompt])
            (again,) = llm.generate([MANY[0]], GREEDY, use_tqdm=False)
            assert [list(again.outputs[0].token_ids)] == first
            cached[swap_space] = again.num_cached_tokens
            assert llm.reset_prefix_cache()
            assert llm.generate([MANY[0]], GREEDY, use_tqdm=False)[0].num_cached_tokens == 0
    assert cached == {0: 0, 0.1: 24}


def test_swap_space__may_not_take_most_of_the_host(small_checkpoint: Path, capsys) -> None:
    assert CacheSection(swap_space=4).swap_space_note(11 * GIB) is None
    assert "41% of the host's 9.8 GiB" in CacheSection(swap_space=4).swap_space_note(int(9.8 * GIB))
    with pytest.raises(ConfigError, match=r"Too large swap space: .* give at most 3\.5"):
        CacheSection(swap_space=4).swap_space_note(5 * GIB)
    host_gib = host_memory().total_bytes / GIB
    with pytest.raises(ConfigError, match="Too large swap space"):
        engine(small_checkpoint, swap_space=0.8 * host_gib)
    with pytest.raises(ConfigError, match=r"swap_space=-1\.0"):
        engine(small_checkpoint, swap_space=-1.0)
    with engine(small_checkpoint, swap_space=0.5 * host_gib):
        assert "50% of the host's" in capsys.readouterr().err


def make_blocks() -> tuple[dict[int, LayerCache], HostBlocks]:
    """Two groups whose first layers share memory, and a layer with tensors of its own."""
    shared, own = torch.arange(24.0).view(6, 4), torch.arange(12).view(6, 2) * 10
    caches = {0: LayerCache(0, (shared,)), 1: LayerCache(1, (own,)), 2: LayerCache(2, (shared,))}
    groups = (KVGroup(0, StateKind.FULL, (0, 1), 4), KVGroup(1, StateKind.WINDOW, (2,), 4, 4))
    return caches, HostBlocks(groups, caches, 3)


def test_moves_happen_once_however_often_a_step_comes_and_out_comes_before_in() -> None:
    caches, blocks = make_blocks()
    before = [t.clone() for c in caches.values() for t in c.tensors]
    blocks.apply(Step(0, (), swap_out=(BlockMove(0, 2, 1),)))
    # Block 2 of group 0 comes back to where a block of group 1 lies, which leaves in the same step.
    step = Step(1, (), swap_out=(BlockMove(1, 4, 2),), swap_in=(BlockMove(0, 4, 1),))
    for _ in range(2):
        blocks.apply(step)
        assert caches[0].tensors[0][4].equal(before[0][2])
        assert caches[1].tensors[0][4].equal(before[1][2])
    blocks.apply(Step(2, (), swap_in=(BlockMove(1, 5, 2),)))
    assert caches[2].tensors[0][5].equal(before[0][4])
    assert caches[1].tensors[0][5].equal(before[1][5]), "group 1 has no second layer"


@pytest.mark.parametrize("move", [BlockMove(0, 6, 1), BlockMove(0, 0, 1), BlockMove(0, 1, 0), BlockMove(0, 1, 4)])
def test_blocks_that_do_not_exist_are_not_moved(move: BlockMove) -> None:
    caches, blocks = make_blocks()
    before = caches[0].tensors[0].clone()
    for step in (Step(0, (), swap_out=(move,)), Step(1, (), swap_in=(BlockMove(0, 1, 1), move))):
        with pytest.raises(InternalError, match="do not exist"):
            blocks.apply(step)
    assert caches[0].tensors[0].equal(before)


# -- cpu_offload_gb

def test_cpu_offload_gb__streams_weights_from_the_host_and_computes_the_same(install, small_checkpoint: Path) -> None:
    separate_device(install)
    with engine(small_checkpoint) as llm:
        expected, weights_bytes = tokens(llm), llm.llm_engine.plan.needs.weights_bytes
    half_gb = weights_bytes / 2 / GIB
    with engine(small_checkpoint, distributed_executor_backend="separate", cpu_offload_gb=half_gb) as llm:
        assert tokens(llm) == expected
        (held_bytes,) = llm.apply_model(lambda model: sum(p.nbytes for p in model.parameters()))
        assert 0.2 * weights_bytes < held_bytes <= 0.5 * weights_bytes
        assert llm.llm_engine.plan.needs.weights_bytes == held_bytes
        assert f"weights kept on the host: {weights_bytes - held_bytes} bytes" in llm.llm_engine.report.text()
        for level in (1, 2):
            llm.sleep(level)
            llm.wake_up()
            assert tokens(llm) == expected


def test_cpu_offload_gb__has_no_effect_where_the_device_is_the_host(small_checkpoint: Path) -> None:
    config = EngineConfig.from_kwargs(model=str(small_checkpoint), dtype="float32", cpu_offload_gb=1.0)
    assert config.notes == ("cpu_offload_gb=1.0 has no effect: on a CPU device all weights are on the host",)
    plugins = load_config_plugins(config)
    source = open_source(config, plugins)
    on_host, _ = plan_model(config, plugins, source)
    elsewhere, _ = plan_model(config, plugins, source, is_host=False)
    assert 0 < elsewhere.needs.weights_bytes < 0.5 * on_host.needs.weights_bytes
    with pytest.raises(ConfigError, match=r"cpu_offload_gb=-1\.0"):
        EngineConfig.from_kwargs(model="m", cpu_offload_gb=-1.0)


def test_weights_are_on_the_device_only_between_fetch_and_drop() -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3), requires_grad=False)
    original = parameter.data
    weights = HostWeights([parameter], torch.device("cpu"))
    assert (parameter.numel(), weights.size_bytes) == (0, 24)
    weights.fetch()
    assert parameter.equal(original)
    assert parameter.data_ptr() != original.data_ptr()
    weights.drop()
    assert parameter.numel() == 0
    weights.fetch()
    assert parameter.equal(original)
