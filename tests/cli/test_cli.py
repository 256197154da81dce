"""The command line: quick answers without torch, one clear line on a mistake, and a plan that the engine agrees with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvloom import LLM, SamplingParams, __version__
from kvloom.cli import main
from kvloom.errors import MemoryPlanError
from kvloom.runtime.host_memory import DeviceMemory


def kvloom(*arguments: str, code: str = "") -> subprocess.CompletedProcess:
    """In a process of its own; `code` runs after the command."""
    program = f"import sys; from kvloom.cli import main\ntry:\n    status = main(sys.argv[1:])\nexcept SystemExit as e:\n    status = e.code\n{code}\nsys.exit(status)"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ})


@pytest.mark.parametrize("arguments", [("--version",), ("plugins", "list"), ("plugins", "list", "--json"), ("plugins", "show", "kvloom-models"),
                                       ("config", "show")], ids=" ".join)
def test_answers_that_need_no_torch_import_none(arguments: tuple[str, ...]) -> None:
    done = kvloom(*arguments, code="print('torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)")
    assert done.returncode == 0
    assert done.stderr.strip() == "False False"
    assert done.stdout


def test_listing_plugins_imports_none_of_them() -> None:
    done = kvloom("plugins", "list", code="print([m for m in sys.modules if m.startswith('kvloom_') and 'plugin' in m], file=sys.stderr)")
    assert done.stderr.strip() == "[]"


def test_version(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"kvloom {__version__}\n"


def test_plugins_are_listed_with_their_status(install, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme", {"acme": "raise RuntimeError"})
    assert main(["plugins", "list"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^kvloom-models +kvloom \S+ +built-in +kvloom_models\.plugin$", out, re.MULTILINE)
    assert re.search(r"^acme +acme 1\.0 +enabled +acme_0$", out, re.MULTILINE)
    monkeypatch.setenv("KVLOOM_PLUGINS", "")
    main(["plugins", "list", "--json"])
    listed = {p["plugin"]: p for p in json.loads(capsys.readouterr().out)}
    assert listed["acme"]["status"] == "not enabled"
    assert listed["acme"]["version"] == "1.0"


def test_a_plugin_is_shown_with_what_it_offers(capsys) -> None:
    assert main(["plugins", "show", "kvloom-schedulers", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {(o["kind"], o["name"]) for o in shown["offers"]} == {("schedulers", "fcfs"), ("schedulers", "priority")}
    assert shown["contracts"] == {"schedulers": 0}


def test_the_configuration_is_shown_with_origins_and_without_secrets(tmp_path: Path, capsys) -> None:
    file = tmp_path / "e.yaml"
    file.write_text("model: m\nhf_token: very-secret\n")
    assert main(["config", "show", "--file", str(file), "--set", "max-num-seqs=7"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^max_num_seqs +7 +argument$", out, re.MULTILINE)
    assert re.search(rf"^model +'m' +{re.escape(str(file))}:1$", out, re.MULTILINE)
    assert "very-secret" not in out


@pytest.mark.parametrize(("arguments", "message"), [
    (["plugins", "show", "nobody"], "no plugin 'nobody' is installed"), (["plan", "/nowhere"], "is no directory"),
    (["plan", "m", "--set", "max_num_seqs"], "expected NAME=VALUE"), (["config", "show", "--set", "max_num_seq=1"], "did you mean 'max_num_seqs'"),
    (["config", "show", "--file", "/nowhere.yaml"], "cannot be read"), (["config", "show", "--set", "max_num_seqs=0"], "max_num_seqs=0"),
])
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments: list[str], message: str) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvloom: ")
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_debug_shows_the_traceback(capsys) -> None:
    with pytest.raises(ValueError, match="is no directory"):
        main(["--debug", "plan", "/nowhere"])


def test_a_plan_is_what_the_engine_does(small_checkpoint: Path, capsys) -> None:
    assert main(["plan", str(small_checkpoint), "--set", "dtype=float32", "--set", "kv_cache_memory=1MiB"]) == 0
    out = capsys.readouterr().out
    with LLM(str(small_checkpoint), dtype="float32", kv_cache_memory="1MiB") as llm:
        plan = llm.llm_engine.plan
        model_bytes = sum(sum(p.numel() * p.itemsize for p in m) for m in llm.apply_model(lambda m: list(m.parameters())))
    assert f"{plan.num_blocks} blocks" in out
    assert plan.needs.weights_bytes == model_bytes
    assert "fits:" in out
    for row in ("weights", "activations", "KV cache of one token", "KV cache budget", "free on the device"):
        assert row in out


def suggestions(table: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(max_model_len|kv_cache_memory|num_gpu_blocks_override)=(\d+)", table.splitlines()[-1])}


@pytest.mark.parametrize("values", [{"kv_cache_memory": "16KiB"}, {"kv_cache_memory": "1TiB"}, {"num_gpu_blocks_override": 10**9}], ids=str)
def test_the_engines_refusal_is_the_plans_table_and_each_suggested_value_works(small_checkpoint: Path, capsys, values: dict,
                                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvloom.runtime.device.host_memory", lambda: DeviceMemory(256 * 2**20, 64 * 2**20))
    with pytest.raises(MemoryPlanError) as caught:
        LLM(str(small_checkpoint), dtype="float32", **values)
    options = [f"--set={name}={value}" for name, value in values.items()]
    assert main(["plan", str(small_checkpoint), "--set", "dtype=float32", *options]) == 1
    assert capsys.readouterr().out.split("\n", 1)[1] == f"{caught.value}\n"
    found = suggestions(str(caught.value))
    assert found
    for name, value in found.items():
        with LLM(str(small_checkpoint), dtype="float32", **{**values, name: value}) as llm:
            assert llm.llm_engine.plan.problem is None
            assert llm.generate("a", SamplingParams(max_tokens=2), use_tqdm=False)[0].finished


def test_a_plan_reads_headers_only(small_checkpoint: Path, tmp_path: Path, capsys) -> None:
    """A sparse file of 40 GiB has a plan in no time, and a truncated one is refused."""
    header = json.dumps({"model.embed_tokens.weight": {"dtype": "F32", "shape": [2**24, 640], "data_offsets": [0, 2**24 * 640 * 4]}}).encode()
    (tmp_path / "config.json").write_text((small_checkpoint / "config.json").read_text())
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**24 * 640 * 4)
    assert main(["plan", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "model.embed_tokens.weight: [16777216, 640], the model needs [288, 64]" in error
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert main(["plan", str(tmp_path)]) == 2
    assert "damaged or was not downloaded completely" in capsys.readouterr().err
