"""What the stick-breaking attention kernels share: one tile of logits, and the rows and keys it stands for.

Shapes: `B` batch, `T` query time, `S` key time, `H` = K*G query heads, `G` key/value heads, `K` query heads that share
one, `C` channels, `R` = T*K rows of queries (row r is time r // K, sharer r % K), `M` rows and `N` keys of a tile.

Operands hold zeros where nobody looks (keys that no query sees, queries that see no key), so that no NaN is multiplied.

Everything is in base 2: with x = log2(e) * logit, log2(1 - z) = -softplus2(x) and log2(z) = x - softplus2(x), where
softplus2(x) = log2(1 + 2^x). One exponential and a polynomial yield both; the weight takes a second exponential.
The softplus of the newer keys of a tile is summed by a product with a triangle of ones, on the tensor cores.

The log of the stick is carried as an unevaluated sum of two float32: the backward pass walks up from the oldest key
with the sums of the forward pass in reverse, and arrives at the newest key with a whole stick again.
"""

import triton
import triton.language as tl

# Arguments that change from call to call: no variant of a kernel is made for their values.
LENGTHS = ("T", "S", "shift", "tile0", "tile1", "num_reaches", "tiles_per_split")


@triton.jit
def log2_of_one_plus(u, ACCURATE: tl.constexpr):
    """log2(1 + u) for 0 <= u <= 1, relative error 2e-7 (ACCURATE) or 1e-5, also for the tiniest u.

    Least-maximum polynomials. The hardware's logarithm is off by 2e-7 in absolute terms near 1: thousands of small
    shares would drift.
    """
    if ACCURATE:
        p = 0.007549172732979059 * u - 0.04256702587008476
        p = p * u + 0.11285613477230072
        p = p * u - 0.19711892306804657
        p = p * u + 0.27564138174057007
        p = p * u - 0.35840848088264465
        p = p * u + 0.48069295287132263
        p = p * u - 0.7213401794433594
        p = p * u + 1.4426950216293335
    else:
        p = -0.03443586826324463 * u + 0.14603279531002045
        p = p * u - 0.3030361235141754
        p = p * u + 0.46917402744293213
        p = p * u - 0.7204261422157288
        p = p * u + 1.4426828622817993
    return p * u


@triton.jit
def product(a, b, WIDE: tl.constexpr):
    """a @ b in float32: 16-bit operands directly, float32 ones (WIDE) as three products of tf32."""
    if WIDE:
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        return tl.dot(a, b)


@triton.jit
def triangles(N: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr):
    """Ones that sum a tile's newer columns (a_MN @ newer) and its older ones."""
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    newer, older = tl.where(row > column, 1.0, 0.0), tl.where(row < column, 1.0, 0.0)
    if HALF:
        newer = newer.to(tl.float16)
    if not WIDE:
        older = older.to(tl.bfloat16)
    return newer, older


@triton.jit
def newer_cost(cost, newer, HALF: tl.constexpr):
    """Sum over the newer keys of the tile of -log2(1 - z).

    HALF: the terms are taken as float16. A sum of s is off by at most s * 2^-12, where the weight it scales is below
    2^-s.
    """
    if HALF:
        return tl.dot(tl.minimum(cost, 30000.0).to(tl.float16), newer)
    else:
        return product(cost, newer, True)


@triton.jit
def add_exactly(high, low, term):
    """(high, low) + term, the rounding error of the large sum kept in the small one."""
    total = high + term
    back = total - high
    return total, low + ((high - (total - back)) + (term - back))


@triton.jit
def query_rows(tile, start_ptr, b, T, S, shift, K, HAS_START: tl.constexpr, M: tl.constexpr):
    """row, time, whether the row is a query that sees a key, and the first and last key it sees."""
    row = tile * M + tl.arange(0, M)
    t = row // K
    seeing = row < T * K
    last = tl.minimum(t + shift, S - 1)
    if HAS_START:
        first = tl.load(start_ptr + b.to(tl.int64) * T + t, mask=seeing, other=0)
    else:
        first = tl.zeros([M], tl.int32)
    return row, t, seeing & (first <= last), first, last


@triton.jit
def key_range(seeing, first, last, S, N: tl.constexpr):
    """Tiles of keys the rows see: from `bottom` to before `end`; those before `edge` are not behind any row."""
    end = (tl.max(tl.where(seeing, last, -1), 0) + N) // N
    bottom = tl.min(tl.where(seeing, first, S), 0) // N
    edge = (tl.min(tl.where(seeing, last, S), 0) + 1) // N
    return bottom, tl.minimum(tl.maximum(edge, bottom), end), end


@triton.jit
def load_queries(
    x_ptr, row, t, g, T, stride_h, stride_t, G, K, C: tl.constexpr, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr
):
    """Rows [M, BLOCK_C] of a [B, H, T, C] tensor at its batch; zeros behind the last query."""
    c = tl.arange(0, BLOCK_C)
    offset = (row % K * G + g).to(tl.int64) * stride_h + t.to(tl.int64) * stride_t
    mask = (row < T * K)[:, None] if C == BLOCK_C else (row < T * K)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + offset[:, None] + c[None, :], mask=mask, other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def store_queries(x_ptr, x, row, t, g, stored, stride_h, stride_t, G, K, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The reverse of `load_queries`."""
    c = tl.arange(0, BLOCK_C)
    offset = (row % K * G + g).to(tl.int64) * stride_h + t.to(tl.int64) * stride_t
    mask = stored[:, None] & (c < C)[None, :]
    tl.store(x_ptr + offset[:, None] + c[None, :], x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_keys(
    x_ptr, key, S, stride_s, C: tl.constexpr, BLOCK_C: tl.constexpr, CHECK: tl.constexpr, UPCAST: tl.constexpr
):
    """Rows [N, BLOCK_C] of keys or values; CHECK: zeros behind the last key."""
    c = tl.arange(0, BLOCK_C)
    at = x_ptr + (key.to(tl.int64) * stride_s)[:, None] + c[None, :]
    if CHECK:
        x = tl.load(at, mask=(key < S)[:, None] & (c < C)[None, :], other=0.0)
    elif C < BLOCK_C:
        x = tl.load(at, mask=(c < C)[None, :], other=0.0)
    else:
        x = tl.load(at)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def see(x, key, first, last, mask_ptr, S, HAS_MASK: tl.constexpr, MASKED: tl.constexpr):
    """Logits with -inf for the keys a row does not see: share, weight and cost come out as exact zeros."""
    if MASKED:
        seen = (key[None, :] <= last[:, None]) & (key[None, :] >= first[:, None])
        if HAS_MASK:
            seen = seen & (tl.load(mask_ptr + key, mask=key < S, other=0) != 0)[None, :]
        x = tl.where(seen, x, float("-inf"))
    return x
