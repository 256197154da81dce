"""The text of a sequence that is followed while it runs."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.core import Request
from kvloom.interfaces.tokenizer import Tokenizer
from kvloom.params import SamplingParams
from kvloom.text.stop_strings import StopStringWatch


class SequenceText:
    """Reads a request's new tokens after each step.

    Args:
        tokenizer, prompt_token_ids, sampling: see `StopStringWatch`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> None:
        self._watch = StopStringWatch(tokenizer, prompt_token_ids, sampling)
        self._keeps_stop = sampling.include_stop_str_in_output

    @property
    def text(self) -> str:
        """So far, without what a stop string cut off."""
        return self._watch.text

    @property
    def found(self) -> str | None:
        """The stop string that ended it, also where its last token ended it anyway."""
        return self._watch.found

    def follow(self, request: Request) -> str | None:
        """Take over what is new; the stop string that it completes, if any."""
        new = request.token_ids[request.prompt_tokens + self._watch.num_tokens:]
        found = self._watch.add(new[:-1] if stopped_by_token(request) and not self._keeps_stop else new)
        return found if request.finish is None or found is not None else self._watch.finish()

    def take(self) -> str:
        """What may be shown since the last time: all of it together is the final text."""
        return self._watch.take()


def stopped_by_token(request: Request) -> bool:
    """Whether its last token is an end-of-text or stop token, whose text does not belong to the output."""
    return request.finish is not None and request.finish.reason == "stop" and not isinstance(request.finish.stop_reason, str)
