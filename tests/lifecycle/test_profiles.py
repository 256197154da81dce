"""torch's profiler around the steps of an engine: files, threads, other profiles."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from lifecycle_helpers import engine, tokens

from kvloom.errors import ConfigError, EngineStateError, RequestTypeError, RequestValidationError


def events(file: str) -> list[str]:
    return [e.get("name", "") for e in json.loads(gzip.decompress(Path(file).read_bytes()))["traceEvents"]]


def test_start_profile__records_steps_until_stop_profile(small_checkpoint: Path, tmp_path: Path) -> None:
    with engine(small_checkpoint, profile_dir=str(tmp_path / "new/traces")) as llm:
        tokens(llm)
        assert not (tmp_path / "new").exists()
        llm.start_profile("mine-")
        steps = llm.llm_engine.engine.scheduler._next_step_id
        assert len(tokens(llm)) == 3
        (file,) = llm.stop_profile()
        assert Path(file).parent == tmp_path / "new/traces"
        assert Path(file).name.startswith("mine-rank0-")
        names = events(file)
        assert f"step {steps}" in names
        assert any(name.startswith("aten::") for name in names)
        llm.start_profile()
        (second,) = llm.stop_profile()
        assert second != file
        assert not any(name.startswith("step ") for name in events(second))


def test_stop_profile__without_a_start_and_a_second_start_are_refused(small_checkpoint: Path, tmp_path: Path) -> None:
    with engine(small_checkpoint, profile_dir=str(tmp_path)) as llm:
        with pytest.raises(EngineStateError, match="was not started"):
            llm.stop_profile()
        llm.start_profile()
        with pytest.raises(EngineStateError, match="was started already"):
            llm.start_profile()
        assert len(llm.stop_profile()) == 1
        with pytest.raises(EngineStateError, match="was not started"):
            llm.stop_profile()
        llm.start_profile()
    assert len(list(tmp_path.iterdir())) == 1, "what is being recorded when the engine closes is forgotten"


def test_start_profile__is_refused_while_another_engine_records(small_checkpoint: Path, tmp_path: Path) -> None:
    with engine(small_checkpoint, profile_dir=str(tmp_path)) as llm, engine(small_checkpoint, profile_dir=str(tmp_path)) as other:
        llm.start_profile()
        with pytest.raises(EngineStateError, match="another engine of this process"):
            other.start_profile()
        llm.close()
        other.start_profile()
        assert len(other.stop_profile()) == 1


@pytest.mark.parametrize(("prefix", "error"), [("../x", RequestValidationError), ("a" * 65, RequestValidationError), (5, RequestTypeError)])
def test_start_profile__refuses_prefixes_that_are_no_part_of_a_name(small_checkpoint: Path, tmp_path: Path, prefix: object,
                                                                    error: type[Exception]) -> None:
    with engine(small_checkpoint, profile_dir=str(tmp_path)) as llm:
        with pytest.raises(error, match="profile_prefix"):
            llm.start_profile(prefix)
        llm.start_profile()


def test_profile_dir__is_where_traces_go_and_is_needed_for_them(small_checkpoint: Path, tmp_path: Path) -> None:
    with engine(small_checkpoint) as llm, pytest.raises(EngineStateError, match="profile_dir="):
        llm.start_profile()
    (tmp_path / "file").write_text("")
    with engine(small_checkpoint, profile_dir=str(tmp_path / "file/traces")) as llm:
        with pytest.raises(ConfigError, match="profile_dir=.*cannot be made"):
            llm.start_profile()
        assert len(tokens(llm)) == 3


def in_a_thread(call: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_stop_profile__in_another_thread_is_refused_and_loses_nothing(small_checkpoint: Path, tmp_path: Path) -> None:
    with engine(small_checkpoint, profile_dir=str(tmp_path)) as llm:
        llm.start_profile()
        with pytest.raises(EngineStateError, match="started in the thread 'MainThread'"):
            in_a_thread(llm.stop_profile)
        tokens(llm)
        (file,) = llm.stop_profile()
        assert any(name.startswith("step ") for name in events(file))


def test_start_profile__in_a_thread_records_that_threads_steps(small_checkpoint: Path, tmp_path: Path) -> None:
    with engine(small_checkpoint, profile_dir=str(tmp_path)) as llm:
        def recorded() -> list[str]:
            llm.start_profile()
            tokens(llm)
            return llm.stop_profile()

        (file,) = in_a_thread(recorded)
        assert any(name.startswith("step ") for name in events(file))


def test_start_profile__leaves_somebody_elses_profile_alone(small_checkpoint: Path, tmp_path: Path) -> None:
    with engine(small_checkpoint, profile_dir=str(tmp_path)) as llm:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as own:
            with pytest.raises(EngineStateError, match="on in this thread already"):
                llm.start_profile()
            torch.ones(3).sum()
        assert any(event.key == "aten::sum" for event in own.key_averages())
        llm.start_profile()
        assert len(llm.stop_profile()) == 1


def test_stop_profile__into_a_folder_that_is_gone_says_so_and_can_be_started_again(small_checkpoint: Path, tmp_path: Path) -> None:
    with engine(small_checkpoint, profile_dir=str(tmp_path / "traces")) as llm:
        llm.start_profile()
        (tmp_path / "traces").rmdir()
        with pytest.raises(ConfigError, match="profile_dir=.*cannot be written"):
            llm.stop_profile()
        llm.start_profile()
        assert len(llm.stop_profile()) == 1


def test_stop_profile__after_the_thread_that_started_it_ended_says_so_once(small_checkpoint: Path, tmp_path: Path) -> None:
    with engine(small_checkpoint, profile_dir=str(tmp_path)) as llm:
        starter = threading.Thread(target=llm.start_profile)
        starter.start()
        starter.join()
        with pytest.raises(EngineStateError, match="has ended, and what it recorded with it"):
            llm.stop_profile()
        llm.start_profile()
        assert len(llm.stop_profile()) == 1
