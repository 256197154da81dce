"""The progress bar of a call."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from kvloom.errors import RequestTypeError
from kvloom.outputs import RequestOutput
from kvloom.pooling_outputs import PoolingRequestOutput

MakeBar = Callable[..., Any]
"""Makes a bar; called as tqdm is: ``total, desc, dynamic_ncols, postfix``."""


def check_bar(use_tqdm: object) -> None:
    """Raises `RequestTypeError` unless it is True, False or a function."""
    if not isinstance(use_tqdm, bool) and not callable(use_tqdm):
        raise RequestTypeError(f"use_tqdm must be True, False or a function that makes a bar, got {type(use_tqdm).__name__}",
                               "use_tqdm", use_tqdm)


class Progress:
    """Counts requests, with tokens per second behind the bar.

    Args:
        total: requests.
        use_tqdm: False shows nothing; True is tqdm; anything else is called to make the bar.
    """

    def __init__(self, total: int, use_tqdm: bool | MakeBar) -> None:
        self._bar: Any = None
        if use_tqdm:
            make = tqdm if use_tqdm is True else use_tqdm
            self._bar = make(total=total, desc="Processed prompts", dynamic_ncols=True, postfix=_speed(0, 0, 1.0))
            if not (hasattr(self._bar, "update") and hasattr(self._bar, "close")):
                raise RequestTypeError(f"use_tqdm must make a progress bar as tqdm does, it made {type(self._bar).__name__}",
                                       "use_tqdm", use_tqdm)
        self._started_s = time.monotonic()
        self._input_tokens = self._output_tokens = 0

    def finished(self, output: RequestOutput | PoolingRequestOutput[Any]) -> None:
        """One request more."""
        if self._bar is None:
            return
        self._input_tokens += len(output.prompt_token_ids)
        self._output_tokens += output.metrics.num_generation_tokens if output.metrics is not None else 0
        self._bar.postfix = _speed(self._input_tokens, self._output_tokens, max(time.monotonic() - self._started_s, 1e-9))
        self._bar.update(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()


def _speed(input_tokens: int, output_tokens: int, seconds: float) -> str:
    return f"est. speed input: {input_tokens / seconds:.2f} toks/s, output: {output_tokens / seconds:.2f} toks/s"
