"""The `gpu` suite: the kernels on one CUDA device, beside what one would use instead.

Shapes: B batch, H heads, T time, C head channels, N tokens, D width, F expert width, E experts, K top-k, R = N*K rows.
bfloat16, forward and backward together unless a name says otherwise; medians over turns in which the sides of a
comparison alternate. As in the `cpu` suite, stick-breaking attention visits every key (`stop=0`) where a figure has a
limit, but for `short_sticks`, whose sticks last as long as in a trained model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megamf.bench import sonicmoe
from megamf.bench.device import device_seconds, gpu_machine
from megamf.bench.sticks import sticks
from megamf.bench.suite import Figure, Result, interleaved, wall_seconds
from megamf.bench.training import every_key, training_step
from megamf.config import ModelConfig, load_config
from megamf.errors import UserError
from megamf.model.backends import Backends
from megamf.model.dispatch import Dispatcher, LocalDispatcher, Plan
from megamf.model.mlp import ExpertMlp
from megamf.ops.backend import package_problem
from megamf.ops.permutation import naive, permute, sort_by_expert, unpermute
from megamf.ops.stickbreaking import stickbreaking_attention
from megamf.plan import count_parameters, peak_flops, train_flops_per_token

PRESET = "molm-350m-4b"
LOCAL = LocalDispatcher()
BYTES_PER_PARAMETER = 2 + 2 + 4 + 4 + 8  # weights, gradients, both again in float32, Adam's moments


@dataclass(frozen=True)
class Place:
    """Where and how to measure; the suite's own is a CUDA device in bfloat16."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    clock: Callable[[Callable[[], object]], float] = wall_seconds
    repeats: int = 15

    def randn(self, *shape: int, grad: bool = False) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype, requires_grad=grad)

    def medians(self, cases: dict[str, Callable[[], object]], tick: Callable[[], None]) -> dict[str, float]:
        """Median seconds of each case, by turns."""
        return interleaved(cases, repeats=self.repeats, warmup=3, progress=tick, clock=self.clock)


def run(progress: Callable[[str], Callable[[], None]], *, repeats: int = 15) -> Result:
    """Measure everything. Raises UserError without a CUDA device. `progress` as in the `cpu` suite."""
    if not torch.cuda.is_available():
        raise UserError(
            f"the suite gpu needs a CUDA device; torch {torch.__version__} sees none here. The suite cpu runs anywhere"
        )
    place = Place(clock=device_seconds("cuda"), repeats=repeats)
    torch.manual_seed(0)
    where = gpu_machine()
    figures: list[Figure] = []
    for C in (64, 128):
        figures += attention(place, 4, 12, 4096, C, progress(f"attention, C {C}"))
        figures += short_sticks(place, 1, 12, 16384, C, 64, progress(f"short sticks, C {C}"))
    figures += large_heads(place, 16, 2, 1024, 1024, progress("attention, C 1024"))
    figures += permutation(place, 32768, 1024, 32, 2, progress("permutation"))
    figures += expert_layer(place, load_config(preset=PRESET).model, 32, 1024, progress("expert layer"))
    figures += training(place, 8, 1024, progress("training"))
    return Result("gpu", figures, where)


def attention(place: Place, B: int, H: int, T: int, C: int, tick: Callable[[], None]) -> list[Figure]:
    """Stick-breaking, every key, against causal softmax attention (on a GPU: flash)."""
    q, k, v = (place.randn(B, H, T, C, grad=True) for _ in range(3))
    median = versus_softmax(place, q, k, v, 0.0, tick)
    shape = f"batch {B}, {H} heads, T {T}, C {C}"
    return [
        Figure(f"stickbreaking_c{C}_ms", 1e3 * median["ours"], f"stick-breaking attention, every key, {shape}"),
        Figure(f"flash_c{C}_ms", 1e3 * median["softmax"], f"causal softmax attention (torch, flash), {shape}"),
        Figure(
            f"stickbreaking_vs_flash_c{C}",
            median["softmax"] / median["ours"],
            f"throughput over softmax attention, {shape}",
            at_least=0.6,
        ),
    ]


def short_sticks(place: Place, B: int, H: int, T: int, C: int, tokens: int, tick: Callable[[], None]) -> list[Figure]:
    """The same where a stick lasts `tokens` keys on average, stopping by default."""
    q, k, v = sticks(B, H, T, C, tokens, device=place.device, dtype=place.dtype)
    median = versus_softmax(place, q, k, v, None, tick)
    shape = f"batch {B}, {H} heads, T {T}, C {C}, a stick lasts {tokens} keys"
    return [
        Figure(
            f"short_sticks_vs_flash_c{C}",
            median["softmax"] / median["ours"],
            f"throughput over softmax attention, stopping by default, {shape}",
            at_least=1.5,
        )
    ]


def versus_softmax(
    place: Place, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, stop: float | None, tick: Callable[[], None]
) -> dict[str, float]:
    """Seconds of stick-breaking attention and of torch's flash attention on the same tensors."""
    grad = torch.randn_like(q)

    def softmax() -> object:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), grad)

    def ours() -> object:
        return torch.autograd.grad(stickbreaking_attention(q, k, v, stop=stop), (q, k, v), grad)

    return place.medians({"ours": ours, "softmax": softmax}, tick)


def large_heads(place: Place, B: int, H: int, T: int, C: int, tick: Callable[[], None]) -> list[Figure]:
    """The released models' attention (K = V, one head, H queries a token) against its two matrix products alone.

    Forward and backward on both sides: torch's gradients of logits = q K^T and o = weights V are two products each.
    """
    q, grad, kv = place.randn(B, H, T, C, grad=True), place.randn(B, H, T, C), place.randn(B, 1, T, C, grad=True)
    q_BMC, kv_BTC, weights_BMT = (place.randn(B, *size, grad=True) for size in ((H * T, C), (T, C), (H * T, T)))
    grad_BMC, grad_BMT = grad.view(B, H * T, C), place.randn(B, H * T, T)

    def products() -> None:
        logits_BMT, o_BMC = q_BMC @ kv_BTC.mT, weights_BMT @ kv_BTC
        torch.autograd.grad((logits_BMT, o_BMC), (q_BMC, kv_BTC, weights_BMT), (grad_BMT, grad_BMC))

    def ours() -> object:
        return torch.autograd.grad(stickbreaking_attention(q, kv, kv, stop=0.0), (q, kv), grad)

    median = place.medians({"ours": ours, "products": products}, tick)
    shape = f"batch {B}, C {C}, K = V, {H} queries a token, T {T}"
    return [
        Figure(f"stickbreaking_c{C}_ms", 1e3 * median["ours"], f"stick-breaking attention, every key, {shape}"),
        Figure(f"gemms_c{C}_ms", 1e3 * median["products"], f"its two matrix products and their gradients, {shape}"),
        Figure(
            f"stickbreaking_vs_gemm_c{C}",
            median["products"] / median["ours"],
            f"throughput over the two square matrix products alone, forward and backward, {shape}",
            at_least=0.6,
        ),
    ]


def permutation(place: Place, N: int, D: int, E: int, K: int, tick: Callable[[], None]) -> list[Figure]:
    """Share of the memory-copy bandwidth, as `permutation` of the `cpu` suite defines it.

    All results go to memory that torch already holds: its allocator on a GPU keeps what it once had.
    """
    x_ND, y_RD = place.randn(N, D), place.randn(N * K, D)
    source_MD = place.randn((K + 1) * N // 2, D)
    gate_NK = torch.rand(N, K, device=place.device)
    expert_NK = torch.rand(N, E, device=place.device).topk(K).indices
    order_R, inverse_R, _ = sort_by_expert(expert_NK, E)
    median = place.medians(
        {
            "copy": lambda: source_MD.clone(),
            "permute": lambda: permute(x_ND, order_R, inverse_R, K),
            "unpermute": lambda: unpermute(y_RD, order_R, inverse_R, gate_NK),
            "sort": lambda: sort_by_expert(expert_NK, E),
        },
        tick,
    )
    meaning = f"forward, bytes read and written a second over those of a plain copy; {N} tokens of {D}, top-{K}"
    return [
        *(Figure(f"{n}_vs_copy", median["copy"] / median[n], meaning, at_least=0.8) for n in ("permute", "unpermute")),
        Figure("sort_ms", 1e3 * median["sort"], f"sorting {N * K} choices of {E} experts"),
    ]


def expert_layer(
    place: Place,
    config: ModelConfig,
    B: int,
    T: int,
    tick: Callable[[], None],
    names: tuple[str, ...] = ("auto", "torch", "triton", "megablocks"),
) -> list[Figure]:
    """The whole sparse feed-forward layer, router included, by every back end that is installed, against a dense one
    of the same FLOPs, against plain torch around its grouped GEMM, and against SonicMoE."""
    D, hidden, K = config.n_embd, config.ffd_hidden, config.k_mlp
    x_BTD, grad_BTD = place.randn(B, T, D, grad=True), place.randn(B, T, D)
    w1, w2 = place.randn(D, K * hidden, grad=True), place.randn(K * hidden, D, grad=True)
    size = f"{B * T} tokens, {config.n_mlp_experts} experts {D}-{hidden}-{D}, top-{K}"
    cases: dict[str, Callable[[], object]] = {
        "dense": lambda: torch.autograd.grad(F.gelu(x_BTD @ w1, approximate="tanh") @ w2, (x_BTD, w1, w2), grad_BTD),
        "grouped_gemm": partial(both_ways, make_layer(place, config, "torch", PlainDispatcher()), x_BTD, grad_BTD),
    }
    meaning = {
        "dense": f"a dense layer of the same FLOPs, {size}",
        "grouped_gemm": f"torch's argsort and indexing around torch's grouped GEMM, {size}",
    }
    missing: dict[str, str] = {}
    for name in names:
        meaning[name] = f"expert layer with its router, experts.backend {name}, {size}"
        missing[name] = package_problem(name)
        if not missing[name]:
            cases[name] = partial(both_ways, make_layer(place, config, name), x_BTD, grad_BTD)
    meaning["sonicmoe"] = f"the layer of the package sonic-moe, {sonicmoe.WIDTH_RULE}, {size}"
    sonic, missing["sonicmoe"] = sonicmoe.layer(config, place.device, place.dtype, x_BTD)
    if sonic is not None:
        cases["sonicmoe"] = partial(both_ways, sonic, x_BTD, grad_BTD)
    median = place.medians(cases, tick)
    ours = min(median[name] for name in ("auto", "torch", "triton") if name in median)
    figures = [
        Figure(f"expert_layer_{name}_ms", 1e3 * median[name], meaning[name])
        if name in median
        else Figure(f"expert_layer_{name}_ms", None, f"{meaning[name]}: {missing[name]}")
        for name in meaning
    ]
    return [
        *figures,
        Figure("experts_vs_dense", median["dense"] / ours, "our fastest over the dense layer", at_least=0.7),
        Figure(
            "experts_vs_grouped_gemm",
            median["grouped_gemm"] / median["auto"],
            "throughput of the automatic choice over plain permutation and torch's grouped GEMM",
            at_least=1.0,
        ),
    ]


class PlainDispatcher(LocalDispatcher):
    """Rows to their experts and back as plain torch does it, without kernels of ours."""

    def plan(self, expert_NK: torch.Tensor, num_experts: int) -> Plan:
        return Plan(*naive.sort_by_expert(expert_NK, num_experts), expert_NK.shape[1])

    def dispatch(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        return naive.permute(x, plan.order_R, plan.top_k)

    def combine(self, y_RD: torch.Tensor, plan: Plan, gate_NK: torch.Tensor | None) -> torch.Tensor:
        assert gate_NK is not None, "an MLP layer always has gates"
        return naive.unpermute(y_RD, plan.inverse_R, gate_NK)


def make_layer(place: Place, config: ModelConfig, backend: str, dispatcher: Dispatcher = LOCAL) -> ExpertMlp:
    """A sparse feed-forward layer with normal weights."""
    with torch.device(place.device):
        layer = ExpertMlp(config, dispatcher, Backends(experts=backend))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer.to(place.dtype)


def both_ways(layer: torch.nn.Module, x_BTD: torch.Tensor, grad_BTD: torch.Tensor) -> object:
    """Output of the layer and all gradients."""
    y_BTD, _ = layer(x_BTD)
    return torch.autograd.grad(y_BTD, (x_BTD, *layer.parameters()), grad_BTD)


def training(place: Place, B: int, T: int, tick: Callable[[], None]) -> list[Figure]:
    """A training step of the preset, of as many layers as fit in 70% of the free memory."""
    config = load_config(preset=PRESET).model
    free, _ = torch.cuda.mem_get_info()
    config = shrink(config, 0.7 * free)
    return step_figures(place, config, B, T, tick)


def shrink(config: ModelConfig, memory: float) -> ModelConfig:
    """The same model with as many layers as weights and optimizer state allow in `memory` bytes; UserError for none.

    The rest is for activations.
    """
    for layers in range(config.n_layer, 0, -1):
        fewer = config.model_copy(update={"n_layer": layers})
        if count_parameters(fewer).total * BYTES_PER_PARAMETER <= memory:
            return fewer
    raise UserError(f"one layer of {PRESET} needs more than the {memory / 2**30:.1f} GiB that are free for weights")


def step_figures(place: Place, config: ModelConfig, B: int, T: int, tick: Callable[[], None]) -> list[Figure]:
    """Tokens a second and MFU of a training step in mixed precision."""
    step = training_step(config, B, T, device=place.device, dtype=place.dtype, recompute=True)
    with every_key():
        seconds = place.medians({"step": step}, tick)["step"]
    peak = peak_flops(torch.device(place.device), place.dtype)
    size = f"{PRESET} of {config.n_layer} layers, batch {B}, T {T}, every key visited"
    return [
        Figure("train_tokens_per_second", B * T / seconds, f"training {size}"),
        Figure(
            "train_mfu",
            train_flops_per_token(config, T) * B * T / seconds / peak,
            f"its model FLOP/s (active parameters and attention) over {peak / 1e12:.0f} TFLOP/s",
            at_least=0.35,
        ),
    ]
