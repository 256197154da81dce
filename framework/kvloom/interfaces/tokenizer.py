"""Tokenizers: text to ids and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from kvloom.errors import UnsupportedFeatureError


class EncodedPair(NamedTuple):
    """Two texts as one prompt: ids, and which text each belongs to, where the tokenizer's model has such types (else empty)."""

    token_ids: list[int]
    token_type_ids: list[int]


class Tokenizer(ABC):
    """Registered with ``kvloom_register_tokenizers`` under a ``tokenizer_mode``. Made once an engine; must be thread-safe."""

    @abstractmethod
    def __init__(self, directory: Path, *, trust_remote_code: bool = False, code_revision: str | None = None) -> None:
        """Load from a directory. Raises `ModelError` that names the files looked at.

        Args:
            trust_remote_code, code_revision: for the gate, `kvloom.interfaces.remote_code.from_pretrained`, through which every use
                of transformers' Auto classes goes.
        """

    @classmethod
    def adopt(cls, underlying: Any) -> Self | None:
        """From the library's own object (``LLM.set_tokenizer``). None, as here, when it is not one of this library."""
        return None

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
    def pad_token_id(self) -> int | None:
        """Padding, None, as here, when there is none."""
        return None

    @property
    @abstractmethod
    def special_token_ids(self) -> frozenset[int]:
        """Ids that ``skip_special_tokens`` leaves out: all that `decode` then drops."""

    @property
    def byte_token_ids(self) -> frozenset[int]:
        """Ids of single bytes that `decode` decides on together: one byte that fits no character makes the whole run of them U+FFFD.

        Their text is final only when the run ends. Empty, as here, where a character that is complete stays, as in byte-level BPE.
        """
        return frozenset()

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The model's own Jinja templates, unrendered, by name. One that serves everything is called "default", one for calls with
        tools may be "tool_use". Empty, as here, where there is none."""
        return {}

    @property
    def chat_template_places(self) -> Sequence[str]:
        """Files in which templates were looked for, for the message that there is none."""
        return ()

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """What templates may write by name: ``bos_token``, ``eos_token``, ... -> the token's text."""
        return {}

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def encode_within(self, text: str, max_tokens: int, *, keep_end: bool | None = None) -> list[int]:
        """`encode` with special tokens, cut to `max_tokens` so that these stay. Raises `ValueError` where they do not fit.

        Args:
            keep_end: whether the text loses its beginning; None: as the tokenizer's own files have it.
        """
        raise UnsupportedFeatureError("truncate_prompt_tokens", max_tokens, f"{type(self).__name__} cannot cut a text")

    def encode_pair(self, text: str, pair: str, max_tokens: int | None = None, *, keep_end: bool | None = None) -> EncodedPair:
        """Two texts as one prompt, as a cross-encoder reads them, the longer one cut first where it has more than `max_tokens`.

        Args:
            keep_end: as in `encode_within`.

        Raises:
            ValueError: the special tokens alone are more.
        """
        raise UnsupportedFeatureError("score", type(self).__name__, "this tokenizer cannot encode pairs of texts")

    @abstractmethod
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True) -> str:
        """Text of a whole sequence; no clean-up of spaces. More tokens never change it, except characters at its end that are
        incomplete (U+FFFD) and the last run of `byte_token_ids`. Ids that the tokenizer does not know have no text.

        Args:
            spaces_between_special_tokens: whether special tokens that are kept get spaces around them, where the tokenizer has that
                choice: few do.
        """

    @abstractmethod
    def token_text(self, token_id: int) -> str:
        """A token for people to read (``Logprob.decoded_token``). Cheap to ask again; any id may be asked for.

        Returns:
            Its text alone; U+FFFD where that is no whole character, empty for ids that the tokenizer does not know.
        """

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token adds to a text, for grammars; any id may be asked for.

        Those of a sequence, put together and decoded with U+FFFD for what is no character, are `decode`'s text, except that some
        tokenizers leave out a space at the very beginning. Empty for special tokens and unknown ids.

        Raises:
            UnsupportedFeatureError: the tokenizer does not tell, as here.
        """
        raise UnsupportedFeatureError("structured output", type(self).__name__, "this tokenizer has no token_bytes: use another "
                                      "tokenizer_mode, or no grammar")
