"""`scripts/gpu_check` as far as it goes without a GPU: its calls, what it packs, its time limits, its tables."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import gpu_pack
import gpu_parts
import gpu_table
import pytest
from gpu_parts import Done, Step
from gpu_table import Section
from repository import ROOT

SCRIPTS = ROOT / "scripts"
TABLE = Section("A", ("x", "y"), (("1", "2|3"),), ("So.",))


def script_module(name: str):
    loader = SourceFileLoader(f"{name}_script", str(SCRIPTS / name))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def test_without_a_gpu_one_line_says_so_and_the_exit_code_is_2() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPTS / "gpu_check"), "bench"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "gpu_check needs a GPU: " in done.stderr


@pytest.mark.parametrize("name", ["gpu_exact.py", "gpu_graphs.py", "gpu_decode.py", "gpu_throughput.py", "bench_gpu_attention"])
def test_each_step_alone_says_that_there_is_no_gpu(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        script_module(name).main(["--folder", "x"] if name in ("gpu_decode.py", "gpu_throughput.py") else [])
    assert left.value.code == 2
    assert f"{name.removesuffix('.py')} needs a GPU: " in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "says"), [
    (["speed"], "there is no part 'speed': kernels, exact, graphs, bench"),
    (["--pack", "x", "bench"], "call it alone"),
    (["--pack", "x", "--write", "y"], "call it alone"),
    (["--wheels", "/nowhere/at/all"], "no such folder"),
    (["--write", "/nowhere/at/all"], "does not exist"),
    (["--fast"], "unrecognized arguments"),
])
def test_a_wrong_call_is_refused_before_anything_runs(arguments: list, says: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        script_module("gpu_check").main(arguments)
    assert left.value.code == 2
    assert says in capsys.readouterr().err


def test_what_the_target_lacks_goes_along_and_nothing_that_it_has() -> None:
    names = {entry.split("==")[0] for entry in gpu_pack.plan()}
    assert {"pydantic", "pydantic-core", "annotated-types", "structlog", "importlib-metadata", "zipp", "msgpack", "hypothesis",
            "typing-extensions"} <= names
    assert names.isdisjoint({"kvloom", "torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy", "pytest",
                             "pluggy", "jinja2", "pyyaml", "tqdm"})
    assert len(names) < 25


def test_wheels_are_asked_for_the_targets_python_and_never_built() -> None:
    arguments = gpu_pack.download_arguments(Path("there"), ["a==1", "b==2"])
    assert arguments[-4:] == ["--dest", "there", "a==1", "b==2"]
    assert arguments[arguments.index("--python-version") + 1] == "3.12"
    assert {"--no-deps", "--only-binary=:all:"} <= set(arguments)
    assert {"manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64"} <= set(arguments)


@pytest.fixture
def fake_pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Calls of pip; each puts a wheel of 1000 bytes where it was told to."""
    calls: list[list[str]] = []

    def pip(arguments: list[str]) -> None:
        calls.append(arguments)
        name = "kvloom-0.1.0" if arguments[0] == "wheel" else "else-1"
        folder = arguments[arguments.index("--wheel-dir" if arguments[0] == "wheel" else "--dest") + 1]
        (Path(folder) / f"{name}-py3-none-any.whl").write_bytes(bytes(1000))

    monkeypatch.setattr(gpu_pack, "pip", pip)
    return calls


def test_packing_says_what_to_carry_and_what_to_call(fake_pip: list, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "wheels"
    for _ in range(2):  # the second time there are wheels already
        assert gpu_pack.pack(folder) == 0
    said = capsys.readouterr().out
    assert f"Carry this checkout and {folder}" in said
    assert "scripts/gpu_check --wheels FOLDER" in said
    assert [arguments[0] for arguments in fake_pip] == ["download", "wheel"] * 2
    assert fake_pip[0][-len(gpu_pack.plan()):] == gpu_pack.plan()


def test_packing_refuses_a_folder_of_other_things_and_too_much(fake_pip: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                               capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(SystemExit):
        gpu_pack.pack(tmp_path)
    assert "letter.txt" in capsys.readouterr().err
    assert not fake_pip
    monkeypatch.setattr(gpu_pack, "MOST_BYTES", 1500)
    with pytest.raises(SystemExit):
        gpu_pack.pack(tmp_path / "wheels")
    assert "at most" in capsys.readouterr().err


def wheel_of_this_checkout(file: Path, change: dict[str, bytes | None]) -> Path:
    packages = ("framework/kvloom", "builtin_models/kvloom_models", "builtin_quant/kvloom_quant", "builtin_samplers/kvloom_samplers",
                "plugins/kvloom_plugins", "kernels/kvloom_kernels")
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("kvloom-0.1.0.dist-info/METADATA", "Name: kvloom")
        for package in packages:
            for path in sorted(p for p in (ROOT / package).rglob("*") if p.suffix in (".py", ".cpp", ".h")):
                name = f"{Path(package).name}/{path.relative_to(ROOT / package).as_posix()}"
                content = change.get(name, path.read_bytes())
                if content is not None:
                    wheel.writestr(name, content)
    return file


def test_a_wheel_of_another_state_of_the_checkout_is_noticed(tmp_path: Path) -> None:
    assert gpu_pack.stale(wheel_of_this_checkout(tmp_path / "same.whl", {})) is None
    assert gpu_pack.stale(wheel_of_this_checkout(tmp_path / "old.whl", {"kvloom/llm.py": b"pass"})) == "kvloom/llm.py"
    assert gpu_pack.stale(wheel_of_this_checkout(tmp_path / "less.whl", {"kvloom_models/llama.py": None})) == "kvloom_models/llama.py"
    kernel = f"kvloom_kernels/cpp/{sorted((ROOT / 'kernels/kvloom_kernels/cpp').glob('*.cpp'))[0].name}"
    assert gpu_pack.stale(wheel_of_this_checkout(tmp_path / "kernel.whl", {kernel: b"//"})) == kernel


def test_a_folder_without_one_wheel_of_ours_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        gpu_pack.install(tmp_path, tmp_path / "target")
    assert "0 wheels of kvloom" in capsys.readouterr().err


def test_a_stale_wheel_is_not_installed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    wheel_of_this_checkout(tmp_path / "kvloom-0.1.0-py3-none-any.whl", {"kvloom/llm.py": b"pass"})
    with pytest.raises(SystemExit):
        gpu_pack.install(tmp_path, tmp_path / "target")
    assert "kvloom/llm.py differs" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def distributions(folder: Path, **requires: list[str]) -> list[str]:
    for name, (version, *needs) in requires.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("\n".join([f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}",
                                                  *(f"Requires-Dist: {need}" for need in needs)]) + "\n")
    return [str(folder)]


def test_what_is_missing_or_too_old_is_named_whoever_needs_it(tmp_path: Path) -> None:
    path = distributions(tmp_path, kvloom=["0.1.0", "alpha>=2", "beta", "other; extra == 'test'"], alpha=["1.9"], beta=["1", "gamma<3"],
                         hypothesis=["6"], pytest=["9"], triton=["3.6", "never-looked-at"])
    assert gpu_pack.missing(path) == ["alpha 1.9 is installed, >=2 is needed", "gamma is not installed"]
    assert "--wheels" in gpu_pack.missing([])[0]
    assert gpu_pack.missing(sys.path) == []


def test_a_table_is_markdown_and_survives_its_file(tmp_path: Path) -> None:
    assert TABLE.markdown() == "### A\n\n| x | y |\n|---|---|\n| 1 | 2/3 |\n\nSo."
    wrong = Section("B", ("x",), (), (), ("too slow",))
    assert wrong.markdown() == "### B\n**Failed**: too slow"
    gpu_table.save([TABLE, wrong], tmp_path / "t")
    assert gpu_table.load(tmp_path / "t") == [TABLE, wrong]
    assert gpu_table.load(tmp_path / "none") == []
    with pytest.raises(ValueError, match="2 cells"):
        Section("A", ("x", "y"), (("1",),))


@pytest.mark.parametrize(("text", "expected"), [
    (gpu_table.percent(0.876), "88%"), (gpu_table.percent(None), "-"), (gpu_table.microseconds(12.34e-6), "12.3"),
    (gpu_table.microseconds(0.0123), "12300"), (gpu_table.microseconds(None), "-"), (gpu_table.ratio(3.0, 2.0), "1.50"),
    (gpu_table.ratio(None, 2.0), "-"), (gpu_table.ratio(1.0, None), "-")])
def test_figures_are_short_and_what_was_not_measured_is_a_dash(text: str, expected: str) -> None:
    assert text == expected


def step(code: str, limit_s: float = 30) -> Step:
    return Step("a step", ("-c", f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n{code}", "{out}"), limit_s)


def run(one: Step, tmp_path: Path, limit_s: float = 30) -> Done:
    return gpu_parts.run_step(one, tmp_path, dict(os.environ), limit_s)


def test_a_step_gives_its_tables(tmp_path: Path) -> None:
    code = "from gpu_table import Section, finish\nsys.exit(finish([Section('A', ('x', 'y'), (('1', '2|3'),), ('So.',))], sys.argv[1]))"
    done = run(step(code), tmp_path)
    assert (done.problem, done.sections) == ("", (TABLE,))
    assert not gpu_parts.failed(done)


def test_a_step_that_fails_or_writes_nothing_is_told_with_what_it_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    done = run(step("print('no such thing'); sys.exit(3)"), tmp_path)
    assert done.problem == "exit code 3"
    assert "no such thing" in capsys.readouterr().out
    assert run(step("pass"), tmp_path).problem == "wrote no results"


def ends(pid: int, within_s: float = 20) -> bool:
    """The process is over; a signal takes a while to be obeyed on a busy machine."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(process):
        return bool(select.select([process], [], [], within_s)[0])


def test_a_step_that_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    begun = time.monotonic()
    child = tmp_path / "child"
    code = (f"import subprocess, time\np = subprocess.Popen(['sleep', '60'])\nopen({str(child)!r}, 'w').write(str(p.pid))\ntime.sleep(60)")
    done = run(step(code), tmp_path, 4)
    assert done.problem == "not done in 4 s"
    assert time.monotonic() - begun < 20
    assert ends(int(child.read_text()))


def test_all_parts_together_stay_within_8_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(s.limit_s for steps in gpu_parts.parts().values() for s in steps) <= gpu_parts.ALL_S <= 480
    slow = {"one": (Step("first", ("-c", "import time; time.sleep(60)"), 60), Step("second", ("-c", "pass"), 60)), "two": ()}
    monkeypatch.setattr(gpu_parts, "parts", lambda: slow)
    first, second = gpu_parts.run_parts(["two", "one"], tmp_path, dict(os.environ), 2.5)
    assert first.problem == "not done in 2 s"
    assert "not run" in second.problem
    assert list(gpu_parts.run_parts(["two"], tmp_path, dict(os.environ))) == []


def test_every_step_is_a_file_that_there_is() -> None:
    for steps in gpu_parts.parts().values():
        for one in steps:
            files = [a for a in one.arguments if a.startswith("/")]
            assert files
            assert all(Path(f).exists() for f in files)
            assert "{out}" in one.arguments


def test_tests_are_counted_and_those_that_fail_named(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text("import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n"
                                        "@pytest.mark.skip(reason='x')\ndef test_skipped(): pass\n")
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", "out.xml", "test_x.py"], cwd=tmp_path,
                   capture_output=True)
    found = gpu_parts.of_pytest(tmp_path / "out.xml", 7.0)
    assert (found.rows, found.failures) == ((("1", "1", "1", "7"),), ("test_bad",))
    assert gpu_parts.of_pytest(tmp_path / "none.xml", 7.0).failures


def test_the_report_has_a_line_a_step_and_every_table() -> None:
    text = gpu_parts.report([Done("good", "", 3.2, (TABLE,)), Done("late", "not done in 9 s", 9.0),
                             Done("wrong", "exit code 1", 1.0, (Section("B", ("x",), (), (), ("NaN",)),))], "a card")
    assert ": a card." in text.splitlines()[0]
    for line in ("| good | passed | 3 |", "| late | not done in 9 s | 9 |", "| wrong | exit code 1 | 1 |", "### A", "**Failed**: NaN"):
        assert line in text


def test_kernels_that_spill_or_want_too_much_shared_memory_are_refused() -> None:
    pytest.importorskip("triton", reason="needs triton: install kvloom[gpu]")
    # In a process of its own: the script's kernels are compiled, those of other tests interpreted.
    code = f"""
import json
from importlib.machinery import SourceFileLoader
script = SourceFileLoader("script", {str(SCRIPTS / "compile_gpu_kernels")!r}).load_module()
print(json.dumps([script.complaint(script.Usage(*usage), capability) for *usage, capability in
                  ((255, 0, 1000, 80), (255, 8, 1000, 80), (64, 0, 200_000, 80), (64, 0, 200_000, 90))]))
wide = script.attend_variant("fp32", 128, 512)
wide.constants.update(QUERIES=16, KEYS=32)
print(script.usage(script.compiled(wide, 90)).stack_bytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    complaints, stack_bytes = done.stdout.splitlines()
    assert json.loads(complaints) == ["", "spills", f"more than {163 * 1024} bytes of shared memory", ""]
    assert int(stack_bytes) > 0, "tiles that no registers hold are seen to spill"


def test_results_are_written_as_they_come_and_the_exit_code_says_whether_all_is_well(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    module, file = script_module("gpu_check"), tmp_path / "results.md"
    steps: list[Done] = []

    def run_parts(names: list[str], folder: Path, env: dict[str, str]) -> Iterator[Done]:
        for done in steps:
            yield done
            assert done.name in file.read_text()

    for name, value in (("need_gpu", lambda program: None), ("description", lambda: "a card"), ("run_parts", run_parts)):
        monkeypatch.setattr(module, name, value)
    steps += [Done("first", "", 1.0, (TABLE,)), Done("second", "", 2.0, (TABLE,))]
    assert module.main(["--write", str(file)]) == 0
    assert file.read_text() in capsys.readouterr().out
    steps.append(Done("third", "exit code 1", 2.0))
    assert module.main(["bench", "--write", str(file)]) == 1
    assert "| third | exit code 1 | 2 |" in file.read_text()


def test_nothing_runs_where_something_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    module = script_module("gpu_check")
    for name, value in (("need_gpu", lambda program: None), ("missing", lambda path: ["zeta is not installed"]), ("run_parts", None)):
        monkeypatch.setattr(module, name, value)
    with pytest.raises(SystemExit) as left:
        module.main([])
    assert left.value.code == 1
    assert "zeta is not installed" in capsys.readouterr().err
