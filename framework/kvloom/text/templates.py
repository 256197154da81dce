"""Chat templates rendered under limits: in a process of their own, which is killed when it takes too long or too much."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kvloom.errors import RequestValidationError
from kvloom.text.limited_process import LimitedProcess, LimitError

NOTHING: Mapping[str, str] = MappingProxyType({})
PROGRAM = Path(__file__).with_name("template_process.py")
TIME_LIMIT_S = 5.0
"""For one rendering, the process's start not counted. Real templates take milliseconds."""
START_LIMIT_S = 30.0
"""For the process to answer its first, empty template."""
MEMORY_LIMIT_BYTES = 512 * 2**20
"""What a rendering may take beyond the interpreter itself."""
MAX_CHARACTERS = 2**23
"""Of a rendered text."""
MAX_TEMPLATE_CHARACTERS = 2**20
"""Of a template."""


class TemplateRenderer:
    """Renders one template at a time. The process starts with the first one, and again after one had to be killed.

    Args:
        time_limit_s, memory_limit_bytes, max_characters: see the constants.
    """

    def __init__(self, time_limit_s: float = TIME_LIMIT_S, memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
                 max_characters: int = MAX_CHARACTERS) -> None:
        self._time_limit_s, self._max_characters = time_limit_s, max_characters
        self._process = LimitedProcess(PROGRAM, memory_limit_bytes, START_LIMIT_S)

    def check(self, template: str) -> None:
        """Raises `RequestValidationError` for a template that cannot be compiled, or breaks a limit."""
        self.render(template, None)

    def render(self, template: str, variables: Mapping[str, Any] | None, must_read: Mapping[str, str] = NOTHING) -> str:
        """The text.

        Args:
            variables: JSON data; None: the template is compiled only, and the text is empty.
            must_read: variables that would be in vain if the template did not read them -> the parameter that they come from.

        Raises:
            RequestValidationError: the template is malformed, refuses the conversation, breaks a limit, or does not read what it must.
        """
        if len(template) > MAX_TEMPLATE_CHARACTERS:
            raise _refusal(f"it has {len(template)} characters, at most {MAX_TEMPLATE_CHARACTERS} are taken")
        question = {"template": template, "variables": None if variables is None else dict(variables), "must_read": list(must_read),
                    "max_characters": self._max_characters}
        try:
            data = json.dumps(question, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestValidationError(f"messages, tools and template arguments must be JSON data: {error}", "messages") from error
        try:
            if not self._process.is_running:
                self._process.start({"template": "", "variables": {}, "must_read": [], "max_characters": 0})
            answer = self._process.ask(data, self._time_limit_s)
        except LimitError as error:
            raise _refusal(str(error)) from error
        if "error" in answer:
            raise _refusal(str(answer["error"]))
        if "unread" in answer:
            name = str(answer["unread"])
            raise RequestValidationError(f"{must_read[name]}: the chat template does not read {name!r}, which would change nothing; it "
                                         f"reads {', '.join(answer['reads'])}", must_read[name], name)
        return str(answer["text"])

    def close(self) -> None:
        """End the process. Calling it twice is fine."""
        self._process.close()


def _refusal(reason: str) -> RequestValidationError:
    return RequestValidationError(f"the chat template cannot be rendered: {reason}", "chat_template")
