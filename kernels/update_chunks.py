# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""What the update kernels share: a program's chunk of a parameter, found in the table (`update_table.py`)."""

import triton
import triton.language as tl

from nabla_tau.kernels.update_table import COLUMNS

WIDTH = tl.constexpr(len(COLUMNS))
(
    PARAMETER, FIRST, SECOND, FORGET, RETAIN, MASK, CENTRE, STEP, SIZE, NUMBER, RATE_AT,
    RATE, DECAY, SIGN, BETA1, BETA2, EPS, MOMENTUM, DAMPENING, NESTEROV,
) = map(tl.constexpr, range(len(COLUMNS)))  # fmt: skip


@triton.jit
def setting(table, rows, COLUMN: tl.constexpr, inside):
    bits = tl.load(table + rows * WIDTH + COLUMN, mask=inside, other=0)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def chunk_of(table, chunks, BLOCK: tl.constexpr):
    # Row of the table, first entry (a parameter may have more than 2^31), and how many entries there are from it on.
    at = chunks + 2 * tl.program_id(0).to(tl.int64)
    row = tl.load(at).to(tl.int64)
    begin = tl.load(at + 1).to(tl.int64) * BLOCK
    return row, begin, tl.load(table + row * WIDTH + SIZE) - begin


@triton.jit
def pointer_to(table, row, begin, COLUMN: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr):
    # An alignment said of the address is lost where it becomes a pointer, so it is said of the pointer, in bytes.
    pointer = tl.load(table + row * WIDTH + COLUMN).to(tl.pointer_type(T)) + begin
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def read_chunk(pointer, left, Real: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    entries = tl.arange(0, BLOCK)
    if FULL:
        return tl.load(pointer + entries).to(Real)
    else:
        return tl.load(pointer + entries, mask=entries < left, other=0).to(Real)


@triton.jit
def write_chunk(pointer, value, old, moves, left, FULL: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    # Entries that do not move get back what was there: a whole line is written at once.
    entries = tl.arange(0, BLOCK)
    if MASKED:
        value = tl.where(moves, value, old)
    value = value.to(pointer.dtype.element_ty)
    if FULL:
        tl.store(pointer + entries, value)
    else:
        tl.store(pointer + entries, value, mask=entries < left)


@triton.jit
def moving_entries(
    table, row, begin, left, MASKED: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr
):
    if MASKED:
        # A parameter without a mask of its own beside others that have one moves as a whole.
        moves = tl.full([BLOCK], 1, tl.int8)
        if tl.load(table + row * WIDTH + MASK) != 0:
            moves = read_chunk(pointer_to(table, row, begin, MASK, tl.int8, ALIGNED), left, tl.int8, FULL, BLOCK)
        return moves != 0
    else:
        return tl.full([BLOCK], 1, tl.int1)
