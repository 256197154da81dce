"""Decoders as embedding models, classifiers and reward models: what transformers computes, however the work is cut up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pooling_helpers import FAMILIES, HIDDEN, close, edit, engine, hidden_of, make, prompts_of, rename, unit, vectors
from safetensors.torch import load_file, save_file

from kvloom import PoolerConfig, PoolingParams
from kvloom.errors import CheckpointError, ConfigError
from kvloom.live_request import Call

PROMPTS = prompts_of(12)
TYPES = {"LAST": lambda h: h[-1], "CLS": lambda h: h[0], "MEAN": lambda h: h.mean(0)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_decoder_embeds_by_its_last_token_normalized(tmp_path: Path, family: str, tied: bool) -> None:
    model = make(tmp_path, family, tie_word_embeddings=tied)
    with engine(tmp_path, task="embed") as llm:
        assert "lm_head" not in llm.apply_model(lambda m: set(m.module_map()))[0]
        close(vectors(llm.embed(PROMPTS, use_tqdm=False)), torch.stack([unit(hidden_of(model, p)[-1]) for p in PROMPTS]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_model_is_for_embeddings_only(tmp_path: Path, family: str) -> None:
    model = make(tmp_path, family, "Model")
    with engine(tmp_path) as llm:
        close(vectors(llm.embed(PROMPTS, use_tqdm=False)), torch.stack([unit(hidden_of(model, p)[-1]) for p in PROMPTS]))
    with pytest.raises(ConfigError, match=r"This model does not support the 'generate' task. Supported tasks: \{'embed'\}"):
        engine(tmp_path, task="generate")


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaModel"])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_tensors_are_found_with_and_without_the_base_prefix(tmp_path: Path, architecture: str, prefix: str) -> None:
    model = make(tmp_path)
    rename(tmp_path, lambda name: prefix + name.removeprefix("model.") if name.startswith("model.") else name)
    edit(tmp_path, architectures=[architecture])
    with engine(tmp_path, task="embed") as llm:
        close(vectors(llm.embed([PROMPTS[0]], use_tqdm=False))[0], unit(hidden_of(model, PROMPTS[0])[-1]))
    if architecture == "LlamaForCausalLM":
        with engine(tmp_path) as llm:
            assert len(llm.generate([PROMPTS[0]], use_tqdm=False)[0].outputs[0].token_ids) == 16


def test_a_missing_label_head_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    edit(tmp_path, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        engine(tmp_path)


@pytest.mark.parametrize("pooling_type", TYPES)
@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 0], ids=lambda n: f"chunk-{n or 'any'}")
def test_every_pooling_type_over_chunks(tmp_path: Path, pooling_type: str, chunk: int) -> None:
    model, prompts = make(tmp_path, "Qwen2"), PROMPTS[:5]
    config = PoolerConfig(pooling_type=pooling_type, normalize=False)
    with engine(tmp_path, task="embed", override_pooler_config=config, long_prefill_token_threshold=chunk) as llm:
        close(vectors(llm.embed(prompts, use_tqdm=False)), torch.stack([TYPES[pooling_type](hidden_of(model, p)) for p in prompts]))


@pytest.mark.parametrize("pooling_type", ["LAST", "MEAN", "ALL"])
def test_preemptions_and_warm_caches_change_nothing(tmp_path: Path, pooling_type: str) -> None:
    model, prompts = make(tmp_path), [[*range(1, 60)], [*range(1, 80)], [*range(1, 60), 5]]
    wanted = [hidden_of(model, p) for p in prompts]
    wanted = wanted if pooling_type == "ALL" else [TYPES[pooling_type](h) for h in wanted]
    with engine(tmp_path, task="embed", override_pooler_config={"pooling_type": pooling_type, "normalize": False},
                long_prefill_token_threshold=20) as llm:
        for again in (False, True):
            running, call = llm.llm_engine, Call()
            running.submit(call, prompts, [PoolingParams()] * 3, [0] * 3)
            sequences = [live.sequences[0].request.sequence_id for live in call.pending.values()]
            running.step()
            preempted = [running.engine.scheduler.preempt(s) for s in sequences]
            assert all(preempted) or (again and pooling_type == "LAST")  # what is in the cache is done in one step
            while running.has_work:
                running.step()
            outputs = [o for _, o in sorted(call.take(), key=lambda done: done[0])]
            for output, theirs in zip(outputs, wanted, strict=True):
                assert output.metrics.num_preemptions == 1 or again
                close(output.outputs.data, theirs)
        cached = [o.num_cached_tokens for o in outputs]
        assert all(cached) if pooling_type == "LAST" else not any(cached)


def test_a_pool_too_small_for_all_makes_requests_give_way(tmp_path: Path) -> None:
    model = make(tmp_path)
    with engine(tmp_path, task="embed", num_gpu_blocks_override=9, long_prefill_token_threshold=16) as llm:
        outputs = llm.embed(PROMPTS, use_tqdm=False)
        close(vectors(outputs), torch.stack([unit(hidden_of(model, p)[-1]) for p in PROMPTS]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("labels", [1, 2, 5])
def test_classifiers_give_transformers_probabilities(tmp_path: Path, family: str, labels: int) -> None:
    model = make(tmp_path, family, "ForSequenceClassification", num_labels=labels)
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([p])).logits for p in PROMPTS])
    with engine(tmp_path) as llm:
        outputs = llm.classify(PROMPTS, use_tqdm=False)
        assert {o.outputs.num_classes for o in outputs} == {labels}
        close([o.outputs.probs for o in outputs], logits.sigmoid() if labels == 1 else logits.softmax(-1))
        raw = llm.encode(PROMPTS, PoolingParams(use_activation=False), use_tqdm=False)
        close(torch.stack([o.outputs.data for o in raw]), logits)
        if labels == 5:
            some = llm.encode(PROMPTS[:1], PoolingParams(returned_token_ids=[4, 1]), use_tqdm=False)
            close(some[0].outputs.data, logits[0, [4, 1]].softmax(-1))


@pytest.mark.parametrize(("config", "activate"), [
    ({"problem_type": "multi_label_classification"}, torch.sigmoid),
    ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, lambda x: x),
    ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, torch.sigmoid),
])
def test_the_checkpoint_names_the_activation(tmp_path: Path, config: dict, activate) -> None:
    model = make(tmp_path, kind="ForSequenceClassification", num_labels=3)
    edit(tmp_path, **config)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0]
    with engine(tmp_path) as llm:
        close(llm.classify([PROMPTS[0]], use_tqdm=False)[0].outputs.probs, activate(logits))
    with engine(tmp_path, override_pooler_config={"softmax": False}) as llm:
        close(llm.classify([PROMPTS[0]], use_tqdm=False)[0].outputs.probs, logits)


def reward_checkpoint(directory: Path, kind: str, labels: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A Qwen2 with the head that Qwen2.5-Math's reward models have: transformers has no class for it."""
    base = make(directory, "Qwen2", "Model")
    head = torch.nn.Sequential(torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, labels))
    tensors = {f"model.{name}": tensor for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(tensors | {f"score.{name}": t for name, t in head.state_dict().items()}, directory / "model.safetensors", {"format": "pt"})
    edit(directory, architectures=[f"Qwen2For{kind}"])
    return base, head


def test_reward__gives_every_token_a_number(tmp_path: Path) -> None:
    base, head = reward_checkpoint(tmp_path, "RewardModel", 1)
    with torch.no_grad():
        theirs = [head(hidden_of(base, p)) for p in PROMPTS]
    with engine(tmp_path, long_prefill_token_threshold=32) as llm:
        for outputs in (llm.reward(PROMPTS, use_tqdm=False), llm.encode(PROMPTS, use_tqdm=False)):
            for output, rewards in zip(outputs, theirs, strict=True):
                close(output.outputs.data, rewards)


def test_a_process_reward_model_gives_every_step_probabilities(tmp_path: Path) -> None:
    base, head = reward_checkpoint(tmp_path, "ProcessRewardModel", 2)
    prompt = [1, 2, 9, 4, 5, 9, 9, 3]
    with torch.no_grad():
        theirs = head(hidden_of(base, prompt)[[2, 5, 6]]).softmax(-1)
    for chunk in (0, 3):
        with engine(tmp_path, override_pooler_config=PoolerConfig(step_tag_id=9), long_prefill_token_threshold=chunk) as llm:
            close(llm.reward([prompt], use_tqdm=False)[0].outputs.data, theirs)
            (failed,) = llm.reward([[1, 2]], use_tqdm=False, on_error="return")
            assert "no token 9, which ends a step" in str(failed.error)
    with engine(tmp_path) as llm:  # the tag of the published checkpoints
        close(llm.encode([prompt], PoolingParams(step_tag_id=9, returned_token_ids=[1], use_activation=False), use_tqdm=False)[0].outputs.data,
              head(hidden_of(base, prompt)[[2, 5, 6]])[:, 1:].detach())
        with pytest.raises(ValueError, match="no token 151651"):
            llm.reward([prompt], use_tqdm=False)


def test_rows_for_every_token_on_request(tmp_path: Path) -> None:
    model = make(tmp_path)
    with engine(tmp_path, task="embed") as llm:
        (output,) = llm.encode([PROMPTS[0]], pooling_task="token_embed", use_tqdm=False)
        close(output.outputs.data, unit(hidden_of(model, PROMPTS[0])))
    with engine(tmp_path, task="embed", override_pooler_config={"pooling_type": "ALL"}) as llm, pytest.raises(ValueError, match="one row a prompt, but this engine pools with ALL.*call encode"):
        llm.embed([PROMPTS[0]], use_tqdm=False)


def test_matryoshka_dimensions_are_cut_before_the_norm(tmp_path: Path) -> None:
    model = make(tmp_path)
    hidden = hidden_of(model, PROMPTS[0])[-1]
    for config, bad, valid in (({"matryoshka_dimensions": [16, 40]}, 20, "16, 40"), ({"is_matryoshka": True}, 61, "1 to 60")):
        with engine(tmp_path, task="embed", hf_overrides=config) as llm:
            (output,) = llm.embed([PROMPTS[0]], pooling_params=PoolingParams(dimensions=16), use_tqdm=False)
            close(output.outputs.embedding, unit(hidden[:16]))
            with pytest.raises(ValueError, match=f"may be {valid}; got {bad}"):
                llm.embed([PROMPTS[0]], pooling_params=PoolingParams(dimensions=bad), use_tqdm=False)


def sentence_checkpoint(directory: Path, pooling: dict, *, normalize: bool, dense: bool, max_tokens: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """In the format of sentence-transformers."""
    model = make(directory, "Qwen3", "Model")
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), *([("Dense", "2_Dense")] if dense else []), *([("Normalize", "3_Normalize")] if normalize else [])]
    (directory / "modules.json").write_text(json.dumps(
        [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (kind, path) in enumerate(modules)]))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": HIDDEN} | pooling))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_tokens, "do_lower_case": False}))
    layer = torch.nn.Linear(HIDDEN, 24)
    if dense:
        (directory / "2_Dense").mkdir()
        (directory / "2_Dense/config.json").write_text(json.dumps(
            {"in_features": HIDDEN, "out_features": 24, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}))
        save_file({f"linear.{n}": t for n, t in layer.state_dict().items()}, directory / "2_Dense/model.safetensors")
    return model, layer


@pytest.mark.parametrize("pooling", [{"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, {"pooling_mode": "mean"}])
@pytest.mark.parametrize("dense", [True, False])
def test_the_modules_of_a_sentence_transformer_win_over_the_model_and_lose_to_the_caller(tmp_path: Path, pooling: dict, dense: bool) -> None:
    model, layer = sentence_checkpoint(tmp_path, pooling, normalize=False, dense=dense, max_tokens=50)
    hidden = hidden_of(model, PROMPTS[0][:50])

    def after(rows: torch.Tensor) -> torch.Tensor:
        return torch.tanh(layer(rows)).detach() if dense else rows

    with engine(tmp_path) as llm:
        close(llm.embed([PROMPTS[0][:50]], use_tqdm=False)[0].outputs.embedding, after(hidden.mean(0)))
        with pytest.raises(ValueError, match="longer than the maximum model length of 50"):
            llm.embed([[1] * 51], use_tqdm=False)
    with engine(tmp_path, override_pooler_config=PoolerConfig(pooling_type="last", normalize=True)) as llm:
        close(llm.embed([PROMPTS[0][:50]], use_tqdm=False)[0].outputs.embedding, unit(after(hidden[-1])))


def test_a_sentence_transformer_under_a_generating_architecture_embeds_by_itself(tmp_path: Path) -> None:
    model, _ = sentence_checkpoint(tmp_path, {"pooling_mode_lasttoken": True}, normalize=True, dense=False, max_tokens=200)
    edit(tmp_path, architectures=["Qwen3ForCausalLM"])
    with engine(tmp_path) as llm:
        close(llm.embed([PROMPTS[0]], use_tqdm=False)[0].outputs.embedding, unit(hidden_of(model, PROMPTS[0])[-1]))
