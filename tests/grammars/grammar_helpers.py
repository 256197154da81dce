"""What the tests of grammars share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvloom.interfaces import GrammarMatcher, GrammarVocabulary

BYTES = GrammarVocabulary((*(bytes([i]) for i in range(256)), b"", b"", b"aa", b"ab", b'{"', b'":', b"\xc3\xa9", b'"}'))
"""Single bytes, two tokens without text, and some longer ones."""


def encode(text: str | bytes) -> list[int]:
    """A text byte by byte."""
    return list(text.encode() if isinstance(text, str) else text)


def allowed(matcher: GrammarMatcher, drafts: Sequence[int] = (), vocabulary: GrammarVocabulary = BYTES) -> list[set[int]]:
    """The tokens of each mask."""
    words = -(-vocabulary.size // 32)
    masks = np.full((1 + len(drafts)) * words, 0x5A5A5A5A, np.int32)
    matcher.fill_masks(memoryview(masks.data), drafts)
    bits = np.unpackbits(masks.view(np.uint8), bitorder="little").reshape(1 + len(drafts), -1)[:, :vocabulary.size]
    texts = [i for i, token in enumerate(vocabulary.tokens) if token]
    return [{i for i in texts if row[i]} for row in bits]
