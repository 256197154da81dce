"""One test a parameter of config.json and the files beside it, named after it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from parameter_helpers import engine, hub_cache, plugin, run, scores
from structlog.testing import capture_logs

from kvloom.config.hf_config import HfConfig, overridden
from kvloom.config.model_json import parse_model_config
from kvloom.errors import ConfigError, ModelError, RequestValidationError
from kvloom.interfaces import ModelConfig
from kvloom.testing.checkpoints import BOS, SMALL, make_checkpoint

LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.fixture(scope="module")
def modern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose config.json has the newer rope_parameters."""
    return make_checkpoint(tmp_path_factory.mktemp("modern"), rope_parameters={"rope_type": "default", "rope_theta": 5000.0})


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose layers see the last 32 tokens."""
    return make_checkpoint(tmp_path_factory.mktemp("windowed"), "MistralForCausalLM", sliding_window=32)


def by_attribute(config: Any) -> Any:
    config.rope_theta = 7.0
    config.max_position_embeddings //= 4
    return config


def by_update(config: Any) -> Any:
    config.update({"rope_theta": 7.0, "max_position_embeddings": config["max_position_embeddings"] // 4})
    return config


def as_plain_dict(config: Any) -> Any:
    return {**config.to_dict(), "rope_theta": 7.0, "max_position_embeddings": 128}


@pytest.mark.parametrize("function", [lambda c: (setattr(c, "rope_theta", 7.0), setattr(c, "max_position_embeddings", 128), c)[2],
                                      by_attribute, by_update, as_plain_dict])
def test_hf_overrides__may_be_a_function_as_scripts_write_it(small_checkpoint: Path, function: Callable[[Any], Any]) -> None:
    with engine(small_checkpoint, hf_overrides={"rope_theta": 7.0, "max_position_embeddings": 128}) as llm:
        expected = scores(llm)
    with engine(small_checkpoint, hf_overrides=function) as llm:
        assert scores(llm) == expected
        with pytest.raises(RequestValidationError, match="maximum model length of 128"):
            run(llm, [[1] * 128])


def test_hf_overrides__a_function_may_give_a_transformers_configuration(small_checkpoint: Path) -> None:
    import transformers

    with engine(small_checkpoint) as plain, engine(
            small_checkpoint, hf_overrides=lambda c: transformers.LlamaConfig(**c.to_dict())) as llm:
        assert scores(llm) == scores(plain)


@pytest.mark.parametrize(("function", "message"), [
    (lambda c: None, "must return the configuration, it returned NoneType"), (lambda c: 3, "it returned int"),
    (lambda c: c.no_such_key, "the function raised AttributeError: config.json has no 'no_such_key'"),
    (lambda c: {**c, (1, 2): 3}, "can only hold what JSON has"),
    (lambda c: {**c, "x": object()}, "can only hold what JSON has"), (lambda c: {**c, "x": float("nan")}, "can only hold what JSON has"),
])
def test_hf_overrides__a_function_that_gives_no_configuration_is_refused(small_checkpoint: Path, function: Callable, message: str) -> None:
    with pytest.raises(ConfigError, match=f"hf_overrides: .*{message}"):
        engine(small_checkpoint, hf_overrides=function)


@pytest.mark.parametrize("override", [{"vocab_size": -1}, lambda c: {**c, "vocab_size": -1}])
def test_hf_overrides__are_checked_as_the_file_is(small_checkpoint: Path, override: Any) -> None:
    with pytest.raises(ModelError, match="vocab_size"):
        engine(small_checkpoint, hf_overrides=override)


def test_hf_overrides__functions_see_attributes_and_items_of_nested_objects_alike() -> None:
    raw = {"a": 1, "text_config": {"b": 2}, "list": [1]}
    config = HfConfig.of(raw)
    assert (config.a, config["a"], config.text_config.b, config.get("c"), hasattr(config, "c"), getattr(config, "c", 5)) == (1, 1, 2, None, False, 5)
    config.text_config.b = 3
    config.new = {"x": 1}
    del config.a
    assert config.to_dict() == {"text_config": {"b": 3}, "list": [1], "new": {"x": 1}}
    assert raw == {"a": 1, "text_config": {"b": 2}, "list": [1]}
    with pytest.raises(AttributeError):
        del config.a


@pytest.mark.parametrize("raw", [{"rope_theta": 10.0}, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10.0}}])
def test_hf_overrides__of_older_rope_keys_win_over_a_newer_files(raw: dict) -> None:
    def rope(**override: Any) -> tuple[str, float, float]:
        found = parse_model_config(overridden({**SMALL, **raw}, override), ModelConfig).rope
        return found.rope_type, found.factor, found.rope_theta

    before = rope()
    assert rope(rope_theta=7.0) == (*before[:2], 7.0)
    assert rope(rope_scaling=LINEAR) == ("linear", 2.0, 10.0)
    assert rope(rope_scaling=LINEAR, rope_theta=7.0) == ("linear", 2.0, 7.0)


def test_rope_theta__and_hf_overrides_mean_the_same(small_checkpoint: Path, modern: Path) -> None:
    for directory in (small_checkpoint, modern):
        with engine(directory) as plain, engine(directory, rope_theta=7.0) as llm, engine(directory, hf_overrides={"rope_theta": 7.0}) as same:
            assert scores(llm) == scores(same) != scores(plain)


def test_rope_scaling__stretches_the_context_and_keeps_the_base(small_checkpoint: Path, modern: Path) -> None:
    for directory in (small_checkpoint, modern):
        with engine(directory) as plain, engine(directory, rope_scaling=LINEAR) as llm, engine(
                directory, hf_overrides={"rope_scaling": LINEAR}) as same:
            assert scores(llm) == scores(same) != scores(plain)
            with pytest.raises(RequestValidationError, match="maximum model length of 1024"):
                run(llm, [[1] * 1024])
    with pytest.raises(ValueError, match="twisted"):
        engine(small_checkpoint, rope_scaling={"rope_type": "twisted", "factor": 2.0})


def test_hf_config_path__has_config_json_for_weights_that_lie_elsewhere(small_checkpoint: Path, tmp_path: Path) -> None:
    weights, config = tmp_path / "weights", tmp_path / "config"
    shutil.copytree(small_checkpoint, weights)
    (weights / "config.json").unlink()
    config.mkdir()
    content = json.loads((small_checkpoint / "config.json").read_text())
    (config / "config.json").write_text(json.dumps({**content, "rope_theta": 7.0}))
    hub_cache(tmp_path / "hub", "acme/config", main=config)
    with engine(small_checkpoint, rope_theta=7.0) as llm:
        expected = scores(llm)
    for given in (str(config), "acme/config"):
        with engine(weights, hf_config_path=given, download_dir=str(tmp_path / "hub")) as llm:
            assert scores(llm) == expected
    for given, message in ((str(tmp_path / "hub"), "has no config.json"), ("/no/such", "is no directory"), ("acme/none", "cannot be fetched")):
        with pytest.raises(ModelError, match=message):
            engine(weights, hf_config_path=given, download_dir=str(tmp_path / "hub"))


def test_config_format__reads_config_json_under_both_names(small_checkpoint: Path) -> None:
    with engine(small_checkpoint) as plain, engine(small_checkpoint, config_format="auto") as auto, engine(
            small_checkpoint, config_format="hf") as llm:
        assert scores(plain) == scores(auto) == scores(llm)


def test_model_impl__is_the_plugins_under_every_name(small_checkpoint: Path) -> None:
    with engine(small_checkpoint) as plain, engine(small_checkpoint, model_impl="auto") as auto, engine(
            small_checkpoint, model_impl="kvloom") as ours, engine(small_checkpoint, model_impl="vllm") as vllms:
        assert scores(plain) == scores(auto) == scores(ours) == scores(vllms)


@pytest.mark.parametrize(("given", "patterns"), [(None, []), ("original/*", ["original/*"]), (["a/*", "*.bin"], ["a/*", "*.bin"])])
def test_ignore_patterns__are_not_fetched(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, given: Any, patterns: list[str]) -> None:
    seen = []
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda model, **options: seen.append(options["ignore_patterns"]) or str(small_checkpoint))
    with engine("acme/tiny", ignore_patterns=given, tokenizer="acme/tokenizer") as llm:
        assert len(scores(llm)[0]) == 6
    assert seen == [patterns, patterns]


@pytest.mark.parametrize(("given", "name"), [("tiny", "tiny"), (["first", "second"], "first"), (None, None)])
def test_served_model_name__is_what_logs_and_plugins_call_it(small_checkpoint: Path, given: Any, name: str | None) -> None:
    with capture_logs() as logs, engine(small_checkpoint, served_model_name=given) as llm:
        assert llm.llm_engine.model_name == (name or str(small_checkpoint))
        assert repr(llm).startswith(f"LLM(model={llm.llm_engine.model_name!r})")
    structlog.reset_defaults()
    assert [entry["model"] for entry in logs if entry["event"] == "engine started"] == [name or str(small_checkpoint)]


def test_disable_sliding_window__lets_layers_see_all_of_at_most_a_windows_tokens(windowed: Path) -> None:
    with engine(windowed) as with_window, engine(windowed, disable_sliding_window=True) as llm:
        short = list(range(1, 20))
        assert scores(llm, short)[0] == scores(with_window, short)[0]
        assert [group.window_tokens for group in llm.llm_engine.plan.needs.groups] == [None]
        assert [group.window_tokens for group in with_window.llm_engine.plan.needs.groups] == [32]
        with pytest.raises(RequestValidationError, match="maximum model length of 32"):
            run(llm, [[1] * 32])
    with pytest.raises(ConfigError, match="max_model_len=33 is more than the 32 tokens"):
        engine(windowed, disable_sliding_window=True, max_model_len=33)


def test_disable_sliding_window__changes_nothing_where_there_is_none(small_checkpoint: Path) -> None:
    with engine(small_checkpoint) as plain, engine(small_checkpoint, disable_sliding_window=True, hf_overrides={
            "sliding_window": 32, "use_sliding_window": False}) as llm:
        assert scores(llm) == scores(plain)
        assert len(run(llm, [[1] * 100])) == 1


TUNED = plugin("loaders", "tuned", """
from pydantic import BaseModel, ConfigDict
from kvloom_plugins.loaders.dummy import DummyLoader
class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")
    value: float = 0.0
class Tuned(DummyLoader):
    def __init__(self, settings):
        self._settings = settings
        super().__init__()
    def read(self, names):
        for name, tensor in super().read(names):
            yield name, tensor.fill_(self._settings.value)
""").replace('"acme_0:Tuned")', '"acme_0:Tuned", config=Settings)')


def test_model_loader_extra_config__are_the_loaders_own_settings(install, small_checkpoint: Path) -> None:
    install("acme", {"acme": TUNED})
    for given, value in ((None, 0.0), ({}, 0.0), ({"value": 0.5}, 0.5)):
        with engine(small_checkpoint, load_format="tuned", model_loader_extra_config=given) as llm:
            (values,) = llm.apply_model(lambda model: {float(v) for p in model.parameters() for v in p.flatten()[:3]})
            assert values == {value}
    for load_format, given, message in (("tuned", {"valu": 1}, "valu: Extra inputs.*settings of 'tuned': value"),
                                        ("tuned", {"value": "x"}, "value: .*number"), ("auto", {"value": 1}, "the loader 'auto' .* takes none")):
        with pytest.raises(ConfigError, match=f"model_loader_extra_config=.*{message}"):
            engine(small_checkpoint, load_format=load_format, model_loader_extra_config=given)
    with engine(small_checkpoint, model_loader_extra_config={}) as llm:
        assert len(scores(llm)[0]) == 6


@pytest.mark.parametrize("load_format", ["pt", "npcache", "mistral"])
def test_load_format__of_files_that_are_never_read_says_what_to_do(small_checkpoint: Path, load_format: str) -> None:
    with pytest.raises(ValueError, match=f"load_format='{load_format}' .*convert the checkpoint to safetensors"):
        engine(small_checkpoint, load_format=load_format)


def test_chat_template__of_the_engine_serves_conversations_without_one_of_their_own(small_checkpoint: Path, tmp_path: Path) -> None:
    template, message = "{% for m in messages %}<{{ m.content }}>{% endfor %}", [{"role": "user", "content": "Hi"}]
    (tmp_path / "template.jinja").write_text(template)
    for given in (template, str(tmp_path / "template.jinja")):
        with engine(small_checkpoint, chat_template=given) as llm:
            (rendered,) = llm.chat(message, dry_run=True)
            assert (rendered.prompt, rendered.prompt_token_ids) == ("<Hi>", [BOS, *b"<Hi>"])
            (other,) = llm.chat(message, dry_run=True, chat_template="{{ messages[0].content }}!")
            assert other.prompt == "Hi!"
    with engine(small_checkpoint) as llm, pytest.raises(RequestValidationError, match="you must provide a chat template"):
        llm.chat(message, dry_run=True)


def test_chat_template__that_cannot_be_compiled_is_refused_before_weights_are_read(
        small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, no_text = tmp_path / "broken.jinja", tmp_path / "no_text.jinja"
    broken.write_text("{% for m in messages %}{{ m.content }}")
    no_text.write_bytes(b"{{ \xff }}")
    with monkeypatch.context() as patch:
        patch.setattr("kvloom.runtime.model_plan.make_loader", lambda *_: pytest.fail("weights were read"))
        for given, message in (("{% if %}", "TemplateSyntaxError"), ("{{ x | nonsense }}", "No filter named 'nonsense'"),
                               ("{{ 1 }}" * 2**18, "at most 1048576 are taken"), (str(broken), "endfor"), (str(no_text), "no file that can be read")):
            with pytest.raises(ConfigError, match=f"(?s)^chat_template=.*{message}"):
                engine(small_checkpoint, chat_template=given)


def test_chat_template__that_fails_on_a_conversation_fails_the_request(small_checkpoint: Path) -> None:
    with engine(small_checkpoint, chat_template="{{ raise_exception('no') if messages[0].content == 'Hi' }}Yes") as llm:
        with pytest.raises(RequestValidationError, match="cannot be rendered.*no"):
            llm.chat([{"role": "user", "content": "Hi"}], dry_run=True)
        assert llm.chat([{"role": "user", "content": "Ho"}], dry_run=True)[0].prompt == "Yes"


def image(url: Any) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": url}]}]


def test_allowed_local_media_path__bounds_the_files_that_conversations_name(small_checkpoint: Path, tmp_path: Path) -> None:
    root, outside = tmp_path / "media", tmp_path / "secret.png"
    root.mkdir()
    outside.write_bytes(b"x")
    (root / "in side.png").write_bytes(b"x")
    (root / "link.png").symlink_to(outside)
    with engine(small_checkpoint, allowed_local_media_path=str(root), chat_template="{{ messages[0].content }}") as llm:
        for bad in (outside, root / "../secret.png", root / "link.png", Path("/etc/passwd"), f"{root}/%2e%2e/secret.png", f"{root}/\0.png"):
            for url in ({"url": f"file://{bad}"}, f"FILE://{bad}", {"url": f"file://localhost{bad}"}):
                with pytest.raises(ValueError, match="outside of allowed_local_media_path"):
                    llm.chat(image(url))
        with pytest.raises(ValueError, match="outside"):
            llm.chat(image({"url": f"file://elsewhere{root}/in%20side.png"}))
        for url in (f"file://{root}/in%20side.png", "https://example.org/a.png", "data:image/png;base64,AAAA"):
            with pytest.raises(ValueError, match="image_url.*only text parts work"):
                llm.chat(image({"url": url}))
        assert len(llm.chat([{"role": "user", "content": "a"}], use_tqdm=False)) == 1


def test_allowed_local_media_path__empty_allows_no_local_file(small_checkpoint: Path) -> None:
    with engine(small_checkpoint, chat_template="{{ messages[0].content }}") as llm:
        with pytest.raises(RuntimeError, match="Cannot load local files without allowed_local_media_path") as caught:
            llm.chat(image({"url": "file:///tmp/a.png"}))
        assert isinstance(caught.value, RequestValidationError)
        assert caught.value.value == "file:///tmp/a.png"
