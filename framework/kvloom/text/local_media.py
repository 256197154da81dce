"""``file://`` addresses in messages: which files may be looked at. Nothing is opened here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from kvloom.errors import LocalMediaError, shown

SCHEME = "file"
LOCAL_HOSTS = ("", "localhost")


def check_local_media(part: Mapping[str, Any], root: str) -> None:
    """A part of a message with media, before anything is done with it.

    Args:
        part: ``{"type": "image_url", "image_url": {"url": ...}}`` and the like; parts without a local address pass.
        root: ``allowed_local_media_path``.

    Raises:
        LocalMediaError: a local file, and there is no root, or it lies outside, links followed.
    """
    given = part.get(str(part.get("type")))
    address = given.get("url") if isinstance(given, Mapping) else given
    if not isinstance(address, str) or address[:len(SCHEME) + 1].lower() != f"{SCHEME}:":
        return
    if not root:
        raise LocalMediaError(f"{shown(address)}: Cannot load local files without allowed_local_media_path: give the LLM the folder "
                              "that they may lie in", "messages", address)
    try:
        split = urlsplit(address)
        path = Path(unquote(split.path)).resolve()
        is_inside = split.netloc in LOCAL_HOSTS and path.is_relative_to(Path(root).resolve())
    except (OSError, ValueError, RuntimeError):  # no address, a NUL, a circle of links
        is_inside = False
    if not is_inside:
        raise LocalMediaError(f"{shown(address)} is outside of allowed_local_media_path", "messages", address)
