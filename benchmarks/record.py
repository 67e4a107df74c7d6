"""One schema for every benchmark: records, timing in turns, peak memory, files with device, versions and date."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import importlib.metadata
import json
import platform
import random
import statistics
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

FLUSH_BYTES = 2**31  # many times any GPU's L2 cache; reading it takes longer than launching a step does


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One row of a table; an empty field was not measured.

    p20, p50, p80 in `unit`; ratio is the p50 of the baseline over the p50 of this provider, from the same run.
    setting: how it was run, where that matters ("malloc tuned", "CUDA graph"). peak_mb: `peak_mb` below. floor_mb:
    megabytes that must move whatever the implementation (inputs read once, outputs written once); gb_s: those over
    p50; copy_share: gb_s over that of a copy of the same matrix, timed in turns with the providers.
    """

    bench: str
    case: str
    provider: str
    device: str
    dtype: str
    threads: int
    setting: str = ""
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    unit: str
    ratio: float | None = None
    baseline: str = ""
    peak_mb: float | None = None
    floor_mb: float | None = None
    gb_s: float | None = None
    copy_share: float | None = None
    note: str = ""


FIELDS = [field.name for field in dataclasses.fields(Record)]


class Timing(NamedTuple):
    """Milliseconds."""

    p20: float
    p50: float
    p80: float


def seconds_of(device: str, quick: bool, on_cpu: float) -> float:
    """How long a case is measured. On a GPU a step takes milliseconds and nobody else is on the machine, whose time is
    scarce: two seconds are some hundred turns."""
    return min(1.0, on_cpu / 15) if quick else 2.0 if device == "cuda" else on_cpu


def timings(
    providers: Mapping[str, Callable[[], object]], *, seconds: float, device: str, queued: bool = True
) -> dict[str, Timing]:
    """Timing of each provider, the providers taking turns in random order for about `seconds` in all.

    Taking turns is what makes a ratio trustworthy on a machine whose speed drifts. On a GPU a queued call is timed by
    events behind a read of 2 GB, which empties the L2 cache and lets the host run ahead: what is timed is the device
    alone, with its inputs in memory. Not queued, the device is idle before the call and the host's clock runs until
    it is idle again: what a caller waits for.
    """
    clock = _events if device == "cuda" and queued else _wall
    flush = torch.zeros(FLUSH_BYTES if clock is _events else 0, dtype=torch.uint8, device=device)
    for run in providers.values():
        until = time.perf_counter() + 0.5
        for _ in range(3):
            clock(run, flush)
            if time.perf_counter() > until:
                break
    taken: dict[str, list[float]] = {name: [] for name in providers}
    order, turns = list(providers), random.Random(0)
    until, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < until or rounds < 5:
        turns.shuffle(order)
        for name in order:
            taken[name].append(clock(providers[name], flush))
        rounds += 1
    return {name: _summary(values) for name, values in taken.items()}


def _summary(values: Sequence[float]) -> Timing:
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(deciles[1], statistics.median(values), deciles[7])


def _wall(run: Callable[[], object], flush: Tensor) -> float:
    wait = torch.cuda.synchronize if flush.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return 1e3 * (time.perf_counter() - start)


def _events(run: Callable[[], object], flush: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Read, not written: lines left dirty in the cache would be written back at the expense of what is timed.
    flush.view(torch.int64).amax()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    """`run` as the replay of a CUDA graph: the same kernels without the host's launches."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_mb(run: Callable[[], object], device: str) -> float:
    """Most megabytes (1e6 bytes) that one call has allocated at once, its result included, its inputs not.

    On the CPU the sum of what tensors and what NumPy arrays held at their worst, the same whatever malloc keeps for
    itself, and of results that neither allocator handed out (the C++ rows keep blocks for their gradients). Scratch
    that libraries take from the C heap is not in it.
    """
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    tracemalloc.start()
    held = run()
    arrays, most_arrays = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del held  # or it would be given back during the next call, and count against it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        held = run()
    storages = {
        tensor.data_ptr(): tensor.untyped_storage() for tensor in tree_leaves(held) if isinstance(tensor, Tensor)
    }
    results = sum(storage.nbytes() for storage in storages.values())
    tensors = most_tensors = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            tensors += event.nbytes()
            most_tensors = max(most_tensors, tensors)
    return (most_arrays + most_tensors + max(0, results - arrays - tensors)) / 1e6


def records_of(
    found: Mapping[str, Timing],
    *,
    baseline: str = "",
    floor_mb: float | None = None,
    copy: Timing | None = None,
    peaks: Mapping[str, float] | None = None,
    **same: Any,
) -> list[Record]:
    """A record for each provider's timing; ratios where the baseline is one of them. `copy` is the time of a copy that
    moves about `floor_mb`; `same` are the fields that are the same in all."""
    base = found.get(baseline)
    return [
        Record(
            provider=name,
            p20=timing.p20,
            p50=timing.p50,
            p80=timing.p80,
            unit="ms",
            ratio=base and base.p50 / timing.p50,
            baseline=baseline if base else "",
            peak_mb=(peaks or {}).get(name),
            floor_mb=floor_mb,
            gb_s=floor_mb and floor_mb / timing.p50,
            copy_share=copy and copy.p50 / timing.p50,
            **same,
        )
        for name, timing in found.items()
    ]


def environment(device: str) -> dict[str, str]:
    return {
        **(_gpu() if device == "cuda" else {"device": _processor()}),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "nabla_tau": importlib.metadata.version("nabla_tau"),
        "date": datetime.date.today().isoformat(),
    }


def _gpu() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    cuda, triton = str(torch.version.cuda), importlib.metadata.version("triton")
    return {"device": torch.cuda.get_device_name(), "driver": driver, "cuda": cuda, "triton": triton}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def write_csv(records: Sequence[Record], path: Path, device: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in environment(device).items())
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for record in records:
            row = dataclasses.asdict(record)
            writer.writerow({key: f"{v:.5g}" if isinstance(v, float) else v for key, v in row.items()})


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows with every field of a record; a field that an older file does not have is empty."""
    with open(path, newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return [{name: row.get(name) or "" for name in FIELDS} for row in rows]


def read_head(path: Path) -> dict[str, str]:
    """Device, versions and date of a CSV."""
    with open(path) as file:
        head = (line[2:].split(": ", 1) for line in file if line.startswith("# "))
        return {key: value.strip() for key, value in head}


def write_json(records: Sequence[Record], path: Path, device: str) -> None:
    content = {"environment": environment(device), "records": [dataclasses.asdict(record) for record in records]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def print_record(r: Record) -> None:
    time = " " * 15 if r.p50 is None else f"{r.p50:10.4g} {r.unit:<4}"
    ratio = "" if r.ratio is None else f"{r.ratio:6.2f}x {r.baseline}"
    share = "" if r.copy_share is None else f"{r.copy_share:4.0%} of a copy"
    peak = "" if r.peak_mb is None else f"{r.peak_mb:8.3g} MB"
    place = f"{r.bench:11} {r.case:<24} {r.dtype:8} {r.threads} {r.setting:<14} {r.provider:<14}"
    print(f"{place} {time} {ratio:<22} {share:14} {peak:11} {r.note}".rstrip(), flush=True)
