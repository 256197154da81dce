"""A checkpoint's own code runs when the user trusts it, through one gate, and never otherwise."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from parameter_helpers import engine, run, scores
from repository import ROOT

from kvloom.errors import ModelError, UnsupportedArchitectureError, UnsupportedFeatureError
from kvloom.testing.checkpoints import BOS

CANARY = "from pathlib import Path\nPath({path!r}).write_text('sung')\n"
TOKENIZER = """
from transformers import PreTrainedTokenizerFast
class ShoutingTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, **options):
        return super().__call__(text.upper(), **options)
"""
CONFIG = """
from transformers import PretrainedConfig
class OddConfig(PretrainedConfig):
    model_type = "odd"
    def __init__(self, width=64, **kwargs):
        self.hidden_size = width
        super().__init__(**kwargs)
"""
HOSTILE = {
    "_attn_implementation_internal": "evil/kernel", "_commit_hash": "0" * 40, "_attn_implementation": "evil/kernel",
    "_experts_implementation": "evil/kernel", "trust_remote_code": True,
}


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What code that was run has written. transformers' copies of code stay in the test's folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "canary"


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in {**content, **values}.items() if v is not None}))


def custom(source: Path, directory: Path, canary: Path, *, tokenizer: bool = True, config: bool = True) -> Path:
    """A copy whose JSON files name Python files that leave a canary."""
    shutil.copytree(source, directory)
    song = CANARY.format(path=str(canary))
    for name, code in (("tokenization_odd.py", TOKENIZER), ("configuration_odd.py", CONFIG), ("modeling_odd.py", "")):
        (directory / name).write_text(song + code)
    if tokenizer:
        change(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_odd.ShoutingTokenizer"]}, **HOSTILE)
    if config:
        change(directory / "config.json", auto_map={"AutoConfig": "configuration_odd.OddConfig"}, **HOSTILE)
    return directory


def test_trust_remote_code__false_leaves_hostile_files_inert(small_checkpoint: Path, tmp_path: Path, canary: Path) -> None:
    directory = custom(small_checkpoint, tmp_path / "m", canary)
    with engine(small_checkpoint) as plain, engine(directory) as llm:  # PreTrainedTokenizerFast is a class of transformers
        assert scores(llm) == scores(plain)
        assert run(llm, "hi")[0].prompt_token_ids == [BOS, *b"hi"]
    assert not canary.exists()
    assert not (tmp_path / "modules").exists()


def test_trust_remote_code__false_refuses_a_tokenizer_that_is_only_code(small_checkpoint: Path, tmp_path: Path, canary: Path) -> None:
    directory = custom(small_checkpoint, tmp_path / "m", canary)
    change(directory / "tokenizer_config.json", tokenizer_class="ShoutingTokenizer")
    for maps in ({"AutoTokenizer": ["tokenization_odd.ShoutingTokenizer", None]}, ["tokenization_odd.ShoutingTokenizer", None],
                 {"AutoTokenizer": "evil/repository--tokenization_odd.ShoutingTokenizer"}):
        change(directory / "tokenizer_config.json", auto_map=maps)
        with pytest.raises(ModelError, match=r"is code that comes with it \(.*ShoutingTokenizer\), and it is not run.*trust_remote_code=True"):
            engine(directory)
    with engine(directory, skip_tokenizer_init=True) as llm:
        assert len(scores(llm)[0]) == 6
    assert not canary.exists()


def test_trust_remote_code__true_loads_the_checkpoints_tokenizer(small_checkpoint: Path, tmp_path: Path, canary: Path) -> None:
    directory = custom(small_checkpoint, tmp_path / "m", canary, config=False)
    change(directory / "tokenizer_config.json", tokenizer_class="ShoutingTokenizer")
    with engine(directory, trust_remote_code=True) as llm:
        assert run(llm, "hi")[0].prompt_token_ids == [BOS, *b"HI"]
        assert type(llm.get_tokenizer()).__name__ == "ShoutingTokenizer"
    assert canary.read_text()


def test_trust_remote_code__true_asks_the_checkpoints_configuration_class(small_checkpoint: Path, tmp_path: Path, canary: Path) -> None:
    directory = custom(small_checkpoint, tmp_path / "m", canary, tokenizer=False)
    change(directory / "config.json", hidden_size=None, width=64, model_type="odd", tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(ModelError, match="hidden_size"):
        engine(directory)
    assert not canary.exists()
    with engine(small_checkpoint) as plain, engine(directory, trust_remote_code=True) as llm:
        assert scores(llm) == scores(plain)
    assert canary.read_text()
    (directory / "configuration_odd.py").write_text("raise OSError('nothing here')")
    with pytest.raises(ModelError, match="the configuration class that comes with .* failed"):
        engine(directory, trust_remote_code=True)


@pytest.mark.parametrize("trust", [False, True])
def test_trust_remote_code__never_runs_a_model_and_says_what_to_do(small_checkpoint: Path, tmp_path: Path, canary: Path, trust: bool) -> None:
    directory = custom(small_checkpoint, tmp_path / "m", canary, tokenizer=False, config=False)
    change(directory / "config.json", architectures=["OddForCausalLM"], auto_map={"AutoModelForCausalLM": "modeling_odd.OddForCausalLM"})
    with pytest.raises(UnsupportedFeatureError, match="is never run: install a plugin that registers OddForCausalLM"):
        engine(directory, trust_remote_code=trust)
    change(directory / "config.json", auto_map=None)
    with pytest.raises(UnsupportedArchitectureError, match="OddForCausalLM"):
        engine(directory, trust_remote_code=trust)
    assert not canary.exists()


def test_trust_remote_code__of_a_file_is_not_the_users_word(small_checkpoint: Path, tmp_path: Path, canary: Path) -> None:
    directory = custom(small_checkpoint, tmp_path / "m", canary)
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        change(directory / file, trust_remote_code=True)
    with engine(directory) as llm:
        assert run(llm, "hi")[0].prompt_token_ids == [BOS, *b"hi"]
    assert not canary.exists()


@pytest.mark.parametrize(("trust", "python"), [(False, False), (True, True)])
def test_trust_remote_code__decides_whether_python_files_are_fetched(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, trust: bool,
                                                                     python: bool) -> None:
    seen = []
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda model, **options: seen.append("*.py" in options["allow_patterns"]) or str(small_checkpoint))
    with engine("acme/tiny", trust_remote_code=trust) as llm:
        assert len(scores(llm)[0]) == 6
    assert set(seen) == {python}


def test_trust_remote_code__true_fetches_the_code_that_a_snapshot_of_the_cache_lacks(small_checkpoint: Path, tmp_path: Path, canary: Path,
                                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    with_code = custom(small_checkpoint, tmp_path / "m", canary, config=False)

    def snapshot(model: str, *, local_files_only: bool, **_: Any) -> str:
        return str(small_checkpoint if local_files_only else with_code)

    def without_network(model: str, *, local_files_only: bool, **_: Any) -> str:
        if not local_files_only:
            raise OSError("no network")
        return str(small_checkpoint)

    for download, text in ((snapshot, b"HI"), (without_network, b"hi")):
        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        with engine("acme/tiny", trust_remote_code=True) as llm:
            assert run(llm, "hi")[0].prompt_token_ids == [BOS, *text]


def test_trust_remote_code__true_is_said_in_the_log(small_checkpoint: Path, capsys) -> None:
    for given, count in ((False, 0), (True, 1)):
        with engine(small_checkpoint, trust_remote_code=given) as llm:
            assert run(llm, "hi")[0].prompt_token_ids == [BOS, *b"hi"]
        assert capsys.readouterr().err.count("trust_remote_code=True: code that comes with the checkpoint may run") == count


def test_code_revision__goes_to_the_gate(small_checkpoint: Path, tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, seen = custom(small_checkpoint, tmp_path / "m", canary, config=False), []
    import transformers.models.auto.tokenization_auto as auto

    original = auto.get_class_from_dynamic_module
    monkeypatch.setattr(auto, "get_class_from_dynamic_module",
                        lambda *args, code_revision=None, **options: seen.append(code_revision) or original(*args, **options))
    for given in (None, "v1"):
        with engine(directory, trust_remote_code=True, code_revision=given) as llm:
            assert run(llm, "hi")[0].prompt_token_ids == [BOS, *b"HI"]
    assert seen == [None, "v1"]


def test_the_gate_is_the_only_caller_of_auto_classes() -> None:
    callers = set()
    for root in ("framework", "builtin_models", "builtin_quant", "builtin_samplers", "plugins", "kernels"):
        for path in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr == "from_pretrained" and ast.unparse(node.value) != "remote_code":
                    callers.add(path.relative_to(ROOT).as_posix())
    assert callers == {"framework/kvloom/interfaces/remote_code.py"}
