"""The sparse feed-forward layer: every backend against sums over single neurons, and what is refused."""

import math

import pytest
import torch

from megamf.errors import UserError
from megamf.ops.expert_ffn import ACTIVATIONS, COMPILED, expert_ffn

SCALAR = {
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}
BACKENDS = ["csrc", "grouped", "naive"]


def make(N, D, E, size, O, K, *, up=False, biases=False, weighted=False, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    expert_NK = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(N)]) if N else torch.empty(0, K)
    given = (randn(N, D), expert_NK.long(), randn(E, D, size), randn(E, size, O))
    more = {
        "up_EDF": randn(E, D, size) if up else None,
        "gate_bias_EF": randn(E, size) if biases else None,
        "up_bias_EF": randn(E, size) if biases and up else None,
        "out_bias_O": randn(O) if biases else None,
        "weight_NK": randn(N, K).abs() if weighted else None,
    }
    return given, more


def by_neuron(given, more, activation):
    """One multiplication at a time, of a few tokens."""
    x_ND, expert_NK, gate_EDF, out_EFO = given
    y_NO = torch.zeros(len(x_ND), out_EFO.shape[2], dtype=torch.float64)
    for n, x in enumerate(x_ND):
        if more["out_bias_O"] is not None:
            y_NO[n] += more["out_bias_O"]
        for k, e in enumerate(expert_NK[n].tolist()):
            for f in range(gate_EDF.shape[2]):
                value = float(x @ gate_EDF[e, :, f])
                value += 0.0 if more["gate_bias_EF"] is None else float(more["gate_bias_EF"][e, f])
                h = SCALAR[activation](value)
                if more["up_EDF"] is not None:
                    bias = 0.0 if more["up_bias_EF"] is None else float(more["up_bias_EF"][e, f])
                    h *= float(x @ more["up_EDF"][e, :, f]) + bias
                h *= 1.0 if more["weight_NK"] is None else float(more["weight_NK"][n, k])
                y_NO[n] += h * out_EFO[e, f]
    return y_NO


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_every_form_is_the_sum_over_neurons(backend, activation):
    for up, biases, weighted in ((False, False, False), (True, True, True), (False, True, False), (True, False, True)):
        given, more = make(5, 7, 4, 8, 24, 3, up=up, biases=biases, weighted=weighted)
        found = expert_ffn(*given, **more, activation=activation, backend=backend)
        assert torch.allclose(found, by_neuron(given, more, activation), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("N", [0, 1, 3, 17, 131, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_awkward_numbers_of_tokens(N, threads, dtype):
    torch.set_num_threads(threads)
    try:
        for size, D, O, K in ((32, 200, 48, 5), (48, 33, 208, 1), (16, 500, 160, 9)):
            given, more = make(N, D, 9, size, O, K, up=True, biases=True, dtype=dtype)
            found = expert_ffn(*given, **more, activation="silu", backend="csrc")
            wide = [t.double() if t.is_floating_point() else t for t in given]
            more = {name: None if t is None else t.double() for name, t in more.items()}
            expected = expert_ffn(*wide, **more, activation="silu", backend="naive")
            tolerance = 1e-5 if dtype == torch.float32 else 1e-12
            assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance * 500)
    finally:
        torch.set_num_threads(1)


def test_results_do_not_depend_on_the_number_of_threads():
    given, more = make(150, 96, 12, 32, 64, 4, dtype=torch.float32)
    one = expert_ffn(*given, **more, backend="csrc")
    torch.set_num_threads(2)
    try:
        assert torch.equal(expert_ffn(*given, **more, backend="csrc"), one)
    finally:
        torch.set_num_threads(1)


def test_gradients_of_the_grouped_backend():
    given, more = make(6, 5, 4, 8, 6, 2, up=True, biases=True, weighted=True)
    wanted = [given[0], given[2], given[3], *(t for t in more.values())]
    for tensor in wanted:
        tensor.requires_grad_()
    results = [expert_ffn(*given, **more, activation="gelu", backend=name) for name in ("auto", "naive")]
    one, two = (torch.autograd.grad(result.square().sum(), wanted) for result in results)
    for a, b in zip(one, two, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_bfloat16_takes_the_grouped_path():
    given, more = make(9, 16, 4, 32, 32, 2, dtype=torch.bfloat16)
    wide = [t.double() if t.is_floating_point() else t for t in given]
    expected = expert_ffn(*wide, **more, backend="naive")
    found = expert_ffn(*given, **more)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() < 0.02 * expected.norm()


def test_refusals():
    assert COMPILED
    given, _ = make(3, 5, 4, 8, 8, 2)
    x, expert, gate, out = given
    with pytest.raises(IndexError, match="expected 0 to 3"):
        expert_ffn(x, expert + 2, gate, out, backend="csrc")
    with pytest.raises(ValueError, match="activation 'sine'"):
        expert_ffn(*given, activation="sine")
    with pytest.raises(ValueError, match="got out"):
        expert_ffn(x, expert, gate, out.float())
    with pytest.raises(ValueError, match="expected 1 to 4"):
        expert_ffn(x, expert[:, :0], gate, out)
    with pytest.raises(UserError, match="multiples of 8, got 4 neurons"):
        expert_ffn(x, expert, gate[..., :4], out[:, :4], backend="csrc")
    with pytest.raises(UserError, match="has no gradient"):
        expert_ffn(x.requires_grad_(), expert, gate, out, backend="csrc")
