"""Stop strings: found in the text as it comes, across token borders, in time linear in the output."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.interfaces.tokenizer import Tokenizer
from kvloom.params import SamplingParams
from kvloom.text.detokenizer import Detokenizer


class StopStringWatch:
    """The text of one output that ends at the first stop string.

    Attributes:
        found: the stop string, None so far.
        num_tokens: that were taken over.

    Args:
        tokenizer, prompt_token_ids: see `Detokenizer`.
        sampling: its stop strings, maybe none, and how it wants the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids, skip_special_tokens=sampling.skip_special_tokens,
                                        spaces_between_special_tokens=sampling.spaces_between_special_tokens)
        self._stops = sampling.stop_strings
        self._reach = max(map(len, self._stops), default=1) - 1
        self._include, self._min_tokens = sampling.include_stop_str_in_output, sampling.min_tokens
        self._taken: list[str] = []
        self._waiting: list[str] = []  # lists: appending to a text would copy all of it
        self._recent = ""  # the last `_reach` characters: a stop string may begin there
        self._ended = False
        self.num_tokens = 0
        self.found: str | None = None

    @property
    def text(self) -> str:
        """So far; cut at the stop string once one was found. Joined anew each time."""
        return "".join(self._taken) + "".join(self._waiting)

    def add(self, token_ids: Sequence[int]) -> str | None:
        """Take tokens over one by one; the stop string that they complete, if any. Later tokens are then left out."""
        for token_id in token_ids:
            if self._ended:
                break
            self.num_tokens += 1
            self._append(self._detokenizer.add([token_id]))
        return self.found

    def finish(self) -> str | None:
        """The output ended otherwise: what was held back comes too; the stop string that it completes, if any."""
        if not self._ended:
            self._append(self._detokenizer.finish())
            self._ended = True
        return self.found

    def take(self) -> str:
        """Text since the last call that may be shown: all that was taken begins the final `text`, whatever comes."""
        waiting = "".join(self._waiting)
        held = 0 if self._ended or self._include else min(self._reach, len(waiting))
        new = waiting[:len(waiting) - held]
        if new:
            self._taken.append(new)
            self._waiting = [waiting[len(new):]]
        return new

    def _append(self, piece: str) -> None:
        if not piece:
            return
        self._waiting.append(piece)
        text, old = self._recent + piece, len(self._recent)
        if self.num_tokens > self._min_tokens:  # like end-of-text tokens, they wait
            for stop in self._stops:
                place = text.find(stop, max(0, old - len(stop) + 1))
                if place >= 0:
                    self.found, self._ended = stop, True
                    self._cut(len(text) - place - (len(stop) if self._include else 0))
                    return
        self._recent = text[max(0, len(text) - self._reach):]

    def _cut(self, characters: int) -> None:
        """Remove the end of the text; that much was never taken."""
        waiting = "".join(self._waiting)
        self._waiting = [waiting[:len(waiting) - characters]]
