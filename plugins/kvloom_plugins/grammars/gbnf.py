"""GBNF, the notation of llama.cpp's grammars, to Lark's, which llguidance takes."""

from __future__ import annotations

from llguidance.gbnf_to_lark import any_to_lark


def to_lark(text: str) -> str:
    """Lark grammars are left as they are. Raises ValueError for what is neither."""
    try:
        return str(any_to_lark(text))
    except Exception as error:
        raise ValueError(f"it is no GBNF or Lark grammar: {error}") from error
