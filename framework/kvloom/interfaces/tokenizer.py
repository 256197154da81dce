"""Tokenizers: text to ids and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Tokenizer(ABC):
    """Registered with ``kvloom_register_tokenizers`` under a ``tokenizer_mode``. Made once an engine; must be thread-safe."""

    @abstractmethod
    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        """Load from a directory. Raises `ModelError` that names the files looked at."""

    @property
    @abstractmethod
    def underlying(self) -> Any:
        """The library's own object, what ``LLM.get_tokenizer()`` gives."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Largest known id + 1, added tokens included."""

    @property
    @abstractmethod
    def eos_token_id(self) -> int | None:
        """End of text, None when there is none."""

    @property
    @abstractmethod
    def bos_token_id(self) -> int | None:
        """Begin of text, None when there is none."""

    @property
    @abstractmethod
    def special_token_ids(self) -> frozenset[int]:
        """Ids that ``skip_special_tokens`` leaves out."""

    @property
    @abstractmethod
    def chat_template(self) -> str | None:
        """The model's own Jinja template, unrendered; None when it has none."""

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; no clean-up of spaces."""

    @abstractmethod
    def token_text(self, token_id: int) -> str:
        """A token for people to read (``Logprob.decoded_token``); replacement characters where it is not valid text alone."""
