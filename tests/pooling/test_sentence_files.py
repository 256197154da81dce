"""Files of sentence-transformers are data: what they may say is checked before anything is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pooling_helpers import HIDDEN, engine, make

from kvloom.errors import CheckpointError, ModelError, UnsupportedFeatureError

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


POOLING, DENSES = module("Pooling", "1_Pooling"), [module("Pooling", "1_Pooling"), module("Dense", "2_Dense")]


@pytest.mark.parametrize(("files", "error", "message"), [
    (([POOLING, module("CNN")],), UnsupportedFeatureError, "CNN"),
    (([module("Pooling", "../elsewhere")],), ModelError, "not inside the checkpoint"),
    (([module("Pooling", "/etc")],), ModelError, "not inside the checkpoint"),
    (({"type": "Pooling"},), ModelError, "must hold a list"),
    (([POOLING], {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}), UnsupportedFeatureError, "choose one with override_pooler_config"),
    ((DENSES, MEAN, DENSE | {"in_features": 7}), ModelError, "takes 7 numbers, what comes before it gives 60"),
    ((DENSES, MEAN, DENSE | {"out_features": True}), ModelError, "must be sizes"),
    ((DENSES, MEAN, DENSE | {"activation_function": "os.system"}), UnsupportedFeatureError, "activation_function"),
    ((DENSES, MEAN, DENSE), CheckpointError, "2_Dense"),
    (([POOLING], MEAN, None, {"max_seq_length": -1}), ModelError, "max_seq_length"),
    (([POOLING], MEAN, None, {"do_lower_case": True}), UnsupportedFeatureError, "do_lower_case"),
])
def test_what_cannot_be_used_is_named(tmp_path: Path, files: tuple, error: type[Exception], message: str) -> None:
    write(tmp_path, *files)
    with pytest.raises(error, match=message):
        engine(tmp_path)


def test_a_pooling_type_of_the_caller_makes_up_for_one_that_is_not_known(tmp_path: Path) -> None:
    write(tmp_path, [POOLING], {"pooling_mode_weightedmean_tokens": True})
    with engine(tmp_path, override_pooler_config={"pooling_type": "MEAN"}) as llm:
        assert len(llm.embed([[5]], use_tqdm=False)[0].outputs.embedding) == HIDDEN
