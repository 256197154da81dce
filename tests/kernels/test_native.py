"""Compiled kernels come from a private folder, and without a compiler everything runs in torch."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

from kvloom import LLM, SamplingParams
from kvloom_kernels import native

CODE = "from kvloom_kernels import native; print(native.problem())"


def problem_with(**variables: str) -> str:
    done = subprocess.run([sys.executable, "-c", CODE], env={**os.environ, **variables}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++, with which the kernels are known to compile")
def test_the_kernels_compile() -> None:
    assert native.problem() is None


needs_compiler = pytest.mark.skipif(native.problem() is not None, reason=f"the C++ kernels are not there: {native.problem()}")


@needs_compiler
def test_a_fresh_cache_is_made_private_and_used_again(tmp_path: Path) -> None:
    variables = {"XDG_CACHE_HOME": str(tmp_path), native.FLAGS_VARIABLE: "-O0"}  # compiles in a third of the time
    assert problem_with(**variables) == "None"
    folder = tmp_path / "kvloom/kernels"
    assert folder.stat().st_mode & 0o777 == 0o700
    made = list(folder.iterdir())
    assert len(made) == 1
    written = made[0].stat().st_mtime_ns
    assert problem_with(**variables) == "None"
    assert [p.stat().st_mtime_ns for p in folder.iterdir()] == [written]


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "kvloom/kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert "closed to others" in problem_with(XDG_CACHE_HOME=str(tmp_path), PATH=os.environ["PATH"])


def test_no_compiler_is_said_so(tmp_path: Path) -> None:
    assert "no C++ compiler" in problem_with(XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path))


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    fake = tmp_path / "g++"
    fake.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 1.0 && exit 0\necho cannot compile >&2\nexit 1\n")
    fake.chmod(0o755)
    assert "cannot compile" in problem_with(XDG_CACHE_HOME=str(tmp_path / "cache"), PATH=f"{tmp_path}:{os.environ['PATH']}")


def test_without_a_compiler_the_engine_runs_in_torch_and_says_why(small_checkpoint: Path, tmp_path: Path) -> None:
    values, prompts, params = {"dtype": "float32", "skip_tokenizer_init": True}, [[1, 2, 3], list(range(40))], {"temperature": 0, "max_tokens": 8}
    with LLM(str(small_checkpoint), **values) as llm:
        expected = llm.generate(prompts, SamplingParams(**params), use_tqdm=False)[1].outputs[0].token_ids
    code = f"""
from kvloom import LLM, SamplingParams
llm = LLM({str(small_checkpoint)!r}, **{values})
print(llm.generate({prompts}, SamplingParams(**{params}), use_tqdm=False)[1].outputs[0].token_ids)
print(llm.llm_engine.report.text())
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
                          capture_output=True, text=True, check=True)
    tokens, report = done.stdout.split("\n", 1)
    assert tokens == str(expected)
    assert "attention backend: torch (refused: cpu: no C++ compiler was found" in report


def features(flags: str) -> set[str]:
    """Which of the macros that the sources ask for are defined: equal ones leave the very same C++ to compile."""
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    done = subprocess.run([str(compiler), *native.FLAGS, flags, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=True)
    asked = {name for path in native.SOURCES.iterdir() for name in re.findall(r"\b__(?:AVX|AMX|FMA|F16)\w*", path.read_text())}
    assert asked >= {"__AVX512F__", "__AVX512BF16__", "__AMX_BF16__"}
    return {words[1] for line in done.stdout.splitlines() if (words := line.split())[1] in asked}


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++, with which the kernels are known to compile")
@pytest.mark.parametrize(("march", "macro"), [("x86-64", "__SSE2__"), ("x86-64-v3", "__AVX2__"), ("x86-64-v4", "__AVX512F__"),
                                              ("cooperlake", "__AVX512BF16__"), ("sapphirerapids", "__AMX_BF16__")])
def test_every_source_compiles_for_every_kind_of_cpu(tmp_path: Path, march: str, macro: str) -> None:
    """For this one alone the compiler sees few of the branches. `-fsyntax-only` would not tell that a CPU lacks an instruction."""
    for_it = ["g++", *native.FLAGS, f"-march={march}", "-O0"]
    known = subprocess.run([*for_it, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=False)
    if known.returncode:
        pytest.skip(f"this g++ does not know the CPU: {known.stderr.splitlines()[0]}")
    assert f"#define {macro} " in known.stdout
    if features(f"-march={march}") == features("-O3"):
        pytest.skip("these are the branches of this CPU, which are compiled without flags")
    sources = sorted(map(str, native.SOURCES.glob("*.cpp")))
    done = subprocess.run([*for_it, "-S", *sources], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.iterdir())) == len(sources)


@needs_compiler
@pytest.mark.parametrize("flags", ["-march=x86-64-v3", "-mno-amx-bf16"])
def test_kernels_for_lesser_cpus_give_the_same(flags: str) -> None:
    """Without AVX-512 bfloat16 is widened to float32 and a panel has 8 features instead of 16; without AMX vectors multiply."""
    if platform.machine() != "x86_64":
        pytest.skip("the flags are of this architecture")
    if features(flags) == features("-O3"):
        pytest.skip("this CPU is as small: the files test these kernels without flags")
    files = [f"tests/kernels/test_{name}.py" for name in ("product", "product_blocks", "attention_shapes", "attention_split", "odd_shapes")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files], cwd=ROOT, capture_output=True, text=True,
                          check=False, env={**os.environ, native.FLAGS_VARIABLE: flags})
    assert done.returncode == 0, done.stdout[-3000:]
