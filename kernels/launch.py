"""Launch configurations of the Triton kernels, as pure functions of shape and dtype: no search, nothing to warm up.

The measure is 32 logits a thread. A row that lies in registers is read once; 32 logits, their exponentials and
addresses fit without spilling into the 64 registers a thread has when 1024 of them share 65536, which gives the limit
of 32768 classes. Shorter rows take fewer threads rather than fewer logits a thread: what is computed once a row is
computed by all threads of the row, and several programs on a multiprocessor overlap, one loading while another reduces.
`benchmarks/compile_kernels.py` holds every kernel to its registers; no GPU has yet said whether these are the fastest.
"""

from dataclasses import dataclass

import torch

# Up to this many rows the gate of `nabla_tau_rows` is the work of the last program, beyond it a launch of its own: one
# program of 256 threads takes some microseconds for them, as a launch does.
GATE_ROWS = 4096
# Rows that it takes at a time: four a thread with 256 threads, one where registers are scarce.
GATE_BLOCK = 1024


@dataclass(frozen=True)
class Launch:
    """`rows` x `classes` is the tile of a program, both powers of two; `online`: a row takes several tiles."""

    rows: int
    classes: int
    threads: int
    online: bool = False

    def num_warps(self, warp: int = 64 if torch.version.hip else 32) -> int:
        return max(1, self.threads // warp)


def _ceil_pow2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def alignment(*sizes: int) -> int:
    """Largest power of two up to 16 that divides all sizes. Triton's own test is for 16 alone, which a row of 1000
    bfloat16 fails though each of its rows starts on 16 bytes."""
    return next(a for a in (16, 8, 4, 2, 1) if all(size % a == 0 for size in sizes))


def rows(classes: int, real: torch.dtype, *, smoothing: bool = False, gate: bool = False) -> Launch:
    """For the kernels that read whole rows; `real` is the computing dtype.

    Smoothing keeps the logits beside their exponentials: 8 logits a thread. float64 takes two registers a number and
    more in its functions: 2 logits a thread, and at most 256 threads. A longer row is read in blocks, whose sums stay
    in lanes: 8 logits a thread (float64: 4), so that several programs share a multiprocessor. Up to 256 classes a
    program takes several rows, with 8 logits a thread: what is computed once a row weighs more than the row. A gate
    wants 256 threads for the losses it adds up.
    """
    double = real == torch.float64
    per_thread = 2 if double else 8 if smoothing else 32
    block = _ceil_pow2(classes)
    if block > per_thread * (256 if double else 1024):
        threads = 128 if double or smoothing else 256
        return Launch(1, threads * (4 if double else 8), threads, online=True)
    if block <= 256 or gate:
        return Launch(max(1, 2048 // block), block, max(256, block // per_thread))
    return Launch(1, block, max(32, block // per_thread))


def elementwise(classes: int) -> Launch:
    """For the kernels without a sum over classes: two 128-bit loads of a 16-bit dtype a thread."""
    block = min(_ceil_pow2(classes), 4096)
    return Launch(4096 // block, block, 256)


def gate() -> Launch:
    """For the gate as a launch of its own: 8 rows a thread."""
    return Launch(4096, 1, 512)


def labels(count: int, itemsize: int) -> Launch:
    """For the multi-label forward: one 128-bit load a thread, since its six sums keep many numbers alive."""
    tile = 256 * 16 // itemsize
    block = min(_ceil_pow2(count), tile)
    return Launch(tile // block, block, 256)


def chunk(itemsize: int) -> Launch:
    """For the update kernels, which keep five tensors of a parameter in flight: two 128-bit loads a thread of each in
    float32, one in a 16-bit dtype."""
    return Launch(1, 256 * (8 if itemsize < 8 else 4), 256)


def in_order() -> Launch:
    """For one program that goes through the parameters, or through the sums of all chunks."""
    return Launch(1, 1024, 256)


def gram(count: int, dtype: torch.dtype) -> Launch:
    """For the Grams of `count` rows a sample: tiles of `rows` x `rows`, features `classes` at a time.

    Of two 64 x 64 tiles each of 256 threads keeps 32 numbers, which leaves room for 512 threads on a multiprocessor.
    128 bytes of a row are read at a time, 64 of float32, which takes three registers to multiply a number. A tensor
    core takes 16 rows at least.
    """
    block = min(64, max(16, _ceil_pow2(max(1, count))))
    return Launch(block, (64 if dtype == torch.float32 else 128) // dtype.itemsize, 256 if block == 64 else 128)
