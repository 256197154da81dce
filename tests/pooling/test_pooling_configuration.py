"""The rows of docs/api.md about the configuration of pooling, one test each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pooling_helpers import close, engine, hidden_of, make, prompts_of, unit

from kvloom import PoolerConfig, SamplingParams
from kvloom.config import EngineConfig
from kvloom.errors import ConfigError, RequestValidationError, UnsupportedFeatureError

PROMPTS = prompts_of(8)
QUIET = {"use_tqdm": False}


def test_task__says_what_an_engine_is_for(directory: Path, model: torch.nn.Module) -> None:
    with engine(directory) as made:
        assert len(made.generate([PROMPTS[0]], SamplingParams(max_tokens=2), **QUIET)) == 1
        for call in (made.encode, made.embed, made.classify, made.reward, lambda p: made.score("a", "b")):
            with pytest.raises(RequestValidationError, match="is only supported for .*this engine runs with task='generate'.*Make an LLM with task="):
                call([PROMPTS[0]])
    for task in ("embed", "pooling"):
        with engine(directory, task=task) as made:
            for call in (made.generate, made.generate_iter, made.chat):
                with pytest.raises(RequestValidationError, match="only supported for .conditional. generation models.*task='generate'"):
                    call([PROMPTS[0]])
            with pytest.raises(RequestValidationError, match="is only supported for models that classify"):
                made.classify([PROMPTS[0]])
    with pytest.warns(DeprecationWarning, match="use task='embed'"):
        assert EngineConfig.from_kwargs(model="m", task="embedding").model.task == "embed"
    with pytest.raises(ConfigError, match="does not support the 'classify' task. Supported tasks"):
        engine(directory, task="classify")


def test_runner__is_another_name_of_task() -> None:
    for runner, task in (("auto", "auto"), ("generate", "generate"), ("pooling", "pooling")):
        assert EngineConfig.from_kwargs(model="m", runner=runner).model.task == task
    config = EngineConfig.from_kwargs(model="m", runner="pooling", convert="embed")
    assert (config.model.task, config.notes) == ("embed", ("runner='pooling' and convert='embed' is called task='embed' here",))
    with pytest.raises(UnsupportedFeatureError, match="runner='draft'"):
        EngineConfig.from_kwargs(model="m", runner="draft")
    with pytest.raises(ConfigError, match="mean the same"):
        EngineConfig.from_kwargs(model="m", runner="pooling", task="embed")


def test_convert__is_another_name_of_task() -> None:
    for convert, task in (("auto", "auto"), ("none", "auto"), ("embed", "embed"), ("classify", "classify")):
        assert EngineConfig.from_kwargs(model="m", convert=convert).model.task == task
    with pytest.raises(ConfigError, match="contradicts"):
        EngineConfig.from_kwargs(model="m", runner="generate", convert="embed")


def test_override_pooler_config__is_a_pooler_config_or_a_dict(directory: Path, model: torch.nn.Module) -> None:
    for config in (PoolerConfig(pooling_type="MEAN"), {"pooling_type": "MEAN"}):
        with engine(directory, task="embed", override_pooler_config=config) as made:
            close(made.embed([PROMPTS[0]], **QUIET)[0].outputs.embedding, unit(hidden_of(model, PROMPTS[0]).mean(0)))
    with pytest.raises(ConfigError, match="override_pooler_config"):
        engine(directory, task="embed", override_pooler_config={"pooling": "MEAN"})


def test_pooler_pooling_type__must_be_registered(directory: Path, model: torch.nn.Module) -> None:
    with pytest.raises(ConfigError, match="pooling_type='MAEN'.*did you mean 'MEAN'"):
        engine(directory, task="embed", override_pooler_config=PoolerConfig(pooling_type="MAEN"))


@pytest.mark.parametrize(("task", "config", "message"), [
    ("generate", {"pooling_type": "MEAN"}, "says pooling_type, but this engine generates"), ("embed", {"softmax": True}, "softmax=True means nothing with task='embed'"),
    ("embed", {"returned_token_ids": [1]}, "this engine gives embeddings"),
])
def test_override_pooler_config__that_would_change_nothing_is_refused_before_weights_are_read(
        directory: Path, monkeypatch: pytest.MonkeyPatch, task: str, config: dict, message: str) -> None:
    monkeypatch.setattr("kvloom.runtime.model_plan.make_loader", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=message):
        engine(directory, task=task, override_pooler_config=config)


def test_pooler_normalize__false_keeps_the_length(directory: Path, model: torch.nn.Module) -> None:
    with engine(directory, task="embed", override_pooler_config=PoolerConfig(normalize=False)) as made:
        close(made.embed([PROMPTS[0]], **QUIET)[0].outputs.embedding, hidden_of(model, PROMPTS[0])[-1])


def logits_of(cross, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return cross[1](torch.tensor([prompt])).logits[0]


@pytest.mark.parametrize("name", ["softmax", "use_activation"])
def test_pooler_softmax__false_gives_raw_scores(cross, name: str) -> None:
    with engine(cross[0], override_pooler_config={name: False}) as made:
        close(made.classify([PROMPTS[0]], **QUIET)[0].outputs.probs, logits_of(cross, PROMPTS[0]))


def test_pooler_use_activation__may_not_contradict() -> None:
    with pytest.raises(ValueError, match="contradicts normalize or softmax"):
        PoolerConfig(use_activation=True, softmax=False)


def test_pooler_step_tag_id__is_a_token_id(cross) -> None:
    with engine(cross[0], override_pooler_config=PoolerConfig(pooling_type="STEP", step_tag_id=9, softmax=False)) as made:
        (output,) = made.encode([[5, 9, 6]], **QUIET)
        close(output.outputs.data[0], logits_of(cross, [5, 9]))
    for bad in (-1, True, "x"):
        with pytest.raises(ValueError, match="step_tag_id"):
            PoolerConfig(step_tag_id=bad)


def test_pooler_returned_token_ids__are_columns_of_the_label_head(tmp_path: Path) -> None:
    theirs = make(tmp_path, kind="ForSequenceClassification", num_labels=3)
    with engine(tmp_path, override_pooler_config=PoolerConfig(returned_token_ids=[2, 0])) as made, torch.no_grad():
        close(made.classify([PROMPTS[0]], **QUIET)[0].outputs.probs, theirs(torch.tensor([PROMPTS[0]])).logits[0, [2, 0]].softmax(-1))
    with pytest.raises(ConfigError, match="columns 0 to 2 of the label head, got 3"):
        engine(tmp_path, override_pooler_config=PoolerConfig(returned_token_ids=[3]))
