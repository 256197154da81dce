"""docs/architecture.md says what is there, and nothing else."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest
from conftest import ROOT

import kvloom.interfaces as interfaces


@pytest.fixture(scope="module")
def module_list() -> ModuleType:
    spec = importlib.util.spec_from_file_location("module_list", ROOT / "scripts/module_list.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_module_has_its_line_and_every_line_its_module(module_list: ModuleType) -> None:
    assert module_list.PAGE.read_text() == module_list.page_with(module_list.module_lines()), \
        "run: python scripts/module_list.py"


def test_every_contract_name_in_the_feature_table_exists() -> None:
    page = (ROOT / "docs/architecture.md").read_text().split("## What carries the later features")[1].split("\n## ")[0]
    for name, member in re.findall(r"`([A-Z]\w+)(?:\.(\w+))?", page):
        if name in ("RECURRENT", "FULL", "WINDOW"):
            continue
        contract = getattr(interfaces, name)
        fields = {*dir(contract), *getattr(contract, "__annotations__", {}), *getattr(contract, "__dataclass_fields__", {})}
        assert not member or member in fields, f"{name}.{member}"
