"""One test a parameter of the checkpoint, named after it: what docs/api.md says of it is what an engine does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from parameter_helpers import (
    GREEDY,
    SAMPLED,
    engine,
    hub_cache,
    plugin,
    python_tokenizer,
    run,
    scores,
    token_ids,
)
from safetensors.torch import load_file, save_file

from kvloom import LLM, SamplingParams
from kvloom.errors import ConfigError, ModelError, RequestValidationError
from kvloom.testing.checkpoints import BOS, VOCAB_SIZE, make_checkpoint
from kvloom_kernels.linear import product_kind


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of other numbers and a larger vocabulary."""
    return make_checkpoint(tmp_path_factory.mktemp("larger"), vocab_size=300)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("bare"), tokenizer=False)


@pytest.fixture(scope="module")
def byt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return python_tokenizer(tmp_path_factory.mktemp("tokenizers") / "byt5")


def test_model__is_a_directory_or_a_hub_id_that_is_in_the_cache(small_checkpoint: Path, tmp_path: Path) -> None:
    hub_cache(tmp_path, "acme/tiny", main=small_checkpoint)
    with engine(small_checkpoint) as from_directory, engine("acme/tiny", download_dir=str(tmp_path)) as from_hub:
        assert scores(from_directory) == scores(from_hub)
    for model, message in (("/no/such/directory", "is no directory"), ("acme/other", "cannot be fetched.*hf download acme/other")):
        with pytest.raises(ModelError, match=message):
            engine(model, download_dir=str(tmp_path))
    with pytest.raises(TypeError, match="model"):
        LLM()


def test_tokenizer__is_taken_from_another_directory(bare: Path, small_checkpoint: Path, byt5: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        engine(bare)
    for tokenizer, prompt in ((small_checkpoint, [BOS, *b"Hi"]), (byt5, [*(byte + 3 for byte in b"Hi"), 1])):
        with engine(bare, tokenizer=str(tokenizer)) as llm:
            (output,) = run(llm, "Hi")
            assert output.prompt_token_ids == prompt
            assert output.outputs[0].text == llm.get_tokenizer().decode(output.outputs[0].token_ids, skip_special_tokens=True)


@pytest.mark.parametrize(("mode", "python", "is_fast"), [("auto", False, True), ("fast", False, True), ("FAST", False, True),
                                                         ("auto", True, False), ("slow", True, False)])
def test_tokenizer_mode__takes_the_rust_or_the_python_implementation(bare: Path, small_checkpoint: Path, byt5: Path, mode: str, python: bool,
                                                                     is_fast: bool) -> None:
    with engine(bare, tokenizer=str(byt5 if python else small_checkpoint), tokenizer_mode=mode) as llm:
        assert llm.get_tokenizer().is_fast is is_fast
        assert len(token_ids(run(llm, "Hi"))[0]) == 6


@pytest.mark.parametrize(("mode", "python", "error", "message"), [
    ("fast", True, ModelError, "only the Python ByT5Tokenizer.*Use tokenizer_mode='auto'"),
    ("slow", False, ModelError, "only the fast .*Use tokenizer_mode='auto'"),
    ("magic", False, ConfigError, "Unknown tokenizer mode 'magic'.*auto.*fast.*slow"),
])
def test_tokenizer_mode__that_the_files_cannot_have_is_refused(bare: Path, small_checkpoint: Path, byt5: Path, mode: str, python: bool,
                                                               error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        engine(bare, tokenizer=str(byt5 if python else small_checkpoint), tokenizer_mode=mode)


def test_tokenizer_mode__may_be_a_plugins(install, small_checkpoint: Path) -> None:
    install("acme", {"acme": plugin("tokenizers", "shouting", """
from kvloom_plugins.tokenizers.hf import AutoTokenizer
class Shouting(AutoTokenizer):
    def encode(self, text, *, add_special_tokens=True):
        return super().encode(text.upper(), add_special_tokens=add_special_tokens)
""")})
    with engine(small_checkpoint, tokenizer_mode="shouting") as llm:
        assert run(llm, "hi")[0].prompt_token_ids == [BOS, *b"HI"]


def test_skip_tokenizer_init__takes_token_prompts_and_gives_no_text(bare: Path) -> None:
    with engine(bare, skip_tokenizer_init=True) as llm:
        (output,) = run(llm, [[1, 2, 3]])
        assert (output.prompt, output.outputs[0].text, len(output.outputs[0].token_ids)) == (None, "", 6)
        for prompt, params in (("text", GREEDY), ([[1]], SamplingParams(stop="x")), ([[1]], SamplingParams(bad_words=["x"]))):
            with pytest.raises(RequestValidationError, match="Unable to get tokenizer because skip_tokenizer_init is True"):
                run(llm, prompt, params)
        with pytest.raises(RequestValidationError, match="skip_tokenizer_init"):
            llm.get_tokenizer()


def test_revision__is_a_branch_or_commit_of_the_hub_id(small_checkpoint: Path, larger: Path, tmp_path: Path) -> None:
    hub_cache(tmp_path, "acme/tiny", main=small_checkpoint, v2=larger)
    seen = {}
    for revision in (None, "main", "v2", f"{2:040x}"):
        with engine("acme/tiny", download_dir=str(tmp_path), revision=revision) as llm:
            seen[revision] = scores(llm)
    assert seen[None] == seen["main"] != seen["v2"] == seen[f"{2:040x}"]
    with pytest.raises(ModelError, match="at revision 'v9'.*--revision v9"):
        engine("acme/tiny", download_dir=str(tmp_path), revision="v9")


def test_tokenizer_revision__is_the_models_unless_it_is_given(small_checkpoint: Path, larger: Path, byt5: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(larger, tmp_path / "v2")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (directory / file).unlink()
    shutil.copy(byt5 / "tokenizer_config.json", directory)
    hub_cache(tmp_path, "acme/tiny", main=small_checkpoint, v2=directory)
    bytes_, bytes_after_3 = [BOS, *b"Hi"], [*(byte + 3 for byte in b"Hi"), 1]
    for revision, tokenizer_revision, prompt in ((None, None, bytes_), ("v2", None, bytes_after_3), (None, "v2", bytes_after_3),
                                                 ("v2", "main", bytes_)):
        with engine("acme/tiny", download_dir=str(tmp_path), revision=revision, tokenizer_revision=tokenizer_revision) as llm:
            assert run(llm, "Hi")[0].prompt_token_ids == prompt
            with pytest.raises(RequestValidationError, match=f"ids of this model are 0 to {299 if revision == 'v2' else VOCAB_SIZE - 1}"):
                run(llm, [[300]])


def dtypes(llm: LLM) -> set[torch.dtype]:
    """Of the weights, and of the hidden states that the output head gets."""
    seen: set[torch.dtype] = set()
    (original,) = llm.apply_model(lambda model: model.logits)

    def noting(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.add(hidden.dtype)
        return original(hidden, *rest)

    llm.apply_model(lambda model: setattr(model, "logits", noting))
    run(llm, [[1, 2]])
    (weights,) = llm.apply_model(lambda model: {p.dtype for p in model.parameters()})
    return seen | weights


NATIVE = torch.float32 if product_kind() == "widened" else torch.bfloat16


@pytest.mark.parametrize(("given", "stored", "meant"), [
    ("float32", "float32", torch.float32), ("Float", "bfloat16", torch.float32), ("half", "float32", torch.float16),
    (torch.bfloat16, "float32", torch.bfloat16), ("auto", "bfloat16", torch.bfloat16), ("auto", "float32", NATIVE), ("auto", "float16", NATIVE),
])
def test_dtype__is_that_of_weights_and_activations(small_checkpoint: Path, given: Any, stored: str, meant: torch.dtype) -> None:
    with engine(small_checkpoint, dtype=given, hf_overrides={"dtype": stored}) as llm:
        assert dtypes(llm) == {meant}
        assert f"dtype: {str(meant).removeprefix('torch.')}" in llm.llm_engine.report.text()


def test_dtype__that_does_not_exist_is_refused(small_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="Unknown dtype: use one of auto, half, float16"):
        engine(small_checkpoint, dtype="int8")


def test_quantization__is_what_the_checkpoint_says_and_may_only_confirm_it(install, small_checkpoint: Path) -> None:
    install("acme", {"acme": plugin("quantizations", "eighths", """
from kvloom_quant.unquantized import Unquantized
MADE = []
class Eighths(Unquantized):
    def __init__(self, settings):
        super().__init__({})
        MADE.append(settings)
""")})
    import acme_0  # what the fixture installed

    stored = {"quantization_config": {"quant_method": "eighths", "bits": 3}}
    for given in (None, "eighths"):
        acme_0.MADE.clear()
        with engine(small_checkpoint, quantization=given, hf_overrides=stored) as llm:
            assert len(scores(llm)[0]) == 6
        assert {"quant_method": "eighths", "bits": 3} in acme_0.MADE
    acme_0.MADE.clear()
    with engine(small_checkpoint) as plain, engine(small_checkpoint, quantization="none") as confirmed:
        assert scores(plain) == scores(confirmed)
    assert acme_0.MADE == []
    for given, overrides in (("awq", {}), ("eighths", {}), ("awq", stored), ("none", stored)):
        with pytest.raises(ConfigError, match=f"quantization='{given}' does not match the checkpoint"):
            engine(small_checkpoint, quantization=given, hf_overrides=overrides)
    with pytest.raises(ConfigError, match="Unknown quantization method 'awq'"):
        engine(small_checkpoint, hf_overrides={"quantization_config": {"quant_method": "awq"}})


def test_seed__decides_what_requests_without_a_seed_draw(small_checkpoint: Path) -> None:
    seeded, drawn = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, seed=5), {}
    for seed in (None, 0, 7):
        with engine(small_checkpoint, seed=seed) as llm:
            drawn[seed] = token_ids(run(llm, [[1], [1], [1]], [SAMPLED, SAMPLED, seeded]))
    assert drawn[None] == drawn[0] != drawn[7]
    assert drawn[0][0] != drawn[0][1]
    assert drawn[0][2] == drawn[7][2]


def test_max_model_len__bounds_prompt_and_output_together(small_checkpoint: Path) -> None:
    endless = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    for given, tokens in ((20, 20), (None, 512)):
        with engine(small_checkpoint, max_model_len=given) as llm:
            (short, longest) = run(llm, [[1] * (tokens - 5), [1] * (tokens - 1)], endless)
            assert [len(t) for t in token_ids([short, longest])] == [5, 1]
            with pytest.raises(RequestValidationError, match=f"longer than the maximum model length of {tokens}"):
                run(llm, [[1] * tokens])
    with pytest.raises(ConfigError, match="max_model_len=513 is more than the 512 tokens"):
        engine(small_checkpoint, max_model_len=513)


def test_load_format__says_where_the_weights_come_from(small_checkpoint: Path, tmp_path: Path, install) -> None:
    shutil.copy(small_checkpoint / "config.json", tmp_path)
    install("acme", {"acme": plugin("loaders", "zeros", """
from kvloom_plugins.loaders.dummy import DummyLoader
class Zeros(DummyLoader):
    def read(self, names):
        for name, tensor in super().read(names):
            yield name, tensor.zero_()
""")})
    real, seen = tmp_path / "real", {}
    shutil.copytree(small_checkpoint, real)
    tensors = load_file(real / "model.safetensors")  # as the dummy loader makes them up, where nothing was rounded to bfloat16
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, real / "model.safetensors")
    for load_format, directory in (("auto", real), ("safetensors", real), ("dummy", tmp_path), ("zeros", tmp_path)):
        with engine(directory, load_format=load_format, skip_tokenizer_init=True) as llm:
            seen[load_format] = scores(llm)
    assert seen["auto"] == seen["safetensors"]
    assert seen["dummy"] not in (seen["auto"], seen["zeros"])
    assert seen["zeros"][0] == [0] * 6
    with pytest.raises(ModelError, match="safetensors"):
        engine(tmp_path, load_format="auto", skip_tokenizer_init=True)
    with pytest.raises(ValueError, match="load_format='pickle'"):
        engine(small_checkpoint, load_format="pickle")


def test_download_dir__is_the_hubs_cache_folder(small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache(tmp_path / "here", "acme/tiny", main=small_checkpoint)
    with engine("acme/tiny", download_dir=str(tmp_path / "here")) as llm:
        expected = scores(llm)
    with pytest.raises(ModelError, match="not in the hub's cache"):
        engine("acme/tiny", download_dir=str(tmp_path / "elsewhere"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "here"))  # None: huggingface_hub's own
    with engine("acme/tiny") as llm:
        assert scores(llm) == expected


@pytest.mark.parametrize("token", ["very-secret", True, None])
def test_hf_token__goes_to_every_download_and_is_never_shown(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys, token: Any) -> None:
    given = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, *, token, **_: given.append((model, token)) or str(small_checkpoint))
    with engine("acme/private", tokenizer="acme/tokenizer", hf_token=token) as llm:
        run(llm, "a")
        shown = [repr(llm.llm_engine.config), str(llm.llm_engine.config.rows()), llm.llm_engine.report.text(), llm.llm_engine.plan.table(),
                 *capsys.readouterr()]
    assert given == [("acme/private", token), ("acme/tokenizer", token)]
    assert "very-secret" not in "".join(shown)


def test_hf_token__is_not_in_the_message_about_other_parameters() -> None:
    with pytest.raises(ConfigError, match="code_revision='v1' needs") as caught:
        LLM("m", code_revision="v1", hf_token="very-secret")
    assert "very-secret" not in str(caught.value)


def test_hf_token__is_not_in_the_message_of_a_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx refuses a token with a line break (as a file has one at its end) in an error that holds the whole header."""

    def fail(model: str, *, token: str, local_files_only: bool, **_: Any) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("not here") if local_files_only else OSError(f"Illegal header value {f'Bearer {token}'.encode()!r}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match="cannot be fetched") as caught:
        engine("acme/private", download_dir=str(tmp_path), hf_token="very-secret\n")
    assert "very-secret" not in str(caught.value)


def test_hf_overrides__are_keys_on_top_of_config_json(small_checkpoint: Path) -> None:
    with engine(small_checkpoint) as llm:
        plain = scores(llm)
    with engine(small_checkpoint, hf_overrides={"max_position_embeddings": 60, "rope_theta": 7.0}) as llm:
        changed = scores(llm)
        with pytest.raises(RequestValidationError, match="maximum model length of 60"):
            run(llm, [[1] * 60])
    assert changed != plain
    assert json.loads((small_checkpoint / "config.json").read_text())["max_position_embeddings"] == 512


# -- generation defaults

def write_defaults(directory: Path, **values: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "generation_config.json").write_text(json.dumps(values))
    return directory


@pytest.fixture(scope="module")
def with_defaults(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a generation_config.json: greedy, three tokens."""
    directory = shutil.copytree(small_checkpoint, tmp_path_factory.mktemp("defaults") / "m")
    return write_defaults(directory, temperature=0.0, max_new_tokens=3, top_k=4)


def test_generation_config__says_where_defaults_and_end_tokens_come_from(with_defaults: Path, tmp_path: Path) -> None:
    with engine(with_defaults, generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()
        following = token_ids(run(llm, [[5], [6]]))
    folder = write_defaults(tmp_path / "folder", temperature=0.0, max_new_tokens=5, eos_token_id=[following[0][0], 3])
    with engine(with_defaults, generation_config="auto") as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=3)
        assert token_ids(run(llm, [[5], [6]], None)) == [ids[:3] for ids in following]
    with engine(with_defaults, generation_config=str(folder)) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=5)
        ended, goes_on = run(llm, [[5], [6]], None)
        assert (token_ids([ended]), ended.outputs[0].finish_reason) == ([following[0][:1]], "stop")
        assert token_ids([goes_on]) == [following[1][:5]]
    with pytest.raises(ConfigError, match=re.escape(f"generation_config='{tmp_path}': there is no {tmp_path}/generation_config.json")):
        engine(with_defaults, generation_config=str(tmp_path))


def test_override_generation_config__is_on_top_of_the_file(with_defaults: Path) -> None:
    with engine(with_defaults, override_generation_config={"max_new_tokens": 4, "repetition_penalty": 1.5}) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=4, repetition_penalty=1.5)
        assert len(token_ids(run(llm, [[8]], None))[0]) == 4
        assert len(token_ids(run(llm, [[8]]))[0]) == 6
    with engine(with_defaults, generation_config="vllm", override_generation_config={"max_new_tokens": 4}) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(max_tokens=4)


@pytest.mark.parametrize(("overrides", "message"), [
    ({"top_kk": 5}, "override_generation_config: unknown key 'top_kk'; did you mean 'top_k'"),
    ({"max_tokens": 5}, "unknown key 'max_tokens'"), ({"temperature": "hot"}, "override_generation_config.*temperature must be a finite number"),
    ({"top_p": 1.5}, "top_p must be a finite number"), ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list of them"),
    ([1], "override_generation_config=.*dict"),
])
def test_override_generation_config__of_something_else_is_refused(with_defaults: Path, overrides: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine(with_defaults, override_generation_config=overrides)
