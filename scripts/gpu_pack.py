"""`scripts/gpu_check --pack` and `--wheels`: what a machine with a GPU and without a package registry lacks, as wheels.

It is taken to have CPython 3.12 on x86-64 Linux with torch, triton, transformers and pytest, and what these ask for themselves.
Everything else that kvloom and the tests of its kernels need goes into the folder, in the versions that are installed here, and a wheel
of this checkout.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "3.12"
PLATFORMS = ("manylinux1_x86_64", "manylinux2014_x86_64", *(f"manylinux_2_{glibc}_x86_64" for glibc in range(17, 40)))
"""pip takes wheels of exactly the platforms that are named."""
THERE = ("torch", "triton", "transformers", "pytest", "pip")
FOR_TESTS = ("hypothesis",)
ALWAYS = ("typing-extensions",)
"""Goes along though it is there: what goes along may ask for a newer one, which serves everybody."""
MOST_BYTES = 64 * 2**20
TARGET = {**default_environment(), "python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "sys_platform": "linux",
          "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython",
          "platform_python_implementation": "CPython", "os_name": "posix", "extra": ""}
"""What markers of requirements are evaluated for."""


def fail(message: str) -> None:
    """Leave with one line and exit code 1."""
    print(f"gpu_check: {message}", file=sys.stderr)
    raise SystemExit(1)


def needs(found: Distribution) -> Iterator[Requirement]:
    """What it requires on the target, without its extras."""
    for text in found.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(TARGET):
            yield requirement


def needed_by(name: str) -> set[str]:
    """What a package that is installed here asks for itself; nothing for one that is not."""
    try:
        return {canonicalize_name(requirement.name) for requirement in needs(distribution(name))}
    except PackageNotFoundError:
        return set()


def plan() -> list[str]:
    """``name==version`` of every package that goes along. What is there is not looked into: its needs vary with its version."""
    there = {*THERE, *(need for name in THERE for need in needed_by(name))} - {*ALWAYS}
    found: dict[str, str] = {}
    waiting = ["kvloom", *FOR_TESTS, *ALWAYS]
    while waiting:
        name = waiting.pop()
        if name in found or name in there:
            continue
        try:
            found[name] = distribution(name).version
        except PackageNotFoundError:
            fail(f"{name} is not installed here: install kvloom[test], so that its version is known")
        waiting += needed_by(name)
    del found["kvloom"]  # a wheel of this checkout instead
    return sorted(f"{name}=={version}" for name, version in found.items())


def pip(arguments: Sequence[str]) -> None:
    """Run this interpreter's pip; leave where it fails, after what it said."""
    if subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=False).returncode:
        fail(f"pip {arguments[0]} failed")


def download_arguments(folder: Path, packages: Sequence[str]) -> list[str]:
    """Of ``pip``, for wheels of the target."""
    return ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp",
            *(argument for platform in PLATFORMS for argument in ("--platform", platform)), "--dest", str(folder), *packages]


def pack(folder: Path) -> int:
    """Fill the folder, and say what to carry and what to call there. The exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    if strangers := [file.name for file in folder.iterdir() if file.suffix != ".whl"]:
        fail(f"{folder} has something else than wheels ({strangers[0]}): name another folder")
    for old in folder.glob("*.whl"):
        old.unlink()
    pip(download_arguments(folder, plan()))
    pip(["wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)])
    wheels = sorted(folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    print("\n".join(wheel.name for wheel in wheels))
    if size > MOST_BYTES:
        fail(f"the wheels have {size / 2**20:.1f} MiB, at most {MOST_BYTES / 2**20:.0f} are wanted")
    print(f"\n{len(wheels)} wheels, {size / 2**20:.1f} MiB. Carry this checkout and {folder} to the machine with the GPU; there, in "
          "the checkout:\n    python3 scripts/gpu_check --wheels FOLDER --write results.md\nPack again after any change.")
    return 0


def stale(wheel: Path) -> str | None:
    """The first file in which a wheel of ours differs from this checkout; None where there is none."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    with zipfile.ZipFile(wheel) as packed:
        inside = {name: packed.read(name) for name in packed.namelist() if ".dist-info/" not in name}
    here = {f"{Path(package).name}/{file.relative_to(ROOT / package).as_posix()}": file for package in packages
            for file in (ROOT / package).rglob("*") if file.suffix in (".py", ".cpp", ".h")}
    for name in sorted(here.keys() | inside.keys()):
        if name not in inside or (name in here and here[name].read_bytes() != inside[name]):
            return name
    return None


def install(folder: Path, target: Path) -> None:
    """Unpack the wheels for this interpreter into `target`, a folder for ``PYTHONPATH``: what is installed stays as it is."""
    wheels = sorted(folder.glob("*.whl"))
    ours = [wheel for wheel in wheels if wheel.name.startswith("kvloom-")]
    if len(ours) != 1:
        fail(f"{folder} has {len(ours)} wheels of kvloom, not one: make it with --pack")
    if (name := stale(ours[0])) is not None:
        fail(f"{ours[0].name} is not of this checkout ({name} differs): pack again")
    pip(["install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(target), *map(str, wheels)])


def missing(path: Sequence[str]) -> list[str]:
    """What kvloom and the tests of its kernels lack among the distributions on a path, as phrases.

    Args:
        path: folders, as in ``sys.path``; of a package that lies in several, the first counts.
    """
    found: dict[str, Distribution] = {}
    for one in distributions(path=list(path)):
        found.setdefault(canonicalize_name(one.metadata["Name"] or ""), one)
    if "kvloom" not in found:
        return ["kvloom is not installed for this Python: use --wheels FOLDER, made by --pack where there is a package registry"]
    problems = []
    waiting, asked = [Requirement(name) for name in ("kvloom", *FOR_TESTS, "pytest", "triton")], set[str]()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in found:
            problems.append(f"{name} is not installed")
        elif not requirement.specifier.contains(found[name].version, prereleases=True):
            problems.append(f"{name} {found[name].version} is installed, {requirement.specifier} is needed")
        elif name not in asked and name not in THERE:
            asked.add(name)
            waiting += needs(found[name])
    return sorted(set(problems))
