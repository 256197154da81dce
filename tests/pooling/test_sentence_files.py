"""Files of sentence-transformers are data: what they may say is checked before anything is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pooling_helpers import HIDDEN, POSITIONS, engine, make

from kvloom.errors import CheckpointError, ConfigError, ModelError, RequestValidationError, UnsupportedFeatureError

MEAN = {"pooling_mode": "mean"}
DENSE = {"in_features": HIDDEN, "out_features": 8, "bias": True, "activation_function": "torch.nn.modules.linear.Identity"}


def write(directory: Path, modules: object, pooling: object = MEAN, dense: object = None, sentence: object = None) -> None:
    make(directory, kind="Model")
    (directory / "modules.json").write_text(json.dumps(modules))
    for name, content in (("1_Pooling/config.json", pooling), ("2_Dense/config.json", dense), ("sentence_bert_config.json", sentence)):
        if content is not None:
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(json.dumps(content))


def module(kind: str, path: str = "") -> dict:
    return {"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{kind}"}


FIRST, POOLING, DENSE_MODULE = module("Transformer"), module("Pooling", "1_Pooling"), module("Dense", "2_Dense")
DENSES = [FIRST, POOLING, DENSE_MODULE]


@pytest.mark.parametrize(("files", "error", "message"), [
    (([FIRST, POOLING, module("CNN")],), UnsupportedFeatureError, "CNN"),
    (([FIRST, module("Pooling", "../elsewhere")],), ModelError, "not inside the checkpoint"),
    (([FIRST, module("Pooling", "/etc")],), ModelError, "not inside the checkpoint"),
    (({"type": "Pooling"},), ModelError, "must hold a list"),
    (([FIRST, POOLING], {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}), UnsupportedFeatureError, "choose one with override_pooler_config"),
    ((DENSES, MEAN, DENSE | {"in_features": 7}), ModelError, "takes 7 numbers, what comes before it gives 60"),
    ((DENSES, MEAN, DENSE | {"out_features": True}), ModelError, "out_features must be a size"),
    ((DENSES, MEAN, {k: v for k, v in DENSE.items() if k != "in_features"}), ModelError, "must have in_features and out_features"),
    ((DENSES, MEAN, DENSE | {"module_input_name": "token_embeddings"}), UnsupportedFeatureError, "may only read and write sentence_embedding"),
    (([FIRST, POOLING], MEAN | {"word_embedding_dimension": HIDDEN + 1}), ModelError, f"for {HIDDEN + 1} numbers.*the model gives {HIDDEN}"),
    (([FIRST, POOLING], MEAN | {"word_embedding_dimension": True}), ModelError, "word_embedding_dimension must be a size"),
    (([FIRST, POOLING | {"type": "custom_st.Pooling"}],), UnsupportedFeatureError, "Transformer, custom_st.Pooling"),
    (([FIRST, POOLING], None), ModelError, "1_Pooling/config.json cannot be read"),
    (([FIRST, POOLING], {"pooling_mode_mean_sqrt_len_tokens": True}), UnsupportedFeatureError, "cls, mean and last token"),
    (([FIRST, POOLING], {"pooling_mode_mean_tokens": "yes"}), UnsupportedFeatureError, "cls, mean and last token"),
    (([FIRST, module("Pooling", "a/../../b")],), ModelError, "not inside the checkpoint"),
    (([FIRST, POOLING | {"path": 5}],), ModelError, "not inside the checkpoint"),
    ((None,), ModelError, "must hold a list"),
    ((DENSES, MEAN, DENSE | {"activation_function": "os.system"}), UnsupportedFeatureError, "activation_function"),
    ((DENSES, MEAN, DENSE), CheckpointError, "2_Dense"),
    (([FIRST, POOLING], MEAN, None, {"max_seq_length": -1}), ModelError, "max_seq_length"),
    (([FIRST, POOLING], MEAN, None, {"do_lower_case": True}), UnsupportedFeatureError, "do_lower_case"),
    (([],), UnsupportedFeatureError, "an empty list"),
    (([POOLING],), UnsupportedFeatureError, "Transformer, then maybe"),
    (([FIRST, POOLING, POOLING],), UnsupportedFeatureError, "Transformer, Pooling, Pooling"),
    (([FIRST, DENSE_MODULE, POOLING], MEAN, DENSE), UnsupportedFeatureError, "Transformer, Dense, Pooling"),
    (([FIRST, POOLING, module("Normalize"), DENSE_MODULE], MEAN, DENSE), UnsupportedFeatureError, "Normalize, Dense"),
])
def test_what_cannot_be_used_is_named(tmp_path: Path, files: tuple, error: type[Exception], message: str) -> None:
    write(tmp_path, *files)
    with pytest.raises(error, match=message):
        engine(tmp_path)


def test_a_pooling_type_of_the_caller_makes_up_for_one_that_is_not_known(tmp_path: Path) -> None:
    write(tmp_path, [FIRST, POOLING], {"pooling_mode_weightedmean_tokens": True})
    with engine(tmp_path, override_pooler_config={"pooling_type": "MEAN"}) as llm:
        assert len(llm.embed([[5]], use_tqdm=False)[0].outputs.embedding) == HIDDEN


def test_the_longest_prompt_is_what_the_checkpoint_says_unless_the_caller_says_more(tmp_path: Path) -> None:
    write(tmp_path, [FIRST, POOLING], sentence={"max_seq_length": 20})
    with engine(tmp_path) as llm:
        assert len(llm.embed([[5] * 20], use_tqdm=False)) == 1
        with pytest.raises(RequestValidationError, match="longer than the maximum model length of 20"):
            llm.embed([[5] * 21], use_tqdm=False)
    with engine(tmp_path, max_model_len=100) as llm:
        assert len(llm.embed([[5] * 100], use_tqdm=False)) == 1
    with pytest.raises(ConfigError, match=f"max_model_len={POSITIONS + 1} is more than the {POSITIONS} tokens"):
        engine(tmp_path, max_model_len=POSITIONS + 1)
