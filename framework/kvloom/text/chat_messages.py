"""Messages of a conversation, as OpenAI's API has them: checked, copied, and brought to one form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvloom.errors import RequestTypeError, RequestValidationError, UnsupportedFeatureError, shown
from kvloom.text.local_media import check_local_media

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}
"""Type of a part -> its key with the text."""
MEDIA_PARTS = frozenset({"image_url", "image", "input_image", "image_pil", "image_embeds", "audio_url", "input_audio", "audio",
                         "video_url", "video", "file"})
"""Types of parts that need media support."""


def read_conversation(conversation: Any, *, as_parts: bool, media_root: str = "") -> list[dict[str, Any]]:
    """Copies of the messages, with contents as texts, or as lists of parts.

    Args:
        media_root: folder that local files must lie in; empty: no local files.

    Raises:
        LocalMediaError: a part names a local file that may not be read.
        RequestTypeError: something that is no message.
        RequestValidationError: no message at all, no role, or parts of unknown types.
        UnsupportedFeatureError: media.
    """
    if not isinstance(conversation, Sequence) or isinstance(conversation, str):
        raise RequestTypeError(f"a conversation must be a list of messages, got {type(conversation).__name__}", "messages",
                               conversation)
    if not conversation:
        raise RequestValidationError("a conversation cannot be empty", "messages", conversation)
    return [_message(m, media_root, as_parts=as_parts) for m in conversation]


def _message(message: Any, media_root: str, *, as_parts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestTypeError(f"a message must be a dict with role and content, got {type(message).__name__}", "messages", message)
    if not isinstance(message.get("role"), str):
        raise RequestValidationError(f"a message must have a role, a text; got {shown(message.get('role'))}", "messages", message)
    if message.get("content") is None and not (message["role"] == "assistant" and message.keys() - {"role", "content"}):
        raise RequestValidationError(f"a message of the role {shown(message['role'])} must have content, a text or a list of parts; "
                                     "only an assistant's tool calls may come without", "messages", message)
    read = dict(message)
    parts = _parts(message.get("content"), media_root)
    if parts is None:
        read["content"] = None
    elif as_parts:
        read["content"] = parts
    else:
        read["content"] = "\n".join(part["text"] for part in parts)
    if message.get("tool_calls") is not None:
        read["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    return read


def _parts(content: Any, media_root: str) -> list[dict[str, str]] | None:
    """Texts of a message; None for one without content (a tool call)."""
    if content is None:
        return None
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise RequestTypeError(f"a message's content must be a text or a list of parts, got {type(content).__name__}", "messages",
                               content)
    return [_part(part, media_root) for part in content]


def _part(part: Any, media_root: str) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise RequestTypeError(f"a part of a message must be a text or a dict with a type, got {type(part).__name__}", "messages", part)
    kind = part.get("type")
    if kind in MEDIA_PARTS:
        check_local_media(part, media_root)
        raise UnsupportedFeatureError("a message's part of type", kind, "only text parts work")
    if kind not in TEXT_PARTS:
        raise RequestValidationError(f"a part of a message has the unknown type {shown(kind)}; types: {', '.join(TEXT_PARTS)}",
                                     "messages", part)
    text = part.get(TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise RequestTypeError(f"a part of type {kind!r} must have a text in {TEXT_PARTS[kind]!r}, got {type(text).__name__}",
                               "messages", part)
    return {"type": "text", "text": text}


def _tool_call(call: Any) -> Any:
    """Arguments as JSON text, as OpenAI's API has them, become an object: that is what templates write."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError as error:
        raise RequestValidationError(f"the arguments of a tool call are no JSON: {error}", "messages", call) from error
    return {**call, "function": {**function, "arguments": arguments}}
