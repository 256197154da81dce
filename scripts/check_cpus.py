#!/usr/bin/env python3
"""The kernels' tests as on other kinds of x86 CPU than this one: `scripts/check --cpus`.

What this CPU has is switched off by the compiler's flags. What it lacks is emulated (tests/kernels/emulated): slow, and no measure of
speed, but the same branches of the same sources.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

from kvloom_kernels import native

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests/kernels"
HEADER = TESTS / "emulated/immintrin.h"
ELSEWHERE = ("native", "kernel_threads", "every_kernel", "triton_attention")
"""Tests of kernels that are compiled with flags of their own, of other kinds, or of none."""

LESSER = {"x86-64": "-march=x86-64", "AVX2": "-march=x86-64-v3"}
"""Kinds that are a part of any CPU of today."""
LARGER = {
    "AVX-512": {"__AVX512F__"},
    "AVX-512-bf16": {"__AVX512F__", "__AVX512BF16__"},
    "AMX": {"__AVX512F__", "__AVX512BF16__", "__AMX_BF16__"},
}
"""Kinds beyond AVX2, and what the compiler defines for them."""
WITHOUT = {"__AVX512BF16__": "-mno-avx512bf16", "__AMX_BF16__": "-mno-amx-bf16"}


def features(flags: str) -> set[str]:
    """Which of the macros that the sources ask for are defined: equal ones leave the very same C++ to compile."""
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    done = subprocess.run([str(compiler), *native.FLAGS, *shlex.split(flags), "-dM", "-E", "-x", "c++", os.devnull], text=True,
                          capture_output=True, check=True)
    asked = {name for path in native.SOURCES.iterdir() for name in re.findall(r"\b__(?:AVX|AMX|FMA|F16)\w*", path.read_text())}
    if not asked >= LARGER["AMX"]:
        raise SystemExit("check_cpus: the sources do not ask for what is known here")
    return {words[1] for line in done.stdout.splitlines() if (words := line.split())[1] in asked}


def flags_for(kind: str) -> str:
    """The compiler's flags. What emulates is a part of the library's name, and -O3 would take a minute for it."""
    if kind in LESSER:
        return LESSER[kind]
    macros = LARGER[kind]
    if is_here(kind):
        return " ".join(off for macro, off in WITHOUT.items() if macro not in macros)
    return " ".join(("-O1", "-march=x86-64-v3", f"-I{HEADER.parent}", f"-DKVLOOM_EMULATED={zlib.crc32(HEADER.read_bytes())}",
                     *(f"-D{macro}" for macro in sorted(macros))))


def is_here(kind: str) -> bool:
    """Whether this CPU has all that is asked for it."""
    return kind in LESSER or LARGER[kind] <= features("")


def run(flags: str, tests: Iterable[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest on files of tests/kernels, with kernels that are compiled with these flags."""
    files = [str(TESTS / f"test_{name}.py") for name in tests]
    return python(flags, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, *files)


def python(flags: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python whose kernels are compiled with these flags."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, text=True, capture_output=True, check=False,
                          env={**os.environ, native.FLAGS_VARIABLE: flags})


def main() -> int:
    """All of them, on as many processes as there are cores."""
    names = sorted(path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py"))
    failed = 0
    for kind in (*LESSER, *LARGER):
        flags = flags_for(kind)
        # Without kernels their tests would be skipped, and all be well; and each process would compile them.
        done = python(flags, "-c", "import sys; from kvloom_kernels import native; sys.exit(native.problem())")
        if not done.returncode:
            done = run(flags, [name for name in names if name not in ELSEWHERE], "-n", "auto")
        print(f"{kind}: {(done.stdout.splitlines() or ['its kernels are not there'])[-1]}", flush=True)
        if done.returncode:
            print(done.stdout[-5000:], done.stderr[-5000:])
            failed += 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
