"""Fail when a ratio got worse: python benchmarks/compare.py OLD.csv NEW.csv [--tolerance .2]

Only ratios are compared, since each was taken against its baseline in one run; absolute times of two machines, or of
two days, say nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from record import read_csv

KEY = ("bench", "case", "provider", "device", "dtype", "threads")


def ratios(path: Path) -> dict[tuple[str, ...], float]:
    return {tuple(row[key] for key in KEY): float(row["ratio"]) for row in read_csv(path) if row["ratio"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.2, help="share of the old ratio that may be lost")
    args = parser.parse_args()
    old, new = ratios(args.old), ratios(args.new)
    worse = 0
    for key in sorted(old.keys() & new.keys()):
        lost = 1 - new[key] / old[key]
        worse += lost > args.tolerance
        print(f"{' '.join(key):<60} {old[key]:6.2f}x -> {new[key]:6.2f}x{'  WORSE' if lost > args.tolerance else ''}")
    for key in sorted(old.keys() - new.keys()):
        print(f"{' '.join(key):<60} not measured any more")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
