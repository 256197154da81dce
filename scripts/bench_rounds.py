"""What `scripts/bench` runs: workloads, and the processes of engines that take turns in them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from bench_limits import Shape
from bench_models import model

HERE = Path(__file__).parent


class Engine(NamedTuple):
    """What takes part in a workload.

    Args:
        name: of `bench_engine`.
        options: further ones; fewer requests where the table wants no throughput of many.
        stays: in one process for all rounds, since starting it takes minutes.
        cold: without compiled kernels of ours. Only in the first round: compiling takes 20 s (on Zen 3) and is the same each time.
    """

    name: str
    options: tuple[str, ...] = ()
    stays: bool = False
    cold: bool = False


class Workload(NamedTuple):
    """Runs that take turns.

    Args:
        model: its name in `bench_models`.
        options: of `bench_engine`.
        engines: by a name in the table.
    """

    model: str
    options: tuple[str, ...]
    engines: dict[str, Engine]


KVLOOM, VLLM = Engine("kvloom"), Engine("vllm", stays=True)
WORKLOADS = {
    "mixed": Workload("llama-135m", (), {
        "kvloom": KVLOOM, "vllm": VLLM, "vllm eager": Engine("vllm", ("--eager", "--requests", "4")),
        "llama.cpp": Engine("llamacpp", ("--requests", "8")), "transformers": Engine("transformers"),
        "kvloom cold": Engine("kvloom", ("--requests", "4"), cold=True)}),
    "prefix": Workload("llama-135m", ("--prefix", "512"), {"kvloom": KVLOOM, "vllm": VLLM}),
    "qwen3": Workload("qwen3-0.6b", ("--requests", "32"), {"kvloom": KVLOOM, "vllm": VLLM}),
    "text": Workload("llama-135m-text", (), {"kvloom": KVLOOM, "kvloom, sampled, text": Engine("kvloom", ("--sampled", "--text"))}),
    "trace": Workload("llama-135m", ("--requests", "128", "--scale", "8"), {"kvloom": KVLOOM, "vllm": VLLM}),
}


Run = dict[str, Any]
"""A line of runs.jsonl: workload, name, version, dtype, round, figures, shape of the model; or, before those of a round, the machine,
its limits, workload and round. Older lines have no version, and no workload and round beside the machine."""


def interpreter(engine: str) -> str | None:
    """The Python that has an engine; None where it was not named."""
    variable = {"vllm": "KVLOOM_BENCH_VLLM", "llamacpp": "KVLOOM_BENCH_LLAMACPP", "transformers": "KVLOOM_BENCH_HF"}.get(engine)
    return sys.executable if variable is None else os.environ.get(variable, sys.executable if engine == "transformers" else None)


def figures_of(command: Sequence[str]) -> dict[str, float]:
    """What a script printed last. Ends this one with the script's own words if it failed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


class Process:
    """An engine's. It is halted between rounds: threads that wait busily would take the others' time."""

    def __init__(self, command: Sequence[str], errors: IO[str], environment: Mapping[str, str]) -> None:
        self._errors = errors
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                                         env=environment)

    def round(self, number: int) -> dict[str, Any]:
        """Its figures, and "version". Ends this script with the engine's own words if it failed."""
        stdin, stdout = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)
        self._process.send_signal(signal.SIGCONT)
        print(number, file=stdin, flush=True)
        for line in stdout:
            if line.startswith('{"'):  # engines may print more
                self._process.send_signal(signal.SIGSTOP)
                return cast("dict[str, Any]", json.loads(line))
        self._errors.seek(0)
        raise SystemExit(f"{self._process.args} failed:\n{self._errors.read()[-2000:]}")

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def process(command: Sequence[str], **variables: str) -> Iterator[Process]:
    """One that ends with the block, with further environment variables."""
    with tempfile.TemporaryFile("w+") as errors, closing(Process(command, errors, os.environ | variables)) as found:
        yield found


class Measurement:
    """All rounds of a workload, engines in turn."""

    def __init__(self, given: argparse.Namespace, name: str, resources: ExitStack) -> None:
        self._name, self._work, self._dtype, self._resources = name, WORKLOADS[name], given.vllm_dtype, resources
        self._directory = model(given.folder, self._work.model)
        self._options = [*self._work.options, *(["--trace", given.trace] if name == "trace" else [])]
        self._staying: dict[str, Process] = {}
        self._scratch = Path(resources.enter_context(tempfile.TemporaryDirectory()))

    def round(self, number: int) -> Iterator[Run]:
        """Each engine's run, after the machine's limits."""
        yield {"machine": machine(), "limits": figures_of([sys.executable, str(HERE / "bench_limits.py")]), "workload": self._name,
               "round": number}
        for label, engine in self._work.engines.items():
            if engine.cold and number:
                continue
            command = self._command(engine)
            figures = None if command is None else self._figures(label, engine, command, number)
            if figures is None:
                why = "no interpreter or model was named" if command is None else "its kernels cannot be compiled here"
                print(f"{self._name}: {label} left out, {why}")
                continue
            print(self._name, label, figures, flush=True)
            yield {"workload": self._name, "name": label, "version": figures.pop("version"), "dtype": self._dtype_of(engine),
                   "round": number, "figures": figures, "shape": vars(Shape(self._directory))}

    def _figures(self, label: str, engine: Engine, command: list[str], number: int) -> dict[str, Any] | None:
        """None of a cold engine that ran without compiled kernels."""
        if engine.cold:
            return self._cold_round(command, number)
        return self._staying_round(label, command, number) if engine.stays else self._one_round(engine, command, number)

    def _dtype_of(self, engine: Engine) -> str:
        return self._dtype if engine.name == "vllm" else "bfloat16"

    def _command(self, engine: Engine) -> list[str] | None:
        """None where the engine is missing."""
        python = interpreter(engine.name)
        file = os.environ.get("KVLOOM_BENCH_GGUF") if engine.name == "llamacpp" else str(self._directory)
        if not python or file is None:
            return None
        return [python, str(HERE / "bench_engine"), engine.name, file, *self._options, *engine.options,
                "--dtype", self._dtype_of(engine), "--stay"]

    def _staying_round(self, label: str, command: Sequence[str], number: int) -> dict[str, Any]:
        if label not in self._staying:
            self._staying[label] = self._resources.enter_context(process(command))
        return self._staying[label].round(number)

    def _cold_round(self, command: Sequence[str], number: int) -> dict[str, Any] | None:
        """In a process of its own, which finds no compiled kernels. One that compiles none runs in torch: that is no cold start."""
        with tempfile.TemporaryDirectory() as cache, process(command, XDG_CACHE_HOME=cache) as alone:
            figures = alone.round(number)
            return figures if any(Path(cache).rglob("kernels-*.so")) else None

    def _one_round(self, engine: Engine, command: list[str], number: int) -> dict[str, Any]:
        """In a process of its own. What is quick and wrong is not measured: the first tokens of ours are compared."""
        kept = self._scratch / "tokens"
        compares = engine == KVLOOM and not number
        with process([*command, *(["--tokens", str(kept)] if compares else [])]) as alone:
            figures = alone.round(number)
        return figures | (figures_of([sys.executable, str(HERE / "bench_tokens"), str(self._directory), str(kept)]) if compares else {})


def machine() -> str:
    """In words, with the day."""
    import torch

    from kvloom_kernels.linear import product_kind

    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return (f"Measured on {time.strftime('%Y-%m-%d')}: {len(os.sched_getaffinity(0))} cores of "
            f"{names[0] if names else platform.processor()} (bfloat16 products: {product_kind()}), "
            f"Python {platform.python_version()}, torch {torch.__version__}")
