"""python benchmarks/run.py BENCH [--device cpu] [--threads N] [--quick] [--json FILE] [--csv FILE]

On the CPU the benchmarks of kernels run under two settings of the allocator, each in a process of its own, since malloc
reads them at start. By default it hands large freed blocks back to the system: every temporary of a step is made of
fresh pages, and on wide rows most of the time of plain PyTorch is page faults. Tuned, it keeps what it has. A user's
program may have either, so both are reported, and a ratio is always within one of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Read by OpenMP when PyTorch is loaded; spinning threads make two-thread timings on a shared machine meaningless.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, would log each of its starts

import torch
from record import Record, print_record, write_csv, write_json

BENCHES = {  # module and function, imported when asked for: each needs other packages
    "ceilings": ("bench_ceilings", "run"),
    "rows": ("bench_rows", "run"),
    "linear_rows": ("bench_linear_rows", "run"),
    "update": ("bench_update", "run"),
    "norms": ("bench_norms", "run"),
    "mia": ("bench_mia", "run"),
    "shadow": ("bench_shadow", "run"),
    "step": ("bench_step", "run"),
    "scaling": ("bench_step", "scaling"),
    "descent": ("bench_descent", "run"),
    "unlearn": ("bench_unlearn", "run"),
    "paper": ("bench_unlearn", "paper"),
    "course": ("bench_course", "run"),
    "quality": ("bench_quality", "run"),
    "rank": ("bench_quality", "rank"),
    "defaults": ("bench_defaults", "run"),
    "attacks": ("bench_defaults", "attacks"),
    "ablation": ("bench_ablation", "run"),
    "leave_one_out": ("bench_ablation", "leave_one_out"),
    "finetuned": ("bench_finetuned", "run"),
    "demo": ("bench_demo", "run"),
    "examples": ("bench_demo", "run_examples"),
    "tofu": ("bench_tofu", "run"),
    "lm_memory": ("bench_lm_memory", "run"),
}
OF_KERNELS = ("rows", "linear_rows", "update")
MALLOC = {
    "malloc default": {},
    # No block from mmap, none handed back, and the heap grows by 1 GB at a time.
    "malloc tuned": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "2000000000",
        "MALLOC_TOP_PAD_": "1000000000",
    },
}
SETTING = "NABLA_TAU_BENCHMARK_SETTING"  # tells a process that it is the one started for a setting


def measure(args: argparse.Namespace) -> Iterator[Record]:
    torch.set_num_threads(args.threads)
    setting = os.environ.get(SETTING)
    module, function = BENCHES[args.bench]
    run = getattr(importlib.import_module(module), function)
    for record in run(args.device, args.threads, args.quick):
        stamped = dataclasses.replace(record, setting=setting) if setting else record
        print_record(stamped)
        yield stamped


def measure_under_each_malloc(args: argparse.Namespace) -> Iterator[Record]:
    own = {name for values in MALLOC.values() for name in values}
    plain = {name: value for name, value in os.environ.items() if name not in own}
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "records.json"
        for setting, values in MALLOC.items():
            command = [sys.executable, __file__, args.bench, "--threads", str(args.threads), "--json", str(found)]
            command += ["--quick"] * args.quick
            subprocess.run(command, env=plain | values | {SETTING: setting}, check=True)
            yield from (Record(**record) for record in json.loads(found.read_text())["records"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small shapes, one seed: to see that it runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that what was measured is still written
    under_each = args.device == "cpu" and args.bench in OF_KERNELS and SETTING not in os.environ
    records: list[Record] = []
    try:
        for record in (measure_under_each_malloc if under_each else measure)(args):
            records.append(record)  # noqa: PERF402 - one by one, so that an interruption loses nothing
    finally:
        if args.csv:
            write_csv(records, args.csv, args.device)
        if args.json:
            write_json(records, args.json, args.device)


if __name__ == "__main__":
    main()
