"""Every encoder family gives transformers' hidden states and scores, whatever it shares a step with and whatever its tensors are called."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from encoder_helpers import FAMILIES, POSITIONS, VOCAB, OurEncoder, edit_config, make
from safetensors.torch import load_file, save_file

from kvloom.errors import CheckpointError, ModelError, UnsupportedFeatureError
from kvloom.interfaces import ForwardContext
from kvloom.runtime.comm import LocalComm

TOLERANCE = 1e-5
LENGTHS = [1, 2, 5, 16, 17, 40, POSITIONS - 8, 3]


def prompts_of(seed: object, lengths: list[int] = LENGTHS) -> list[list[int]]:
    numbers = random.Random(str(seed))
    return [[numbers.randrange(8, VOCAB) for _ in range(n)] for n in lengths]


def their_hidden(model: torch.nn.Module, prompt: list[int], **inputs: torch.Tensor) -> torch.Tensor:
    base = model.base_model
    with torch.no_grad():
        return base(torch.tensor([prompt]), **inputs).last_hidden_state[0]


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_hidden_states_of_a_mixed_batch(tmp_path: Path, family: str, backend: str) -> None:
    model, prompts = make(family, "Model", tmp_path), prompts_of(family)
    for ours, prompt in zip(OurEncoder(tmp_path, attention_backend=backend).hidden(prompts), prompts, strict=True):
        assert_equal(ours, their_hidden(model, prompt))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_what_single_runs_give(tmp_path: Path, family: str) -> None:
    make(family, "Model", tmp_path)
    encoder, prompts = OurEncoder(tmp_path), prompts_of(family)
    for together, prompt in zip(encoder.hidden(prompts), prompts, strict=True):
        assert_equal(together, encoder.hidden([prompt])[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("labels", [1, 4])
def test_scores_of_labels(tmp_path: Path, family: str, labels: int) -> None:
    model, prompts = make(family, "ForSequenceClassification", tmp_path, labels=labels), prompts_of(family)
    encoder = OurEncoder(tmp_path)
    with torch.no_grad():
        theirs = torch.cat([model(torch.tensor([p])).logits for p in prompts])
    assert_equal(encoder.scores(prompts), theirs)
    assert encoder.model.tasks == (("score", "classify") if labels == 1 else ("classify",))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_language_model_serves_as_an_embedding_model(tmp_path: Path, family: str) -> None:
    model, prompts = make(family, "ForMaskedLM", tmp_path), prompts_of(family, [9, 30])
    encoder = OurEncoder(tmp_path)
    for ours, prompt in zip(encoder.hidden(prompts), prompts, strict=True):
        assert_equal(ours, their_hidden(model, prompt))
    assert encoder.model.tasks == ("embed",)


@pytest.mark.parametrize("family", ["bert", "bert-tanh-3-types", "xlm-roberta"])
def test_token_types_of_those_that_give_them(tmp_path: Path, family: str) -> None:
    model, prompts = make(family, "Model", tmp_path), prompts_of(family, [6, 20, 11])
    types = [[0, 0, 0, 1, 1, 1], None, [1] * 11]
    for ours, prompt, own in zip(OurEncoder(tmp_path).hidden(prompts, types), prompts, types, strict=True):
        assert_equal(ours, their_hidden(model, prompt, token_type_ids=torch.tensor([own or [0] * len(prompt)])))


@pytest.mark.parametrize("family", ["roberta", "roberta-far-pad", "xlm-roberta"])
def test_padding_tokens_in_a_prompt_are_not_counted_as_positions(tmp_path: Path, family: str) -> None:
    model = make(family, "Model", tmp_path)
    pad = model.config.pad_token_id
    prompts = [[20, pad, 21, 22], [pad, pad, 30], [40, 41, pad]]
    for ours, prompt in zip(OurEncoder(tmp_path).hidden(prompts), prompts, strict=True):
        # Alone transformers would hide them from the others, too: an attention mask of ones, as kvloom's prompts have no padding.
        assert_equal(ours, their_hidden(model, prompt, attention_mask=torch.ones(1, len(prompt))))


@pytest.mark.parametrize(("family", "positions"), [("bert", POSITIONS), ("roberta", POSITIONS - 2), ("roberta-far-pad", POSITIONS - 8)])
def test_the_longest_prompt_is_what_the_position_table_holds(tmp_path: Path, family: str, positions: int) -> None:
    model = make(family, "Model", tmp_path)
    encoder = OurEncoder(tmp_path)
    assert encoder.source.max_model_len == positions
    (prompt,) = prompts_of(family, [positions])
    assert_equal(encoder.hidden([prompt])[0], their_hidden(model, prompt))


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "distilbert", "modernbert"])
@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification"])
def test_tensors_with_and_without_the_base_prefix(tmp_path: Path, family: str, kind: str) -> None:
    model, (prompt,) = make(family, kind, tmp_path), prompts_of(family, [12])
    path, prefix = tmp_path / "model.safetensors", model.base_model_prefix + "."
    tensors = load_file(path)
    heads = ("classifier", "pre_classifier", "head")
    renamed = {n.removeprefix(prefix) if n.startswith(prefix) else n if n.startswith(heads) else prefix + n: t.clone()
               for n, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path)
    assert_equal(OurEncoder(tmp_path).hidden([prompt])[0], their_hidden(model, prompt))


def test_norms_whose_tensors_have_their_first_names(tmp_path: Path) -> None:
    model, (prompt,) = make("bert", "Model", tmp_path), prompts_of(0, [12])
    path, new = tmp_path / "model.safetensors", {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, tensor in load_file(path).items():
        for now, then in new.items():
            name = name.replace(now, then)
        tensors[name] = tensor.clone()
    save_file(tensors | {"embeddings.position_ids": torch.arange(POSITIONS)[None]}, path)
    encoder = OurEncoder(tmp_path)
    assert_equal(encoder.hidden([prompt])[0], their_hidden(model, prompt))
    assert encoder.report.ignored == ("embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight")


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    make("bert", "Model", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"bert.embeddings.LayerNorm.bias": tensors["embeddings.LayerNorm.bias"].clone()}, path)
    with pytest.raises(CheckpointError, match=r"twice, under two names:\s+(bert\.)?embeddings.LayerNorm.bias and (bert\.)?embeddings.LayerNorm.bias"):
        OurEncoder(tmp_path)


def test_an_unknown_tensor_is_named_as_in_the_file(tmp_path: Path) -> None:
    make("bert", "ForSequenceClassification", tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"bert.extra.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"used by nothing in the model:\s+bert.extra.weight"):
        OurEncoder(tmp_path)


def test_modernbert_as_older_config_files_describe_it(tmp_path: Path) -> None:
    model, prompts = make("modernbert", "Model", tmp_path), prompts_of(0, [40, 7])

    def age(config: dict) -> None:
        del config["layer_types"], config["rope_parameters"]
        config.update(global_attn_every_n_layers=3, global_rope_theta=160000.0, local_rope_theta=None)

    edit_config(tmp_path, age)
    for ours, prompt in zip(OurEncoder(tmp_path).hidden(prompts), prompts, strict=True):
        assert_equal(ours, their_hidden(model, prompt))


@pytest.mark.parametrize(("family", "change", "message"), [
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ("bert", {"is_decoder": True}, "is_decoder"),
    ("bert", {"num_attention_heads": 7}, "multiple of num_attention_heads"),
    ("roberta", {"pad_token_id": 79}, "leaves no position"),
    ("modernbert", {"layer_types": ["full_attention"]}, "layer_types must name"),
    ("modernbert", {"classifier_pooling": "max"}, "classifier_pooling"),
])
def test_a_config_that_cannot_be_served_is_refused(tmp_path: Path, family: str, change: dict, message: str) -> None:
    make(family, "Model", tmp_path)
    edit_config(tmp_path, lambda config: config.update(change))
    with pytest.raises(ModelError, match=message):
        OurEncoder(tmp_path)


def test_what_a_model_cannot_do_is_refused(tmp_path: Path) -> None:
    make("bert", "Model", tmp_path)
    model, ctx = OurEncoder(tmp_path).model, ForwardContext(LocalComm(), ())
    with pytest.raises(UnsupportedFeatureError, match="no label head"):
        model.classify(torch.zeros(1, 60), ctx)
    with pytest.raises(UnsupportedFeatureError, match="this model does embed"):
        model.logits(torch.zeros(1, 60), ctx)
