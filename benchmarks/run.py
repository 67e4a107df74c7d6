"""python benchmarks/run.py BENCH [--device cpu] [--threads N] [--quick] [--json FILE] [--csv FILE]"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# Read by OpenMP when PyTorch is loaded; spinning threads make two-thread timings on a shared machine meaningless.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import bench_quality
import bench_rows
import torch
from record import print_table, write_csv, write_json

BENCHES = {"rows": bench_rows.run, "quality": bench_quality.run, "examples": bench_quality.run_examples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small shapes, one seed: to see that it runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    records = BENCHES[args.bench](args.device, args.threads, args.quick)
    print_table(records)
    if args.csv:
        write_csv(records, args.csv, args.device)
    if args.json:
        write_json(records, args.json, args.device)


if __name__ == "__main__":
    main()
