"""Media (images, audio, video): bytes to encoder inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MediaItem:
    """One checked input.

    Args:
        kind: "image", "audio", "video".
        content_hash: SHA-256 over the decoded data with shape and mode; part of the prefix-cache key.
        tensors: what `Model.encode` takes.
        tokens: rows of encoder output = placeholder tokens in the prompt.
        placeholder_token_id: what stands for those rows in the token ids.
    """

    kind: str
    content_hash: str
    tensors: Mapping[str, Tensor]
    tokens: int
    placeholder_token_id: int


class MediaProcessor(ABC):
    """Turns a request's media into `MediaItem`s. Registered with ``kvloom_register_media`` under a model architecture.

    Limits on bytes, pixels, frames and seconds are checked by the core before this is called; it opens no path and no URL.
    """

    @abstractmethod
    def process(self, kind: str, data: bytes, options: Mapping[str, Any]) -> MediaItem:
        """Decode and prepare one input. Raises `RequestValidationError` with a fixed text."""

    @abstractmethod
    def expand(self, token_ids: list[int], items: list[MediaItem]) -> tuple[list[int], list[int]]:
        """Put each item's placeholders into the prompt: ``(token ids, offset of each item)``."""
