"""The rest of the class: calls on workers, flags of older versions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom import LLM, SamplingParams
from kvloom.errors import EngineClosedError


@pytest.fixture
def llm(small_checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(small_checkpoint), dtype="float32") as made:
        yield made


def test_collective_rpc__calls_functions_with_the_worker_and_methods_by_name(llm: LLM) -> None:
    assert llm.collective_rpc(lambda worker: worker.rank) == [0]
    assert llm.collective_rpc(lambda worker, a, b=0: (worker.rank, a, b), args=(1,), kwargs={"b": 2}) == [(0, 1, 2)]
    assert llm.collective_rpc("__repr__") == llm.collective_rpc(repr)


def test_collective_rpc__passes_exceptions_on_and_the_engine_goes_on(llm: LLM) -> None:
    with pytest.raises(AttributeError, match="no_such_method"):
        llm.collective_rpc("no_such_method")
    with pytest.raises(ZeroDivisionError):
        llm.collective_rpc(lambda worker: 1 / 0)
    assert len(llm.generate("a", SamplingParams(max_tokens=2), use_tqdm=False)) == 1
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.collective_rpc(lambda worker: 1)


def test_deprecate_legacy_api__warns_inside_the_block_only(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLM, "DEPRECATE_LEGACY", False)
    params = SamplingParams(max_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.generate(prompt_token_ids=[1, 2], sampling_params=params, use_tqdm=False)
    with pytest.warns(DeprecationWarning, match="prompt_token_ids is deprecated"), LLM.deprecate_legacy_api():
        llm.generate(prompt_token_ids=[1, 2], sampling_params=params, use_tqdm=False)
    assert not LLM.DEPRECATE_LEGACY
    with pytest.raises(RuntimeError), LLM.deprecate_legacy_api():
        raise RuntimeError
    assert not LLM.DEPRECATE_LEGACY
