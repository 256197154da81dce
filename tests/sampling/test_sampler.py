"""Random numbers are a function of (seed, sample, position) alone; tokens come up as often as their probabilities say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.interfaces import SamplingRows
from kvloom.params import SamplingParams
from kvloom_samplers.filters import Temperature
from kvloom_samplers.philox import philox4x32, uniforms
from kvloom_samplers.token_sampler import TokenSampler


def words(*values: int) -> np.ndarray:
    return np.array([values], dtype=np.uint64)


@pytest.mark.parametrize(("counter", "key", "expected"), [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_philox_gives_the_known_answers_of_its_authors(counter, key, expected) -> None:
    assert philox4x32(words(*counter), words(*key)).tolist() == [list(expected)]


def test_philox_words_differ_and_are_spread_evenly() -> None:
    key = np.array([0x12345678, 0x9ABCDEF0], dtype=np.uint64)
    ours = philox4x32(np.stack([np.arange(1, 33, dtype=np.uint64), *(np.zeros(32, np.uint64),) * 3], axis=1), np.tile(key, (32, 1)))
    assert len({tuple(row) for row in ours.tolist()}) == 32
    assert abs(ours.mean() / 2**31 - 1) < 0.1


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.integers(0, 2**31))
def test_uniforms_are_strictly_between_0_and_1(seed: int, sample: int, position: int) -> None:
    number = uniforms(np.array([seed], np.uint64), np.array([sample]), np.array([position]))[0]
    assert 0 < number < 1
    other = uniforms(np.array([seed], np.uint64), np.array([sample]), np.array([position + 1]))[0]
    assert number != other


def rows(count: int, temperature: float = 1.0, seed: int = 7) -> SamplingRows:
    return SamplingRows(
        sequence_ids=np.arange(count), row_starts=np.arange(count + 1), params=[SamplingParams()] * count,
        temperatures=np.full(count, temperature, np.float32), seeds=np.full(count, seed, np.uint64),
        sample_indices=np.zeros(count, np.int64), positions=np.arange(count))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_up_as_often_as_their_probabilities_say(temperature: float) -> None:
    count, logits = 40_000, torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf, 0.5])
    scaled = Temperature().apply(logits.repeat(count, 1), [temperature] * count)
    drawn = TokenSampler().sample(scaled, rows(count, temperature)).token_ids
    seen = torch.bincount(drawn, minlength=6).double()
    expected = (logits.double() / temperature).softmax(0) * count
    assert seen[4] == 0
    alive = expected > 0
    chi_square = ((seen - expected)[alive] ** 2 / expected[alive]).sum()
    assert chi_square < 20.5  # 4 degrees of freedom: exceeded once in 2,500 times by chance; the seeds are fixed


def test_temperature_0_takes_the_best_token() -> None:
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    assert TokenSampler().sample(logits.clone(), rows(50, 0.0)).token_ids.tolist() == logits.argmax(-1).tolist()


def test_neighbours_and_order_do_not_change_a_row() -> None:
    logits = torch.randn(20, 500, generator=torch.Generator().manual_seed(1))
    given_rows = rows(20)
    mixed = replace(given_rows, temperatures=np.where(np.arange(20) % 3 == 0, 0, 0.8).astype(np.float32))
    together = TokenSampler().sample(logits.clone(), mixed).token_ids
    for i in range(20):
        one = replace(mixed, **{name: getattr(mixed, name)[i:i + 1] for name in (
            "sequence_ids", "params", "temperatures", "seeds", "sample_indices", "positions")}, row_starts=np.arange(2))
        assert TokenSampler().sample(logits[i:i + 1].clone(), one).token_ids[0] == together[i]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_fails_alone(bad: float, temperature: float) -> None:
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(2))
    clean = TokenSampler().sample(logits.clone(), rows(3, temperature)).token_ids
    logits[1, 4] = bad
    done = TokenSampler().sample(logits.clone(), rows(3, temperature))
    assert done.finite.tolist() == [i != 1 for i in range(len(done.token_ids))]
    assert [done.token_ids[i] for i in (0, 2)] == [clean[i] for i in (0, 2)]


def test_a_vocabulary_of_equals_is_drawn_evenly_to_its_last_token() -> None:
    drawn = TokenSampler().sample(torch.zeros(2000, 50_000), rows(2000)).token_ids
    assert drawn.max() > 49_000
    assert drawn.min() < 1000
    assert drawn.unique().numel() > 1900
