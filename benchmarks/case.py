"""A case of a benchmark on the statistics: several ways to compute the same thing, timed in turns.

Where a whole run of a baseline takes minutes it runs on a part; its time is then scaled up and the note says so.
peak_mb is what a call makes the process take beyond what it held before, results included (Linux only).
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import sys
from collections.abc import Callable
from typing import NamedTuple

from record import Record, Timing, records_of, timings


class Provider(NamedTuple):
    """`parts`: how many times its work makes the whole."""

    call: Callable[[], object]
    parts: float = 1


class Case(NamedTuple):
    name: str
    dtype: str
    baseline: str
    providers: dict[str, Provider]


def process_peak_mb(call: Callable[[], object]) -> float:
    """The process's high-water mark, set back before the call, above what it held then; megabytes (1e6 bytes)."""
    gc.collect()
    # Freed memory that the allocator keeps would be taken again unseen.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) * 1024 / 1e6


def _status_kib(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def measure(bench: str, case: Case, device: str, threads: int, seconds: float) -> list[Record]:
    found = timings({name: p.call for name, p in case.providers.items()}, seconds=seconds, device=device)
    whole = {name: Timing(*(case.providers[name].parts * t for t in timing)) for name, timing in found.items()}
    peaks = {
        name: process_peak_mb(p.call) for name, p in case.providers.items() if p.parts == 1 and sys.platform == "linux"
    }
    records = records_of(
        whole,
        baseline=case.baseline,
        peaks=peaks,
        bench=bench,
        case=case.name,
        device=device,
        dtype=case.dtype,
        threads=threads,
    )
    return [
        dataclasses.replace(r, note=f"1/{parts:.0f} of it measured, scaled")
        if (parts := case.providers[r.provider].parts) > 1
        else r
        for r in records
    ]
