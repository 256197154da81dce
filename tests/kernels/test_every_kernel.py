"""No kernel without a reference, a test over odd shapes that knows it, and a line of the benchmark."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from repository import ROOT

from kvloom_kernels.native import SOURCES, library, problem

needs_compiler = pytest.mark.skipif(problem() is not None, reason=f"the C++ kernels are not there: {problem()}")


class Checks(NamedTuple):
    """Where a kernel's plain-torch reference is, and the test over odd shapes that compares them."""

    reference: str
    test: str


KERNELS = {
    "kvloom_product": Checks("linear.product_reference", "test_odd_shapes.test_products_of_sizes_that_are_no_multiple_of_a_tile"),
    "kvloom_pack": Checks("linear.pack_reference", "test_odd_shapes.test_packing_and_lookups"),
    "kvloom_lookup": Checks("linear.lookup_reference", "test_odd_shapes.test_packing_and_lookups"),
    "kvloom_attend": Checks("attention.paged_attention_reference", "test_attention_shapes.test_paged_attention_of_each_head_size_and_group"),
    "kvloom_attend_tokens": Checks("token_attention.token_attention_reference", "test_attention_shapes.test_token_attention_of_each_head_size_and_group"),
    "kvloom_rms_norm": Checks("norm.rms_norm_reference", "test_odd_shapes.test_norms_and_activations"),
    "kvloom_gated_mul": Checks("activation.gated_mul_reference", "test_odd_shapes.test_norms_and_activations"),
    "kvloom_norm_rope_write": Checks("attention.norm_rope_write_reference", "test_odd_shapes.test_norm_rotation_and_cache_writing"),
    "kvloom_copy_blocks": Checks("blocks.copy_blocks_reference", "test_odd_shapes.test_copies_and_first_uses_of_blocks"),
    "kvloom_touch": Checks("blocks.touch_reference", "test_odd_shapes.test_copies_and_first_uses_of_blocks"),
    "kvloom_apply_bitmask": Checks("bitmask.apply_bitmask_reference", "test_odd_shapes.test_bitmasks_over_views"),
    "kvloom_gather_tokens": Checks("gather.gather_tokens_reference", "test_gather.test_the_kernels_gather_the_same"),
    "kvloom_gather_blocks": Checks("gather.gather_blocks_reference", "test_gather.test_the_kernels_gather_the_same"),
    "kvloom_divide": Checks("sampling.divide_reference", "test_odd_shapes.test_divisions_over_views"),
    "kvloom_top_p": Checks("sampling.top_p_reference", "test_odd_shapes.test_top_p_over_views"),
    "kvloom_best": Checks("sampling.best_reference", "test_odd_shapes.test_the_best_and_draws"),
    "kvloom_draw": Checks("sampling.draw_reference", "test_odd_shapes.test_the_best_and_draws"),
    "kvloom_token_logprobs": Checks("sampling.token_logprobs_reference", "test_odd_shapes.test_logprobs_over_views"),
}
TRITON_KERNELS = {
    "attend_kernel": Checks("attention.paged_attention_reference", "test_triton_attention.test_contexts_however_divided_agree_with_the_plain_reference"),
    "join_kernel": Checks("attention.paged_attention_reference", "test_triton_attention.test_contexts_however_divided_agree_with_the_plain_reference"),
    "write_kernel": Checks("attention.paged_write_reference", "test_triton_attention.test_a_write_puts_each_token_in_its_slot_and_touches_nothing_else"),
    "norm_rope_write_kernel": Checks("attention.norm_rope_write_reference", "test_triton_attention.test_norm_rotation_and_write_in_one_launch"),
}
"""That `scripts/bench_gpu_attention` launches each is said by its own test, which interprets them."""
NO_KERNELS = {"kvloom_run", "kvloom_packed_elements", "kvloom_panel_features", "kvloom_bf16_products"}
"""Exported too: what runs kernels, and facts about packed weights. They compute nothing."""


@pytest.fixture(scope="module")
def cases() -> Iterator[ModuleType]:
    """What the benchmark measures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        patch.delitem(sys.modules, "kernel_cases", raising=False)
        yield import_module("kernel_cases")


def test_every_exported_function_is_a_kernel_with_a_test_or_computes_nothing() -> None:
    sources = "".join(path.read_text() for path in SOURCES.glob("*.cpp"))
    exported = re.findall(r'extern "C"[^(;{]*?(\w+)\(', sources)
    assert sorted(exported) == sorted([*KERNELS, *NO_KERNELS])


@needs_compiler
def test_the_library_has_them_all() -> None:
    assert all(hasattr(library(), name) for name in (*KERNELS, *NO_KERNELS))


def test_every_triton_kernel_has_a_test() -> None:
    sources = "".join(path.read_text() for path in (SOURCES.parent / "gpu").glob("*.py"))
    assert sorted(re.findall(r"@triton\.jit.*\ndef ([a-z]\w*)\(", sources)) == sorted(TRITON_KERNELS)


@pytest.mark.parametrize("kernel", [*KERNELS, *TRITON_KERNELS])
def test_a_kernels_test_calls_its_reference(kernel: str) -> None:
    checks = (KERNELS | TRITON_KERNELS)[kernel]
    module, _, reference = checks.reference.partition(".")
    assert callable(getattr(import_module(f"kvloom_kernels.{module}"), reference))
    name, _, test = checks.test.partition(".")
    functions = functions_of((Path(__file__).parent / f"{name}.py").read_text())
    body = functions[test] + "".join(own for helper, own in functions.items() if helper.startswith("assert_") and f"{helper}(" in functions[test])
    assert f"{reference}(" in body


def functions_of(text: str) -> dict[str, str]:
    """The source of each function of a module."""
    return {node.name: ast.unparse(node) for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def test_the_benchmark_has_lines_of_every_kernel(cases: ModuleType) -> None:
    assert list(cases.CASES) == list(KERNELS)


@needs_compiler
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_the_benchmark_compares_gives_the_same(cases: ModuleType, kernel: str) -> None:
    torch.manual_seed(0)
    names = []
    for name, ours, torchs in cases.CASES[kernel](cases.SMALL):
        torch.testing.assert_close(ours(), torchs(), rtol=2**-6, atol=2**-4, msg=lambda text, name=name: f"{name}: {text}")
        names.append(name)
    assert names
    assert len(set(names)) == len(names)
