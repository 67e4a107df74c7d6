"""ceilings: what the machine can do, to set other figures beside: a large copy, and a large matrix product.

The copy counts bytes read plus bytes written; the product 2 n^3 operations, on random data, since products of zeros run
faster.
"""

from __future__ import annotations

import torch
from record import Record, timings


def run(device: str, threads: int, quick: bool) -> list[Record]:
    large = device == "cuda" and not quick
    source = torch.randn(2**29 if large else 2**24, device=device)
    target = torch.empty_like(source)
    side = 8192 if large else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = timings(
        {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, seconds=5 if large else 1, device=device
    )
    ceilings = [  # work of a call in megabytes or billions of operations, so that a millisecond gives the unit
        ("copy", f"{source.nbytes / 1e6:.0f} MB", "float32", 2 * source.nbytes / 1e6, "GB/s"),
        ("matmul", f"{side}x{side}x{side}", "bfloat16", 2 * side**3 / 1e9, "TFLOP/s"),
    ]
    return [
        Record(
            bench="ceilings",
            case=f"{name} {size}",
            provider="torch",
            device=device,
            dtype=dtype,
            threads=threads,
            p20=work / found[name].p80,
            p50=work / found[name].p50,
            p80=work / found[name].p20,
            unit=unit,
        )
        for name, size, dtype, work, unit in ceilings
    ]
