"""Fail when a ratio got worse: python benchmarks/compare.py OLD.csv NEW.csv [--tolerance .2]

Only ratios are compared, since each was taken against its baseline in one run; absolute times of two machines, or of
two days, say nothing. Exit code: 0 none got worse, 1 some did, 2 the files have no ratio in common.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from record import read_csv

KEY = ("bench", "case", "provider", "device", "dtype", "threads", "setting", "baseline")


def ratios(path: Path) -> dict[tuple[str, ...], float]:
    rows = (row for row in read_csv(path) if row["ratio"] and row["provider"] != row["baseline"])
    return {tuple(row[key] for key in KEY): float(row["ratio"]) for row in rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.2, help="share of the old ratio that may be lost")
    args = parser.parse_args(arguments)
    old, new = ratios(args.old), ratios(args.new)
    common = sorted(old.keys() & new.keys())
    worse = 0
    for key in common:
        lost = 1 - new[key] / old[key]
        worse += lost > args.tolerance
        print(f"{' '.join(key):<70} {old[key]:6.2f}x -> {new[key]:6.2f}x{'  WORSE' if lost > args.tolerance else ''}")
    for key in sorted(old.keys() - new.keys()):
        print(f"{' '.join(key):<70} not measured any more")
    if not common:
        print("no ratio in common")
        return 2
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
