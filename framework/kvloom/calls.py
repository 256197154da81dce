"""Running a call's requests: all at once, or as there is room."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvloom.live_request import Call, Output, Params
from kvloom.progress import MakeBar, Progress, check_bar
from kvloom.request_arguments import OnError
from kvloom.running import RunningEngine


def run(engine: RunningEngine, items: Sequence[Any], params: Sequence[Params], priorities: Sequence[int], use_tqdm: bool | MakeBar,
        on_error: OnError) -> list[Any]:
    """Submit, and step until the requests are done; on any exception forget them all. Outputs are in the order of `items`."""
    check_bar(use_tqdm)
    call = Call()
    outputs: dict[int, Output] = {}
    try:
        engine.submit(call, items, params, priorities, return_errors=on_error == "return")
        with Progress(len(items), use_tqdm) as progress:
            while True:
                for place, output in call.take():
                    outputs[place] = unless_failed(output, on_error)
                    progress.finished(output)
                if not call.num_unfinished:
                    break
                engine.step(call)
    finally:
        engine.abort(call)
    return [outputs[place] for place in range(len(items))]


def iterate(engine: RunningEngine, pairs: Iterator[tuple[Any, Params]], bound: int, priority: int, on_error: OnError) -> Iterator[Any]:
    """Submit as there is room for `bound` open requests, and yield outputs as they finish."""
    call, place, exhausted = Call(), 0, False
    try:
        while True:
            for _, output in call.take():  # before more is read: what is read may raise
                yield unless_failed(output, on_error)
            while not exhausted and call.num_open < bound:
                pair = next(pairs, None)
                if pair is None:
                    exhausted = True
                else:
                    engine.submit(call, [pair[0]], [pair[1]], [priority], return_errors=on_error == "return", first_place=place)
                    place += 1
            if call.num_unfinished:
                engine.step(call)
            elif exhausted and not call.num_open:
                return
    finally:
        engine.abort(call)


def unless_failed(output: Output, on_error: OnError) -> Output:
    """The output, or its error raised."""
    if output.error is not None and on_error == "raise":
        raise output.error
    return output
