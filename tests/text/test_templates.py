"""Chat templates are foreign code: nothing but their variables, and limits on time, memory and output that hold."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.errors import RequestValidationError
from kvloom.text.templates import TemplateRenderer


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    made = TemplateRenderer(time_limit_s=3.0, memory_limit_bytes=256 * 2**20, max_characters=10**6)
    yield made
    made.close()


@pytest.mark.parametrize(("template", "text"), [
    ("plain", "plain"), ("{{ a }} {{ b.c[0] }}", "1 x"), ("{{ b | tojson }}", '{"c": ["x", "<é>"]}'), ("{% for x in b.c %}{{ x }};{% endfor %}", "x;<é>;"),
    ("  {% if a %}\nyes\n  {% endif %}\n", "yes\n"), ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    ("{% generation %}in{% endgeneration %}", "in"), ("{{ 'x' if nothing is defined else 'y' }}", "y"), ("{{ strftime_now('%Y') | int > 2000 }}", "True"),
    ("{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
])
def test_what_templates_of_this_format_use_works(renderer: TemplateRenderer, template: str, text: str) -> None:
    assert renderer.render(template, {"a": 1, "b": {"c": ["x", "<é>"]}}) == text


@pytest.mark.parametrize(("template", "message"), [
    ("{% for i in range(100000) %}{% for j in range(100000) %}{% set x = 1 %}{% endfor %}{% endfor %}", "took longer than 3 s"),
    ("{% for i in range(100000) %}{% for j in range(100000) %}xxxxxxxxxx{% endfor %}{% endfor %}", "more than 1000000 characters"),
    ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"), ("{{ 'x' * 10000000000 }}", "too much memory"),
    ("{{ 'x' | center(10000000000) }}", "too much memory"), ("{{ '%10000000000d' % 1 }}", "too much memory"), ("{{ '{:>10000000000}'.format(1) }}", ""),
    ("{% set ns = namespace(x=[1]) %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "too much memory"),
    ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "ecursion"), ("x" * (2**20 + 1), "at most 1048576 are taken"),
], ids=lambda v: v[:40])
def test_loops_recursion_and_huge_strings_are_stopped_and_the_next_template_works(renderer: TemplateRenderer, template: str, message: str) -> None:
    with pytest.raises(RequestValidationError, match="the chat template cannot be rendered") as caught:
        renderer.render(template, {})
    assert message in str(caught.value)
    assert renderer.render("{{ 1 + 1 }}", {}) == "2"


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__ }}", "{{ x.__init__.__globals__ }}", "{{ cycler.__init__.__globals__.os }}", "{{ self.__init__.__globals__ }}", "{{ x.append(1) }}",
    "{% for %}", "{{ raise_exception('not like this') }}", "{% include 'x' %}", "{% import 'os' as os %}", "{{ nothing.at.all }}", "{{ 1 / 0 }}",
])
def test_what_templates_may_not_do_is_refused(renderer: TemplateRenderer, template: str) -> None:
    with pytest.raises(RequestValidationError, match="the chat template cannot be rendered") as caught:
        renderer.render(template, {"x": [1]})
    assert caught.value.parameter == "chat_template"
    if "raise_exception" in template:
        assert "not like this" in str(caught.value)


@pytest.mark.parametrize("template", ["{{ ''.__class__ }}", "{{ self.__init__ }}", "{{ x.__doc__ }}"])
def test_what_templates_may_not_see_is_nothing(renderer: TemplateRenderer, template: str) -> None:
    assert renderer.render(template, {"x": [1]}) == ""


@pytest.mark.parametrize("value", [float("nan"), object(), {1: {2}}, b"x"])
def test_variables_are_json_data(renderer: TemplateRenderer, value: object) -> None:
    with pytest.raises(RequestValidationError, match="JSON data"):
        renderer.render("x", {"a": value})


def test_large_texts_pass_both_ways(renderer: TemplateRenderer) -> None:
    text = "é" * 400_000
    assert renderer.render("{{ a }}{{ a }}", {"a": text}) == text * 2


def children() -> set[int]:
    tasks = f"/proc/{os.getpid()}/task"
    return {int(child) for task in os.listdir(tasks) for child in Path(f"{tasks}/{task}/children").read_text().split()}


@pytest.mark.skipif(not os.path.exists(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children"), reason="needs Linux's list of child processes")
def test_the_process_starts_with_the_first_template_and_ends_with_its_owner() -> None:
    before = children()
    first, second = TemplateRenderer(), TemplateRenderer()
    assert children() == before
    first.render("x", {})
    second.render("x", {})
    assert len(children() - before) == 2
    first.close()
    first.close()
    assert len(children() - before) == 1
    del second
    gc.collect()
    assert children() == before


def test_ctrl_c_while_the_process_starts_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen] = []

    def popen(*args: object, **kwargs: object) -> subprocess.Popen:
        started.append(original(*args, **kwargs))
        signal.raise_signal(signal.SIGINT)
        return started[0]

    original, renderer = subprocess.Popen, TemplateRenderer()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", popen)
        with pytest.raises(KeyboardInterrupt):
            renderer.render("a", {})
    assert started[0].poll() is not None
    assert renderer.render("a", {}) == "a"
    renderer.close()
