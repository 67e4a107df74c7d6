"""One schema for every benchmark: a record, interleaved timing, and CSV/JSON with device, versions and date."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


@dataclasses.dataclass(frozen=True)
class Record:
    """One row of a table. p20, p50, p80 in `unit`; ratio is the p50 of the baseline over the p50 of this provider, from
    the same run; an empty field was not measured."""

    bench: str
    case: str
    provider: str
    device: str
    dtype: str
    threads: int
    p20: float
    p50: float
    p80: float
    unit: str
    peak_mb: float | None = None
    ratio: float | None = None
    baseline: str = ""
    note: str = ""


FIELDS = [field.name for field in dataclasses.fields(Record)]


def timings(
    providers: dict[str, Callable[[], object]], *, seconds: float, device: str
) -> dict[str, tuple[float, float, float]]:
    """p20, p50, p80 of each provider in milliseconds, the providers taking turns for about `seconds` in all.

    Taking turns is what makes a ratio trustworthy on a machine whose speed drifts.
    """

    def once(run: Callable[[], object]) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    for run in providers.values():
        for _ in range(3):
            once(run)
    taken: dict[str, list[float]] = {name: [] for name in providers}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(next(iter(taken.values()))) < 5:
        for name, run in providers.items():
            taken[name].append(once(run))
    found = {}
    for name, values in taken.items():
        deciles = statistics.quantiles(values, n=10)
        found[name] = deciles[1], statistics.median(values), deciles[7]
    return found


def environment(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
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
    with open(path, newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def write_json(records: Sequence[Record], path: Path, device: str) -> None:
    content = {"environment": environment(device), "records": [dataclasses.asdict(record) for record in records]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def print_table(records: Sequence[Record]) -> None:
    width = max(len(record.case) for record in records)
    for r in records:
        ratio = "" if r.ratio is None else f"{r.ratio:6.2f}x {r.baseline}"
        print(f"{r.bench:8} {r.case:<{width}} {r.provider:<14} {r.p50:10.4g} {r.unit:<4} {ratio:<16} {r.note}".rstrip())
