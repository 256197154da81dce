"""Where the repository is, its scripts as modules, and whether there is a GPU. Imports no torch: variables that it reads may be set later."""

from __future__ import annotations

import ctypes.util
import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def has_gpu() -> bool:
    """Whether torch can use one: with a driver but no card, or built without CUDA, it cannot. Imported only where there is a driver."""
    if ctypes.util.find_library("cuda") is None:
        return False
    import torch

    with warnings.catch_warnings():  # of a driver that is too old: then there is none for us
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def load_script(name: str) -> ModuleType:
    """A module of ``scripts/``, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
