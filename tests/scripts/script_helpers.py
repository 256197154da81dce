"""Scripts as modules."""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest


def imported_script(path: Path) -> ModuleType:
    """A script, which has no suffix and imports from its own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        loader = SourceFileLoader(f"{path.name}_script", str(path))
        spec = spec_from_loader(loader.name, loader)
        assert spec is not None
        module = module_from_spec(spec)
        patch.setitem(sys.modules, loader.name, module)
        loader.exec_module(module)
    return module
