"""Grammars of requests, tried under limits before they get near the engine: in a process of their own, which is killed when one takes
too long or too much."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from kvloom.config import EngineConfig
from kvloom.errors import ConfigError, NotRegisteredError, RequestValidationError, UnsupportedFeatureError
from kvloom.hooks.loader import PluginSet
from kvloom.hooks.registry import Entry
from kvloom.interfaces.grammar import Grammar, GrammarProblem, GrammarSpec, GrammarVocabulary
from kvloom.interfaces.tokenizer import Tokenizer
from kvloom.structured_outputs import AUTO, BackendChoice, StructuredOutputsParams
from kvloom.text.limited_process import LimitedProcess, LimitError
from kvloom.text.vocabulary import grammar_vocabulary
from kvloom_kernels.requirement import Machine

PROGRAM = Path(__file__).with_name("grammar_process.py")
TIME_LIMIT_S = 5.0
"""For one grammar. The engine compiles what came through once more, so a request waits at most twice this. Real schemas take
milliseconds, see docs/structured_output.md."""
START_LIMIT_S = 60.0
"""For the process to import the plugin and read the vocabulary."""
MEMORY_LIMIT_BYTES = 512 * 2**20
"""What grammars may take beyond the process itself."""
REMEMBERED_BYTES = 2**24
"""Of grammars that came through and are not tried again."""
SHOWN_PROBLEMS = 5
"""Of a grammar in one message."""


AUTO_BACKEND = "guidance"
"""What "auto" means. A third party's backend is chosen by name only."""


def find_grammar(asked: str, plugins: PluginSet) -> Entry[Grammar]:
    """The backend that ``guided_decoding_backend`` names, not imported yet. Raises `ConfigError` when nobody registered it."""
    registry, name = plugins.registries["grammars"], BackendChoice.parse(asked).name
    try:
        return registry.resolve(AUTO_BACKEND if name == AUTO else name)
    except NotRegisteredError as error:
        raise ConfigError(f"guided_decoding_backend={name!r}: {error}") from error


def open_gate(config: EngineConfig, plugins: PluginSet, tokenizer: Tokenizer, vocab_size: int,
              end_token_ids: Sequence[int]) -> GrammarGate:
    """The gate of an engine with this tokenizer.

    Args:
        vocab_size, end_token_ids: see `grammar_vocabulary`.

    Raises:
        ConfigError: see `find_grammar`.
    """
    backend = config.features.guided_decoding_backend
    return GrammarGate(find_grammar(backend, plugins), BackendChoice.parse(backend),
                       cache(lambda: grammar_vocabulary(tokenizer, vocab_size, end_token_ids)))


class GrammarGate:
    """Of one engine. The process starts with the first grammar, and again after one had to be killed.

    Args:
        entry: the grammar backend.
        engine: the engine's ``guided_decoding_backend``, taken apart; its name is the entry's.
        make_vocabulary: called with the first grammar; the workers' too.
        time_limit_s, memory_limit_bytes, remembered_bytes: see the constants.
    """

    def __init__(self, entry: Entry[Grammar], engine: BackendChoice, make_vocabulary: Callable[[], GrammarVocabulary], *,
                 time_limit_s: float = TIME_LIMIT_S, memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
                 remembered_bytes: int = REMEMBERED_BYTES) -> None:
        self._entry, self._engine, self.make_vocabulary = entry, engine, make_vocabulary
        self._time_limit_s, self._remembered_bytes = time_limit_s, remembered_bytes
        self._process = LimitedProcess(PROGRAM, memory_limit_bytes, START_LIMIT_S)
        self._passed: OrderedDict[GrammarSpec, int] = OrderedDict()
        self._passed_bytes = 0

    def admit(self, structure: StructuredOutputsParams) -> GrammarSpec | None:
        """What travels to the workers; None when no grammar is asked for.

        Raises:
            RequestValidationError: another backend than the engine's, or a grammar that cannot be enforced, with where and which
                keyword; or one that breaks a limit.
            UnsupportedFeatureError: the tokenizer does not tell what its tokens are.
        """
        asked = structure.backend_choice.name
        if asked not in (AUTO, self._entry.name):
            raise RequestValidationError(f"the request asks for the grammar backend {asked!r}, but the engine's is "
                                         f"{self._entry.name!r}: leave backend out, or start the engine with "
                                         f"guided_decoding_backend={asked!r}", "backend", asked)
        spec = structure.spec(self._engine)
        if spec is None:
            return None
        if spec in self._passed:
            self._passed.move_to_end(spec)
            return spec
        problems = self.problems(spec)
        if problems:
            raise _refusal(spec, "; ".join(f"at {p.where or 'the top'}, {p.keyword}: {p.reason}" for p in problems[:SHOWN_PROBLEMS]))
        self._remember(spec)
        return spec

    def validate(self, structure: StructuredOutputsParams) -> list[GrammarProblem]:
        """See `LLM.validate_grammar`."""
        spec = structure.spec(self._engine)
        return [] if spec is None else self.problems(spec)

    def problems(self, spec: GrammarSpec) -> list[GrammarProblem]:
        """What the library finds fault with.

        Raises:
            RequestValidationError: it breaks a limit, or the library gave up otherwise.
        """
        try:
            if not self._process.is_running:
                self._start()
            answer = self._process.ask(json.dumps(spec).encode() + b"\n", self._time_limit_s)
        except LimitError as error:
            raise _refusal(spec, str(error)) from error
        if "error" in answer:
            raise _refusal(spec, str(answer["error"]))
        return [GrammarProblem._make(problem) for problem in answer["problems"]]

    def close(self) -> None:
        """End the process. Calling it twice is fine."""
        self._process.close()

    def _start(self) -> None:
        needs = self._entry.needs
        missing = None if needs is None else needs.unmet(Machine("cpu"), "")
        if missing is not None:
            raise UnsupportedFeatureError("structured output", self._entry.name, f"this backend {missing}; the built-in one's comes "
                                          "with kvloom[grammars]")
        settings = self._entry.settings
        model = None if settings is None else f"{type(settings).__module__}:{type(settings).__qualname__}"
        answer = self._process.start({
            "target": self._entry.target, "path": sys.path, "settings_model": model,
            "settings": None if settings is None else settings.model_dump(mode="json"),
            "tokens": [token.hex() for token in self.make_vocabulary().tokens]})
        if "error" in answer:
            self._process.close()
            raise UnsupportedFeatureError("structured output", self._entry.name, f"its library cannot start: {answer['error']}")

    def _remember(self, spec: GrammarSpec) -> None:
        self._passed[spec] = _size_bytes(spec)
        self._passed_bytes += self._passed[spec]
        while self._passed_bytes > self._remembered_bytes:
            self._passed_bytes -= self._passed.popitem(last=False)[1]


def _size_bytes(spec: GrammarSpec) -> int:
    return 256 + sum(sys.getsizeof(part) for part in spec)


def _refusal(spec: GrammarSpec, reason: str) -> RequestValidationError:
    return RequestValidationError(f"the {spec.kind} cannot be used for structured output: {reason}", spec.kind, spec.text)
