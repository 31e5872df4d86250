"""Random permutations that are computed index by index: no table, the same on every machine and numpy version.

A balanced Feistel network permutes the numbers of an even number of bits; numbers that leave the wanted range are
sent through it again until they come back inside ("cycle walking", Black and Rogaway 2002). The round function is
the finaliser of splitmix64. Networks of few bits are not fair, so short ranges are sorted by a hash instead.
"""

import hashlib

import numpy as np

ROUNDS = 6
SHORT = 1024
BLOCK = 2**14  # numbers at a time: they stay in the processor's cache
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from seed, source number, epoch and the like."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where the permutation of `range(size)` chosen by `key` sends each of `index` (any integers in the range).

    Returns int64 of the same shape. Time and memory depend on `index` only, not on `size`.
    """
    assert size > 0
    if size <= SHORT:
        hashes = _mix(_mix(np.arange(1, size + 1, dtype=np.uint64) * _GOLDEN) ^ np.uint64(key))
        return np.argsort(hashes, kind="stable")[index].astype(np.int64)
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    keys = _mix(np.uint64(key) + _GOLDEN * np.arange(1, ROUNDS + 1, dtype=np.uint64))
    flat = np.asarray(index, dtype=np.uint64).ravel()
    blocks = [_walk(flat[at : at + BLOCK], size, half, keys) for at in range(0, len(flat), BLOCK)]
    out = np.concatenate(blocks) if blocks else flat
    return out.view(np.int64).reshape(np.shape(index))


def _walk(number: np.ndarray, size: int, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    out = _feistel(number, half, keys)
    outside = np.flatnonzero(out >= size)
    while len(outside):
        again = _feistel(out[outside], half, keys)
        out[outside] = again
        outside = outside[again >= size]
    return out


def _feistel(number: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = number >> half, number & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(number: np.ndarray) -> np.ndarray:
    number = (number ^ (number >> np.uint64(30))) * _MIX1
    number = (number ^ (number >> np.uint64(27))) * _MIX2
    return number ^ (number >> np.uint64(31))
