"""From a token's name in the vocabulary to the bytes that it adds to a text, as the tokenizer's decoder would have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

BYTE_NAMES = {f"<0x{byte:02{form}}>": byte for byte in range(256) for form in "Xx"}
"""Names of single bytes in vocabularies with byte fallback."""


def reader_of(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes] | None:
    """What reads names; None for decoders whose tokens depend on their neighbours (WordPiece, CTC), or that are not known here.

    Args:
        decoder: that of a ``tokenizer.json``.
    """
    parts: Sequence[Mapping[str, Any]] = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        return partial(_byte_level, {_byte_name(byte): byte for byte in range(256)})
    if not parts or not {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}.issuperset(kinds):
        return None
    spaces: list[tuple[str, str]] = []
    for part in parts:
        if part["type"] == "Metaspace":
            spaces.append((part["replacement"], " "))
        elif part["type"] == "Replace":
            if "String" not in part["pattern"]:
                return None
            spaces.append((part["pattern"]["String"], part["content"]))
    return partial(_spaced, spaces, "ByteFallback" in kinds)


def _byte_level(alphabet: Mapping[str, int], name: str) -> bytes:
    try:
        return bytes(alphabet[character] for character in name)
    except KeyError:  # an added token, which stands for itself
        return name.encode()


def _spaced(spaces: Sequence[tuple[str, str]], has_bytes: bool, name: str) -> bytes:
    if has_bytes and name in BYTE_NAMES:
        return bytes((BYTE_NAMES[name],))
    for mark, text in spaces:
        name = name.replace(mark, text)
    return name.encode()


def _byte_name(byte: int) -> str:
    """The printable character that stands for a byte in byte-level BPE: itself where it is printable, else one from 256 on."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    if byte in kept:
        return chr(byte)
    return chr(256 + sum(other not in kept for other in range(byte)))
