"""Copies of a linear map: choosing, averaging, merging, and the draws."""

import numpy as np
import torch
from torch import nn

from megamf.adapt.mixture import Mixture, Pair, choose, choose_average, choose_fixed, draw, merge, mixture_of


def linears(number, bias=True, seed=0):
    torch.manual_seed(seed)
    return [nn.Linear(5, 3, bias=bias) for _ in range(number)]


def test_chosen_copy_and_average_against_plain_arithmetic():
    copies = linears(3)
    mixture = Mixture(copies)
    x = torch.randn(4, 2, 5)
    for index, one in enumerate(copies):
        mixture.chosen = index
        assert torch.equal(mixture(x), one(x)) and torch.equal(mixture.weight, one.weight)
    mixture.chosen = None
    mean = sum(one.weight for one in copies) / 3, sum(one.bias for one in copies) / 3
    assert torch.allclose(mixture(x), x @ mean[0].T + mean[1], atol=1e-6)


def test_only_the_chosen_copy_has_a_gradient():
    mixture = Mixture(linears(3))
    mixture.chosen = 1
    mixture(torch.randn(2, 5)).sum().backward()
    assert [one.weight.grad is not None for one in mixture.copies] == [False, True, False]


def test_average_of_identical_copies_is_the_copy():
    one = linears(1, bias=False)[0]
    for number in (1, 2, 3, 4):
        mixture = mixture_of(one, number)
        merged = mixture.average()
        assert torch.allclose(merged.weight, one.weight, rtol=1e-6, atol=0)
        if number in (1, 2, 4):
            assert torch.equal(merged.weight, one.weight)
        assert merged.bias is None and merged.weight is not one.weight


def test_merge_replaces_mixtures_wherever_they_stand():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 5), Mixture(linears(2)))})
    model["b"] = Mixture(linears(4, seed=1))
    x = torch.randn(2, 3)
    before = model["b"](torch.ones(1, 5)), model["a"](x)
    assert merge(model) == 2 and merge(model) == 0
    assert type(model["b"]) is nn.Linear and type(model["a"][1]) is nn.Linear
    assert torch.allclose(model["b"](torch.ones(1, 5)), before[0], atol=1e-6)
    assert torch.allclose(model["a"](x), before[1], atol=1e-6)


def test_draws_follow_from_seed_step_and_pass_alone_and_are_uniform_and_independent():
    one = draw(3, 7, 0, 20, 4)
    assert np.array_equal(one, draw(3, 7, 0, 20, 4))
    others = [draw(4, 7, 0, 20, 4), draw(3, 8, 0, 20, 4), draw(3, 7, 1, 20, 4)]
    assert not any(np.array_equal(one, other) for other in others)
    many = np.concatenate([draw(0, step, 0, 20, 4) for step in range(500)])
    counts = np.zeros((4, 4))
    np.add.at(counts, (many[:, 0], many[:, 1]), 1)
    assert abs(counts / len(many) - 1 / 16).max() < 0.01


def test_choosing_with_a_shared_side():
    pairs = [Pair("x", Mixture(linears(4)), Mixture(linears(1))) for _ in range(3)]
    choose(pairs, np.array([[3, 2], [0, 0], [1, 3]]))
    assert [pair.down.chosen for pair in pairs] == [3, 0, 1] and [pair.up.chosen for pair in pairs] == [0, 0, 0]
    choose_fixed(pairs, 2)
    assert {pair.down.chosen for pair in pairs} == {2} and {pair.up.chosen for pair in pairs} == {0}
    choose_average(pairs)
    assert {pair.down.chosen for pair in pairs} == {None}
