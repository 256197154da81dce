"""Every logits processor against a slow reference, alone and among rows that did not ask; states that advance and roll back."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom import SamplingParams
from kvloom.errors import RequestFailedError, RequestValidationError
from kvloom.hooks.discovery import PluginSelection
from kvloom.hooks.loader import load_plugins
from kvloom.interfaces import LogitsProcessor, SamplingRows, SequenceView
from kvloom.runtime.logits import LogitsPipeline, NamedProcessor, SequenceProcessors, make_processors
from kvloom_samplers.token_sampler import TokenSampler

VOCABULARY = 23
PIPELINE = LogitsPipeline(make_processors(load_plugins(PluginSelection(())).registries["logits_processors"]))
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 0.3, 1.0, 1.7]), top_k=st.sampled_from([-1, 0, 1, 3, 100]), top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0, 0.05, 0.5, 1.0]), presence_penalty=st.sampled_from([0, 0.7, -1.0]), frequency_penalty=st.sampled_from([0, 0.4, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.6]), logit_bias=st.none() | st.dictionaries(st.integers(0, 22), st.floats(-3, 3, width=32), max_size=4),
    allowed_token_ids=st.none() | st.lists(st.integers(0, 22), min_size=1, max_size=8), min_tokens=st.integers(0, 6),
    stop_token_ids=st.none() | st.lists(st.integers(0, 22), max_size=2), bad_words=st.none() | st.lists(st.sampled_from(["a", "ab", "ba", "aab", "cc"]), max_size=3),
    logits_processors=st.sampled_from([None, [lambda ids, x: x + len(ids)], [lambda prompt, ids, x: x * 0.5 + len(prompt), lambda ids, x: x - 1]]),
)


class Letters:
    """Just enough of a tokenizer: one token a letter, none differs after a space."""

    @staticmethod
    def encode(text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return ["abcd".index(c) for c in text.strip()]


def start(params: SamplingParams, prompt=(), output=(), vocab_size: int = VOCABULARY, pipeline: LogitsPipeline = PIPELINE) -> SequenceProcessors:
    """As at admission, and then on the worker."""
    return pipeline.start(SequenceView(0, 0, tuple(prompt), params, vocab_size, (2,)), pipeline.ask(params, Letters), output)


def reference(logits: list[float], p: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """Plain Python, in the documented order."""
    x = [v if p.allowed_token_ids is None or i in p.allowed_token_ids else -math.inf for i, v in enumerate(logits)]
    for word in p.bad_words or ():
        *before, last = Letters.encode(word, add_special_tokens=False)
        if output[len(output) - len(before):] == before:
            x[last] = -math.inf
    if len(output) < p.min_tokens:
        x = [-math.inf if i in (2, *(p.stop_token_ids or ())) else v for i, v in enumerate(x)]
    for i, bias in (p.logit_bias or {}).items():
        x[i] += bias
    for function in p.logits_processors or ():
        arguments = [output] if function.__code__.co_argcount == 2 else [prompt, output]
        x = function(*arguments, torch.tensor(x)).tolist()
    counts = Counter(output)
    for i in {*prompt, *output}:
        x[i] = x[i] / p.repetition_penalty if x[i] > 0 else x[i] * p.repetition_penalty
    for i, n in counts.items():
        x[i] -= p.frequency_penalty * n + p.presence_penalty
    if p.is_greedy:
        return x
    x = [v / p.temperature for v in x]

    def probabilities() -> list[float]:
        best = max(x)
        weights = [math.exp(v - best) for v in x]
        return [w / sum(weights) for w in weights]

    best_p = max(probabilities())
    x = [v if q >= p.min_p * best_p * (1 - 1e-6) else -math.inf for v, q in zip(x, probabilities(), strict=True)]
    if p.top_k > 0:
        last = sorted(x, reverse=True)[min(p.top_k, len(x)) - 1]
        x = [v if v >= last else -math.inf for v in x]
    if p.top_p < 1:
        order, mass = sorted(zip(x, probabilities(), strict=True), reverse=True), 0.0
        for v, q in order:
            last, mass = v, mass + q
            if mass >= p.top_p:
                break
        x = [v if v >= last else -math.inf for v in x]
    return x


def assert_same(got: torch.Tensor, expected: list[float]) -> None:
    wanted = torch.tensor(expected)
    assert torch.equal(torch.isinf(got), torch.isinf(wanted))
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


@given(rows=st.lists(st.tuples(PARAMS, TOKENS, TOKENS), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_a_batch_gives_each_row_what_the_reference_gives_it_alone(rows: list, seed: int) -> None:
    logits = torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    sequences = []
    for params, prompt, output in rows:
        sequence = start(params, prompt)
        for token_id in output:
            PIPELINE.advance(sequence, [token_id])
        sequences.append(sequence)
    expected = [reference(logits[i].tolist(), params, prompt, output) for i, (params, prompt, output) in enumerate(rows)]
    got = PIPELINE.apply(logits.clone(), sequences)
    for i in range(len(rows)):
        assert_same(got[i], expected[i])


@given(params=PARAMS, prompt=TOKENS, output=TOKENS, more=TOKENS)
def test_a_resumed_sequence_and_one_that_rolled_back_are_where_they_were(params: SamplingParams, prompt: list, output: list, more: list) -> None:
    logits = torch.linspace(-4, 4, VOCABULARY)[None]
    resumed, rolled_back = start(params, prompt, output), start(params, prompt, output)
    PIPELINE.advance(rolled_back, more)
    for i, state in rolled_back.states.items():
        PIPELINE._processors[i].processor.rollback(state, len(more))
    assert torch.equal(PIPELINE.apply(logits.clone(), [resumed]), PIPELINE.apply(logits.clone(), [rolled_back]))


@given(params=PARAMS, prompt=TOKENS, output=TOKENS)
def test_applying_changes_no_state(params: SamplingParams, prompt: list, output: list) -> None:
    logits = torch.linspace(-4, 4, VOCABULARY)[None]
    sequence = start(params, prompt, output)
    assert torch.equal(PIPELINE.apply(logits.clone(), [sequence]), PIPELINE.apply(logits.clone(), [sequence]))


@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999999, 1 - 1e-9])
@pytest.mark.parametrize("spread", [0.0, 0.01, 5.0])
def test_top_p_over_a_long_vocabulary_keeps_the_smallest_set(top_p: float, spread: float) -> None:
    size = 5000
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(0)) * spread
    sequence = start(SamplingParams(top_p=top_p), vocab_size=size)
    kept = torch.isfinite(PIPELINE.apply(logits.clone(), [sequence])[0])
    mass = logits.double().softmax(-1)[0]
    assert mass[kept].sum() >= top_p - 1e-5
    if spread:
        smallest = mass[kept].min()
        assert mass[kept].sum() - smallest <= top_p + 1e-5


def test_rows_that_ask_for_nothing_are_not_touched() -> None:
    logits = torch.randn(3, VOCABULARY)
    sequences = [start(p) for p in (SamplingParams(temperature=0), SamplingParams(top_k=1, logit_bias={3: 99.0}), SamplingParams())]
    assert [len(s.states) for s in sequences] == [0, 2, 0]
    got = PIPELINE.apply(logits.clone(), sequences)
    assert torch.equal(got[[0, 2]], logits[[0, 2]])
    assert torch.isfinite(got[1]).sum() == 1


def test_greedy_rows_skip_what_cannot_change_the_best_token() -> None:
    params = SamplingParams(temperature=0, top_k=2, top_p=0.5, min_p=0.5, logit_bias={1: 1.0})
    assert len(start(params).states) == 1


@pytest.mark.parametrize(("params", "name"), [(SamplingParams(logit_bias={VOCABULARY: 1.0}), "logit_bias"),
                                              (SamplingParams(allowed_token_ids=[1, 99]), "allowed_token_ids")])
def test_an_id_out_of_the_vocabulary_is_refused_by_name(params: SamplingParams, name: str) -> None:
    with pytest.raises(RequestValidationError, match=f"{name} has the token id .* out of vocabulary"):
        start(params)


class Bad(LogitsProcessor):
    """Fails as its name says."""

    @classmethod
    def parameters(cls, params: SamplingParams, tokenizer) -> str:
        return "asked"

    def new_state(self, parameters: str, sequence: SequenceView) -> str:
        return parameters

    def apply(self, logits: torch.Tensor, states: list) -> torch.Tensor:
        if type(self).__name__ == "Shape":
            return logits[:, :5]
        raise ZeroDivisionError("oops")


@pytest.mark.parametrize(("kind", "message"), [("Raises", "raised ZeroDivisionError: oops"), ("Shape", r"gave the shape \(1, 5\) for \(1, 23\)")])
def test_a_processor_that_fails_is_named_with_its_plugin(kind: str, message: str) -> None:
    pipeline = LogitsPipeline([NamedProcessor("mine", "plugin 'acme' of acme 1.0", type(kind, (Bad,), {})())])
    with pytest.raises(RequestFailedError, match=f"logits processor 'mine' \\(plugin 'acme' of acme 1.0\\) {message}"):
        pipeline.apply(torch.zeros(1, VOCABULARY), [start(SamplingParams(), pipeline=pipeline)])


@pytest.mark.parametrize("params", [
    SamplingParams(), SamplingParams(temperature=0.7, top_p=0.9), SamplingParams(temperature=1.7, top_k=9), SamplingParams(min_p=0.1, logit_bias={3: 1.5}),
    SamplingParams(temperature=1.3, min_p=0.02, top_k=15, top_p=0.95, repetition_penalty=1.4, presence_penalty=0.4, allowed_token_ids=list(range(20))),
], ids=str)
def test_tokens_are_drawn_from_the_processed_distribution(params: SamplingParams) -> None:
    """Chi-square over many draws of one position; the seeds are fixed, so it repeats."""
    count, prompt, output = 20_000, [1, 5, 5], [2, 5]
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2
    expected = torch.tensor(reference(logits.tolist(), params, prompt, output)).double().softmax(0) * count
    processed = PIPELINE.apply(logits.repeat(count, 1), [start(params, prompt, output)] * count)
    drawn = TokenSampler().sample(processed, SamplingRows(
        sequence_ids=np.arange(count), row_starts=np.arange(count + 1), params=[params] * count,
        temperatures=np.full(count, params.temperature, np.float32), seeds=np.arange(count, dtype=np.uint64),
        sample_indices=np.zeros(count, np.int64), positions=np.full(count, 5))).token_ids
    seen = torch.bincount(drawn, minlength=VOCABULARY).double()
    assert seen[expected == 0].sum() == 0
    often = expected >= 5
    rest = (seen[~often].sum() - expected[~often].sum()) ** 2 / expected[~often].sum().clamp(min=1)
    chi_square = ((seen - expected)[often] ** 2 / expected[often]).sum() + rest
    freedom = int(often.sum())
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations
