"""Expert layers on Triton under its interpreter against the loop; started by test_grouped_linear_kernels."""

import pytest
import torch

from megamf.config import ModelConfig
from megamf.model.attention import ExpertAttention
from megamf.model.backends import Backends
from megamf.model.dispatch import LocalDispatcher, Plan
from megamf.model.mlp import ExpertMlp

SIZES = {
    "n_embd": 16, "n_head": 2, "att_hidden": 12, "ffd_hidden": 20, "n_att_experts": 4, "n_mlp_experts": 5, "k_att": 2,
    "k_mlp": 3, "gating_size": 6,
}  # fmt: skip


class Elsewhere(LocalDispatcher):
    """All experts here, but as if rows had travelled: nothing can be gathered inside a product."""

    def plan(self, expert_NK: torch.Tensor, num_experts: int) -> Plan:
        plan = super().plan(expert_NK, num_experts)
        plan.transport = "rows travelled"
        return plan


def layer(kind, dispatcher, backend):
    made = kind(ModelConfig(**SIZES), dispatcher, Backends(experts=backend))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return made


def run(made, **options):
    x_BTD = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y_BTD, stats = made(x_BTD, **options)
    inputs = [x_BTD, *made.parameters()]
    return y_BTD.detach(), *torch.autograd.grad(y_BTD.square().sum() + stats.prob_E[0] + stats.entropy, inputs)


@pytest.mark.parametrize("dispatcher", [LocalDispatcher, Elsewhere])
@pytest.mark.parametrize("kind", [ExpertMlp, ExpertAttention])
def test_a_layer_equals_the_loop(kind, dispatcher):
    expected, fused = layer(kind, LocalDispatcher(), "loop"), layer(kind, dispatcher(), "triton")
    for e, f in zip(run(expected), run(fused), strict=True):
        torch.testing.assert_close(f, e, rtol=2e-5, atol=2e-5)


def test_recomputed_in_the_backward_pass():
    plain, again = (layer(ExpertMlp, LocalDispatcher(), "triton").train() for _ in range(2))
    again.recompute = True
    for e, f in zip(run(plain), run(again), strict=True):
        assert torch.equal(e, f)


def test_what_is_kept_for_the_backward_pass():
    """The input, h and its activation, the index lists and the gates: no gathered input and no copies of the output."""
    made = layer(ExpertMlp, LocalDispatcher(), "triton")
    x_ND = torch.randn(14, 16, requires_grad=True)
    plan = made.dispatcher.plan(torch.randint(5, (14, 3)), 5)
    kept = set()
    gate = torch.rand(14, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(tuple(t.shape)) or t, lambda t: t):
        made._fused(x_ND, plan, gate)
    assert (14, 16) in kept and (42, 20) in kept and (42, 16) not in kept


def test_compiles_without_a_break():
    made = layer(ExpertMlp, LocalDispatcher(), "triton")
    x_BTD = torch.randn(2, 7, 16)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x_BTD)[0], made(x_BTD)[0], rtol=1e-5, atol=1e-5)
