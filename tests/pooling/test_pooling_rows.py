"""The rows of docs/api.md about pooling, one test each: methods and parameters; and bad input."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from pooling_helpers import (
    VOCAB,
    close,
    engine,
    free_blocks,
    hidden_of,
    make,
    prompts_of,
    unit,
    vectors,
    write_tokenizer,
)
from transformers import AutoTokenizer

from kvloom import LLM, PoolerConfig, PoolingParams, SamplingParams
from kvloom.errors import RequestTypeError, RequestValidationError

PROMPTS = prompts_of(8)
QUIET = {"use_tqdm": False}


@pytest.fixture(scope="module")
def llm(directory: Path, model: torch.nn.Module):
    with engine(directory, task="embed", skip_tokenizer_init=False) as made:
        yield made


def embedding(model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    return unit(hidden_of(model, prompt)[-1])


# -- methods


def test_encode__takes_every_form_of_prompt_and_keeps_the_order(llm: LLM, model: torch.nn.Module) -> None:
    forms = ["w5 w6", {"prompt": "w7"}, {"prompt_token_ids": [8, 9]}, [10, 11, 12], {"prompt_token_ids": [13], "cache_salt": "x"}]
    outputs = llm.encode(forms, **QUIET)
    ids = [[1, 5, 6, 2], [1, 7, 2], [8, 9], [10, 11, 12], [13]]
    assert [o.prompt_token_ids for o in outputs] == ids
    numbers = [int(o.request_id) for o in outputs]
    assert numbers == list(range(numbers[0], numbers[0] + 5))
    assert all(o.finished and o.error is None and o.metrics.finished_time for o in outputs)
    for output, prompt in zip(outputs, ids, strict=True):
        assert output.outputs.data.dtype is torch.float32
        close(output.outputs.data, embedding(model, prompt))
    close(llm.encode([10, 11], **QUIET)[0].outputs.data, embedding(model, [10, 11]))


def test_encode__the_older_overloads(llm: LLM, model: torch.nn.Module) -> None:
    for arguments, keywords, ids in (((), {"prompt_token_ids": [5, 6]}, [[5, 6]]), ((None, None, [[5], [6, 7]]), {}, [[5], [6, 7]]),
                                     (("w5",), {"prompt_token_ids": [9]}, [[1, 5, 2]])):
        with pytest.warns(DeprecationWarning, match="prompt_token_ids is deprecated"):
            outputs = llm.encode(*arguments, **keywords, **QUIET)
        assert [o.prompt_token_ids for o in outputs] == ids
    with pytest.raises(ValueError, match="Either prompts or prompt_token_ids must be provided"):
        llm.encode()


def test_embed__gives_lists_of_length_1(llm: LLM, model: torch.nn.Module) -> None:
    outputs = llm.embed(PROMPTS, **QUIET)
    close(vectors(outputs), torch.stack([embedding(model, p) for p in PROMPTS]))
    assert isinstance(outputs[0].outputs.embedding, list)


def test_classify__gives_a_probability_for_each_label(tmp_path: Path) -> None:
    theirs = make(tmp_path, kind="ForSequenceClassification", num_labels=3)
    write_tokenizer(tmp_path)
    with engine(tmp_path, skip_tokenizer_init=False) as made, torch.no_grad():
        outputs = made.classify(PROMPTS, **QUIET)
        close([o.outputs.probs for o in outputs], torch.cat([theirs(torch.tensor([p])).logits.softmax(-1) for p in PROMPTS]))
        with pytest.raises(RequestValidationError, match="needs a model with one label, this one has 3"):
            made.score("w5", "w6")


def test_reward__is_refused_in_engines_of_other_tasks(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"LLM.reward\(\) is only supported for reward models.*task='embed'"):
        llm.reward(PROMPTS)


@pytest.mark.parametrize("truncate", [None, 7, -1])
def test_score__of_a_cross_encoder_reads_both_texts_as_one_prompt(cross, truncate: int | None) -> None:
    where, theirs, made = cross
    tokenizer = AutoTokenizer.from_pretrained(where)
    query, texts = "w10 w11 w12 w13", ["w20", "w30 w31 w32 w33 w34 w35", "w40 w41"]
    cut = {} if truncate is None else {"truncation": "longest_first", "max_length": 256 if truncate == -1 else truncate}
    ids = [tokenizer(query, t, **cut)["input_ids"] for t in texts]
    assert [len(i) for i in ids] == ([7, 7, 7] if truncate == 7 else [8, 13, 9])  # the tokenizer of this checkpoint knows the words
    with torch.no_grad():
        wanted = [theirs(torch.tensor([i])).logits.sigmoid().item() for i in ids]
    outputs = made.score(query, texts, truncate_prompt_tokens=truncate, **QUIET)
    assert [o.prompt_token_ids for o in outputs] == ids
    assert [o.outputs.score for o in outputs] == pytest.approx(wanted, abs=1e-5)
    (one,) = made.score({"prompt_token_ids": [10, 11, 12, 13]}, {"prompt": texts[1]}, truncate_prompt_tokens=truncate, **QUIET)
    assert one.outputs.score == pytest.approx(wanted[1], abs=1e-5)
    assert [o.outputs.score for o in made.score([query] * 3, texts, truncate_prompt_tokens=truncate, **QUIET)] == pytest.approx(wanted, abs=1e-5)


def test_score__of_an_embedding_model_is_the_cosine(llm: LLM, model: torch.nn.Module) -> None:
    outputs = llm.score("w10 w11", ["w20", "w30 w31"], **QUIET)
    a, b = embedding(model, [1, 10, 11, 2]), embedding(model, [1, 30, 31, 2])
    assert outputs[1].outputs.score == pytest.approx(float(a @ b), abs=1e-5)
    assert outputs[1].prompt_token_ids == [1, 10, 11, 2, 0, 1, 30, 31, 2]
    first, second = map(int, outputs[1].request_id.split("_"))
    assert second == first + 2


def test_score__of_what_does_not_fit(llm: LLM, cross) -> None:
    for wrong in ([PoolingParams()], {"dimensions": 2}):
        with pytest.raises(RequestTypeError, match="one PoolingParams for all pairs"):
            llm.score("a", ["b"], pooling_params=wrong, **QUIET)
    _, _, crossed = cross
    for made in (llm, crossed):
        for first, second, message in ((["w5"] * 2, ["w6"] * 3, "Input lengths must be either 1:1, 1:N or N:N"),
                                       (["w5"] * 2, "w6", "Input lengths must be either"), ([], "w6", "At least one text element"),
                                       ("w5", [], "At least one text_pair element")):
            with pytest.raises(RequestValidationError, match=message):
                made.score(first, second)
    with pytest.raises(RequestValidationError, match="leave no room beside the tokenizer's 3 special tokens"):
        crossed.score("w5", "w6", truncate_prompt_tokens=3, **QUIET)
    assert len(crossed.score("w5", "w6", **QUIET)) == 1


# -- parameters


def test_pooling_dimensions__cut_and_normalize(llm: LLM, model: torch.nn.Module) -> None:
    close(llm.embed([PROMPTS[0]], pooling_params=PoolingParams(dimensions=16), **QUIET)[0].outputs.embedding, unit(hidden_of(model, PROMPTS[0])[-1][:16]))
    for dimensions, message in ((17, "may be 16; got 17"), (0, "integer in"), (True, "integer in"), (float("nan"), "integer in")):
        with pytest.raises(RequestValidationError, match=message):
            llm.embed([PROMPTS[0]], pooling_params=PoolingParams(dimensions=dimensions), **QUIET)


def test_pooling_dimensions__need_a_model_that_was_trained_for_them(tmp_path: Path) -> None:
    make(tmp_path)
    with engine(tmp_path, task="embed") as made, pytest.raises(RequestValidationError, match="not trained to be cut"):
        made.embed([PROMPTS[0]], pooling_params=PoolingParams(dimensions=16), **QUIET)


POOLER = '''
from kvloom import hookimpl
from kvloom.interfaces import Pooler
KVLOOM_API = {"poolers": 0}
class Weighted(Pooler):
    """Rows by their position, as the request says; it breaks where a prompt begins with 13."""
    def start(self, params, token_ids):
        if token_ids[0] == 13:
            raise RuntimeError("unlucky")
        return (params.additional_data or {}).get("factor", 1), (params.extra_kwargs or {}).get("mine", {}).get("plus", 0), None
    def update(self, state, hidden, first_position):
        if 14 in hidden.shape:
            raise RuntimeError("a chunk of 14")
        factor, plus, total = state
        rows = sum(hidden[i] * (first_position + i + 1) for i in range(len(hidden)))
        return factor, plus, rows if total is None else total + rows
    def finish(self, state):
        factor, plus, total = state
        return total * factor + plus
@hookimpl
def kvloom_register_poolers(registry):
    registry.add("WEIGHTED", "acme_0:Weighted")
'''


def test_pooling_additional_data__reaches_the_pooler_of_a_plugin(install, directory: Path, model: torch.nn.Module) -> None:
    install("acme", {"acme": POOLER})
    config, prompt = PoolerConfig(pooling_type="weighted", normalize=False), PROMPTS[0]
    hidden = hidden_of(model, prompt)
    wanted = (hidden * torch.arange(1, len(prompt) + 1)[:, None]).sum(0)
    for chunk in (0, 5):
        with engine(directory, task="embed", override_pooler_config=config, long_prefill_token_threshold=chunk) as made:
            (output,) = made.embed([prompt], pooling_params=PoolingParams(additional_data={"factor": 3}), **QUIET)
            torch.testing.assert_close(torch.tensor(output.outputs.embedding), wanted * 3, atol=1e-2, rtol=1e-5)
            before = free_blocks(made)
            outputs = made.embed([[5], [13, 5], [6], [5] * 14 if not chunk else [7]], on_error="return", **QUIET)
            assert ["unlucky" in str(o.error) for o in outputs] == [False, True, False, False]
            assert "Weighted raised RuntimeError" in str(outputs[1].error)
            assert outputs[1].outputs is None
            assert ("a chunk of 14" in str(outputs[3].error)) == (not chunk)
            assert free_blocks(made) == before
            with pytest.raises(RequestValidationError, match="JSON"):
                made.embed([[5]], pooling_params=PoolingParams(additional_data=object()), **QUIET)


def test_pooling_extra_kwargs__reach_the_pooler_of_a_plugin(install, directory: Path, model: torch.nn.Module) -> None:
    install("acme", {"acme": POOLER})
    with engine(directory, task="embed", override_pooler_config={"pooling_type": "WEIGHTED", "normalize": False}) as made:
        plain, plus = (made.embed([[5]], pooling_params=PoolingParams(extra_kwargs=k), **QUIET)[0].outputs.embedding for k in (None, {"mine": {"plus": 2}}))
        close(torch.tensor(plus), torch.tensor(plain) + 2)
    with pytest.raises(RequestValidationError, match="extra_kwargs must hold JSON data"):
        PoolingParams(extra_kwargs={"mine": float("nan")})


def test_pooling_use_activation__false_leaves_out_norm_and_probabilities(llm: LLM, model: torch.nn.Module) -> None:
    close(llm.embed([PROMPTS[0]], pooling_params=PoolingParams(use_activation=False), **QUIET)[0].outputs.embedding, hidden_of(model, PROMPTS[0])[-1])
    with pytest.raises(RequestValidationError, match="True or False"):
        PoolingParams(use_activation=1)


def test_pooling_truncate_prompt_tokens__cuts_texts_as_the_tokenizer_does(llm: LLM) -> None:
    text = " ".join(f"w{i}" for i in range(10, 30))
    assert llm.embed([text], truncate_prompt_tokens=5, **QUIET)[0].prompt_token_ids == [1, 10, 11, 12, 2]
    assert llm.embed([[5, 6, 7]], truncate_prompt_tokens=2, **QUIET)[0].prompt_token_ids == [6, 7]
    long = " ".join(["w10"] * 3000)
    assert len(llm.embed([long], truncate_prompt_tokens=-1, **QUIET)[0].prompt_token_ids) == 256
    assert len(llm.embed([[10] * 256], **QUIET)[0].prompt_token_ids) == 256
    with pytest.raises(RequestValidationError, match="3002 tokens, which is longer than the maximum model length of 256"):
        llm.embed([long], **QUIET)
    for bad in (0, -2, True, 1.5):
        with pytest.raises(RequestValidationError, match="truncate_prompt_tokens"):
            llm.embed(["w5"], truncate_prompt_tokens=bad, **QUIET)
    with pytest.raises(RequestValidationError, match="no room beside the tokenizer's 2"):
        llm.embed(["w5"], truncate_prompt_tokens=2, **QUIET)


def test_pooling_step_tag_id__belongs_to_step_pooling(llm: LLM) -> None:
    with pytest.raises(RequestValidationError, match="belongs to pooling type STEP, this engine pools with LAST"):
        llm.embed([PROMPTS[0]], pooling_params=PoolingParams(step_tag_id=3), **QUIET)


def test_pooling_returned_token_ids__choose_labels(cross, llm: LLM) -> None:
    _, _, made = cross
    for engine_, columns, message in ((made, [1], "columns 0 to 0 of the label head, got 1"), (llm, [0], "this engine gives embeddings")):
        with pytest.raises(RequestValidationError, match=message):
            engine_.encode([PROMPTS[0]], PoolingParams(returned_token_ids=columns), **QUIET)
    with pytest.raises(RequestValidationError, match="at least one column"):
        PoolingParams(returned_token_ids=[])


def test_pooling_task__must_be_one_that_the_engine_serves(llm: LLM) -> None:
    assert llm.encode([PROMPTS[0]], PoolingParams(task="token_embed"), **QUIET)[0].outputs.data.ndim == 2
    with pytest.raises(RequestValidationError, match="task='embed', whose requests may be for embed, token_embed; got 'classify'"):
        llm.encode([PROMPTS[0]], PoolingParams(task="classify"), **QUIET)
    with pytest.raises(RequestValidationError, match="got 'reward'"):
        llm.encode([PROMPTS[0]], pooling_task="reward", **QUIET)
    with pytest.raises(RequestValidationError, match="task must be one of"):
        PoolingParams(task="sing")
    with pytest.raises(RequestValidationError, match="contradicts the call"):
        llm.embed([PROMPTS[0]], pooling_params=PoolingParams(task="token_embed"), **QUIET)


def test_pooling_skip_reading_prefix_cache__computes_every_token(llm: LLM) -> None:
    prompt = [(3 * i) % 90 + 5 for i in range(60)]
    cached = [llm.embed([prompt], pooling_params=PoolingParams(skip_reading_prefix_cache=skip), **QUIET)[0].num_cached_tokens for skip in (None, None, True)]
    assert cached == [0, 48, 0]


# -- bad input


def test_one_broken_request_of_eight_harms_nobody(llm: LLM) -> None:
    alone = vectors(llm.embed(PROMPTS, **QUIET))
    before = free_blocks(llm)
    broken = [*PROMPTS[:3], [VOCAB], *PROMPTS[4:]]
    with pytest.raises(RequestValidationError, match="out of vocabulary"):
        llm.embed(broken, **QUIET)
    outputs = llm.embed(broken, on_error="return", **QUIET)
    assert "out of vocabulary" in str(outputs[3].error)
    kept = [i for i in range(8) if i != 3]
    close(vectors([outputs[i] for i in kept]), alone[kept])
    assert free_blocks(llm) == before
    assert len(llm.embed([PROMPTS[0]], **QUIET)) == 1


@pytest.mark.parametrize(("call", "message"), [
    (lambda llm: llm.embed([]), "must pass at least one prompt"), (lambda llm: llm.encode([]), "must pass at least one prompt"),
    (lambda llm: llm.encode([[1], [2]], [PoolingParams()]), "lengths of prompts and params must be the same"),
    (lambda llm: llm.encode([[1]], [SamplingParams()]), "pooling_params must be PoolingParams"),
    (lambda llm: llm.encode([[1]], PoolingParams(task="embed"), on_error="drop"), "on_error must be"),
    (lambda llm: llm.embed([[1]], lora_request=object()), "lora_request"), (lambda llm: llm.embed([[]]), "cannot be empty"),
    (lambda llm: llm.embed([[1]], priority=[1, 2]), "lengths of prompts and priority"),
    (lambda llm: llm.embed(3), "prompts must be"), (lambda llm: llm.embed([{"text": "w5"}]), "no key"),
])
def test_bad_calls_say_what_is_wrong(llm: LLM, call, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(llm)
    assert len(llm.embed([PROMPTS[0]], **QUIET)) == 1


def test_the_callers_parameters_stay_as_they_are(llm: LLM) -> None:
    params = PoolingParams(dimensions=16)
    llm.embed(PROMPTS[:2], pooling_params=params, truncate_prompt_tokens=3, **QUIET)
    assert params == PoolingParams(dimensions=16)


def test_hidden_states_that_are_not_finite_fail_their_request_only(tmp_path: Path) -> None:
    model = make(tmp_path)
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = float("nan")
    model.save_pretrained(tmp_path)
    with engine(tmp_path, task="embed") as made, warnings.catch_warnings():
        outputs = made.embed([[5], [50], [6]], on_error="return", **QUIET)
    assert ["not finite" in str(o.error) for o in outputs] == [False, True, False]
