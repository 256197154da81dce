"""Make every kind of bad input and show that it is refused. Meant for ``python -O scripts/check_refusals.py``: no check is an assert.

Prints a line a refusal; the exit code is 1 when something was let through or raised anything but kvloom's own errors.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from kvloom import LLM, SamplingParams
from kvloom.errors import KvloomError
from kvloom.hooks.discovery import PluginSelection
from kvloom.hooks.loader import load_plugins
from kvloom.testing.checkpoints import make_checkpoint

PLUGIN = """
from kvloom import hookimpl
KVLOOM_API = {{"schedulers": {version}}}
@hookimpl
def {hook}(registry):
    registry.add("mine", "x:Y")
"""


def install(site: Path, distribution: str, source: str) -> str:
    """A made-up distribution with one plugin of the same name."""
    info = site / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kvloom]\n{distribution} = {distribution}_plugin\n")
    (site / f"{distribution}_plugin.py").write_text(source)
    return distribution


def checkpoint_cases(scratch: Path) -> dict[str, Callable[[], object]]:
    """Directories that are no usable checkpoint."""
    good = make_checkpoint(scratch / "good")
    weights = (good / "model.safetensors").read_bytes()

    def broken(name: str, content: bytes | None, file: str = "model.safetensors", config: str | None = None) -> Callable[[], object]:
        directory = scratch / name
        directory.mkdir()
        if config != "":
            (directory / "config.json").write_text(config or (good / "config.json").read_text())
        if content is not None:
            (directory / file).write_bytes(content)
        return lambda: LLM(str(directory), skip_tokenizer_init=True)

    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8:8 + length])
    header["model.norm.weight"]["shape"] = [2**40]
    lying = json.dumps(header).encode().ljust(length)
    return {
        "an unknown architecture": broken("architecture", weights, config=json.dumps({"architectures": ["NoSuchModel"]})),
        "a directory without config": broken("no-config", weights, config=""),
        "a truncated file": broken("truncated", weights[:-100]),
        "a truncated header": broken("truncated-header", weights[:20]),
        "a lying header": broken("lying", len(lying).to_bytes(8, "little") + lying + weights[8 + length:]),
        "a checkpoint of pickles only": broken("pickles", b"\x80\x04.", "pytorch_model.bin"),
    }


def plugin_cases(scratch: Path) -> dict[str, Callable[[], object]]:
    """Plugins that are wrong."""
    site = scratch / "site"
    good = PLUGIN.format(version=0, hook="kvloom_register_schedulers")
    for name in ("one", "other"):
        install(site, name, good)
    install(site, "broken", "raise OSError('no driver')")
    install(site, "misspelt", PLUGIN.format(version=0, hook="kvloom_register_scheduler"))
    install(site, "newer", PLUGIN.format(version=9, hook="kvloom_register_schedulers"))
    sys.path.insert(0, str(site))

    def load(*names: str) -> Callable[[], object]:
        return lambda: load_plugins(PluginSelection(names, "plugins="))

    return {
        "two plugins with one name": lambda: load_plugins(PluginSelection(("one", "other"))).registries["schedulers"].resolve("mine"),
        "a named plugin that raises on import": load("broken"),
        "what an installed plugin that raises on import would have offered":
            lambda: load_plugins(PluginSelection()).registries["schedulers"].resolve("of the broken one"),
        "a misspelt hook": load("misspelt"),
        "a plugin for another contract version": load("newer"),
    }


def request_cases(scratch: Path) -> dict[str, Callable[[], object]]:
    """Requests that cannot be served."""
    directory = make_checkpoint(scratch / "small", tokenizer=False)
    llm = LLM(str(directory), skip_tokenizer_init=True, max_model_len=64, num_gpu_blocks_override=4, plugins=[])

    def generate(token_ids: list[int], max_tokens: int = 4) -> Callable[[], object]:
        return lambda: llm.generate([token_ids], SamplingParams(max_tokens=max_tokens), use_tqdm=False)

    return {
        "an id out of the vocabulary": generate([288]),
        "a negative id": generate([-1]),
        "an over-long prompt": generate([1] * 64),
        "a request that the pool can never hold": generate([1] * 40, max_tokens=20),
    }


def main() -> int:
    """Run every case; the exit code."""
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        cases = {**checkpoint_cases(scratch), **request_cases(scratch), **plugin_cases(scratch)}
        for name, case in cases.items():
            try:
                case()
            except KvloomError as error:
                print(f"refused: {name}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
            except Exception as error:  # noqa: BLE001  (that is what this script looks for)
                failures += 1
                print(f"NOT OURS: {name}: {error!r}")
            else:
                failures += 1
                print(f"LET THROUGH: {name}")
    print(f"{len(cases)} kinds of bad input, {failures} not refused as they should be; asserts are {'on' if __debug__ else 'off'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
