# pyright: basic, reportArgumentType=false
"""What comes before and after the backward kernel: passes over rows that move bytes, in portable Triton.

Lines are rows of all heads in a row, ``m_padded`` a head, so that a tile of the kernel never meets the next head's.
"""

import triton
import triton.language as tl


@triton.jit
def prepare_kernel(
    out, d_out, lse, d_lse, lse_two, delta, o_b, o_h, o_m, h, m, m_padded, e,
    R: tl.constexpr, E: tl.constexpr, D_LSE: tl.constexpr,
):  # fmt: skip
    """Write ``delta = rowsum(dO ∘ O) - dLSE`` and the log-sum-exp over ln 2.

    The latter is +inf for rows without keys and past the last, whose weights are then 0.
    """
    line = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    head = line // m_padded
    row = line % m_padded
    exists = row < m
    across = tl.arange(0, E)
    inside = exists[:, None] & (across < e)[None, :]
    at = d_out + (head // h) * o_b + (head % h) * o_h + row * o_m
    dense = head * m + row
    gradient = tl.load(at[:, None] + across[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(out + dense[:, None] * e + across[None, :], mask=inside, other=0.0).to(tl.float32)
    flow = tl.sum(gradient * mean, 1)
    if D_LSE:
        flow -= tl.load(d_lse + dense, mask=exists, other=0.0)
    log_sum = tl.load(lse + dense, mask=exists, other=-float("inf")) * 1.4426950408889634
    tl.store(delta + line, flow)
    tl.store(lse_two + line, tl.where(log_sum == -float("inf"), float("inf"), log_sum))


@triton.jit
def finish_kernel(sums, dq, m, m_padded, d, scale, D: tl.constexpr, PARTS: tl.constexpr):
    """Sort the sums of 64 rows of dq (see `backward_kernel.add_queries`), scale and round them.

    They lie in PARTS parts of D / PARTS columns each; in a part by block of 8 columns, by warp, by row of 8, by thread
    of the row, by upper and lower row, by neighbour.
    """
    line = tl.program_id(0).to(tl.int64) * 64
    x = tl.load(sums + line * D + tl.arange(0, 64 * D))
    x = tl.reshape(x, [PARTS, D // PARTS // 8, 4, 8, 4, 2, 2])
    x = tl.reshape(tl.permute(x, [2, 5, 3, 0, 1, 4, 6]), [64, D]) * scale
    row = line % m_padded + tl.arange(0, 64)
    across = tl.arange(0, D)
    at = dq + (line // m_padded * m + row)[:, None] * d + across[None, :]
    tl.store(at, x.to(dq.dtype.element_ty), mask=(row < m)[:, None] & (across < d)[None, :])
