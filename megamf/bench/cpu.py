"""The `cpu` suite: attention against softmax attention, its memory, the expert operations, and training throughput.

Shapes: B batch, H heads, T time, C head channels, N tokens, D width, F expert width, E experts, K top-k, R = N*K rows.
Everything is float32, and forward and backward together unless a name says otherwise.

Stick-breaking attention may stop early, where the stick is used up. On random inputs, and in a model that has not
learned yet, that is after some thirty keys, which would flatter every figure here. So the figures with limits visit
every key (`stop=0`), as the FLOPs count them; figures with `early_stop` in their name show the default beside them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from megamf.bench.memory import attention_memory_ratio
from megamf.bench.suite import Figure, Result, interleaved, machine
from megamf.config import ModelConfig, RunConfig
from megamf.config.run import Losses, Optim
from megamf.model import ModuleFormer, initialise
from megamf.model.losses import auxiliary_loss
from megamf.model.objective import Objective
from megamf.ops.grouped_linear import grouped_linear
from megamf.ops.permutation import permute, sort_by_expert, unpermute
from megamf.ops.stickbreaking import DEFAULT_STOP, stickbreaking_attention
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
    figures = [
        *attention(2, 4, 1024, 64, "", repeats, progress("attention, T 1024"), formula=True),
        *attention(1, 4, 4096, 64, "_t4096", max(3, repeats // 3), progress("attention, T 4096")),
        *expert_operations(repeats, progress("expert operations")),
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
    limit = 2.5 if not suffix else None
    figures.append(
        Figure(f"stickbreaking_vs_sdpa{suffix}", ratio, f"time over softmax attention, T {T}", at_most=limit)
    )
    return figures


def expert_operations(repeats: int, tick: Callable[[], None]) -> list[Figure]:
    """Permutation against copying as many bytes, ragged expert products against one dense product of as many FLOPs."""
    N, D, hidden, E, K = 4096, 512, 1024, 16, 2
    x_ND, gate_NK = torch.randn(N, D), torch.rand(N, K)
    expert_NK = torch.rand(N, E).topk(K).indices
    order_R, inverse_R, count_E = sort_by_expert(expert_NK, E)
    y_RD, copy_RD = torch.randn(N * K, D), torch.empty(N * K, D)
    rows_RD, w_EDF = torch.randn(N * K, D, requires_grad=True), torch.randn(E, D, hidden, requires_grad=True)
    w_DF, grad_RF = torch.randn(D, hidden, requires_grad=True), torch.randn(N * K, hidden)
    median = interleaved(
        {
            "copy": lambda: copy_RD.copy_(y_RD),
            "permute": lambda: permute(x_ND, order_R, inverse_R, K),
            "unpermute": lambda: unpermute(y_RD, order_R, inverse_R, gate_NK),
            "experts": lambda: torch.autograd.grad(grouped_linear(rows_RD, w_EDF, count_E), (rows_RD, w_EDF), grad_RF),
            "dense": lambda: torch.autograd.grad(rows_RD @ w_DF, (rows_RD, w_DF), grad_RF),
        },
        repeats=repeats,
        progress=tick,
    )
    size = f"{N * K} rows of {D}"
    return [
        Figure("permute_vs_copy", median["permute"] / median["copy"], f"forward, time over copying {size}"),
        Figure("unpermute_vs_copy", median["unpermute"] / median["copy"], f"forward, time over copying {size}"),
        Figure(
            "experts_vs_dense",
            median["experts"] / median["dense"],
            f"{N * K} rows through {E} experts {D}x{hidden}, time over one dense product of as many FLOPs",
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
        Figure("train_mfu", model / gemm, f"its model FLOP/s over the matrix-product rate; {size}", at_least=0.30),
    ]


def training_step(model_config: ModelConfig, B: int, T: int) -> Callable[[], object]:
    """One whole update on random tokens, as a function without arguments."""
    config = RunConfig(model=model_config, losses=Losses(balance="mi"), optim=Optim())
    model = ModuleFormer(model_config)
    initialise(model, model_config, seed=0)
    objective = Objective(model, config.train.loss_chunk)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, fused=True)
    token_BT = torch.randint(model_config.vocab_size, (B, T + 1))
    input_BT, label_BT = token_BT[:, :-1].contiguous(), token_BT[:, 1:].contiguous()

    def step() -> None:
        loss_sum, sums = objective(input_BT, label_BT, None)
        (loss_sum / (B * T) + auxiliary_loss(sums, sums, config.losses)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@contextmanager
def every_key() -> Iterator[None]:
    """Within it, no attention that leaves `stop` to the default stops early."""
    usual = dict(DEFAULT_STOP)
    DEFAULT_STOP.update(dict.fromkeys(usual, 0.0))
    try:
        yield
    finally:
        DEFAULT_STOP.update(usual)


def memory(tick: Callable[[], None]) -> list[Figure]:
    """Peak extra memory of attention at T 8192, where the scores alone would be 64 times the inputs."""
    ratio = attention_memory_ratio(1, 4, 8192, 64)
    tick()
    meaning = "peak extra memory over inputs and output together, batch 1, 4 heads, T 8192, C 64"
    return [Figure("stickbreaking_memory_ratio", ratio, meaning, at_most=10.0)]
