"""pytest-benchmark entry points: pytest benchmarks --benchmark-only (or `make bench`).

Small shapes, one provider a test, grouped by case. Each provider is timed by itself, so that a ratio is only as good as
the machine is quiet; `run.py` has them take turns, and its figures are the ones to quote.
"""

from __future__ import annotations

import pytest
import torch
from bench_rows import CPU_QUICK, FORMS, LOSS, SIGNALS, make_batch, providers

torch.set_num_threads(1)


@pytest.mark.parametrize("provider", ["eager", "nabla_tau"])
@pytest.mark.parametrize("form", [LOSS, SIGNALS])
@pytest.mark.parametrize(("rows", "classes"), CPU_QUICK)
def test_rows(benchmark, rows, classes, form, provider):
    benchmark.group = f"rows {rows}x{classes}{form}"
    benchmark(providers(make_batch(rows, classes, torch.float32, "cpu"), form)[provider])


@pytest.mark.parametrize(("rows", "classes"), CPU_QUICK)
def test_row_kernel(benchmark, rows, classes):
    benchmark.group = f"rows {rows}x{classes}{FORMS[-1]}"
    benchmark(providers(make_batch(rows, classes, torch.float32, "cpu"), FORMS[-1])["nabla_tau"])
