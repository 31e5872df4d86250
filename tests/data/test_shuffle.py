"""The computed permutations are permutations, fair, and fixed for ever."""

import math
from collections import Counter

import numpy as np
import pytest

from megamf.data.shuffle import BLOCK, derive_key, permute


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 50_000])
def test_is_a_permutation(size):
    assert sorted(permute(np.arange(size), size, derive_key(1, size))) == list(range(size))


def test_random_access_equals_the_whole():
    size = 3 * BLOCK + 5
    whole = permute(np.arange(size), size, 99)
    chosen = np.array([[0, size - 1], [BLOCK, BLOCK - 1]])
    assert (permute(chosen, size, 99) == whole[chosen]).all()
    assert permute(np.array([7]), size, 99)[0] == whole[7]


def test_huge_ranges_need_no_table():
    assert 0 <= permute(np.array([10**15]), 10**15 + 3, 1)[0] < 10**15 + 3


def test_every_order_is_equally_likely():
    draws = 12_000
    counts = Counter(tuple(permute(np.arange(4), 4, derive_key(seed))) for seed in range(draws))
    expected = draws / math.factorial(4)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == 24
    assert chi_square < 49.7  # 23 degrees of freedom, p = 0.001


@pytest.mark.parametrize("size", [1000, 1025, 1500])
def test_every_place_is_equally_likely(size):
    draws = 1500
    places = np.concatenate([permute(np.array([0, 1, size - 1]), size, derive_key(seed)) for seed in range(draws)])
    counts = np.histogram(places, bins=10, range=(0, size))[0]
    assert ((counts - 3 * draws / 10) ** 2 / (3 * draws / 10)).sum() < 27.9  # 9 degrees of freedom, p = 0.001


def test_neighbours_are_torn_apart():
    size = 10_000
    order = permute(np.arange(size), size, derive_key("x"))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.03


def test_integers_as_an_oracle():
    """The same network with Python's own integers."""
    word = 2**64 - 1

    def mix(number):
        number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & word
        number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & word
        return number ^ (number >> 31)

    def walk(number, size, key):
        half = ((size - 1).bit_length() + 1) // 2
        while True:
            left, right = number >> half, number % 2**half
            for turn in range(1, 7):
                secret = mix((key + 0x9E3779B97F4A7C15 * turn) & word)
                left, right = right, left ^ mix(right ^ secret) % 2**half
            number = left * 2**half + right
            if number < size:
                return number

    for size, key in ((1025, 3), (5000, 2**64 - 1), (70_001, derive_key("documents", 0, 1, 2))):
        places = np.linspace(0, size - 1, 5).astype(int)
        assert permute(places, size, key).tolist() == [walk(int(place), size, key) for place in places]


def test_keys_differ_and_stay():
    assert len({derive_key("a", n) for n in range(1000)}) == 1000
    assert derive_key("documents", 0, 1, 2) == derive_key("documents", 0, 1, 2) < 2**64
    assert derive_key("documents", 0, 1) != derive_key("documents", 1, 0)
