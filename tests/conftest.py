"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real tokenizers, traces and a trained model that lies beside the checkout, or where KVLOOM_SHARED says."""
    where = Path(os.environ.get("KVLOOM_SHARED", ROOT.parent / "shared"))
    if not where.is_dir():
        pytest.skip("needs the shared data folder: put it beside the checkout or set KVLOOM_SHARED")
    return where
