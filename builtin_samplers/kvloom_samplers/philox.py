"""Philox4x32-10: a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

A number is a pure function of key and counter, so there is no state that neighbours, order or preemption could change.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox4x32(counter: Array, key: Array) -> Array:
    """``counter [S, 4]``, ``key [S, 2]``, 32-bit words -> ``[S, 4]`` 32-bit words; all uint64 arrays."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) & LOW for i in range(4))
    k0, k1 = (key[:, i].astype(np.uint64) & LOW for i in range(2))
    for _ in range(ROUNDS):
        first, second = np.uint64(MULTIPLIERS[0]) * c0, np.uint64(MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (second >> HALF) ^ c1 ^ k0, second & LOW, (first >> HALF) ^ c3 ^ k1, first & LOW
        k0, k1 = (k0 + np.uint64(WEYL[0])) & LOW, (k1 + np.uint64(WEYL[1])) & LOW
    return np.stack((c0, c1, c2, c3), axis=1)


def uniforms(seeds: Array, sample_indices: Array, positions: Array, stream: int = 0) -> Array:
    """One number in (0, 1) a sequence, float64 with 52 random bits.

    Args:
        seeds: ``[S]`` uint64, the key.
        sample_indices, positions: ``[S]``: 0..n-1 within the request, and the position of the token to be sampled.
        stream: which of a position's numbers: another one for another purpose.
    """
    seeds = seeds.astype(np.uint64)
    key = np.stack((seeds & LOW, seeds >> HALF), axis=1)
    positions, samples = positions.astype(np.uint64), sample_indices.astype(np.uint64)
    counter = np.stack((positions & LOW, positions >> HALF, samples & LOW, np.full_like(positions, stream)), axis=1)
    words = philox4x32(counter, key)
    bits = (words[:, 0] << np.uint64(20)) ^ (words[:, 1] >> np.uint64(12))
    return (bits.astype(np.float64) + 0.5) * 2.0**-52  # with 53 bits the largest would round to 1
