"""One request whose text is shown as it comes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from kvloom.live_request import Call, OnText
from kvloom.llm import LLM
from kvloom.logs import console
from kvloom.outputs import RequestOutput
from kvloom.params import SamplingParams


def stream(llm: LLM, prompt: str, params: SamplingParams, on_text: OnText | None) -> RequestOutput:
    """Complete one prompt.

    Raises:
        RequestError: it cannot be served, or failed.
    """
    engine, call = llm.llm_engine, Call()
    try:
        engine.submit(call, [prompt], [params], [0], on_text=on_text)
        while call.num_unfinished:
            engine.step(call)
    finally:
        engine.abort(call)
    output: RequestOutput
    ((_, output),) = call.take()
    if output.error is not None:
        raise output.error
    return output


def write(piece: str) -> None:
    """To standard output, at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


@contextmanager
def quiet_logs(quiet: bool) -> Iterator[None]:
    """What a start logs would stand between a person's text; warnings still come, on standard error."""
    if not quiet or structlog.is_configured():
        yield
        return
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger("warning"),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        processors=[structlog.processors.add_log_level, console()],
    )
    try:
        yield
    finally:
        structlog.reset_defaults()
