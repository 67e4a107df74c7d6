# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""What a step needs to know of all parameters at once, in Triton: inner products of the gradients, and the ball.

Each program stores the sums of its chunk, in the computing dtype; `_finish_kernel`, one program, adds them up in
float64 and in order, so that every run gives the same bits.
"""

import triton
import triton.language as tl

from nabla_tau.kernels.update_chunks import (
    CENTRE,
    FORGET,
    PARAMETER,
    RETAIN,
    WIDTH,
    chunk_of,
    moving_entries,
    pointer_to,
    read_chunk,
    write_chunk,
)


@triton.jit
def _chunk_products(
    table, row, begin, left,
    T: tl.constexpr, Real: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    f = tl.zeros([BLOCK], Real)
    r = tl.zeros([BLOCK], Real)
    if tl.load(table + row * WIDTH + FORGET) != 0:
        f = read_chunk(pointer_to(table, row, begin, FORGET, T, ALIGNED), left, Real, FULL, BLOCK)
    if tl.load(table + row * WIDTH + RETAIN) != 0:
        r = read_chunk(pointer_to(table, row, begin, RETAIN, T, ALIGNED), left, Real, FULL, BLOCK)
    if MASKED:
        moves = moving_entries(table, row, begin, left, MASKED, ALIGNED, FULL, BLOCK)
        f = tl.where(moves, f, 0.0)
        r = tl.where(moves, r, 0.0)
    return tl.sum(f * f, 0), tl.sum(f * r, 0), tl.sum(r * r, 0)


@triton.jit
def _products_kernel(
    table, chunks, sums, C,
    T: tl.constexpr, Real: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, begin, left = chunk_of(table, chunks, BLOCK)
    if left >= BLOCK:
        ff, fr, rr = _chunk_products(table, row, begin, left, T, Real, MASKED, ALIGNED, True, BLOCK)
    else:
        ff, fr, rr = _chunk_products(table, row, begin, left, T, Real, MASKED, ALIGNED, False, BLOCK)
    at = sums + tl.program_id(0)
    tl.store(at, ff.to(tl.float64))
    tl.store(at + C, fr.to(tl.float64))
    tl.store(at + 2 * C, rr.to(tl.float64))


@triton.jit
def _chunk_distance(
    table, row, begin, left,
    T: tl.constexpr, Real: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    p = read_chunk(pointer_to(table, row, begin, PARAMETER, T, ALIGNED), left, Real, FULL, BLOCK)
    c = read_chunk(pointer_to(table, row, begin, CENTRE, T, ALIGNED), left, Real, FULL, BLOCK)
    away = p - c
    if MASKED:
        away = tl.where(moving_entries(table, row, begin, left, MASKED, ALIGNED, FULL, BLOCK), away, 0.0)
    return tl.sum(away * away, 0)


@triton.jit
def _distance_kernel(
    table, chunks, sums, C,
    T: tl.constexpr, Real: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, begin, left = chunk_of(table, chunks, BLOCK)
    if left >= BLOCK:
        squared = _chunk_distance(table, row, begin, left, T, Real, MASKED, ALIGNED, True, BLOCK)
    else:
        squared = _chunk_distance(table, row, begin, left, T, Real, MASKED, ALIGNED, False, BLOCK)
    tl.store(sums + tl.program_id(0), squared.to(tl.float64))


@triton.jit
def _finish_kernel(sums, out, C, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    # Added to what is there: the parameters of another dtype come in a launch of their own.
    for which in tl.static_range(COUNT):
        total = tl.zeros([BLOCK], tl.float64)
        for start in range(0, C, BLOCK):
            chunks = start + tl.arange(0, BLOCK)
            total += tl.load(sums + which * C + chunks, mask=chunks < C, other=0.0)
        tl.store(out + which, tl.load(out + which) + tl.sum(total, 0))


@triton.jit
def _pull_chunk(
    table, row, begin, left, squared, radius,
    T: tl.constexpr, Real: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    parameter = pointer_to(table, row, begin, PARAMETER, T, ALIGNED)
    p = read_chunk(parameter, left, Real, FULL, BLOCK)
    c = read_chunk(pointer_to(table, row, begin, CENTRE, T, ALIGNED), left, Real, FULL, BLOCK)
    factor = (tl.load(radius).to(tl.float64) / tl.sqrt(tl.load(squared))).to(Real)
    moves = moving_entries(table, row, begin, left, MASKED, ALIGNED, FULL, BLOCK)
    write_chunk(parameter, c + factor * (p - c), p, moves, left, FULL, MASKED, BLOCK)


@triton.jit
def _pull_kernel(
    table, chunks, squared, radius,
    T: tl.constexpr, Real: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Inside the ball nothing is written: c + (p - c) need not be p.
    if tl.sqrt(tl.load(squared)) > tl.load(radius).to(tl.float64):
        row, begin, left = chunk_of(table, chunks, BLOCK)
        if left >= BLOCK:
            _pull_chunk(table, row, begin, left, squared, radius, T, Real, MASKED, ALIGNED, True, BLOCK)
        else:
            _pull_chunk(table, row, begin, left, squared, radius, T, Real, MASKED, ALIGNED, False, BLOCK)
