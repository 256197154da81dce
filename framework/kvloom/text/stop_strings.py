"""Stop strings: found in the text as it comes, across token borders, in time linear in the output."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.interfaces.tokenizer import Tokenizer
from kvloom.params import SamplingParams
from kvloom.text.detokenizer import Detokenizer


class StopStringWatch:
    """The text of one output that ends at the first stop string.

    Attributes:
        text: so far; cut at the stop string once one was found.
        found: the stop string, None so far.
        num_tokens: that were taken over.

    Args:
        tokenizer, prompt_token_ids: see `Detokenizer`.
        sampling: with at least one stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids, skip_special_tokens=sampling.skip_special_tokens)
        self._stops = sampling.stop_strings
        self._reach = max(map(len, self._stops)) - 1
        self._include, self._min_tokens = sampling.include_stop_str_in_output, sampling.min_tokens
        self.num_tokens = 0
        self.text = ""
        self.found: str | None = None

    def add(self, token_ids: Sequence[int]) -> str | None:
        """Take tokens over one by one; the stop string that they complete, if any. Later tokens are then left out."""
        for token_id in token_ids:
            self.num_tokens += 1
            if self._take(self._detokenizer.add([token_id])) is not None:
                break
        return self.found

    def finish(self) -> None:
        """The output ended otherwise: what was held back, bytes that never became a character, comes too."""
        self.text += self._detokenizer.finish()

    def _take(self, piece: str) -> str | None:
        first = max(0, len(self.text) - self._reach)
        self.text += piece
        if self.num_tokens > self._min_tokens:  # like end-of-text tokens, they wait
            for stop in self._stops:
                place = self.text.find(stop, first)
                if place >= 0:
                    self.text = self.text[: place + len(stop) if self._include else place]
                    self.found = stop
                    break
        return self.found
