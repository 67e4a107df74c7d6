"""Every Triton kernel compiles for every target, and keeps within its registers (`benchmarks/compile_kernels.py`)."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "compile_kernels.py"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def kernels() -> set[str]:
    """Names of the kernels in the sources, as the table writes them; a new one has to be in the table too."""
    found = set()
    for name in ("rows", "multilabel", "gram", "update", "update_sums"):
        text = (ROOT / "kernels" / f"{name}.py").read_text()
        found |= {f"{name}.{kernel}" for kernel in re.findall(r"^def _(\w+)_kernel\(", text, re.MULTILINE)}
    return found


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


@pytest.mark.slow
def test_kernels_keep_their_limits_on_every_target(tmp_path):
    # In processes of its own, which are not to inherit the interpreter that other tests ask for.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--quick", "--csv", str(tmp_path / "table.csv")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    table = read(tmp_path / "table.csv")
    targets = {"sm_80", "sm_90a", "sm_100a", "gfx942"}
    assert {(row["kernel"], row["target"]) for row in table} == {(k, t) for k in kernels() for t in targets}
    for row in table:
        where = f"{row['kernel']} {row['form']} on {row['target']}"
        assert row["spills"] == "0", where
        assert int(row["registers"]) <= int(row["limit"]), where
        # What the limit is for: a block fits, and half a multiprocessor's worth of threads beside each other.
        if row["target"] != "gfx942" and row["dtype"] != "fp64":
            assert int(row["limit"]) * max(int(row["threads"]), 512) <= 65536, where
        if int(row["classes"]) % 16 == 0:
            assert row["wide_loads"] == "True", where


def test_the_committed_table_has_every_kernel_and_no_fault():
    table = read(ROOT / "benchmarks" / "results" / "compiled_kernels.csv")
    assert {row["kernel"] for row in table} == kernels()
    assert {row["note"] for row in table} == {""}
    assert all(row["spills"] == "0" and int(row["registers"]) <= int(row["limit"]) for row in table)
