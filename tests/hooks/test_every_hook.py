"""One test a hook, named after it: what a plugin offers through it is found, loaded and checked against its contract."""

from __future__ import annotations

from pathlib import Path

import pytest
from plugin_sources import registers

import kvloom.interfaces as interfaces
from kvloom import LLM, SamplingParams
from kvloom.errors import PluginLoadError
from kvloom.hooks.discovery import PluginSelection
from kvloom.hooks.loader import load_plugins
from kvloom.hooks.specs import KINDS, OBSERVERS


def offered_and_checked(install, kind: str) -> None:
    """A subclass of the contract is taken, another class is refused; both through the hook of this kind."""
    contract = KINDS[kind].contracts[0]
    source = f"from kvloom.interfaces import {contract}\nclass Mine({contract}):\n    pass\nclass Wrong:\n    pass\n"
    install("acme", {
        "acme-right": registers(kind, "mine", "acme_0:Mine", extra=source),
        "acme-wrong": registers(kind, "wrong", "acme_1:Wrong", extra=source),
    })
    registry = load_plugins(PluginSelection(("acme-right", "acme-wrong"), "plugins=")).registries[kind]
    assert issubclass(registry.resolve("mine").load(), getattr(interfaces, contract))
    with pytest.raises(PluginLoadError, match=f"no subclass of kvloom.interfaces.{contract}"):
        registry.resolve("wrong").load()


def test_kvloom_register_models(install) -> None:
    offered_and_checked(install, "models")


def test_kvloom_register_quantizations(install) -> None:
    offered_and_checked(install, "quantizations")


def test_kvloom_register_logits_processors(install) -> None:
    offered_and_checked(install, "logits_processors")


def test_kvloom_register_samplers(install) -> None:
    offered_and_checked(install, "samplers")


def test_kvloom_register_decoders(install) -> None:
    offered_and_checked(install, "decoders")


def test_kvloom_register_poolers(install) -> None:
    offered_and_checked(install, "poolers")


def test_kvloom_register_attention_backends(install) -> None:
    offered_and_checked(install, "attention_backends")


def test_kvloom_register_adapters(install) -> None:
    offered_and_checked(install, "adapters")


def test_kvloom_register_executors(install) -> None:
    offered_and_checked(install, "executors")


def test_kvloom_register_grammars(install) -> None:
    offered_and_checked(install, "grammars")


def test_kvloom_register_loaders(install) -> None:
    offered_and_checked(install, "loaders")


def test_kvloom_register_schedulers(install) -> None:
    offered_and_checked(install, "schedulers")


def test_kvloom_register_tokenizers(install) -> None:
    offered_and_checked(install, "tokenizers")


def test_kvloom_register_media(install) -> None:
    offered_and_checked(install, "media")


def test_kvloom_register_routes(install) -> None:
    offered_and_checked(install, "routes")


OBSERVER = """
from kvloom import hookimpl
SEEN = []
@hookimpl
def {hook}({argument}):
    SEEN.append({argument})
    if len(SEEN) > 1:
        raise RuntimeError("an onlooker breaks")
"""


def observed(install, checkpoint: Path, hook: str, argument: str) -> tuple[list, LLM, list]:
    """What an observer saw of an engine that served three requests, although the observer broke."""
    install("acme", {"acme": OBSERVER.format(hook=hook, argument=argument)})
    import acme_0  # what the fixture installed

    with LLM(str(checkpoint), plugins=["acme"]) as llm:
        outputs = llm.generate(["a", "b", "c"], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True), use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [3, 3, 3]
    return acme_0.SEEN, llm, outputs


def test_kvloom_engine_started(install, small_checkpoint: Path) -> None:
    seen, _, _ = observed(install, small_checkpoint, "kvloom_engine_started", "engine")
    assert len(seen) == 1
    assert seen[0].model_name == str(small_checkpoint)
    assert seen[0].stats()["free_blocks"] == seen[0].stats()["total_blocks"]


def test_kvloom_step_finished(install, small_checkpoint: Path, capsys) -> None:
    seen, _, _ = observed(install, small_checkpoint, "kvloom_step_finished", "stats")
    assert [s.step_id for s in seen] == [0, 1], "an observer that breaks is asked no more"
    assert seen[0].num_tokens == 6
    assert "an onlooker breaks" in capsys.readouterr().err


def test_kvloom_request_finished(install, small_checkpoint: Path, capsys) -> None:
    seen, _, outputs = observed(install, small_checkpoint, "kvloom_request_finished", "output")
    assert [o.request_id for o in seen] == [o.request_id for o in outputs] == ["0", "1", "2"]
    assert "an onlooker breaks" in capsys.readouterr().err


def test_every_hook_has_its_test() -> None:
    hooks = [*(k.hook for k in KINDS.values()), *OBSERVERS]
    assert [h for h in hooks if f"test_{h}" not in globals()] == []
