"""Models and engines that the tests of pooling share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pooling_helpers import engine, make_cross_encoder, make_embedder

from kvloom import LLM


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the decoder that embeds."""
    return tmp_path_factory.mktemp("embed")


@pytest.fixture(scope="module")
def model(directory: Path) -> torch.nn.Module:
    """transformers' model of it; writes the checkpoint."""
    return make_embedder(directory)


@pytest.fixture(scope="module")
def cross(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, torch.nn.Module, LLM]]:
    """A cross-encoder: directory, transformers' model, engine."""
    where = tmp_path_factory.mktemp("cross")
    theirs = make_cross_encoder(where)
    with engine(where, task="score", skip_tokenizer_init=False) as made:
        yield where, theirs, made
