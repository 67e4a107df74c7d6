# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Squared norms of per-sample weight gradients from the Grams of a layer's rows, in Triton. Formula: `reference.py`.

    |sum_t g_t a_t^T|^2 = sum_{t,s} (a_t . a_s)(g_t . g_s)          a [B, T, p], g [B, T, q]

A program makes one tile of both Grams of a sample, loops over the features, and multiplies the tiles where they lie, in
registers: the T x T Grams are never stored. They are symmetric, so only the tiles on and below the diagonal are made,
those below counting twice. Bytes moved: with n = T / tile, each row is read n + 1 times by the programs of its sample,
mostly from the second-level cache, and B n (n + 1) / 2 numbers are written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_tau.kernels import launch


@triton.jit
def _tile_of_gram(
    rows, t, s, T, width,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(rows + t[:, None] * width + k[None, :], mask=(t < T)[:, None] & (k < width)[None, :], other=0.0)
        y = tl.load(rows + s[None, :] * width + k[:, None], mask=(s < T)[None, :] & (k < width)[:, None], other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    return total


@triton.jit
def _norms_kernel(
    inputs, gradients, partial, T, p_units, q_units,
    ALIGN: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Tile (i, j), j <= i, is number i (i + 1) / 2 + j; the root is rounded, so i is put right by whole numbers.
    p = p_units * ALIGN
    q = q_units * ALIGN
    number = tl.program_id(0)
    i = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > number, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= number, i + 1, i)
    j = number - i * (i + 1) // 2
    sample = tl.program_id(1).to(tl.int64)  # B T p may exceed 2^31
    t = i * BLOCK_T + tl.arange(0, BLOCK_T)
    s = j * BLOCK_T + tl.arange(0, BLOCK_T)
    a = _tile_of_gram(inputs + sample * T * p, t, s, T, p, WIDEN, PRECISION, BLOCK_T, BLOCK_K)
    g = _tile_of_gram(gradients + sample * T * q, t, s, T, q, WIDEN, PRECISION, BLOCK_T, BLOCK_K)
    total = tl.sum(a * g)
    tl.store(partial + sample * tl.num_programs(0) + number, tl.where(i == j, total, 2.0 * total))


def gram_norms(inputs: Tensor, gradients: Tensor) -> Tensor:
    """Squared norm of each sample's sum_t g_t a_t^T, [B] float32 (`reference.gram_norms`), in one launch and a sum.

    inputs [B, T, p] and gradients [B, T, q], both float32, bfloat16 or float16; products are summed in float32, of
    float32 numbers without cutting them to TF32. Sums are in a fixed order: the same result in every run.
    """
    inputs, gradients = inputs.contiguous(), gradients.contiguous()
    (samples, count, p), q = inputs.shape, gradients.shape[2]
    align = launch.alignment(p, q)
    config = launch.gram(count, inputs.dtype)
    tiles = triton.cdiv(count, config.rows)
    partial = torch.empty(samples, tiles * (tiles + 1) // 2, dtype=torch.float32, device=inputs.device)
    if partial.numel():
        with torch.cuda.device_of(inputs):
            _norms_kernel[(partial.shape[1], samples)](
                inputs, gradients, partial, count, p // align, q // align,
                ALIGN=align, WIDEN=triton.knobs.runtime.interpret, PRECISION=precision(inputs.dtype),
                BLOCK_T=config.rows, BLOCK_K=config.classes, num_warps=config.num_warps(),
            )  # fmt: skip
    # Rounding may leave a sum of nothing below 0.
    return partial.sum(1).clamp(min=0)


def precision(dtype: torch.dtype, hip: bool = torch.version.hip is not None) -> str:
    """How a tensor core multiplies: float32 as three TF32 products where it can (not AMD's), 16-bit as it is."""
    return "tf32x3" if dtype == torch.float32 and not hip else "ieee"
