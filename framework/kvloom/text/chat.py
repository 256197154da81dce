"""Conversations to prompts: messages are checked and brought to the form that a template reads, rendered, and encoded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvloom.config.model import JINJA_MARKS
from kvloom.errors import RequestTypeError, RequestValidationError, shown
from kvloom.interfaces.tokenizer import Tokenizer
from kvloom.prompts import ParsedPrompt
from kvloom.text.chat_messages import read_conversation
from kvloom.text.limited_process import LimitError
from kvloom.text.templates import TemplateRenderer

ContentFormat = Literal["auto", "string", "openai"]
"""How a message's content is given to the template: a text, or a list of parts; "auto" finds out what the template takes."""
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template"})
"""Variables of templates that `chat_template_kwargs` may not set."""
CONTINUE_HERE = "<<kvloom continues here>>"
"""Put behind the last message to find its end in the rendered text."""
PROBE = "kvloom-probe"


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as the model gets it."""

    prompt: str
    prompt_token_ids: list[int]


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What `LLM.chat` takes besides messages; see there."""

    chat_template: str | None = None
    content_format: ContentFormat = "auto"
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.content_format not in ("auto", "string", "openai"):
            raise RequestValidationError(f"chat_template_content_format must be 'auto', 'string' or 'openai', got "
                                         f"{shown(self.content_format)}", "chat_template_content_format", self.content_format)
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestValidationError("add_generation_prompt and continue_final_message cannot both be True: the first begins a new "
                                         "message, the second goes on with the last one; set add_generation_prompt=False",
                                         "continue_final_message", True)
        if self.tools is not None and not (isinstance(self.tools, Sequence) and all(isinstance(t, Mapping) for t in self.tools)):
            raise RequestTypeError(f"tools must be a list of JSON objects, got {shown(self.tools)}", "tools", self.tools)
        for name in self.template_kwargs or {}:
            if name in RESERVED:
                raise RequestValidationError(f"chat_template_kwargs may not set {name!r}: it has an argument of its own, or none",
                                             "chat_template_kwargs", name)


class ChatFormatter:
    """Renders the conversations of one engine. Owns the renderer's process.

    Args:
        tokenizer: its templates are the default.
        renderer: the one place where templates run.
        chat_template: Jinja text or a file, instead of the tokenizer's.
        media_root: folder of local media files; empty: none.

    Raises:
        RequestValidationError: `chat_template` is neither Jinja nor a file.
    """

    def __init__(self, tokenizer: Tokenizer, renderer: TemplateRenderer, chat_template: str | None = None,
                 media_root: str = "") -> None:
        self._tokenizer, self._renderer, self._media_root = tokenizer, renderer, media_root
        self._default = None if chat_template is None else read_template(chat_template)
        self._takes_parts: dict[str, bool] = {}

    def prompt(self, conversation: Sequence[Mapping[str, Any]], options: ChatOptions) -> ParsedPrompt:
        """What `render` gives, for the engine."""
        rendered = self.render(conversation, options)
        return ParsedPrompt(rendered.prompt, tuple(rendered.prompt_token_ids))

    def render(self, conversation: Sequence[Mapping[str, Any]], options: ChatOptions) -> RenderedChat:
        """One conversation.

        Raises:
            RequestTypeError, RequestValidationError: malformed messages, no template, or one that refuses them.
            UnsupportedFeatureError: parts that are no text.
        """
        template = self._template(options)
        form = options.content_format
        as_parts = form == "openai" or (form == "auto" and self._reads_parts(template, conversation, options))
        messages = read_conversation(conversation, as_parts=as_parts, media_root=self._media_root)
        if options.continue_final_message:
            text = self._up_to_the_end(template, messages, options)
        else:
            text = self._text(template, messages, options)
        return RenderedChat(text, self._encode(text))

    def close(self) -> None:
        """End the renderer's process."""
        self._renderer.close()

    def _template(self, options: ChatOptions) -> str:
        if options.chat_template is not None:
            return read_template(options.chat_template)
        if self._default is not None:
            return self._default
        found = self._tokenizer.chat_templates
        template = (found.get("tool_use") if options.tools else None) or found.get("default")
        if template is None:
            names = f" (it has {', '.join(found)})" if found else ""
            places = ", ".join(self._tokenizer.chat_template_places)
            raise RequestValidationError(
                f"you must provide a chat template: the model has none{names}; looked at {places}. Give chat_template= (Jinja text "
                "or a file), or use generate with a text that is formatted already", "chat_template")
        return template

    def _text(self, template: str, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        variables = {
            **self._tokenizer.special_tokens, **(options.template_kwargs or {}), "messages": list(messages),
            "tools": None if options.tools is None else [dict(t) for t in options.tools], "documents": None,
            "add_generation_prompt": options.add_generation_prompt,
        }
        must_read = dict.fromkeys(options.template_kwargs or (), "chat_template_kwargs") | ({"tools": "tools"} if options.tools else {})
        return self._renderer.render(template, variables, must_read)

    def _up_to_the_end(self, template: str, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        """The text up to the end of the last message, without what the template writes behind it."""
        marked = copy.deepcopy(list(messages))
        content = marked[-1].get("content")
        if isinstance(content, str):
            marked[-1] = {**marked[-1], "content": content + CONTINUE_HERE}
        elif content and isinstance(content[-1], dict) and "text" in content[-1]:
            content[-1] = {**content[-1], "text": content[-1]["text"] + CONTINUE_HERE}
        else:
            raise RequestValidationError("continue_final_message needs a last message with text", "continue_final_message", True)
        text, found, _ = self._text(template, marked, options).rpartition(CONTINUE_HERE)
        if not found:
            raise RequestValidationError("continue_final_message: the chat template does not write the last message's text",
                                         "continue_final_message", True)
        return text

    def _reads_parts(self, template: str, conversation: Sequence[Mapping[str, Any]], options: ChatOptions) -> bool:
        """Whether the template takes contents as lists of parts: asked by rendering these messages so, with one part more."""
        known = self._takes_parts.get(template)
        if known is not None:
            return known
        probe = [dict(m) for m in read_conversation(conversation, as_parts=True, media_root=self._media_root)]
        asked = next((m for m in reversed(probe) if m["role"] == "user"), probe[-1])
        asked["content"] = [*(asked.get("content") or ()), {"type": "text", "text": PROBE}]
        try:
            text = self._text(template, probe, options)
        except RequestValidationError as error:
            if isinstance(error.__cause__, LimitError):
                raise
            return False
        if PROBE not in text:
            return False
        if len(self._takes_parts) >= 32:  # templates come with requests: keep what is remembered bounded
            self._takes_parts.clear()
        # A template that takes texts writes the list as Python or JSON does.
        self._takes_parts[template] = f"'{PROBE}'" not in text and f'"{PROBE}"' not in text
        return self._takes_parts[template]

    def _encode(self, text: str) -> list[int]:
        """Ids with exactly one begin-of-text token where the tokenizer has one that it adds: the template's, or else its own."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        bos = self._tokenizer.bos_token_id
        if bos is None or self._tokenizer.encode("", add_special_tokens=True)[:1] != [bos]:
            return ids
        own = next((i for i, token_id in enumerate(ids) if token_id != bos), len(ids))
        return [bos, *ids[own:]]


def read_template(given: str) -> str:
    """Jinja text as it is, or the text of a file.

    Raises:
        RequestTypeError: no text.
        RequestValidationError: neither Jinja nor a file.
    """
    if not isinstance(given, str):
        raise RequestTypeError(f"chat_template must be Jinja text or a file's path, got {type(given).__name__}", "chat_template", given)
    if any(mark in given for mark in JINJA_MARKS):
        return given
    path = Path(given)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RequestValidationError(f"chat_template={shown(given)} is no Jinja text (it has no {{{{ or {{%) and no file that can be "
                                     f"read: {error}", "chat_template", given) from error


def split_conversations(messages: Any) -> list[Sequence[Mapping[str, Any]]]:
    """One item a conversation: a list of messages is one, a list of such lists many.

    Raises:
        RequestTypeError: neither.
        RequestValidationError: a conversation without messages.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RequestTypeError(f"messages must be a list of messages or a list of conversations, got {type(messages).__name__}",
                               "messages", messages)
    if messages and all(isinstance(m, Mapping) for m in messages):
        return [messages]
    return list(messages)

