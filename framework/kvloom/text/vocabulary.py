"""What grammars know of a tokenizer: the bytes of each token."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kvloom.config import EngineConfig
from kvloom.errors import UnsupportedFeatureError
from kvloom.hooks.loader import PluginSet
from kvloom.interfaces.grammar import GrammarVocabulary
from kvloom.interfaces.tokenizer import Tokenizer
from kvloom.text.tokenizer import import_tokenizer, open_tokenizer


def grammar_vocabulary(tokenizer: Tokenizer, vocab_size: int, end_token_ids: Iterable[int]) -> GrammarVocabulary:
    """The tokens of a model.

    Args:
        vocab_size: ids that the model embeds; those that the tokenizer does not know have no text.
        end_token_ids: that end a text.

    Raises:
        UnsupportedFeatureError: the tokenizer does not tell, see `Tokenizer.token_bytes`.
    """
    silent = tokenizer.special_token_ids.union(end_token_ids)
    return GrammarVocabulary(tuple(b"" if i in silent else tokenizer.token_bytes(i) for i in range(vocab_size)))


def open_vocabulary(config: EngineConfig, plugins: PluginSet, model_dir: Path, vocab_size: int,
                    end_token_ids: Iterable[int]) -> GrammarVocabulary:
    """The same for a worker that has no tokenizer: it opens the configuration's. Raises what `open_tokenizer` raises."""
    component = import_tokenizer(config, plugins.registries["tokenizers"])
    if component is None:
        raise UnsupportedFeatureError("structured output", None, "it needs a tokenizer: leave skip_tokenizer_init at False")
    return grammar_vocabulary(open_tokenizer(config, model_dir, component), vocab_size, end_token_ids)
