"""Chat templates rendered under limits: in a process of their own, which is killed when it takes too long or too much."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvloom.errors import RequestValidationError

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
        self._time_limit_s, self._memory_limit_bytes, self._max_characters = time_limit_s, memory_limit_bytes, max_characters
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[Any, Any] | None = None

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text.

        Args:
            variables: JSON data.

        Raises:
            RequestValidationError: the template is malformed, refuses the conversation, or breaks a limit.
        """
        if len(template) > MAX_TEMPLATE_CHARACTERS:
            raise _refusal(f"it has {len(template)} characters, at most {MAX_TEMPLATE_CHARACTERS} are taken")
        question = {"template": template, "variables": dict(variables), "max_characters": self._max_characters}
        try:
            data = json.dumps(question, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestValidationError(f"messages, tools and template arguments must be JSON data: {error}", "messages") from error
        answer = self._ask(data, self._time_limit_s)
        if "error" in answer:
            raise _refusal(str(answer["error"]))
        return str(answer["text"])

    def close(self) -> None:
        """End the process. Calling it twice is fine."""
        self._process = None
        if self._end is not None:
            self._end()

    def _ask(self, data: bytes, limit_s: float) -> dict[str, Any]:
        process = self._process or self._start()
        try:
            line = exchange(process, data, limit_s)
        except BaseException:  # also Ctrl-C: what it would answer belongs to nobody
            self.close()
            raise
        if line is None:
            self.close()
            raise _refusal(f"it took longer than {limit_s:g} s and was stopped")
        if not line.endswith(b"\n"):
            self.close()
            raise _refusal("it needs too much memory or recursion: its process ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", str(PROGRAM), str(self._memory_limit_bytes)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603  (our own file)
        self._end = weakref.finalize(self, end, self._process)  # also when nobody calls close
        self._ask(json.dumps({"template": "", "variables": {}, "max_characters": 0}).encode() + b"\n", START_LIMIT_S)
        return self._process


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def exchange(process: subprocess.Popen[bytes], data: bytes, limit_s: float) -> bytes | None:
    """Write a line and read one, without waiting on either side longer than the limit.

    Returns:
        The answer; without its line break when the process ended; None when the time was up.
    """
    deadline_s = time.monotonic() + limit_s
    if process.stdin is None or process.stdout is None:
        return b""
    to, back = process.stdin.fileno(), process.stdout.fileno()
    os.set_blocking(to, False)
    os.set_blocking(back, False)
    left, answer = memoryview(data), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(to, selectors.EVENT_WRITE)
        selector.register(back, selectors.EVENT_READ)
        while not answer.endswith(b"\n"):
            ready = selector.select(max(0.0, deadline_s - time.monotonic()))
            if not ready:
                return None
            for key, _ in ready:
                if key.fd == back:
                    piece = os.read(back, 2**20)
                    if not piece:
                        return bytes(answer)
                    answer += piece
                else:
                    try:
                        left = left[os.write(to, left):]
                    except BrokenPipeError:
                        return b""
                    if not left:
                        selector.unregister(to)
    return bytes(answer)


def _refusal(reason: str) -> RequestValidationError:
    return RequestValidationError(f"the chat template cannot be rendered: {reason}", "chat_template")
