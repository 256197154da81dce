"""The check of the built wheel finds what it bans."""

from __future__ import annotations

from types import ModuleType

import pytest
from repository import ROOT, load_script


@pytest.fixture(scope="module")
def check_wheel() -> ModuleType:
    return load_script("check_wheel")


@pytest.mark.parametrize("source", [
    "import pickle", "from cloudpickle import dumps", "import torch\ntorch.load('x')", "eval('1')", "exec('1')", "assert True", "import marshal as m",
    "import numpy as np\nnp.load('x')", "from jinja2 import Environment", "import jinja2.sandbox", "def f():\n    import dill",
])
def test_banned_code_is_found_with_its_line(check_wheel: ModuleType, source: str) -> None:
    found = check_wheel.problems("kvloom/x.py", source)
    assert len(found) == 1
    assert found[0].startswith(f"kvloom/x.py:{source.count(chr(10)) + 1}: ")


def test_the_one_template_renderer_may_import_jinja_and_nothing_else_that_is_banned(check_wheel: ModuleType) -> None:
    assert check_wheel.problems(check_wheel.TEMPLATE_RENDERER, "import jinja2.sandbox") == []
    assert check_wheel.problems(check_wheel.TEMPLATE_RENDERER, "import pickle")


def test_our_own_sources_pass(check_wheel: ModuleType) -> None:
    for root in ("framework", "builtin_models", "builtin_quant", "builtin_samplers", "plugins", "kernels"):
        for path in (ROOT / root).rglob("*.py"):
            assert check_wheel.problems(str(path.relative_to(ROOT / root)), path.read_text()) == []
