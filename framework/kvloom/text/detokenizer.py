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
TAIL_TOKENS = 4 * MAX_INCOMPLETE
"""As many as the bytes that the last `MAX_INCOMPLETE` characters can have: earlier ones do not matter for them."""
MAX_WINDOW_TOKENS = 64
"""Nothing is held back longer than so many tokens: only output that is hardly text gets there."""


class Detokenizer:
    """One sequence's text. `add` tokens, get the text that they complete; all pieces and `finish` make the whole.

    The whole is ``decode(output)``, and with a prompt what ``decode(prompt + output)`` has beyond its common beginning with
    ``decode(prompt)``, or with that of the prompt without its last, incomplete character: the output may complete it. One exception:
    characters in a run of more than `MAX_WINDOW_TOKENS` `Tokenizer.byte_token_ids` are shown, and stay when the run turns out to be
    no text.

    The window of tokens that is decoded::

        context, its text is shown | its text is shown, or may be incomplete characters | open run of byte tokens
                                 read                                                 seen

    Args:
        prompt_token_ids: the output continues them.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: see `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool,
                 spaces_between_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip, self._spaces = tokenizer, skip_special_tokens, spaces_between_special_tokens
        self._left_out = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._bytes, self._vocab_size = tokenizer.byte_token_ids, tokenizer.vocab_size
        self._window: list[int] = []
        self._run, self._run_is_text = 0, True
        for token_id in self._end_of(prompt_token_ids):
            self._take(token_id)
        self._read = self._seen = len(self._window) - self._run
        self._shown = _certain(self._decode(self._window[:self._read]))
        self._of_prompt = self._ends_of_prompt()

    def add(self, token_ids: Sequence[int]) -> str:
        """Text that these tokens complete; may be empty."""
        for token_id in token_ids:
            if self._has_text(token_id):
                self._take(token_id)
        piece = self._settle()
        if self._run > MAX_WINDOW_TOKENS and self._run_is_text:
            piece += self._show_characters_of_run()
        return self._without_prompt(piece)

    def finish(self) -> str:
        """What was held back: no more tokens come."""
        text = self._decode(self._window)
        piece, self._shown = text[len(self._shown):], text
        return self._without_prompt(piece)

    def _ends_of_prompt(self) -> list[str]:
        """What the prompt has beyond what is certain, the tokens of an incomplete character included or not."""
        if self._decode(self._window) == self._shown:
            return []
        ends = range(max(0, len(self._window) - MAX_INCOMPLETE), len(self._window) + 1)
        return [self._decode(self._window[:end])[len(self._shown):] for end in ends]

    def _end_of(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens; a run of byte tokens not without its beginning."""
        taken: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if len(taken) >= CONTEXT_TOKENS and taken[-1] not in self._bytes:
                break
            if self._has_text(token_id):
                taken.append(token_id)
        return taken[::-1]

    def _has_text(self, token_id: int) -> bool:
        return 0 <= token_id < self._vocab_size and token_id not in self._left_out

    def _take(self, token_id: int) -> None:
        self._window.append(token_id)
        if token_id in self._bytes:
            self._run += 1
        else:
            self._run, self._run_is_text = 0, True

    def _settle(self) -> str:
        """New text before the open run of byte tokens."""
        end = len(self._window) - self._run
        if end == self._seen:
            return ""
        stuck, self._seen = self._seen - self._read > MAX_WINDOW_TOKENS, end
        text = self._decode(self._window[:end])
        certain = text if stuck else text[:max(len(_certain(text)), len(self._shown))]
        piece, self._shown, held = certain[len(self._shown):], certain, text[len(certain):]
        if piece and not held:
            del self._window[:self._read]
            self._read = self._seen = end - self._read
            self._shown = self._decode(self._window[:self._seen])
        elif end - self._read > 2 * TAIL_TOKENS:
            self._shorten(held)
        return piece

    def _shorten(self, held: str) -> None:
        """Forget tokens in the middle of a window that grew, if what is held back does not need them."""
        kept = self._window[:self._read] + self._window[self._seen - TAIL_TOKENS:self._seen]
        text = self._decode(kept)
        if text.endswith(held):
            self._window[:self._seen], self._seen = kept, len(kept)
            self._shown = text[:len(text) - len(held)]

    def _show_characters_of_run(self) -> str:
        """The characters that are complete in the open run, tried once if they make no text: then they never will."""
        before = self._decode(self._window[:self._seen])
        for rest in range(MAX_INCOMPLETE + 1):
            end = len(self._window) - rest
            text = self._decode(self._window[:end])
            if text[len(before):] != INCOMPLETE * (end - self._seen):
                piece, self._shown, self._run = text[len(self._shown):], before, rest
                del self._window[self._seen:end]
                return piece
        self._run_is_text = False
        return ""

    def _without_prompt(self, piece: str) -> str:
        """`piece` without the prompt's end, which was decoded along because it may be incomplete."""
        if not self._of_prompt or not piece:
            return piece
        same = max(_same(piece, end) for end in self._of_prompt)
        self._of_prompt = [end[same:] for end in self._of_prompt if same == len(piece) and end.startswith(piece)]
        return piece[same:]

    def _decode(self, token_ids: Sequence[int]) -> str:
        if not token_ids:
            return ""
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip, spaces_between_special_tokens=self._spaces)


def _certain(text: str) -> str:
    """`text` without the characters at its end that later tokens may complete."""
    held = 0
    while held < min(MAX_INCOMPLETE, len(text)) and text[-1 - held] == INCOMPLETE:
        held += 1
    return text[:len(text) - held]


def _same(one: str, other: str) -> int:
    """Length of their common beginning."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length
