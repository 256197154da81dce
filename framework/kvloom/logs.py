"""Log events: structlog, to standard error unless the application configured structlog itself."""

from __future__ import annotations

import sys
from typing import Any


def get_logger() -> Any:
    """A logger for one event. Asked for at each event, so that a later ``structlog.configure`` is honoured."""
    import structlog  # 0.2 s: the command line answers most questions without a log line

    if structlog.is_configured():
        return structlog.get_logger("kvloom")
    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            console(),
        ],
    )


def console() -> Any:
    """Log lines for a person, with Python's own tracebacks: rich's show every frame's locals, in 0.9 s and hundreds of lines."""
    import structlog

    return structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
