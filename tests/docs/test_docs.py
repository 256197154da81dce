"""The documentation says what is there, and nothing else."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from repository import ROOT, load_script

import kvloom
import kvloom.cli
import kvloom.errors
import kvloom.interfaces as interfaces
from kvloom import LLM, SamplingParams
from kvloom.hooks.specs import KINDS, OBSERVERS, HookSpecs


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_script("generate_docs")


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/api.md", "docs/errors.md"])
def test_generated_parts_are_current(generator: ModuleType, page: str) -> None:
    text = (ROOT / page).read_text()
    assert text == generator.updated(page, text), "run: python scripts/generate_docs.py"


def test_every_row_has_a_test(generator: ModuleType) -> None:
    assert generator.missing() == [], "name a test test_<row>__<behaviour>"


def test_the_demo_prints_what_the_readme_shows(capsys: pytest.CaptureFixture) -> None:
    shown = (ROOT / "README.md").read_text().partition("$ kvloom demo\n")[2].partition("```")[0]
    assert kvloom.cli.main(["demo"]) == 0
    assert capsys.readouterr().out.split() == shown.split()


def test_every_test_that_a_page_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/api.md").read_text())
    assert len(named) > 100
    defined = {path: (ROOT / path).read_text() for path, _ in named}
    assert [f"{path}::{name}" for path, name in named if f"\ndef {name}(" not in defined[path]] == []


def test_the_named_processor_of_the_api_page_works_as_it_is_printed(install, small_checkpoint: Path) -> None:
    (source,) = re.findall(r"```python\n# my_package/plugin.py.*?\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.DOTALL)
    (asked,) = re.findall(r"`(SamplingParams\(extra_args=.*?\))` asks for it", (ROOT / "docs/api.md").read_text())
    install("acme", {"my-plugin": source.replace("my_package.plugin", "acme_0")})
    params = eval(asked, {"SamplingParams": SamplingParams})
    with LLM(str(small_checkpoint)) as llm:
        (output,) = llm.generate("a", params, use_tqdm=False)
        assert output.outputs[0].text.isdecimal()
        with pytest.raises(ValueError, match=r"last: Field required \(its parameters: first, last\)"):
            llm.generate("a", SamplingParams(extra_args={"only-range": {"first": 1}}), use_tqdm=False)


def test_every_contract_name_in_the_feature_table_exists() -> None:
    page = (ROOT / "docs/architecture.md").read_text().split("## What carries the later features")[1].split("\n## ")[0]
    for name, member in re.findall(r"`([A-Z]\w+)(?:\.(\w+))?", page):
        if name in ("RECURRENT", "FULL", "WINDOW"):
            continue
        contract = getattr(interfaces, name)
        fields = {*dir(contract), *getattr(contract, "__annotations__", {}), *getattr(contract, "__dataclass_fields__", {})}
        assert not member or member in fields, f"{name}.{member}"


def sections(page: str) -> dict[str, str]:
    return {part.split("\n")[0]: part for part in re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE)[1:]}


def specs() -> dict[str, str]:
    """Hook -> signature."""
    found = {name: value for name, value in vars(HookSpecs).items() if name.startswith("kvloom_")}
    return {name: f"{name}{inspect.signature(value)}".replace("self, ", "").replace("'", "") for name, value in found.items()}


def test_the_specs_are_the_table_of_kinds_and_the_observers() -> None:
    assert list(specs()) == [*(kind.hook for kind in KINDS.values()), *OBSERVERS]


def test_every_hook_has_a_section_with_its_exact_signature_and_no_other_is_described() -> None:
    described = {name: text for name, text in sections("docs/hooks.md").items() if name.startswith("kvloom_")}
    assert list(described) == list(specs())
    for name, signature in specs().items():
        assert described[name].split("\n")[1] == f"`{signature}`"
        for part in ("**when**", "**returning nothing**", "**used by**", "```python"):
            assert part in described[name], f"{name}: {part}"
        if name not in OBSERVERS:
            kind = KINDS[name.removeprefix("kvloom_register_")]
            assert f"contract version {kind.version}" in described[name]
            for contract in kind.contracts:
                assert f"`kvloom.interfaces.{contract}`" in described[name]


def test_the_plugin_of_the_hooks_page_works_as_it_is_printed(install, tmp_path: Path, small_checkpoint: Path) -> None:
    blocks = re.findall(r"```python\n# (my_package/\w+\.py)\n(.*?)```", (ROOT / "docs/hooks.md").read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == ["my_package/plugin.py", "my_package/policy.py"]
    install("acme", {"my-plugin": blocks[0][1].replace("my_package.policy", "acme_policy")})
    (tmp_path / "site/acme_policy.py").write_text(blocks[1][1])
    with LLM(str(small_checkpoint), scheduling_policy="shortest-first", max_num_seqs=1) as llm:
        outputs = llm.generate([[1] * 20, [1] * 3], SamplingParams(max_tokens=2), use_tqdm=False)
    assert outputs[1].metrics.first_token_time < outputs[0].metrics.first_token_time


def test_the_readmes_code_runs_as_it_is_printed(small_checkpoint: Path, capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(code.replace("path/to/checkpoint", str(small_checkpoint)), "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "The capital of France is -> " in out
    assert "start report" in out


def test_the_readmes_commands_are_there(small_checkpoint: Path, capsys) -> None:
    commands = re.findall(r"^    (scripts/\w+|kvloom [^#\n]*)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [c for c in commands if c.startswith("scripts/")] == ["scripts/demo", "scripts/test"]
    for command in commands:
        if command.startswith("scripts/"):
            assert (ROOT / command).stat().st_mode & 0o111
        else:
            arguments = shlex.split(command.replace("path/to/checkpoint", str(small_checkpoint)))[1:]
            assert kvloom.cli.main(arguments) == 0, command
    assert capsys.readouterr().out


def test_every_page_that_is_linked_exists() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_error_page_draws_every_class() -> None:
    drawn = set(re.findall(r"(\w+Error)\b", (kvloom.errors.__doc__ or "").split("\n\n")[1]))
    there = {n for n, v in vars(kvloom.errors).items() if isinstance(v, type) and issubclass(v, Exception) and not n.startswith("_")}
    assert there <= drawn


@pytest.mark.parametrize("name", kvloom.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(kvloom, name) is not None
    assert name in dir(kvloom)


def test_public_names_are_sorted_and_unknown_ones_an_attribute_error() -> None:
    assert sorted(kvloom.__all__) == sorted(set(kvloom.__all__))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = kvloom.Nothing


def test_nothing_names_this_machine() -> None:
    """Committed files name no absolute path of a home, a package registry's host or a session."""
    for path in ROOT.rglob("*"):
        relative = path.relative_to(ROOT)
        if path.suffix in (".py", ".md", ".toml", ".cpp", ".h", ".txt") and not relative.parts[0].startswith("."):
            text = path.read_text()
            assert not re.search(r"/(root|home)/\w+|/work/(main|shared)", text), relative
