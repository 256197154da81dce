"""What is left of an engine that was closed, dropped, or never came up: nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from lifecycle_helpers import GREEDY, PROMPTS, engine, tokens

from kvloom import LLM
from kvloom.errors import ConfigError


@pytest.fixture
def no_cycles_are_collected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def weights(llm: LLM) -> list[weakref.ref]:
    return [weakref.ref(p) for p in llm.apply_model(lambda model: list(model.parameters()))[0]]


@pytest.mark.usefixtures("no_cycles_are_collected")
@pytest.mark.parametrize("enforce_eager", [True, None])
@pytest.mark.parametrize("how", ["close", "del"])
def test_its_weights_are_gone_at_once(small_checkpoint: Path, how: str, enforce_eager: bool | None) -> None:
    llm = engine(small_checkpoint, enforce_eager=enforce_eager)
    tokens(llm)
    held = weights(llm)
    assert held
    assert all(one() is not None for one in held)
    if how == "close":
        llm.close()
    else:
        del llm
    assert [one() for one in held if one() is not None] == []


def test_an_iterator_outlives_the_llm_that_made_it(small_checkpoint: Path) -> None:
    with engine(small_checkpoint) as llm:
        expected = tokens(llm)
    outputs = {int(o.request_id): list(o.outputs[0].token_ids) for o in engine(small_checkpoint).generate_iter(PROMPTS, GREEDY)}
    assert [outputs[i] for i in range(len(PROMPTS))] == expected


@pytest.mark.usefixtures("no_cycles_are_collected")
def test_a_start_that_fails_late_leaves_no_weights_and_can_be_tried_again(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvloom.runtime.worker import DeviceWorker

    held: list[weakref.ref] = []

    def fails(self: DeviceWorker, num_blocks: int) -> None:
        held.extend(weakref.ref(p) for p in self.model.parameters())
        raise ConfigError("no")

    with monkeypatch.context() as patch:
        patch.setattr(DeviceWorker, "allocate", fails)
        with pytest.raises(ConfigError, match="no"):
            engine(small_checkpoint)
    assert held
    assert [one() for one in held if one() is not None] == []
    with engine(small_checkpoint) as llm:
        assert len(tokens(llm)) == len(PROMPTS)
