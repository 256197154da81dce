"""Tokenizers of the transformers library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import transformers

from kvloom.errors import ModelError
from kvloom.interfaces import Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")


class AutoTokenizer(Tokenizer):
    """The fast tokenizer where the directory has one, else the slow one. Code in the directory is never run."""

    use_fast: ClassVar[bool] = True

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        try:
            self._hf = transformers.AutoTokenizer.from_pretrained(
                str(directory), use_fast=self.use_fast, trust_remote_code=False, local_files_only=True,
                clean_up_tokenization_spaces=False)
        except Exception as error:
            found = ", ".join(f for f in FILES if (directory / f).exists()) or "none of them"
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"no tokenizer can be loaded from {directory} (looked for {', '.join(FILES)}; found {found}): "
                             f"{type(error).__name__}: {reason}. Give tokenizer=..., or skip_tokenizer_init=True and token "
                             "prompts") from error
        self._special = frozenset(self._hf.all_special_ids)

    @property
    def underlying(self) -> Any:
        """See `Tokenizer.underlying`."""
        return self._hf

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer.vocab_size`."""
        return max(self._hf.get_vocab().values(), default=-1) + 1

    @property
    def eos_token_id(self) -> int | None:
        """See `Tokenizer.eos_token_id`."""
        return None if self._hf.eos_token_id is None else int(self._hf.eos_token_id)

    @property
    def bos_token_id(self) -> int | None:
        """See `Tokenizer.bos_token_id`."""
        return None if self._hf.bos_token_id is None else int(self._hf.bos_token_id)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """See `Tokenizer.special_token_ids`."""
        return self._special

    @property
    def chat_template(self) -> str | None:
        """See `Tokenizer.chat_template`."""
        template = self._hf.chat_template
        return template if isinstance(template, str) else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """See `Tokenizer.encode`."""
        return [int(i) for i in self._hf(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See `Tokenizer.decode`."""
        return str(self._hf.decode(list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))

    def token_text(self, token_id: int) -> str:
        """See `Tokenizer.token_text`."""
        return self.decode([token_id], skip_special_tokens=False)


class SlowTokenizer(AutoTokenizer):
    """The library's Python tokenizer, for models whose fast one is wrong."""

    use_fast = False
