"""An encoder divided over ranks gives what the whole one gives: heads, MLP, vocabulary, and tensors that hold several shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encoder_helpers import OurEncoder, make

from kvloom.testing.thread_comm import run_ranks


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", "modernbert-biases-mean"])
def test_each_rank_has_the_whole_models_hidden_states(tmp_path: Path, family: str) -> None:
    make(family, "Model", tmp_path)
    prompts = [[9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [30, 99], list(range(20, 60))]
    whole = OurEncoder(tmp_path).hidden(prompts)
    for rank in run_ranks(2, lambda comm: OurEncoder(tmp_path, comm=comm).hidden(prompts)):
        for mine, expected in zip(rank, whole, strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
