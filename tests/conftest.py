"""Fixtures that every test may use."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from repository import ROOT, has_gpu

# Tiny models: a second thread costs more than it gives, and on a busy machine very much more. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Without a GPU the Triton kernels are interpreted; triton reads it while it is imported.
if not has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings

# No time limits: CI machines are busy. The same examples every time; `--hypothesis-profile=explore` looks for new ones.
settings.register_profile("repeat", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("repeat")


def pytest_collection_finish() -> None:
    """What there is by now, half a million objects of torch and pytest, stays: looking through it took half a second a collection."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real tokenizers, traces and a trained model that lies beside the checkout, or where KVLOOM_SHARED says."""
    where = Path(os.environ.get("KVLOOM_SHARED", ROOT.parent / "shared"))
    if not where.is_dir():
        pytest.skip("needs the shared data folder: put it beside the checkout or set KVLOOM_SHARED")
    return where


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer."""
    from kvloom.testing.checkpoints import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "small")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests/api: a random Llama whose greedy output does not repeat itself."""
    from api_helpers import lively_checkpoint

    return lively_checkpoint(tmp_path_factory.mktemp("lively") / "m")


@pytest.fixture(scope="module")
def truth(checkpoint: Path):
    """For tests/api: transformers' model of the same checkpoint."""
    from api_helpers import Truth

    return Truth(checkpoint)


Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a made-up distribution: ``install("acme", {"acme-models": source, ...}, version="1.0")``.

    Each plugin is a module ``{distribution}_{n}`` with the given source, declared as an entry point of the group kvloom.
    """
    site = tmp_path / "site"
    site.mkdir()
    before = set(sys.modules)
    installed: list[str] = []

    def make(distribution: str, plugins: dict[str, str], version: str = "1.0", first: bool = False) -> None:
        place = tmp_path / f"site-{len(installed)}" if first else site
        place.mkdir(exist_ok=True)
        monkeypatch.syspath_prepend(str(place))
        info = place / f"{distribution}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = ["[kvloom]"]
        for i, (name, source) in enumerate(plugins.items()):
            module = f"{distribution}_{i}"
            (place / f"{module}.py").write_text(source)
            lines.append(f"{name} = {module}")
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        installed.append(distribution)

    yield make
    for name in set(sys.modules) - before:
        if name.rpartition("_")[0] in installed:
            del sys.modules[name]
