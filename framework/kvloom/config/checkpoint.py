"""From a directory or a hub id to a directory. The hub's cache is used when it has the files, so everything works offline too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvloom.errors import ModelError

FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.tiktoken", "*.jinja", "merges.txt", "vocab.txt"]
"""What is fetched of a hub repository: never pickles, and Python files only where their code is trusted."""
CODE_FILES = ["*.py"]
USABLE = ("*.safetensors", "tokenizer_config.json")
"""A snapshot in the cache that has any of these is taken as it is; one without is the rest of an interrupted download."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """What is fetched, and what for.

    Args:
        with_code: Python files too.
        ignore_patterns: files that are left out.
        usable: see `USABLE`.
    """

    with_code: bool = False
    ignore_patterns: tuple[str, ...] = ()
    usable: tuple[str, ...] = USABLE


def resolve_model_dir(model: str, revision: str | None = None, download_dir: str | None = None,
                      token: bool | str | None = None, fetch: Fetch = Fetch()) -> Path:
    """The directory of a checkpoint or tokenizer.

    Args:
        model: directory, or hub id such as ``org/name``.
        revision: branch, tag or commit of a hub id.
        download_dir: the hub's cache folder; None: huggingface_hub's own.
        token: as huggingface_hub takes it.
        fetch: of a hub id.

    Raises:
        ModelError: neither a directory nor a hub id that is in the cache or can be fetched.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists() or directory.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"{model!r} is no directory: give a directory with config.json and safetensors files, or a hub id (org/name)")
    return _from_hub(model, revision, download_dir, token, fetch)


def _from_hub(model: str, revision: str | None, download_dir: str | None, token: bool | str | None, fetch: Fetch) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    def snapshot(*, offline: bool) -> Path:
        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, token=token,
                                      allow_patterns=[*FILES, *(CODE_FILES if fetch.with_code else ())],
                                      ignore_patterns=list(fetch.ignore_patterns), local_files_only=offline))

    cached: Path | None = None
    try:
        found = snapshot(offline=True)
        cached = found if any(True for pattern in fetch.usable for _ in found.glob(pattern)) else None
        if cached is not None and (not fetch.with_code or any(cached.glob("*.py"))):
            return cached
    except LocalEntryNotFoundError:
        pass  # not in the cache: it is fetched below
    except HFValidationError as error:
        raise ModelError(f"{model!r} is neither a directory nor a valid hub id: {error}") from error
    try:
        return snapshot(offline=False)
    except Exception as error:
        if cached is not None:  # it was asked for code too: whether there is any in the repository can't be known here
            return cached
        at = f" at revision {revision!r}" if revision else ""
        reason = _without_secret(str(error), token)[:300]
        raise ModelError(f"{model!r}{at} is no directory here, is not in the hub's cache and cannot be fetched "
                         f"({type(error).__name__}: {reason}). Give a directory, or fetch it first: "
                         f"hf download {model}{f' --revision {revision}' if revision else ''}") from error


def _without_secret(text: str, token: bool | str | None) -> str:
    """`text` of another library, which may quote the headers that it sent."""
    secret = token.strip() if isinstance(token, str) else ""
    return text.replace(secret, "***") if secret else text
