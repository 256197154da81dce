"""Write the parts of docs/ that follow from the code: module list, tables with each row's test, error tree. A test checks that they
are current.

    python scripts/generate_docs.py

A row's test is found by its name: ``test_max_num_seqs__bounds_what_runs_at_once`` is one of ``max_num_seqs``.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from typing import Any

import kvloom.errors
from kvloom.beam_outputs import BeamSearchOutput, BeamSearchSequence
from kvloom.config import OTHER_ARGS, RENAMED, SECTIONS, TASK_ARGS, NoEffect, Unsupported
from kvloom.config.compat import OTHER_ENGINE_ATTRIBUTES, OTHER_METHODS
from kvloom.config.pooler import PoolerConfig
from kvloom.errors import RequestError, UnsupportedFeatureError
from kvloom.llm import LLM
from kvloom.other_arguments import OTHER_ARGUMENTS
from kvloom.outputs import CompletionOutput, Logprob, RequestOutput
from kvloom.params import BeamSearchParams, PoolingParams, SamplingParams
from kvloom.pooling_calls import PoolingCalls
from kvloom.structured_outputs import StructuredOutputsParams

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = ("framework", "builtin_models", "builtin_quant", "builtin_samplers", "plugins", "kernels")

NO_TEST = "**no test**"
TRANSCRIPT_WIDTH = 120
UNDOCUMENTED: dict[str, dict[str, str]] = {
    "Logprob": {"logprob": "natural logarithm of its probability", "rank": "1 is the most probable token",
                "decoded_token": "its text, for people; U+FFFD where it is no whole character"},
    "CompletionOutput": {"lora_request": "None: no adapters so far"},
}
"""Meanings of fields that their class's docstring does not list one by one."""


def modules() -> str:
    """One line a module: the first line of its docstring."""
    out = []
    for source_root in SOURCE_ROOTS:
        out.append(f"\n{source_root}/\n")
        for path in sorted((ROOT / source_root).rglob("*.py")):
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            if not docstring:
                raise SystemExit(f"{path.relative_to(ROOT)} has no docstring")
            out.append(f"- `{path.relative_to(ROOT / source_root)}` {docstring.split(chr(10) * 2)[0].replace(chr(10), ' ')}")
    return "\n".join(out).lstrip()


def parameters() -> str:
    """The constructor's parameters with default, state and test."""
    rows = ["| parameter | default | state | meaning | test |", "|---|---|---|---|---|"]
    for section in SECTIONS.values():
        for name, field in section.model_fields.items():
            default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)!r}`"
            state, meaning = section.state(name), _cell(field.description or "")
            works = _state(state) + _not_yet(section.not_yet(name))
            rows.append(f"| `{name}` | {default} | {works} | {meaning} | {_test_of_state(name, state)} |")
    return "\n".join(rows)


def other_parameters() -> str:
    """vLLM's names that are no parameters of their own here."""
    rows = ["| name | taken values | state | test |", "|---|---|---|---|"]
    rows += [f"| `{old}` | as `{new}` | works, with a note | {_test('names_of_other_versions')} |" for old, new in RENAMED.items()]
    rows += [f"| `{name}` | {', '.join(f'`{v!r}`' for v in tasks)} | works, as `task` does | {_test(name)} |"
             for name, tasks in TASK_ARGS.items()]
    for name, other in OTHER_ARGS.items():
        more = other.state.values if isinstance(other.state, Unsupported) else ()
        taken = "any" if isinstance(other.state, NoEffect) else ", ".join(f"`{v!r}`" for v in (other.default, *more))
        rows.append(f"| `{name}` | {taken} | {_state(other.state)} | {_test_of_state(name, other.state)} |")
    return "\n".join(rows)


def sampling() -> str:
    """Fields of SamplingParams with default, state and test."""
    rows, meanings = ["| field | default | state | meaning | test |", "|---|---|---|---|---|"], _meanings(SamplingParams)
    for field in fields(SamplingParams):
        state = "works" if _is_taken(field.name) else "unsupported so far"
        rows.append(f"| `{field.name}` | {_default(field)} | {state} | {meanings[field.name]} | {_test(field.name, 'tests/api/')} |")
    return "\n".join(rows)


def methods() -> str:
    """Methods and properties of `LLM`, with their arguments: meaning and test of each."""
    rows = ["| method, or its argument | default | meaning | test |", "|---|---|---|---|"]
    for name, member in _public_members().items():
        rows.append(f"| `{name}` | | {_summary(member)} | {_test(name, f'tests/api/test_{name}_rows')} |")
        if isinstance(member, property):
            continue
        meanings = (_argument_meanings(PoolingCalls) if name in vars(PoolingCalls) else {}) | _argument_meanings(member)
        for argument, parameter in inspect.signature(member).parameters.items():
            if argument != "self":
                is_required = parameter.default is parameter.empty or type(parameter.default) is object
                default = "" if is_required else f"`{parameter.default!r}`"
                test = _test_of_argument(name, argument, is_required=is_required)
                rows.append(f"| `{name}` `{argument}` | {default} | {meanings.get(argument, '')} | {test} |")
    return "\n".join(rows)


def other_methods() -> str:
    """Methods of other versions of vLLM, attributes of its engine, and arguments of methods that are here."""
    rows = ["| method, attribute or argument | instead | test |", "|---|---|---|"]
    rows += [f"| `{name}` | {_cell(instead)} | {_test('methods_of_other_versions')} |" for name, instead in OTHER_METHODS.items()]
    rows += [f"| `llm_engine.{name}` | {_cell(instead)} | {_test('llm_engine_of_other_versions')} |"
             for name, instead in OTHER_ENGINE_ATTRIBUTES.items()]
    test = _test("arguments_of_other_versions")
    rows += [f"| `{method}` `{name}` | only `{field.default!r}` is taken; {_cell(field.instead)} | {test} |"
             for method, other in OTHER_ARGUMENTS.items() for name, field in other.items()]
    return "\n".join(rows)


def _public_members() -> dict[str, Any]:
    """What `LLM` and its bases define, in the order of the source, without the flags."""
    defined = (name for cls in LLM.__mro__[:-1] for name in vars(cls))
    return {name: getattr(LLM, name) for name in defined if not name.startswith("_") and not name.isupper()}


def _summary(member: Any) -> str:
    """First sentence of a docstring."""
    text = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split())
    return _cell(text.split(". ")[0].removesuffix(".").replace("``", "`"))


def _argument_meanings(member: Any) -> dict[str, str]:
    """Argument -> its meaning in the section Args of a docstring; several may share one entry."""
    section = (inspect.getdoc(member) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    found = {}
    for entry in re.split(r"\n {4}(?=\w)", f"\n{section}")[1:]:
        names, _, meaning = entry.partition(": ")
        found.update(dict.fromkeys(names.split(", "), _cell(" ".join(meaning.split()).replace("``", "`").removesuffix("."))))
    return found


def _test_of_argument(method: str, argument: str, *, is_required: bool) -> str:
    """A test of the method, or of all pooling methods, that has the argument in its name, else one that gives it by keyword; of an
    argument that every test must give, the method's first."""
    shared = _tests().get("pooling_methods", []) if method in vars(PoolingCalls) else []
    for tests in (_tests().get(method, []), shared):
        by_name = [t for t in tests if f"_{argument}_" in f"{t.partition('::')[2].replace('__', '_')}_"]
        by_keyword = [t for t in tests if re.search(rf'\b{argument}=|"{argument}"', _sources()[t])]
        if found := by_name or by_keyword:
            return f"`{found[0]}`"
    return _test(method, "tests/api/") if is_required else NO_TEST


def beam_search() -> str:
    """Fields of BeamSearchParams with default and test."""
    rows, meanings = ["| field | default | meaning | test |", "|---|---|---|---|"], _meanings(BeamSearchParams)
    for field in fields(BeamSearchParams):
        test = _test(f"beam_search_params_{field.name}", "tests/api/")
        rows.append(f"| `{field.name}` | {_default(field)} | {meanings[field.name]} | {test} |")
    return "\n".join(rows)


def pooling() -> str:
    """Fields of PoolingParams with default and test."""
    rows, meanings = ["| field | default | meaning | test |", "|---|---|---|---|"], _meanings(PoolingParams)
    rows += [f"| `{field.name}` | {_default(field)} | {meanings[field.name]} | {_test(f'pooling_{field.name}')} |"
             for field in fields(PoolingParams)]
    return "\n".join(rows)


def pooler() -> str:
    """Fields of PoolerConfig with test."""
    rows, meanings = ["| field | meaning | test |", "|---|---|---|"], _documented(PoolerConfig)
    rows += [f"| `{name}` | {meanings[name]} | {_test(f'pooler_{name}')} |" for name in PoolerConfig.model_fields]
    return "\n".join(rows)


def output_fields(cls: type, prefix: str) -> str:
    """Fields of an output class; `prefix` is what the names of its tests begin with."""
    rows, meanings = ["| field | meaning | test |", "|---|---|---|"], _meanings(cls)
    rows += [f"| `{field.name}` | {meanings[field.name]} | {_test(f'{prefix}_{field.name}', 'tests/api/')} |" for field in fields(cls)]
    return "\n".join(rows)


def error_tree() -> str:
    """The tree that errors.py draws."""
    return f"```\n{(kvloom.errors.__doc__ or '').split(chr(10) * 2)[1]}\n```"


def transcript() -> str:
    """What ``kvloom demo`` prints, wrapped as a terminal would."""
    done = subprocess.run([sys.executable, "-m", "kvloom", "demo"], capture_output=True, text=True, check=True)
    lines = [wrapped for line in done.stdout.strip().splitlines() for wrapped in textwrap.wrap(line, TRANSCRIPT_WIDTH) or [""]]
    return "\n".join(["```", "$ kvloom demo", *lines, "```"])


def _state(state: NoEffect | Unsupported | None) -> str:
    if isinstance(state, NoEffect):
        return f"{f'works on {state.works_on}; else ' if state.works_on else ''}no effect: {_cell(state.reason)}"
    if isinstance(state, Unsupported):
        works = f" (`{'`, `'.join(map(repr, state.values))}` too)" if state.values else ""
        return f"unsupported so far unless the default{works}: {_cell(state.works)}"
    return "works"


def _not_yet(values: Mapping[Any, str]) -> str:
    """What is said of values that come later."""
    by_instead: dict[str, list[str]] = {}
    for value, instead in values.items():
        by_instead.setdefault(instead, []).append(f"`{value!r}`")
    return "".join(f"; {', '.join(names)} unsupported so far: {_cell(instead)}" for instead, names in by_instead.items())


def _test_of_state(name: str, state: NoEffect | Unsupported | None) -> str:
    if isinstance(state, NoEffect):
        return _test("parameters_without_effect")
    return _test("unsupported_parameters") if isinstance(state, Unsupported) else _test(name)


def _test(subject: str, folder: str = "tests/config/") -> str:
    """Where the first test of `subject` is: in `folder` if there is one (``seed`` is a parameter and a field), else anywhere."""
    found = _tests().get(subject, [])
    return next((f"`{test}`" for test in sorted(found, key=lambda test: not test.startswith(folder))), NO_TEST)


@cache
def _tests() -> dict[str, list[str]]:
    """Subject -> ``path::name`` of its tests, in the order of files and lines. ``test_n__more_than_one`` is one of ``n``."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and (match := re.fullmatch(r"test_(\w+?)__\w+", node.name)):
                found.setdefault(match[1], []).append(f"{path.relative_to(ROOT).as_posix()}::{node.name}")
    return found


@cache
def _sources() -> dict[str, str]:
    """``path::name`` of every test -> its source."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                lines = text.splitlines()[first - 1:node.end_lineno]
                found[f"{path.relative_to(ROOT).as_posix()}::{node.name}"] = "\n".join(lines)
    return found


def missing() -> list[str]:
    """Rows without a test: table and first cell."""
    tables = {marker: make() for marker, (_, make) in PARTS.items() if make is not transcript}
    return [f"{marker}: {row.split(' | ')[0].strip('| ')}" for marker, table in tables.items() for row in table.splitlines()
            if row.endswith(f"| {NO_TEST} |")]


def _meanings(cls: type) -> dict[str, str]:
    """Field -> its meaning in the section Args of a class's docstring. Several fields may share one entry."""
    return _documented(cls, {field.name: "" for field in fields(cls)} | UNDOCUMENTED.get(cls.__name__, {}))


def _documented(cls: type, found: dict[str, str] | None = None) -> dict[str, str]:
    """Name -> meaning, as the section Args says, on top of `found`."""
    found = {} if found is None else found
    section = (inspect.getdoc(cls) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    for entry in re.split(r"\n {4}(?=\w)", f"\n{section}")[1:]:
        names, _, meaning = entry.partition(": ")
        for name in names.split(", "):
            found[name] = _cell(" ".join(meaning.split()).replace("``", "`").removesuffix("."))
    if undocumented := [name for name, meaning in found.items() if not meaning]:
        raise SystemExit(f"{cls.__name__} does not document {', '.join(undocumented)}")
    return found


def _is_taken(name: str) -> bool:
    """Whether `SamplingParams` knows what to do with the field: anything but "not supported so far" for a senseless value."""
    try:
        SamplingParams(**{name: object()})
    except UnsupportedFeatureError:
        return False
    except RequestError:
        return True
    return True


def _default(field: Field[Any]) -> str:
    if field.default is MISSING:
        return "required"
    return f"`{field.default.name if field.name == 'output_kind' else repr(field.default)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "modules": ("docs/architecture.md", modules),
    "parameters": ("docs/api.md", parameters),
    "other-parameters": ("docs/api.md", other_parameters),
    "methods": ("docs/api.md", methods),
    "other-methods": ("docs/api.md", other_methods),
    "sampling": ("docs/api.md", sampling),
    "structured-outputs": ("docs/api.md", lambda: output_fields(StructuredOutputsParams, "structured_outputs")),
    "pooling": ("docs/api.md", pooling),
    "pooler": ("docs/api.md", pooler),
    "request-output": ("docs/api.md", lambda: output_fields(RequestOutput, "request_output")),
    "completion-output": ("docs/api.md", lambda: output_fields(CompletionOutput, "completion_output")),
    "logprob": ("docs/api.md", lambda: output_fields(Logprob, "logprob")),
    "beam-search": ("docs/api.md", beam_search),
    "beam-search-output": ("docs/api.md", lambda: output_fields(BeamSearchOutput, "beam_search_output")),
    "beam-search-sequence": ("docs/api.md", lambda: output_fields(BeamSearchSequence, "beam_search_sequence")),
    "errors": ("docs/errors.md", error_tree),
    "transcript": ("README.md", transcript),
}
"""Marker in the page -> page, text."""


def updated(page: str, text: str) -> str:
    """`text` of a page with its generated parts replaced."""
    for marker, (where, make) in PARTS.items():
        if where == page:
            begin, end = f"<!-- {marker} -->\n", f"<!-- /{marker} -->\n"
            head, rest = text.split(begin)
            text = head + begin + make() + "\n" + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    for page in sorted({where for where, _ in PARTS.values()}):
        path = ROOT / page
        path.write_text(updated(page, path.read_text()))
    if without := missing():
        raise SystemExit(f"rows without a test, which is named test_<row>__<behaviour>: {'; '.join(without)}")
