"""Token ids to text as they come: every piece is final, and all pieces together are the text of the whole."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.interfaces.tokenizer import Tokenizer

CONTEXT_TOKENS = 5
"""Prompt tokens decoded along at the start, so that the first output token knows whether a space goes before it."""
INCOMPLETE = "\ufffd"
"""What decoders give for bytes that are no character yet."""
MAX_INCOMPLETE = 3
"""Of the last characters so many may still change: a character has at most 4 bytes."""
MAX_WINDOW_TOKENS = 64
"""Window after which nothing is held back: only output that is no text at all gets there."""


class Detokenizer:
    """One sequence's text. `add` tokens, get the text that they complete.

    A window of tokens is decoded without and with the new ones; what the second decoding has more is the new text. Characters at
    the end that may be incomplete are held back, `finish` gives what is left.

    Args:
        prompt_token_ids: the output continues them.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._window = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._start_from(_certain(self._decode()))

    def add(self, token_ids: Sequence[int]) -> str:
        """Text that these tokens complete; may be empty."""
        special = self._tokenizer.special_token_ids if self._skip else frozenset()
        self._window.extend(i for i in token_ids if i not in special)
        text = self._decode()
        certain = text if len(self._window) - self._read > MAX_WINDOW_TOKENS else _certain(text)
        piece = certain[len(self._shown):]
        if len(certain) < len(text):
            self._shown += piece
        elif piece:
            self._window = self._window[self._read:]
            self._start_from(self._decode())
        return piece

    def finish(self) -> str:
        """What was held back."""
        return self._decode()[len(self._shown):]

    def _start_from(self, shown: str) -> None:
        self._read, self._shown = len(self._window), shown

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip) if self._window else ""


def _certain(text: str) -> str:
    """`text` without the characters at its end that later tokens may complete."""
    held = 0
    while held < min(MAX_INCOMPLETE, len(text)) and text[-1 - held] == INCOMPLETE:
        held += 1
    return text[:len(text) - held]
