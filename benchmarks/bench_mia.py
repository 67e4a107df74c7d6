"""mia: the statistics of membership inference, over many models and over one, against numpy, scikit-learn and scipy."""

from __future__ import annotations

import bench_mia_shadow
import bench_mia_threshold
from record import Record


def run(device: str, threads: int, quick: bool) -> list[Record]:
    return bench_mia_shadow.run(device, threads, quick) + bench_mia_threshold.run(device, threads, quick)
