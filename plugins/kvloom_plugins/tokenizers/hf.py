"""Tokenizers of the transformers library."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Self

import transformers

from kvloom.errors import ModelError
from kvloom.interfaces import EncodedPair, Tokenizer, remote_code
from kvloom_plugins.tokenizers.pieces import reader_of

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")

CHAT_TEMPLATE_FILES = ("chat_template.jinja", "additional_chat_templates/*.jinja", "tokenizer_config.json")


class AutoTokenizer(Tokenizer):
    """The implementation that the library has for the files: fast (Rust) for nearly all, Python for a few old models.

    Since transformers 5 each model has one of the two, ``use_fast`` is ignored. Code in the directory runs only with trust.
    """

    def __init__(self, directory: Path, *, trust_remote_code: bool = False, code_revision: str | None = None) -> None:
        _check_code(directory, trust_remote_code=trust_remote_code)
        try:
            loaded = remote_code.from_pretrained(transformers.AutoTokenizer, directory, trust_remote_code=trust_remote_code,
                                                 code_revision=code_revision, clean_up_tokenization_spaces=False)
        except Exception as error:
            found = ", ".join(f for f in FILES if (directory / f).exists()) or "none of them"
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"no tokenizer can be loaded from {directory} (looked for {', '.join(FILES)}; found {found}): "
                             f"{type(error).__name__}: {reason}. Give tokenizer=..., or skip_tokenizer_init=True and token "
                             "prompts") from error
        self._take(loaded, tuple(str(directory / name) for name in CHAT_TEMPLATE_FILES))

    @classmethod
    def adopt(cls, underlying: Any) -> Self | None:
        """See `Tokenizer.adopt`."""
        if not isinstance(underlying, transformers.PreTrainedTokenizerBase):
            return None
        tokenizer = cls.__new__(cls)
        tokenizer._take(underlying, ("the tokenizer that was given to set_tokenizer",))
        return tokenizer

    def _take(self, tokenizer: Any, template_places: tuple[str, ...]) -> None:
        self._hf, self._template_places = tokenizer, template_places
        self._lock = Lock()  # the library keeps how it cuts in the object, from one call to the next
        vocabulary = self._hf.get_vocab()
        self._vocab_size = max(vocabulary.values(), default=-1) + 1
        self._gaps = frozenset(range(self._vocab_size)).difference(vocabulary.values())
        self._special = frozenset(self._hf.all_special_ids)
        if self.is_fast:  # it leaves these out too, named in the configuration or not
            self._special |= {i for i, token in self._hf.added_tokens_decoder.items() if token.special}
        plain = transformers.PreTrainedTokenizerFast  # a class of its own may decode in a way of its own
        is_plain = isinstance(self._hf, plain) and type(self._hf).decode is plain.decode and type(self._hf)._decode is plain._decode
        self._backend = self._hf.backend_tokenizer if is_plain else None
        self._texts: dict[int, str] = {}
        self._bytes = self._find_byte_tokens(vocabulary)

    def _find_byte_tokens(self, vocabulary: Mapping[str, int]) -> frozenset[int]:
        """Tokens ``<0x..>``, if a byte that is no text takes a character before it back."""
        names = [[f"<0x{byte:02X}>", f"<0x{byte:02x}>"] for byte in range(256)]
        ids = [[vocabulary[name] for name in same if name in vocabulary] for same in names]
        if not ids[0x41] or not ids[0xFF] or "A" in self.decode([ids[0x41][0], ids[0xFF][0]], skip_special_tokens=False):
            return frozenset()
        return frozenset(i for same in ids for i in same)

    @property
    def is_fast(self) -> bool:
        """Whether the library's Rust implementation does the work."""
        return bool(getattr(self._hf, "is_fast", False))

    @property
    def underlying(self) -> Any:
        """See `Tokenizer.underlying`."""
        return self._hf

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer.vocab_size`."""
        return self._vocab_size

    @property
    def eos_token_id(self) -> int | None:
        """See `Tokenizer.eos_token_id`."""
        return None if self._hf.eos_token_id is None else int(self._hf.eos_token_id)

    @property
    def bos_token_id(self) -> int | None:
        """See `Tokenizer.bos_token_id`."""
        return None if self._hf.bos_token_id is None else int(self._hf.bos_token_id)

    @property
    def pad_token_id(self) -> int | None:
        """See `Tokenizer.pad_token_id`."""
        return None if self._hf.pad_token_id is None else int(self._hf.pad_token_id)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """See `Tokenizer.special_token_ids`."""
        return self._special

    @property
    def byte_token_ids(self) -> frozenset[int]:
        """See `Tokenizer.byte_token_ids`."""
        return self._bytes

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """See `Tokenizer.chat_templates`."""
        found = self._hf.chat_template
        if isinstance(found, str):
            return {"default": found}
        return dict(found) if isinstance(found, dict) else {}

    @property
    def chat_template_places(self) -> Sequence[str]:
        """See `Tokenizer.chat_template_places`."""
        return self._template_places

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """See `Tokenizer.special_tokens`."""
        return {name: str(token) for name, token in self._hf.special_tokens_map.items() if isinstance(token, str)}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """See `Tokenizer.encode`."""
        with self._lock:
            return [int(i) for i in self._hf(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]]

    def encode_within(self, text: str, max_tokens: int, *, keep_end: bool | None = None) -> list[int]:
        """See `Tokenizer.encode_within`."""
        return self._cut(text, None, max_tokens, keep_end).token_ids

    def encode_pair(self, text: str, pair: str, max_tokens: int | None = None, *, keep_end: bool | None = None) -> EncodedPair:
        """See `Tokenizer.encode_pair`."""
        return self._cut(text, pair, max_tokens, keep_end)

    def _cut(self, text: str, pair: str | None, max_tokens: int | None, keep_end: bool | None) -> EncodedPair:
        added = self._hf.num_special_tokens_to_add(pair=pair is not None)
        if max_tokens is not None and max_tokens <= added:
            raise ValueError(f"{max_tokens} tokens leave no room beside the tokenizer's {added} special tokens")
        with self._lock:
            side = self._hf.truncation_side
            self._hf.truncation_side = side if keep_end is None else "left" if keep_end else "right"
            try:
                found = self._hf(text, pair, verbose=False, truncation=False if max_tokens is None else "longest_first",
                                 max_length=max_tokens)
            finally:
                self._hf.truncation_side = side
        return EncodedPair([int(i) for i in found["input_ids"]], [int(i) for i in found.get("token_type_ids", ())])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True) -> str:
        """See `Tokenizer.decode`."""
        known = [i for i in token_ids if self._knows(i)]
        if len(known) == 1 and not (skip_special_tokens and known[0] in self._special):  # what follows a sequence asks for those
            return self.token_text(known[0])
        return self._decode(known, skip_special_tokens, spaces_between_special_tokens)

    def _decode(self, token_ids: list[int], skips_special: bool, has_spaces: bool = True) -> str:
        if self._backend is not None:  # without the library's own way to it, which takes as long again
            return str(self._backend.decode(token_ids, skip_special_tokens=skips_special))
        options: dict[str, bool] = {}
        if isinstance(self._hf, transformers.PreTrainedTokenizer):  # the fast ones know no such choice
            options["spaces_between_special_tokens"] = has_spaces and not skips_special
        return str(self._hf.decode(token_ids, skip_special_tokens=skips_special, clean_up_tokenization_spaces=False, **options))

    def token_text(self, token_id: int) -> str:
        """See `Tokenizer.token_text`."""
        if not self._knows(token_id):
            return ""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._decode([token_id], skips_special=False)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        if self._read_piece is None:
            return super().token_bytes(token_id)
        return b"" if not self._knows(token_id) or token_id in self._special else self._read_piece(self._names[token_id])

    @cached_property
    def _read_piece(self) -> Callable[[str], bytes] | None:
        if not self.is_fast:
            return None
        decoder = self._hf.backend_tokenizer.decoder
        return reader_of(None if decoder is None else json.loads(decoder.__getstate__()))

    @cached_property
    def _names(self) -> Mapping[int, str]:
        return {token_id: name for name, token_id in self._hf.get_vocab().items()}

    def _knows(self, token_id: int) -> bool:
        return 0 <= token_id < self._vocab_size and token_id not in self._gaps


def _check_code(directory: Path, *, trust_remote_code: bool) -> None:
    """Raises `ModelError` when the tokenizer is code of the checkpoint, not trusted, and no class of transformers: another one would
    give other ids."""
    code = remote_code.named_code(directory, "tokenizer_config.json", "AutoTokenizer")
    if code is None or trust_remote_code:
        return
    name = str(remote_code.read_json(directory / "tokenizer_config.json").get("tokenizer_class") or "")
    if not any(hasattr(transformers, f"{name.removesuffix('Fast')}{suffix}") for suffix in ("", "Fast") if name):
        raise ModelError(f"the tokenizer of {directory} is code that comes with it ({code}), and it is not run. If you have read "
                         "it and trust it, give trust_remote_code=True; else tokenizer=..., or skip_tokenizer_init=True and token "
                         "prompts")


class FastTokenizer(AutoTokenizer):
    """The library's Rust implementation, where it has one for the files; "auto" takes the same one then."""

    def __init__(self, directory: Path, *, trust_remote_code: bool = False, code_revision: str | None = None) -> None:
        super().__init__(directory, trust_remote_code=trust_remote_code, code_revision=code_revision)
        if not self.is_fast:
            raise ModelError(f"tokenizer_mode='fast' asks for a Rust tokenizer, but transformers {transformers.__version__} has only "
                             f"the Python {type(self._hf).__name__} for the files in {directory}. Use tokenizer_mode='auto'")


class SlowTokenizer(AutoTokenizer):
    """The library's Python implementation. transformers 5 has one only for models without a fast one (ByT5, CTRL, BioGPT, ...)."""

    def __init__(self, directory: Path, *, trust_remote_code: bool = False, code_revision: str | None = None) -> None:
        super().__init__(directory, trust_remote_code=trust_remote_code, code_revision=code_revision)
        if self.is_fast:
            raise ModelError(f"tokenizer_mode='slow' asks for a Python tokenizer, but transformers {transformers.__version__} has only "
                             f"the fast {type(self._hf).__name__} for the files in {directory}. Use tokenizer_mode='auto'")
