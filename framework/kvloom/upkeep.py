"""What a running engine does between requests: calls on workers, conversations and grammars to look at, sleep, another tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from kvloom.config import EngineConfig
from kvloom.core import Engine
from kvloom.errors import EngineStateError, InternalError, RequestTypeError
from kvloom.hooks.loader import PluginSet
from kvloom.interfaces import Executor, GrammarProblem
from kvloom.logs import get_logger
from kvloom.prompts import ParsedPrompt
from kvloom.request_rules import RequestRules
from kvloom.sleep import Sleeper, SleepState
from kvloom.structured_outputs import StructuredOutputsParams
from kvloom.text.chat import ChatFormatter, ChatOptions, RenderedChat
from kvloom.text.grammar_gate import open_gate
from kvloom.text.templates import TemplateRenderer
from kvloom.text.tokenizer import adopt_tokenizer


class Upkeep(ABC):
    """A base of `RunningEngine`. Everything here has the engine's turn while it runs."""

    config: EngineConfig
    engine: Engine
    executor: Executor
    plugins: PluginSet
    rules: RequestRules
    sleeper: Sleeper
    _chat: ChatFormatter | None

    @abstractmethod
    def _alone(self, what: str) -> AbstractContextManager[None]:
        """For what may not be called by two threads at once, nor from inside itself."""

    @property
    @abstractmethod
    def num_live(self) -> int:
        """Sequences that calls wait for."""

    @contextmanager
    def _idle(self, what: str) -> Iterator[None]:
        """For what no request may be under way."""
        with self._alone(what):
            if self.num_live:
                raise EngineStateError(f"{what} has to wait: {self.num_live} sequences are under way; let their calls end first")
            while self.engine.has_work:  # steps in flight of requests that were forgotten
                self.engine.step()
            yield

    # -- workers

    def call_workers(self, what: str, method: str | Callable[..., Any], timeout_s: float | None = None, args: Sequence[Any] = (),
                     kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        """See `Executor.call`; `what` asks for it."""
        with self._alone(what):
            return self.executor.call(method, timeout_s, args, kwargs)

    # -- conversations and grammars

    @property
    def chat(self) -> ChatFormatter:
        """Renders conversations. Raises `RequestValidationError` without a tokenizer."""
        if self._chat is None:
            m = self.config.model
            tokenizer = self.rules.need_tokenizer("chat", "messages", "use generate with prompt_token_ids")
            self._chat = ChatFormatter(tokenizer, TemplateRenderer(), m.chat_template, m.allowed_local_media_path)
        return self._chat

    def chat_prompt(self, conversation: Sequence[Mapping[str, Any]], options: ChatOptions) -> ParsedPrompt:
        """What a conversation says to the model. For `submit`, which has the turn."""
        return self.chat.prompt(conversation, options)

    def render_chats(self, conversations: Sequence[Sequence[Mapping[str, Any]]], options: ChatOptions) -> list[RenderedChat]:
        """See ``LLM.chat(dry_run=True)``."""
        with self._alone("chat()"):
            return [self.chat.render(c, options) for c in conversations]

    def validate_grammar(self, structure: StructuredOutputsParams) -> list[GrammarProblem]:
        """See `LLM.validate_grammar`."""
        if not isinstance(structure, StructuredOutputsParams):
            raise RequestTypeError(f"structure must be StructuredOutputsParams, got {type(structure).__name__}: for a JSON schema, "
                                   "StructuredOutputsParams(json=schema)", "structure", structure)
        with self._alone("validate_grammar()"):
            return self.rules.need_grammars().validate(structure)

    # -- memory, tokenizer, profiles

    def reset_prefix_cache(self) -> bool:
        """See `LLM.reset_prefix_cache`."""
        with self._alone("reset_prefix_cache()"):
            return self.engine.scheduler.forget_prefixes()

    def sleep(self, level: int) -> None:
        """See `LLM.sleep`."""
        with self._idle("sleep()"):
            if not self.config.device.enable_sleep_mode:
                raise EngineStateError("sleep() needs LLM(..., enable_sleep_mode=True)")
            self.executor.check_ready()
            if self.sleeper.state is SleepState.AWAKE and not self.engine.scheduler.forget_prefixes():
                raise InternalError("no request is under way, but KV blocks are held")
            self.sleeper.sleep(level)

    def wake_up(self, tags: Iterable[str] | None) -> bool:
        """See `LLM.wake_up`."""
        with self._alone("wake_up()"):
            self.executor.check_ready()
            return self.sleeper.wake_up(tags)

    def set_tokenizer(self, tokenizer: Any) -> None:
        """See `LLM.set_tokenizer`."""
        with self._idle("set_tokenizer()"):
            adopted, before = adopt_tokenizer(self.config, self.plugins.registries["tokenizers"], tokenizer), self.rules
            grammars = open_gate(self.config, self.plugins, adopted, before.vocab_size, before.end_tokens.configured)
            self.rules = before.with_tokenizer(adopted, grammars)
            self.executor.call("set_vocabulary", args=(grammars.make_vocabulary,))
            if before.grammars is not None:
                before.grammars.close()
            if self._chat is not None:
                self._chat.close()
            self._chat = None

    def start_profile(self, prefix: str) -> None:
        """See `LLM.start_profile`."""
        with self._alone("start_profile()"):
            if self.config.device.profile_dir is None:
                raise EngineStateError("start_profile() needs LLM(..., profile_dir='folder for the traces')")
            self.executor.start_profile(self.config.device.profile_dir, prefix)

    def stop_profile(self) -> list[str]:
        """See `LLM.stop_profile`."""
        with self._alone("stop_profile()"):
            files = self.executor.stop_profile()
        get_logger().info("profile written", files=files)
        return files
