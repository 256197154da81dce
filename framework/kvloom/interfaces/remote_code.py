"""The one gate between a checkpoint and transformers' Auto classes: nothing else may call their ``from_pretrained``.

Those classes import Python files that a checkpoint's JSON names (``auto_map``, in another repository even) and read keys from it
that steer their own code (``_attn_implementation_internal``, ...). Without trust they therefore see a directory in which the JSON
files have neither. Torch-free; transformers' class is the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvloom.errors import ModelError

CODE_KEY = "auto_map"
"""Names classes of a checkpoint's Python files, by Auto class."""
CLEANED = ("config.json", "tokenizer_config.json")
"""Files in which Auto classes look for code; of other files they take data only."""
HARMLESS = frozenset({"_name_or_path"})
"""Keys with an underscore that name things and load nothing."""


def from_pretrained(auto: Any, directory: Path, *, trust_remote_code: bool, code_revision: str | None = None, **options: Any) -> Any:
    """``auto.from_pretrained`` of a directory, offline.

    Args:
        auto: an Auto class of transformers.
        trust_remote_code: the user's own word, never a file's. False: no code of the checkpoint is imported.
        code_revision: of code in another repository that ``auto_map`` names, which is then fetched.
        options: for the class.

    Raises:
        ModelError: the class cannot do without the checkpoint's code, which is not trusted.
    """
    if trust_remote_code:
        more = {} if code_revision is None else {"code_revision": code_revision}
        return auto.from_pretrained(str(directory), trust_remote_code=True, local_files_only=not more, **more, **options)
    with _inert(directory) as clean:
        return auto.from_pretrained(str(clean), trust_remote_code=False, local_files_only=True, **options)


def named_code(directory: Path, file: str, auto_name: str) -> str | None:
    """The class of the checkpoint's own code that `file` names for an Auto class (by name), if any."""
    found = read_json(directory / file).get(CODE_KEY)
    entry = found.get(auto_name) if isinstance(found, Mapping) else found if auto_name == "AutoTokenizer" else None
    if isinstance(entry, list):  # a slow and a fast tokenizer
        entry = next((e for e in entry if e), None)
    return None if entry is None else str(entry)


@contextmanager
def _inert(directory: Path) -> Iterator[Path]:
    """The directory itself where it names no code, else one with links to its files and the JSON cleaned."""
    given = {name: read_json(directory / name) for name in CLEANED}
    cleaned = {name: _clean(content) for name, content in given.items()}
    if cleaned == given:
        yield directory
        return
    with TemporaryDirectory(prefix="kvloom-") as made:
        for path in directory.iterdir():
            if path.suffix != ".py":
                (Path(made) / path.name).symlink_to(path.resolve())
        for name in CLEANED:
            if cleaned[name] != given[name]:
                (Path(made) / name).unlink()
                (Path(made) / name).write_text(json.dumps(cleaned[name]))
        yield Path(made)


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items() if k != CODE_KEY and (not k.startswith("_") or k in HARMLESS)}
    return [_clean(v) for v in value] if isinstance(value, list) else value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file. Raises `ModelError` for anything else."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return found
