"""mia: the statistics of membership inference, over many models and over one, against numpy, scikit-learn and scipy."""

from __future__ import annotations

from collections.abc import Iterator

import bench_mia_shadow
import bench_mia_threshold
from case import measure
from record import Record


def run(device: str, threads: int, quick: bool) -> Iterator[Record]:
    for module in (bench_mia_threshold, bench_mia_shadow):
        for case in module.cases(quick):
            yield from measure("mia", case, device, threads, seconds=0.3 if quick else 12)
