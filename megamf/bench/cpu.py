"""The `cpu` suite: attention against softmax attention and matrix products, the expert operations, training throughput.

Shapes: B batch, H heads, T time, C head channels, N tokens, D width, F expert width, E experts, K top-k, R = N*K rows.
Everything is float32, and forward and backward together unless a name says otherwise. The two sides of every
comparison take turns in one run.

Stick-breaking attention may stop early, where the stick is used up. On random inputs, and in a model that has not
learned yet, that is after some thirty keys, which would flatter every figure here. So the figures with limits visit
every key (`stop=0`), as the FLOPs count them; figures with `early_stop` in their name show the default beside them,
and `exhaustion_speedup` measures what stopping gains where a stick lasts as long as in a trained model.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megamf.bench.memory import attention_memory_ratio
from megamf.bench.sticks import sticks
from megamf.bench.suite import Figure, Result, interleaved, machine
from megamf.bench.training import every_key, training_step
from megamf.config import ModelConfig
from megamf.ops.grouped_linear import grouped_linear
from megamf.ops.permutation import permute, sort_by_expert, unpermute
from megamf.ops.permutation.into import permute_into, unpermute_into
from megamf.ops.stickbreaking import stickbreaking_attention
from megamf.plan import train_flops_per_token

GEMM_SIZE, GEMM_BURST = 1024, 8
TRAINED = ModelConfig(
    vocab_size=4096, n_layer=4, n_embd=256, n_head=1, att_hidden=256, ffd_hidden=512, n_att_experts=4, n_mlp_experts=8,
    k_att=2, k_mlp=2, gating_size=64,
)  # fmt: skip
TRAINED_B, TRAINED_T = 2, 1024


def run(progress: Callable[[str], Callable[[], None]], *, repeats: int = 15) -> Result:
    """Measure everything. `progress(what)` returns a function that is called after every turn of `what`."""
    where = machine()
    torch.manual_seed(0)
    few = max(3, repeats // 3)
    figures = [
        *attention(2, 4, 1024, 64, "", repeats, progress("attention, T 1024"), formula=True),
        *attention(1, 4, 4096, 64, "_t4096", few, progress("attention, T 4096")),
        *large_heads(1024, 1024, 2, few, progress("attention, C 1024")),
        *exhaustion(1, 2, 16384, 64, 64, few, progress("exhaustion, T 16384")),
        *permutation(16384, 512, 16, 2, 2 * repeats, progress("permutation")),
        *experts(4096, 512, 1024, 16, 2, repeats, progress("experts")),
        *training(max(3, repeats // 2), progress("training")),
        *memory(progress("memory, T 8192")),
    ]
    return Result("cpu", figures, where)


def attention(
    B: int, H: int, T: int, C: int, suffix: str, repeats: int, tick: Callable[[], None], *, formula: bool = False
) -> list[Figure]:
    """Stick-breaking against causal softmax attention; with `formula` also the plain-torch specification."""
    q, k, v, grad = (torch.randn(B, H, T, C, requires_grad=i < 3) for i in range(4))

    def both_ways(attend: Callable[..., torch.Tensor], **options: object) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(q, k, v, **options), (q, k, v), grad)

    cases = {
        "stickbreaking": both_ways(stickbreaking_attention, stop=0.0),
        "sdpa": both_ways(F.scaled_dot_product_attention, is_causal=True),
        "stickbreaking_early_stop": both_ways(stickbreaking_attention),
    }
    if formula:
        cases["naive"] = both_ways(stickbreaking_attention, backend="naive")
    median = interleaved(cases, repeats=repeats, progress=tick)
    shape = f"batch {B}, {H} heads, T {T}, C {C}"
    names = {
        "stickbreaking": f"stick-breaking attention, every key visited, {shape}",
        "stickbreaking_early_stop": f"the same on standard normal inputs, stopping where the stick is used up, {shape}",
        "sdpa": f"causal softmax attention (torch), {shape}",
        "naive": f"stick-breaking attention by the plain-torch formula, {shape}",
    }
    figures = [Figure(f"{case}{suffix}_ms", 1e3 * median[case], names[case]) for case in cases]
    ratio = median["stickbreaking"] / median["sdpa"]
    figures.append(Figure(f"stickbreaking_vs_sdpa{suffix}", ratio, f"time over softmax attention, T {T}", at_most=1.3))
    return figures


def large_heads(T: int, C: int, H: int, repeats: int, tick: Callable[[], None]) -> list[Figure]:
    """The released models' attention (K = V, one head, H queries a token) against its matrix products as if T x T."""
    q, grad = torch.randn(1, H, T, C, requires_grad=True), torch.randn(1, H, T, C)
    kv = torch.randn(1, 1, T, C, requires_grad=True)
    q_MC, k_TC, grad_MC = q.detach().view(H * T, C), kv.detach().view(T, C), grad.view(H * T, C)
    weights_MT = torch.randn(H * T, T)

    def products() -> None:
        q_MC @ k_TC.t()  # logits
        weights_MT @ k_TC  # output
        q_MC @ k_TC.t()  # logits again, as they are not kept
        grad_MC @ k_TC.t()  # gradient of the weights
        weights_MT @ k_TC  # of q
        weights_MT.t() @ q_MC  # of k
        weights_MT.t() @ grad_MC  # of v

    median = interleaved(
        {
            "attention": lambda: torch.autograd.grad(stickbreaking_attention(q, kv, kv, stop=0.0), (q, kv), grad),
            "products": products,
        },
        repeats=repeats,
        progress=tick,
    )
    shape = f"C {C}, K = V, {H} queries a token, T {T}"
    return [
        Figure("stickbreaking_c1024_ms", 1e3 * median["attention"], f"stick-breaking attention, every key, {shape}"),
        Figure("gemms_c1024_ms", 1e3 * median["products"], f"its 2 + 5 matrix products, square: all {T} x {T} pairs"),
        Figure(
            "stickbreaking_vs_gemm",
            median["attention"] / median["products"],
            f"time over the square products; causality needs half of them; {shape}",
            at_most=0.8,
        ),
    ]


def exhaustion(B: int, H: int, T: int, C: int, tokens: int, repeats: int, tick: Callable[[], None]) -> list[Figure]:
    """What stopping where the stick is used up gains, and what it changes, where a stick lasts `tokens` keys."""
    q, k, v = sticks(B, H, T, C, tokens)
    grad = torch.randn(B, H, T, C)

    def attend(stop: float | None) -> tuple[torch.Tensor, ...]:
        o = stickbreaking_attention(q, k, v, stop=stop)
        return o.detach(), *torch.autograd.grad(o, (q, k, v), grad)

    median = interleaved(
        {"every": lambda: attend(0.0), "stopping": lambda: attend(None)}, repeats=repeats, warmup=1, progress=tick
    )
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(attend(None), attend(0.0), strict=True)]
    shape = f"batch {B}, {H} heads, T {T}, C {C}, a stick lasts {tokens} keys"
    return [
        Figure(
            "exhaustion_speedup",
            median["every"] / median["stopping"],
            f"time of visiting every key over that of stopping by default; {shape}",
            at_least=6.0,
        ),
        Figure(
            "exhaustion_error",
            max(errors),
            "largest relative change by stopping, of the output and the gradients of q, k and v",
            at_most=1e-6,
        ),
    ]


def permutation(N: int, D: int, E: int, K: int, repeats: int, tick: Callable[[], None]) -> list[Figure]:
    """Share of the memory-copy bandwidth: the time of a copy that moves as many bytes, over that of the operation.

    Both move (K + 1) N rows: `permute` reads N and writes K N, `unpermute` reads K N and writes N, a copy of
    (K + 1) N / 2 rows reads and writes those. All sides write into memory that the process already has (`copy_`,
    `permute_into`, `unpermute_into`). The figures with `fresh` in their name are the functions as a model calls them,
    beside `clone` of as much as they return: there most of the time is the operating system's, which hands out every
    page.
    The suite's size is several times the caches: within them a copy is no measure of the memory.
    """
    x_ND, gate_NK, y_RD = torch.randn(N, D), torch.rand(N, K), torch.randn(N * K, D)
    order_R, inverse_R, _ = sort_by_expert(torch.rand(N, E).topk(K).indices, E)
    out_RD, out_ND = torch.ones(N * K, D), torch.ones(N, D)
    source_MD, copy_MD = torch.randn((K + 1) * N // 2, D), torch.ones((K + 1) * N // 2, D)
    median = interleaved(
        {
            "copy": lambda: copy_MD.copy_(source_MD),
            "permute": lambda: permute_into(x_ND, order_R, inverse_R, K, out_RD),
            "unpermute": lambda: unpermute_into(y_RD, order_R, inverse_R, gate_NK, K, out_ND),
            "clone_permute": lambda: out_RD.clone(),
            "fresh_permute": lambda: permute(x_ND, order_R, inverse_R, K),
            "clone_unpermute": lambda: out_ND.clone(),
            "fresh_unpermute": lambda: unpermute(y_RD, order_R, inverse_R, gate_NK),
        },
        repeats=repeats,
        progress=tick,
    )
    size = f"forward, {N} tokens of {D}, top-{K}"
    strict = f"bytes read and written a second over those of a plain copy, into memory that is there; {size}"
    fresh = f"throughput over `clone` of as much as it returns, both into fresh memory; {size}"
    return [
        *(Figure(f"{n}_vs_copy", median["copy"] / median[n], strict, at_least=0.6) for n in ("permute", "unpermute")),
        *(
            Figure(f"{n}_fresh_vs_clone", median[f"clone_{n}"] / median[f"fresh_{n}"], fresh)
            for n in ("permute", "unpermute")
        ),
    ]


def experts(N: int, D: int, hidden: int, E: int, K: int, repeats: int, tick: Callable[[], None]) -> list[Figure]:
    """Sort, permute, two expert products and unpermute, against two dense products of as many FLOPs."""
    R = N * K
    x_ND, gate_NK = torch.randn(N, D, requires_grad=True), torch.rand(N, K, requires_grad=True)
    expert_NK = torch.rand(N, E).topk(K).indices
    w1_EDF, w2_EFD = torch.randn(E, D, hidden, requires_grad=True), torch.randn(E, hidden, D, requires_grad=True)
    x_RD, w1_DF, w2_FD = (torch.randn(size, requires_grad=True) for size in ((R, D), (D, hidden), (hidden, D)))
    grad_ND, grad_RD = torch.randn(N, D), torch.randn(R, D)

    def routed() -> object:
        order_R, inverse_R, count_E = sort_by_expert(expert_NK, E)
        h_RF = grouped_linear(permute(x_ND, order_R, inverse_R, K), w1_EDF, count_E)
        y_ND = unpermute(grouped_linear(h_RF, w2_EFD, count_E), order_R, inverse_R, gate_NK)
        return torch.autograd.grad(y_ND, (x_ND, gate_NK, w1_EDF, w2_EFD), grad_ND)

    def dense() -> object:
        return torch.autograd.grad(x_RD @ w1_DF @ w2_FD, (x_RD, w1_DF, w2_FD), grad_RD)

    median = interleaved({"experts": routed, "dense": dense}, repeats=repeats, progress=tick)
    size = f"{R} rows {D}-{hidden}-{D}"
    return [
        Figure("experts_ms", 1e3 * median["experts"], f"permute, {E} experts and unpermute, {size}"),
        Figure("dense_ms", 1e3 * median["dense"], f"two dense products of as many FLOPs, {size}"),
        Figure(
            "experts_vs_dense",
            median["dense"] / median["experts"],
            "throughput of the experts over that of the dense products",
            at_least=0.75,
        ),
    ]


def training(repeats: int, tick: Callable[[], None]) -> list[Figure]:
    """Forward, backward and AdamW of a small ModuleFormer, against matrix products timed in turns with it."""
    step = training_step(TRAINED, TRAINED_B, TRAINED_T)
    a_NN, b_NN = torch.randn(GEMM_SIZE, GEMM_SIZE), torch.randn(GEMM_SIZE, GEMM_SIZE)

    def products() -> None:
        for _ in range(GEMM_BURST):
            torch.mm(a_NN, b_NN)

    def full_step() -> None:
        with every_key():
            step()

    cases = {"gemm": products, "step": full_step, "early_stop": step}
    median = interleaved(cases, repeats=repeats, progress=tick)
    gemm = GEMM_BURST * 2 * GEMM_SIZE**3 / median["gemm"]
    tokens = TRAINED_B * TRAINED_T / median["step"]
    model = train_flops_per_token(TRAINED, TRAINED_T) * tokens
    size = f"width {TRAINED.n_embd}, {TRAINED.n_layer} layers, T {TRAINED_T}, batch {TRAINED_B}"
    return [
        Figure("gemm_gflops", gemm / 1e9, f"GFLOP/s of {GEMM_SIZE}x{GEMM_SIZE} matrix products"),
        Figure("train_tokens_per_second", tokens, f"training a ModuleFormer of {size}, every key visited"),
        Figure(
            "train_early_stop_tokens_per_second",
            TRAINED_B * TRAINED_T / median["early_stop"],
            "the same, untrained, stopping where the stick is used up",
        ),
        Figure("train_mfu", model / gemm, f"its model FLOP/s over the matrix-product rate; {size}", at_least=0.45),
    ]


def memory(tick: Callable[[], None]) -> list[Figure]:
    """Peak extra memory of attention at T 8192, where the scores alone would be 64 times the inputs."""
    ratio = attention_memory_ratio(1, 4, 8192, 64)
    tick()
    meaning = "peak extra memory over inputs and output together, batch 1, 4 heads, T 8192, C 64"
    return [Figure("stickbreaking_memory_ratio", ratio, meaning, at_most=10.0)]
