"""Encoders through `LLM`: embeddings, classes and scores are transformers', and a bad request harms nobody else."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from encoder_helpers import FAMILIES, POSITIONS, VOCAB, make, write_tokenizer
from transformers import AutoTokenizer

from kvloom import LLM, PoolerConfig
from kvloom.cli import main
from kvloom.errors import ConfigError, RequestValidationError, UnsupportedFeatureError
from kvloom.runtime.device import CpuDevice
from kvloom.runtime.table import HostTable, SentTable, Table

TOLERANCE = 1e-5
ALL = list(FAMILIES)
TEXTS = ["w10 w11 w12", "w20", "w30 w31 w32 w33 w34 w35 w36", "w40 w41"]


def engine(directory: Path, **values) -> LLM:
    return LLM(str(directory), **{"dtype": "float32", "skip_tokenizer_init": True} | values)


def prompts_of(count: int, longest: int = POSITIONS - 8) -> list[list[int]]:
    numbers = random.Random(count)
    return [[numbers.randrange(8, VOCAB) for _ in range(numbers.randint(1, longest))] for _ in range(count)]


def their_hidden(model: torch.nn.Module, prompt: list[int], **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.base_model(torch.tensor([prompt]), **inputs).last_hidden_state[0]


def embeddings(outputs: list) -> torch.Tensor:
    return torch.tensor([o.outputs.embedding for o in outputs])


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("family", ALL)
def test_an_encoder_embeds_by_its_first_token_normalized(tmp_path: Path, family: str) -> None:
    model, prompts = make(family, "Model", tmp_path), prompts_of(9)
    with engine(tmp_path) as llm:
        outputs = llm.embed(prompts, use_tqdm=False)
    assert [o.prompt_token_ids for o in outputs] == prompts
    assert_close(embeddings(outputs), torch.stack([torch.nn.functional.normalize(their_hidden(model, p)[0], dim=-1) for p in prompts]))


@pytest.mark.parametrize("family", ALL)
def test_means_over_all_tokens(tmp_path: Path, family: str) -> None:
    model, prompts = make(family, "Model", tmp_path), prompts_of(9)
    with engine(tmp_path, override_pooler_config=PoolerConfig(pooling_type="MEAN", normalize=False)) as llm:
        assert_close(embeddings(llm.embed(prompts, use_tqdm=False)), torch.stack([their_hidden(model, p).mean(0) for p in prompts]))


@pytest.mark.parametrize("family", ALL)
def test_classes_are_transformers(tmp_path: Path, family: str) -> None:
    model, prompts = make(family, "ForSequenceClassification", tmp_path, labels=4), prompts_of(7)
    with torch.no_grad():
        theirs = torch.cat([model(torch.tensor([p])).logits.softmax(-1) for p in prompts])
    with engine(tmp_path) as llm:
        assert_close(torch.tensor([o.outputs.probs for o in llm.classify(prompts, use_tqdm=False)]), theirs)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert"])
def test_a_cross_encoder_scores_pairs_as_transformers_does(tmp_path: Path, family: str) -> None:
    model = make(family, "ForSequenceClassification", tmp_path, labels=1)
    write_tokenizer(tmp_path, types=family == "bert")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    query, texts = "w50 w51 w52", TEXTS
    with torch.no_grad():
        theirs = [torch.sigmoid(model(**tokenizer(query, t, return_tensors="pt")).logits).item() for t in texts]
    with engine(tmp_path, skip_tokenizer_init=False) as llm:
        outputs = llm.score(query, texts, use_tqdm=False)
    assert [o.outputs.score for o in outputs] == pytest.approx(theirs, abs=TOLERANCE)
    assert [o.prompt_token_ids for o in outputs] == [tokenizer(query, t)["input_ids"] for t in texts]
    if family == "bert":  # the types matter: without them the scores are others
        with torch.no_grad():
            blind = [torch.sigmoid(model(torch.tensor([tokenizer(query, t)["input_ids"]])).logits).item() for t in texts]
        assert max(abs(a - b) for a, b in zip(blind, theirs, strict=True)) > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize("limits", [{"max_num_seqs": 2, "max_num_batched_tokens": 128}, {"max_num_seqs": 8, "max_num_batched_tokens": POSITIONS}, {"max_num_seqs": 1}],
                         ids=str)
def test_how_requests_are_put_together_changes_nothing(tmp_path: Path, family: str, limits: dict) -> None:
    make(family, "Model", tmp_path)
    prompts = prompts_of(20)
    with engine(tmp_path) as llm:
        alone = torch.cat([embeddings(llm.embed([p], use_tqdm=False)) for p in prompts])
    with engine(tmp_path, **limits) as llm:
        torch.testing.assert_close(embeddings(llm.embed(prompts, use_tqdm=False)), alone, atol=1e-6, rtol=0)


def test_a_step_takes_as_many_whole_prompts_as_the_budget_and_the_rows_hold(tmp_path: Path) -> None:
    make("bert", "Model", tmp_path)
    with engine(tmp_path, max_num_batched_tokens=100, max_num_seqs=4) as llm:
        steps = []
        submit = llm.llm_engine.executor.submit
        llm.llm_engine.executor.submit = lambda step: steps.append([r.num_tokens for r in step.ranges]) or submit(step)
        llm.embed([[9] * n for n in (60, 50, 40, 10, 5, 5, 5, 5, 5)], use_tqdm=False)
        assert steps == [[60], [50, 40, 10], [5, 5, 5, 5], [5]]
        llm.llm_engine.engine.scheduler.check_integrity()


def test_the_longest_prompt_is_taken_and_a_longer_one_refused(tmp_path: Path) -> None:
    model = make("roberta", "Model", tmp_path)
    longest = POSITIONS - 2
    with engine(tmp_path) as llm:
        (output,) = llm.embed([[20] * longest], use_tqdm=False)
        assert_close(embeddings([output])[0], torch.nn.functional.normalize(their_hidden(model, [20] * longest)[0], dim=-1))
        with pytest.raises(RequestValidationError, match=str(longest)):
            llm.embed([[20] * (longest + 1)], use_tqdm=False)


def test_a_budget_below_max_model_len_is_refused_with_what_to_do(tmp_path: Path) -> None:
    make("bert", "Model", tmp_path)
    with pytest.raises(ConfigError, match="as this model computes a prompt in one step"):
        engine(tmp_path, max_num_batched_tokens=64, max_num_seqs=8)
    with engine(tmp_path, max_num_batched_tokens=64, max_num_seqs=8, max_model_len=64) as llm:
        assert len(llm.embed([[9] * 64], use_tqdm=False)) == 1


@pytest.mark.parametrize("make_table", [HostTable, partial(SentTable, device=torch.device("cpu"))], ids=["host", "sent"])
def test_token_types_of_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_table: Callable[[int, int], Table]) -> None:
    monkeypatch.setattr(CpuDevice, "table", lambda self, rows, columns: make_table(rows, columns))
    model, ids, types = make("bert", "Model", tmp_path), [9, 10, 11, 12], [0, 0, 1, 1]
    with engine(tmp_path) as llm:
        found = embeddings(llm.embed([{"prompt_token_ids": ids, "token_type_ids": types}, {"prompt_token_ids": ids}], use_tqdm=False))
    for ours, given in zip(found, (types, [0] * 4), strict=True):
        hidden = their_hidden(model, ids, token_type_ids=torch.tensor([given]))
        assert_close(ours, torch.nn.functional.normalize(hidden[0], dim=-1))
    assert (found[0] - found[1]).norm() > 0.01


@pytest.mark.parametrize(("family", "types", "error", "message"), [
    ("bert", [0, 0, 2], RequestValidationError, "are 0 to 1, got 2"), ("bert", [0, 0, -1], RequestValidationError, "are 0 to 1, got -1"),
    ("bert", [0, 0], RequestValidationError, "as many as"), ("roberta", [0, 0, 1], RequestValidationError, "are 0 to 0, got 1"),
    ("distilbert", [0, 0, 0], UnsupportedFeatureError, "takes none"), ("modernbert", [0, 0, 0], UnsupportedFeatureError, "takes none"),
])
def test_token_types_that_a_model_does_not_have_fail_their_request_alone(tmp_path: Path, family: str, types, error, message: str) -> None:
    make(family, "Model", tmp_path)
    bad = {"prompt_token_ids": [9, 10, 11], "token_type_ids": types}
    with engine(tmp_path) as llm:
        before = embeddings(llm.embed([[9, 10, 11]], use_tqdm=False))
        with pytest.raises(error, match=message):
            llm.embed([[9, 10, 11], bad], use_tqdm=False)
        assert torch.equal(embeddings(llm.embed([[9, 10, 11]], use_tqdm=False)), before)


@pytest.mark.parametrize("bad", [{"prompt_token_ids": [9, 10], "token_type_ids": [0, 5]}, [VOCAB], [9] * (POSITIONS + 1), []], ids=["type", "id", "long", "empty"])
def test_one_bad_prompt_of_eight_leaves_seven_as_they_were(tmp_path: Path, bad) -> None:
    make("bert", "Model", tmp_path)
    prompts = prompts_of(8)
    with engine(tmp_path) as llm:
        good = embeddings(llm.embed(prompts[:3] + prompts[4:], use_tqdm=False))
        mixed = llm.embed([*prompts[:3], bad, *prompts[4:]], on_error="return", use_tqdm=False)
        assert [o.error is not None for o in mixed] == [False] * 3 + [True] + [False] * 4
        assert_close(embeddings(mixed[:3] + mixed[4:]), good)
        llm.llm_engine.engine.scheduler.check_integrity()


def test_an_encoder_does_not_generate(tmp_path: Path) -> None:
    make("bert", "Model", tmp_path)
    with engine(tmp_path) as llm, pytest.raises(ValueError, match="generat"):
        llm.generate([[9, 10]], use_tqdm=False)
    with pytest.raises(ValueError, match="does not support the 'generate' task"):
        engine(tmp_path, task="generate")


def test_the_plan_of_an_encoder_says_that_nothing_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("modernbert", "Model", tmp_path)
    assert main(["plan", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "no layer keeps state" in shown
    assert "ModernBertModel" in shown


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_bfloat16_points_in_the_same_direction(tmp_path: Path, family: str, backend: str) -> None:
    model, prompts = make(family, "Model", tmp_path), prompts_of(6)
    with engine(tmp_path, dtype="bfloat16", attention_backend=backend, override_pooler_config=PoolerConfig(pooling_type="MEAN")) as llm:
        ours = embeddings(llm.embed(prompts, use_tqdm=False))
    theirs = torch.stack([torch.nn.functional.normalize(their_hidden(model, p).mean(0), dim=-1) for p in prompts])
    assert (ours * theirs).sum(-1).min() > 0.999
    lengths = ours.norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(len(prompts)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("given", "kept"), [({}, slice(-3, None)), ({"truncation_side": "left"}, slice(-3, None)), ({"truncation_side": "right"}, slice(3))], ids=str)
def test_token_types_are_cut_with_their_tokens(tmp_path: Path, given: dict, kept: slice) -> None:
    make("bert", "Model", tmp_path)
    ids, types = [9, 10, 11, 12, 13], [0, 1, 0, 1, 1]
    with engine(tmp_path) as llm:
        cut = llm.embed({"prompt_token_ids": ids, "token_type_ids": types}, tokenization_kwargs={"truncate_prompt_tokens": 3} | given, use_tqdm=False)
        short = llm.embed({"prompt_token_ids": ids[kept], "token_type_ids": types[kept]}, use_tqdm=False)
    assert cut[0].prompt_token_ids == ids[kept]
    assert torch.equal(embeddings(cut), embeddings(short))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("most", [5, 8, 11])
def test_pairs_are_cut_with_their_types_as_transformers_does(tmp_path: Path, side: str, most: int) -> None:
    model = make("bert", "ForSequenceClassification", tmp_path, labels=1)
    write_tokenizer(tmp_path, types=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, truncation_side=side)
    query, texts = "w50 w51 w52 w53", TEXTS
    with torch.no_grad():
        inputs = [tokenizer(query, t, truncation="longest_first", max_length=most, return_tensors="pt") for t in texts]
        theirs = [torch.sigmoid(model(**i).logits).item() for i in inputs]
    with engine(tmp_path, skip_tokenizer_init=False) as llm:
        outputs = llm.score(query, texts, tokenization_kwargs={"truncate_prompt_tokens": most, "truncation_side": side}, use_tqdm=False)
    assert [o.prompt_token_ids for o in outputs] == [i["input_ids"][0].tolist() for i in inputs]
    assert [o.outputs.score for o in outputs] == pytest.approx(theirs, abs=TOLERANCE)
