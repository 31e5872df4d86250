"""The routing decision in one pass: gate product, softmax, top-k, and sums for the balance losses; and its gradient.

Shapes: `N` tokens, `G` router width, `E` experts, `K` top-k, `P` programs (blocks of tokens).

Sums over tokens are made for each block by its program and over blocks afterwards: no atomics, so they are repeatable.
The forward pass keeps the logits and their logsumexp (4 (E + 1) bytes a token) for the backward pass.
"""

import torch
import triton
import triton.language as tl

from megamf.kernels.launch import launch

# Tokens a program. The block of logits [tokens, experts] and the running product live in registers.
TOKENS = 64
OPTIONS = {"num_warps": 4}
# Below every logit that is a number: what a NaN logit counts as when experts are ranked, so that an expert is chosen.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _forward_kernel(
    h_ptr,
    a_ptr,
    expert_ptr,
    gate_ptr,
    logits_ptr,
    lse_ptr,
    prob_ptr,
    entropy_ptr,
    lse2_ptr,
    count_ptr,
    N,
    G: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Everything about one block of tokens. prob, entropy, lse2 and count are this block's sums."""
    block = tl.program_id(0)
    n = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    n_ok, e_ok = n < N, e < E

    logits = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float32)
    for first in range(0, G, BLOCK_G):
        g = first + tl.arange(0, BLOCK_G)
        h = tl.load(h_ptr + n[:, None] * G + g[None, :], mask=n_ok[:, None] & (g < G)[None, :], other=0.0)
        a = tl.load(a_ptr + e[None, :] * G + g[:, None], mask=e_ok[None, :] & (g < G)[:, None], other=0.0)
        if UPCAST:
            h, a = h.to(tl.float32), a.to(tl.float32)
        logits = tl.dot(h, a, logits, input_precision=PRECISION)

    masked = tl.where(e_ok[None, :], logits, float("-inf"))
    top = tl.max(masked, 1)
    exp = tl.exp(masked - top[:, None])
    total = tl.sum(exp, 1)
    lse = top + tl.log(total)
    # Dead tokens of the last block must not reach the sums.
    prob = tl.where(n_ok[:, None], exp / total[:, None], 0.0)
    log_prob = tl.where(e_ok[None, :], logits - lse[:, None], 0.0)
    live_lse = tl.where(n_ok, lse, 0.0)
    tl.store(logits_ptr + n[:, None] * E + e[None, :], logits, mask=n_ok[:, None] & e_ok[None, :])
    tl.store(lse_ptr + n, lse, mask=n_ok)
    tl.store(prob_ptr + block * E + e, tl.sum(prob, 0), mask=e_ok)
    tl.store(entropy_ptr + block, -tl.sum(tl.sum(prob * log_prob, 1), 0))
    tl.store(lse2_ptr + block, tl.sum(live_lse * live_lse, 0))

    rank = tl.where(logits == logits, tl.maximum(logits, LOWEST), LOWEST)
    rank = tl.where(e_ok[None, :], rank, float("-inf"))
    chosen = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float32)
    for k in tl.static_range(K):
        best = tl.argmax(rank, 1)
        here = e[None, :] == best[:, None]
        tl.store(expert_ptr + n * K + k, best.to(tl.int64), mask=n_ok)
        tl.store(gate_ptr + n * K + k, tl.sum(tl.where(here, prob, 0.0), 1), mask=n_ok)
        chosen += tl.where(here & n_ok[:, None], 1.0, 0.0)
        rank = tl.where(here, float("-inf"), rank)
    tl.store(count_ptr + block * E + e, tl.sum(chosen, 0), mask=e_ok)


@triton.jit
def _logits_kernel(
    logits_ptr,
    lse_ptr,
    expert_ptr,
    grad_gate_ptr,
    grad_prob_ptr,
    grad_entropy_ptr,
    grad_lse2_ptr,
    a_ptr,
    grad_logits_ptr,
    grad_h_ptr,
    N,
    G: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the logits and of h for one block of tokens."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    n_ok, e_ok = n < N, e < E
    both = n_ok[:, None] & e_ok[None, :]
    logits = tl.load(logits_ptr + n[:, None] * E + e[None, :], mask=both, other=0.0)
    lse = tl.load(lse_ptr + n, mask=n_ok, other=0.0)
    log_prob = tl.where(both, logits - lse[:, None], 0.0)
    prob = tl.where(both, tl.exp(log_prob), 0.0)

    grad = tl.load(grad_prob_ptr + e, mask=e_ok, other=0.0)[None, :] - tl.load(grad_entropy_ptr) * log_prob
    for k in tl.static_range(K):
        expert = tl.load(expert_ptr + n * K + k, mask=n_ok, other=0)
        grad_gate = tl.load(grad_gate_ptr + n * K + k, mask=n_ok, other=0.0)
        grad += tl.where(expert[:, None] == e[None, :], grad_gate[:, None], 0.0)
    grad = prob * (grad - tl.sum(prob * grad, 1)[:, None])
    grad += prob * (2.0 * tl.load(grad_lse2_ptr) * lse)[:, None]
    tl.store(grad_logits_ptr + n[:, None] * E + e[None, :], grad, mask=both)

    for first in range(0, G, BLOCK_G):
        g = first + tl.arange(0, BLOCK_G)
        a = tl.load(a_ptr + e[:, None] * G + g[None, :], mask=e_ok[:, None] & (g < G)[None, :], other=0.0)
        grad_h = tl.dot(grad, a.to(tl.float32), input_precision=PRECISION)
        grad_h_ptrs = grad_h_ptr + n[:, None] * G + g[None, :]
        tl.store(grad_h_ptrs, grad_h.to(grad_h_ptr.dtype.element_ty), mask=n_ok[:, None] & (g < G)[None, :])


@triton.jit
def _matrix_kernel(
    grad_logits_ptr,
    h_ptr,
    grad_a_ptr,
    N,
    tokens_a_part,
    G: tl.constexpr,
    E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_a of one part of the tokens, BLOCK_G columns of it: grad_logits^T h."""
    part = tl.program_id(1)
    g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    e = tl.arange(0, BLOCK_E)
    e_ok, g_ok = e < E, g < G
    begin = part.to(tl.int64) * tokens_a_part
    end = tl.minimum(begin + tokens_a_part, N)
    acc = tl.zeros((BLOCK_E, BLOCK_G), dtype=tl.float32)
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        n_ok = n < end
        grad = tl.load(grad_logits_ptr + n[None, :] * E + e[:, None], mask=e_ok[:, None] & n_ok[None, :], other=0.0)
        h = tl.load(h_ptr + n[:, None] * G + g[None, :], mask=n_ok[:, None] & g_ok[None, :], other=0.0)
        acc = tl.dot(grad, h.to(tl.float32), acc, input_precision=PRECISION)
    grad_a_ptrs = grad_a_ptr + part * E * G + e[:, None] * G + g[None, :]
    tl.store(grad_a_ptrs, acc, mask=e_ok[:, None] & g_ok[None, :])


def route_forward(h_NG: torch.Tensor, a_EG: torch.Tensor, top_k: int) -> tuple[torch.Tensor, ...]:
    """expert_NK int64; gate_NK, prob_E, entropy, logsumexp2, count_E, logits_NE, logsumexp_N float32. Contiguous in."""
    (N, G), E = h_NG.shape, a_EG.shape[0]
    P = triton.cdiv(N, TOKENS)

    def empty(*shape: int) -> torch.Tensor:
        return h_NG.new_empty(shape, dtype=torch.float32)

    expert_NK, gate_NK = h_NG.new_empty(N, top_k, dtype=torch.int64), empty(N, top_k)
    logits_NE, lse_N = empty(N, E), empty(N)
    sums = prob_PE, entropy_P, lse2_P, count_PE = empty(P, E), empty(P), empty(P), empty(P, E)
    if N:
        launch(
            _forward_kernel, (P,),
            h_NG, a_EG, expert_NK, gate_NK, logits_NE, lse_N, prob_PE, entropy_P, lse2_P, count_PE, N,
            G=G, E=E, K=top_k, **_blocks(G, E), PRECISION=precision(h_NG.dtype),
            UPCAST=triton.knobs.runtime.interpret, options=OPTIONS,
        )  # fmt: skip
    return expert_NK, gate_NK, *(part.sum(0) for part in sums), logits_NE, lse_N


def route_backward(
    grad_gate_NK: torch.Tensor,
    grad_prob_E: torch.Tensor,
    grad_entropy: torch.Tensor,
    grad_lse2: torch.Tensor,
    h_NG: torch.Tensor,
    a_EG: torch.Tensor,
    expert_NK: torch.Tensor,
    logits_NE: torch.Tensor,
    lse_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_h_NG, grad_a_EG) of the dtypes of h and a. All contiguous; gradients float32."""
    (N, G), E = h_NG.shape, a_EG.shape[0]
    grad_h_NG = torch.empty_like(h_NG)
    grad_logits_NE = torch.empty_like(logits_NE)
    blocks = _blocks(G, E)
    # Parts of the tokens, so that the few tiles of [E, G] fill a device; each adds up its own.
    parts = max(1, min(64, triton.cdiv(N, 4 * TOKENS)))
    grad_a_PEG = h_NG.new_empty(parts, E, G, dtype=torch.float32)
    # A gradient of the logits rounded to ten bits would be worse than the specification's: three products of halves.
    exact = "ieee" if h_NG.dtype == torch.float32 else "tf32x3"
    if N:
        launch(
            _logits_kernel, (triton.cdiv(N, TOKENS),),
            logits_NE, lse_N, expert_NK, grad_gate_NK, grad_prob_E, grad_entropy, grad_lse2, a_EG,
            grad_logits_NE, grad_h_NG, N, G=G, E=E, K=expert_NK.shape[1], **blocks, PRECISION=exact, options=OPTIONS,
        )  # fmt: skip
    launch(
        _matrix_kernel, (triton.cdiv(G, blocks["BLOCK_G"]), parts), grad_logits_NE, h_NG, grad_a_PEG, N,
        triton.cdiv(N, parts), G=G, E=E, **blocks, PRECISION=exact, options=OPTIONS,
    )  # fmt: skip
    return grad_h_NG, grad_a_PEG.sum(0).to(a_EG.dtype)


def _blocks(G: int, E: int) -> dict[str, int]:
    return {
        "BLOCK_N": TOKENS,
        "BLOCK_G": min(64, max(16, triton.next_power_of_2(G))),
        "BLOCK_E": max(16, triton.next_power_of_2(E)),
    }


def precision(dtype: torch.dtype) -> str:
    """float32 routers are multiplied exactly: rounded logits would reorder experts whose scores are close."""
    return "ieee" if dtype == torch.float32 else "tf32"
