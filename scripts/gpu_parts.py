"""The parts of `scripts/gpu_check`, and how they run: each step in a process of its own, with a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from gpu_table import Section, load

SCRIPTS = Path(__file__).resolve().parent
ALL_S = 465
"""Of all parts together: installing and the report have the rest of 8 minutes."""
SHOWN_LINES = 40
"""Of the output of a step that failed."""


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        name: for the summary.
        arguments: of this Python. ``{out}`` in one is the file for its results, ``{folder}`` a folder that all steps share.
        limit_s: it is killed after.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True)
class Done:
    """A step that ran: how it ended (empty where well), after which time, and its tables."""

    name: str
    problem: str
    seconds: float
    sections: tuple[Section, ...] = ()


def _script(name: str, *arguments: str) -> tuple[str, ...]:
    return (str(SCRIPTS / name), "--out", "{out}", *arguments)


def _pytest() -> tuple[str, ...]:
    """The tests of our kernels, and of what torch gathers for them: no plugins but several processes where there are any, and another
    version's warnings are none of ours."""
    processes = ("-p", "xdist", "-n", str(min(8, os.cpu_count() or 1))) if find_spec("xdist") is not None else ()
    folder = SCRIPTS.parent / "tests" / "kernels"
    tests = map(str, (*sorted(folder.glob("test_triton_*.py")), folder / "test_gather.py"))
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "--junitxml", "{out}", *processes, *tests)


def parts() -> dict[str, tuple[Step, ...]]:
    """By the names that the command line takes, in order."""
    return {
        "kernels": (Step("tests of the kernels", _pytest(), 115),),
        "exact": (Step("against transformers", _script("gpu_exact.py"), 60),),
        "graphs": (Step("captured against call by call", _script("gpu_graphs.py"), 75),),
        "bench": (Step("attention", _script("bench_gpu_attention"), 45),
                  Step("decode step", _script("gpu_decode.py", "--folder", "{folder}"), 50),
                  Step("requests at once", _script("gpu_throughput.py", "--folder", "{folder}"), 120)),
    }


def environment(installed: Path) -> dict[str, str]:
    """Of steps: kernels are compiled, no model is looked for on the network, and what was installed into the folder is found first."""
    path = [str(installed), *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1"}


def run_step(step: Step, folder: Path, env: Mapping[str, str], limit_s: float) -> Done:
    """Run it; what it started ends with it."""
    stem = step.name.replace(" ", "-")
    out, log = folder / f"{stem}.out", folder / f"{stem}.log"
    command = [sys.executable, *(a.replace("{out}", str(out)).replace("{folder}", str(folder)) for a in step.arguments)]
    begun = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=dict(env), cwd=SCRIPTS.parent,
                                   start_new_session=True)
        try:
            code = process.wait(timeout=limit_s)
            problem = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"not done in {limit_s:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - begun
    if problem:
        print("\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]))
    sections = [of_pytest(out, seconds)] if "pytest" in step.arguments else load(out)
    if not sections and not problem:
        problem = "wrote no results"
    return Done(step.name, problem, seconds, tuple(sections))


def of_pytest(file: Path, seconds: float) -> Section:
    """From the file that pytest writes for other programs."""
    title, columns = "Tests of the kernels", ("passed", "skipped", "failed", "s")
    if not file.exists():
        return Section(title, columns, (), (), ("the tests did not come to an end",))
    cases = list(ElementTree.parse(file).getroot().iter("testcase"))  # noqa: S314  # our own child wrote it
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [case.attrib["name"] for case in cases if case.find("failure") is not None or case.find("error") is not None]
    passed = len(cases) - skipped - len(names)
    return Section(title, columns, ((str(passed), str(skipped), str(len(names)), f"{seconds:.0f}"),), (),
                   tuple(names) or (() if passed else ("no test ran",)))


def run_parts(names: Sequence[str], folder: Path, env: Mapping[str, str], all_s: float = ALL_S) -> Iterator[Done]:
    """Run the steps of these parts one after the other, as long as there is time."""
    begun = time.monotonic()
    for name, steps in parts().items():
        for step in steps if name in names else ():
            left_s = all_s - (time.monotonic() - begun)
            print(f"{name}: {step.name} ...", flush=True)
            done = (run_step(step, folder, env, min(step.limit_s, left_s)) if left_s > 1
                    else Done(step.name, f"not run: all parts together have {all_s:.0f} s", 0.0))
            print(f"{name}: {step.name}: {done.problem or 'done'} ({done.seconds:.0f} s)", flush=True)
            yield done


def failed(done: Done) -> bool:
    """Whether it ended badly, or found something wrong."""
    return bool(done.problem) or any(section.failures for section in done.sections)


def report(done: Sequence[Done], machine: str) -> str:
    """Markdown: the machine, a line a step, every table."""
    summary = Section("Summary", ("step", "result", "s"), tuple(
        (d.name, d.problem or ("failed" if failed(d) else "passed"), f"{d.seconds:.0f}") for d in done))
    return "\n\n".join([f"Measured on {time.strftime('%Y-%m-%d')}: {machine}.", summary.markdown(),
                        *(section.markdown() for d in done for section in d.sections)]) + "\n"
