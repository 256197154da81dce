"""``kvloom generate``: the prompt's sources, streaming, options, JSON, and mistakes in one line."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from kvloom import LLM, SamplingParams
from kvloom.cli import main
from kvloom.cli.generate import OPTIONS
from kvloom.cli.parser import make_parser

GREEDY = ["--temperature", "0", "--max-tokens", "12", "--set", "dtype=float32", "--param", "ignore_eos=true"]


@pytest.fixture(scope="module")
def expected(small_checkpoint: Path) -> str:
    with LLM(str(small_checkpoint), dtype="float32") as llm:
        return llm.generate("Hello", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)[0].outputs[0].text


def test_the_prompt_comes_from_the_argument_a_file_or_standard_input(small_checkpoint: Path, expected: str, tmp_path: Path, capsys,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompt.txt").write_text("Hello")
    for prompt in (["Hello"], ["--prompt-file", str(tmp_path / "prompt.txt")], ["-"], []):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        assert main(["generate", str(small_checkpoint), *prompt, *GREEDY]) == 0
        assert capsys.readouterr() == (expected + "\n", "")


def test_text_is_written_as_it_comes(small_checkpoint: Path, expected: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pieces: list[str] = []
    monkeypatch.setattr("kvloom.cli.generate.write", pieces.append)
    assert main(["generate", str(small_checkpoint), "Hello", *GREEDY]) == 0
    assert "".join(pieces) == expected
    assert len(pieces) >= 6


def test_a_stop_string_is_never_shown(small_checkpoint: Path, expected: str, capsys) -> None:
    stop = expected[3:6]
    assert main(["generate", str(small_checkpoint), "Hello", *GREEDY, "--stop", stop]) == 0
    assert capsys.readouterr().out == expected[:expected.index(stop)] + "\n"


def test_json_has_everything_of_the_request(small_checkpoint: Path, capsys) -> None:
    options = ["--n", "2", "--seed", "3", "--temperature", "1", "--logprobs", "1", "--max-tokens", "4", "--json", "--set", "dtype=float32"]
    assert main(["generate", str(small_checkpoint), "Hello", *options, "--param", "ignore_eos=true"]) == 0
    shown = json.loads(capsys.readouterr().out)
    with LLM(str(small_checkpoint), dtype="float32") as llm:
        (output,) = llm.generate("Hello", SamplingParams(n=2, seed=3, logprobs=1, max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert [c["token_ids"] for c in shown["outputs"]] == [c.token_ids for c in output.outputs]
    assert [c["text"] for c in shown["outputs"]] == [c.text for c in output.outputs]
    assert len(shown["outputs"][0]["logprobs"]) == 4
    assert shown["metrics"]["num_generation_tokens"] == 8
    assert shown["prompt_token_ids"] == output.prompt_token_ids


def test_several_completions_are_numbered(small_checkpoint: Path, capsys) -> None:
    assert main(["generate", str(small_checkpoint), "Hello", "--n", "2", "--max-tokens", "2", "--param", "allowed_token_ids=[65]"]) == 0
    assert capsys.readouterr().out == "[0] AA\n[1] AA\n"


def test_defaults_come_from_the_models_generation_config(small_checkpoint: Path, expected: str, capsys) -> None:
    settings = ["--set", "dtype=float32", "--set", "override_generation_config={temperature: 0.0, max_new_tokens: 12}"]
    assert main(["generate", str(small_checkpoint), "Hello", *settings, "--param", "ignore_eos=true"]) == 0
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(("arguments", "message"), [
    (["x", "--top-p", "7"], "top_p must be a finite number in (0.0, 1.0], got 7.0"), (["x", "--temperature", "nan"], "temperature must be a finite"),
    (["x", "--param", "top_q=1"], "SamplingParams has no such field; did you mean 'top_p'"), (["x", "--param", "n"], "expected NAME=VALUE"),
    (["x", "--prompt-file", "f"], "not both"), (["--prompt-file", "/nowhere"], "No such file"), (["x", "--set", "max_model_length=5"], "did you mean 'max_model_len'"),
    (["x", "--n", "2", "--temperature", "0"], "n and best_of must be 1"), (["x", "--logprobs", "21"], "asks for 21 candidates"),
    (["x" * 600], "longer than the maximum model length"), (["x", "--set", "load_format=foo"], "nothing is registered under loaders as 'foo'"),
])
def test_a_mistake_is_one_line_and_exit_code_2(small_checkpoint: Path, capsys, arguments: list[str], message: str) -> None:
    assert main(["generate", str(small_checkpoint), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvloom: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_terminal_is_not_waited_for(small_checkpoint: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(["generate", str(small_checkpoint)]) == 2
    assert "there is no prompt" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["generate"], ["nonsense"], [], ["generate", "m", "p", "--top-k", "x"], ["demo", "extra"]], ids=str)
def test_what_cannot_be_parsed_is_one_line_too(capsys, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bug_shows_no_traceback_unless_asked_for(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvloom.cli.config.read_config", lambda arguments, **more: 1 / 0)
    assert main(["config", "show"]) == 2
    assert capsys.readouterr().err == "kvloom: ZeroDivisionError: division by zero\n"
    with pytest.raises(ZeroDivisionError):
        main(["--debug", "config", "show"])


def test_every_sampling_option_is_one_of_the_parser() -> None:
    given = make_parser().parse_args(["generate", "m", "p"])
    assert set(OPTIONS) <= set(vars(given))


def in_a_terminal(*arguments: str) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "kvloom", *arguments], stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL,
                               env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"})
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # Linux says so when the other side is closed
            break
        if not piece:
            break
        shown += piece
    assert process.wait() == 0
    os.close(ours)
    return shown.decode()


def test_terminals_get_colours_and_headers_and_pipes_plain_rows(small_checkpoint: Path) -> None:
    shown = in_a_terminal("plugins", "list")
    assert "\x1b[" in shown
    assert "distribution" in shown
    piped = subprocess.run([sys.executable, "-m", "kvloom", "plugins", "list"], capture_output=True, text=True, check=True).stdout
    assert "\x1b[" not in piped
    assert "distribution" not in piped
    summary = in_a_terminal("generate", str(small_checkpoint), "Hello", "--max-tokens", "3")
    assert "6 prompt tokens, 3 output tokens" in summary
