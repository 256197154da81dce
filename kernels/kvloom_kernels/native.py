"""Our C++ kernels: compiled once for this CPU by the system's compiler, kept in a private folder, called on data pointers.

The file's name is a hash of the sources, the compiler's version, the flags and the CPU's features, so another machine, compiler or
release never runs code made for this one. The folder is ours alone (0700, owner checked): nothing executable is loaded from a place
that another user can write. Without a compiler everything runs in torch, and `problem` says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-pthread", "-fPIC", "-shared")
FLAGS_VARIABLE = "KVLOOM_CXXFLAGS"
"""Environment variable with further flags of the compiler: ``-march=x86-64-v3`` builds what CPUs without AVX-512 get."""
COMPILE_TIMEOUT_S = 120

_P, _I, _F, _B = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
SIGNATURES = {
    "kvloom_run": (_P, _I, _B),
    "kvloom_packed_elements": (_I, _I, _B),
    "kvloom_panel_features": (),
    "kvloom_bf16_products": (),
    "kvloom_apply_bitmask": (_P, _I, _P, _P, _I, _I, _B, _B),
    "kvloom_attend_tokens": (_P, _I, _P, _I, _P, _I, _P, _I, _I, _I, _I, _I, _I, _F, _F, _B, _P, _B, _B),
    "kvloom_gather_tokens": (_P, _I, _P, _P, _P, _I, _P, _P, _P),
    "kvloom_gather_blocks": (_P, _I, _P, _P, _I, _P, _P, _I, _I, _P, _I, _I, _P),
    "kvloom_divide": (_P, _P, _I, _I, _B),
    "kvloom_top_p": (_P, _P, _I, _I, _B),
    "kvloom_best": (_P, _P, _P, _I, _I, _B),
    "kvloom_draw": (_P, _P, _P, _P, _I, _I, _B),
    "kvloom_token_logprobs": (_P, _I, _P, _I, _P, _P, _P, _I, _I, _B, _B),
}
"""Argument types of the functions that are called as such, as their C++ files declare them. Kernels of a step are not, see plan.py."""
RESULTS = {"kvloom_bf16_products": _B, "kvloom_packed_elements": _I, "kvloom_panel_features": _B}


class NativeUnavailableError(Exception):
    """Why there are no native kernels, as a phrase."""


@cache
def _load() -> ctypes.CDLL | NativeUnavailableError:
    try:
        loaded = ctypes.CDLL(str(_compiled()))
        for name, types in SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes = types
            function.restype = RESULTS.get(name)
        return loaded
    except NativeUnavailableError as error:
        return error
    except OSError as error:
        return NativeUnavailableError(f"the compiled kernels cannot be loaded: {error}")


def problem() -> str | None:
    """None when the kernels are there; compiles them if need be. Else the reason, as a phrase."""
    loaded = _load()
    return None if isinstance(loaded, ctypes.CDLL) else str(loaded)


def library() -> ctypes.CDLL:
    """The kernels. Raises `NativeUnavailableError` with the `problem`."""
    loaded = _load()
    if isinstance(loaded, NativeUnavailableError):
        raise loaded
    return loaded


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$XDG_CACHE_HOME/kvloom/kernels``, else under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvloom" / "kernels"


def _compiled() -> Path:
    """Path of the library, compiled now when it is not there yet."""
    compiler = next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise NativeUnavailableError("no C++ compiler was found (g++, clang++ or c++ on PATH)")
    folder = _private(cache_folder())
    sources = sorted(SOURCES.glob("*.cpp"))
    path = folder / f"kernels-{_key(compiler)}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            _run([compiler, *_flags(), "-o", str(made), *map(str, sources)])
            os.replace(made, path)  # whole or not at all, also with several processes
    if path.stat().st_uid != os.getuid():
        raise NativeUnavailableError(f"{path} belongs to another user")
    return path


def _flags() -> list[str]:
    return [*FLAGS, *shlex.split(os.environ.get(FLAGS_VARIABLE, ""))]


def _key(compiler: str) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    digest.update(_run([compiler, "--version"]) + " ".join(_flags()).encode() + _cpu_features())
    return digest.hexdigest()[:32]


def _cpu_features() -> bytes:
    """What ``-march=native`` looks at, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    wanted = ("flags", "Features", "model name", "cpu family", "model\t")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)})).encode()


def _private(folder: Path) -> Path:
    """A folder of ours that nobody else can write to; made if it is not there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise NativeUnavailableError(f"the folder for compiled kernels cannot be made: {error}") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise NativeUnavailableError(f"{folder} must belong to this user and be closed to others: chmod 700 {folder}")
    return folder


def _run(command: list[str]) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, timeout=COMPILE_TIMEOUT_S, check=False)  # noqa: S603  (a fixed command)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise NativeUnavailableError(f"{command[0]} failed: {done.stderr.decode(errors='replace')[-500:]}")
    return done.stdout
