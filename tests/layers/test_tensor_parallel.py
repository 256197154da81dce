"""A model divided over ranks gives what the whole one gives: column, row, qkv, gate-up, embedding and head layers, biases, replicas."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from kvloom.config import EngineConfig
from kvloom.errors import ConfigError
from kvloom.interfaces import Comm, KVGroup, Model, NewSequence, Step, TokenRange
from kvloom.params import SamplingParams
from kvloom.runtime.batch import BatchState
from kvloom.runtime.builder import build_model, open_source
from kvloom.runtime.device import CpuDevice
from kvloom.runtime.forward import Forward, LayerState
from kvloom.runtime.kv_groups import group_layers
from kvloom.runtime.kv_tensors import allocate
from kvloom.runtime.logits import LogitsPipeline
from kvloom.runtime.model_plan import make_loader
from kvloom.runtime.runner import Runner
from kvloom.runtime.tables import SequenceTables
from kvloom.runtime.weights import load_weights
from kvloom.startup import load_config_plugins
from kvloom.testing.checkpoints import make_checkpoint
from kvloom.testing.thread_comm import ThreadComm, run_ranks
from kvloom_samplers.token_sampler import TokenSampler


def groups_of(model: Model) -> tuple[KVGroup, ...]:
    return group_layers(model.state_specs(), 16)


def logits_of_rank(directory: Path, comm: Comm) -> list[torch.Tensor]:
    """Logits of a prompt's last position and of the next token."""
    config = EngineConfig.from_kwargs(model=str(directory), dtype="float32", plugins=[])
    plugins = load_config_plugins(config)
    source = open_source(config, plugins)
    built = build_model(config, plugins, source, torch.device("cpu"), comm)
    load_weights(built.model, make_loader(config, plugins), directory)
    groups = groups_of(built.model)
    caches = allocate(groups, {i: built.backends[i].state_shapes() for g in groups for i in g.layers}, 8, torch.device("cpu"))
    seen: list[torch.Tensor] = []
    original = built.model.logits
    built.model.logits = lambda hidden, ctx: seen.append(original(hidden, ctx).clone()) or seen[-1]
    layers = LayerState(groups, len(built.model.state_specs()), built.backends, caches)
    tables = SequenceTables(CpuDevice(), 2, 64, groups)
    runner = Runner(built.model, Forward(built.model, comm, layers, tables, CpuDevice()), TokenSampler(), LogitsPipeline(()),
                    BatchState(tables))
    prompt = tuple(range(3, 24))
    blocks = tuple((2 + 2 * g, 3 + 2 * g) for g in range(len(groups)))
    greedy = SamplingParams(temperature=0)
    runner.execute(Step(0, (TokenRange(0, 0, 21, sample=True),), new=(NewSequence(0, prompt, 21, 0, blocks, greedy),)))
    runner.execute(Step(1, (TokenRange(0, 21, 1, sample=True, pending=1),)))
    return seen


def logits(directory: Path, size: int) -> list[list[torch.Tensor]]:
    return run_ranks(size, lambda comm: logits_of_rank(directory, comm))


@pytest.mark.parametrize("config", [
    {"tie_word_embeddings": True}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "vocab_size": 301},
], ids=["tied", "untied-biases-odd-vocabulary"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_give_the_whole_models_logits(tmp_path: Path, config: dict, size: int) -> None:
    directory = make_checkpoint(tmp_path / "m", tokenizer=False, num_attention_heads=8, num_key_value_heads=2, **config)
    (whole,) = logits(directory, 1)
    for rank in logits(directory, size):
        assert len(rank) == 2
        for mine, expected in zip(rank, whole, strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("config", "message"), [({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}, "attention heads"),
                                                 ({"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}, "kv heads")])
def test_heads_that_cannot_be_divided_are_refused(tmp_path: Path, config: dict, message: str) -> None:
    directory = make_checkpoint(tmp_path / "m", tokenizer=False, **config)
    settings = EngineConfig.from_kwargs(model=str(directory), plugins=[])
    plugins = load_config_plugins(settings)
    with pytest.raises(ConfigError, match=message):
        build_model(settings, plugins, open_source(settings, plugins), torch.device("meta"), ThreadComm(0, 3, [], threading.Barrier(1)))
