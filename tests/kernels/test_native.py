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
from repository import load_script

from kvloom import LLM, SamplingParams
from kvloom_kernels import native

check_cpus = load_script("check_cpus")
features = check_cpus.features

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
    if features(f"-march={march}") == features(""):
        pytest.skip("these are the branches of this CPU, which are compiled without flags")
    sources = sorted(map(str, native.SOURCES.glob("*.cpp")))
    done = subprocess.run([*for_it, "-S", *sources], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.iterdir())) == len(sources)


@needs_compiler
@pytest.mark.parametrize("kind", [*check_cpus.LESSER, *check_cpus.LARGER])
def test_kernels_for_another_kind_of_cpu_give_the_same(kind: str) -> None:
    """Vectors have 4, 8 or 16 lanes, bfloat16 is widened or multiplied as it is, by vectors or tiles. All tests: `scripts/check --cpus`."""
    if platform.machine() != "x86_64":
        pytest.skip("the flags are of this architecture")
    flags = check_cpus.flags_for(kind)
    if features(flags) == features(""):
        pytest.skip("this CPU is of that kind: the files test its kernels without flags")
    if kind != "AMX" and not check_cpus.is_here(kind):
        pytest.skip("it takes a minute to emulate, and has few branches that the emulated AMX has not: `scripts/check --cpus` does it")
    done = check_cpus.run(flags, ("attention", "attention_split", "odd_shapes"), "-x")
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"^\d{3,} passed in", done.stdout.splitlines()[-1]), "none may be skipped for want of kernels"
