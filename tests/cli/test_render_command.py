"""``kvloom render`` shows what a chat becomes, from the tokenizer alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvloom import LLM
from kvloom.cli import main
from kvloom.demo import model_dir

QUESTION = {"role": "user", "content": "Could you work out 3 plus 4?"}


def test_text_and_ids_are_those_of_a_dry_run(capsys, tmp_path: Path) -> None:
    begun = [QUESTION, {"role": "assistant", "content": "3 plus"}]
    (tmp_path / "messages.json").write_text(json.dumps(begun))
    with LLM(str(model_dir()), dtype="float32") as llm:
        (asked,), (continued,) = (llm.chat([QUESTION], dry_run=True),
                                  llm.chat(begun, dry_run=True, add_generation_prompt=False, continue_final_message=True))
    capsys.readouterr()
    assert main(["render", str(model_dir()), QUESTION["content"]]) == 0
    assert capsys.readouterr().out == f"{asked.prompt}\n{' '.join(map(str, asked.prompt_token_ids))}\n"
    assert main(["render", str(model_dir()), "--messages", str(tmp_path / "messages.json"), "--continue-final-message", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"prompt": continued.prompt, "prompt_token_ids": continued.prompt_token_ids}


def test_another_template_and_tools_reach_the_template(capsys, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text('[{"name": "f"}]')
    assert main(["render", str(model_dir()), "x", "--chat-template", "{{ tools[0].name }}{{ messages[0].content }}", "--tools", str(tmp_path / "tools.json")]) == 0
    assert capsys.readouterr().out.startswith("fx\n")


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "give TEXT"), (["x", "--messages", "y"], "give TEXT"), (["--messages", "/nowhere"], "No such file"), (["x", "--chat-template", "nowhere"], "no file"),
    (["x", "--set", "skip_tokenizer_init=true"], "nothing to render with"), (["x", "--chat-template", "{% for %}"], "cannot be rendered"),
])
def test_a_mistake_is_one_line(capsys, arguments: list[str], message: str) -> None:
    assert main(["render", str(model_dir()), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_broken_json_is_named(capsys, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("{")
    assert main(["render", str(model_dir()), "--messages", str(tmp_path / "m.json")]) == 2
    assert "is no JSON" in capsys.readouterr().err
