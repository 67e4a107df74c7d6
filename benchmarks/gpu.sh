#!/usr/bin/env bash
# Everything worth doing on a machine with a GPU, in one command: build, tests, benchmarks, CSVs.
#     bash benchmarks/gpu.sh OUTDIR
# Needs python3 with torch, numpy, scikit-learn, scipy, setuptools, pybind11 and pytest, and a C++17 compiler; no network.
# Without a GPU it runs the same steps in small on the CPU, to see that they run; those figures mean nothing.
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$site" .
# Safe path: the root holds the sources, and what is tested is what was installed.
export PYTHONPATH=$site PYTHONSAFEPATH=1 OMP_WAIT_POLICY=passive

device=cpu options=(--quick)
if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  device=cuda options=()
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv | tee "$out/gpu.csv"
else
  echo "no GPU here: small shapes on the CPU, to check this script only"
fi
python3 -m pytest -q -p no:cacheprovider tests/test_gpu.py tests/test_loss.py tests/test_objective.py tests/test_numerics.py \
  tests/test_rows_cpp.py tests/test_unlearner.py tests/test_paper.py 2>&1 | tee "$out/tests.txt"
cd benchmarks # the benchmarks import each other, which a safe path would not allow
PYTHONPATH=$site:$PWD python3 run.py rows --device "$device" "${options[@]}" --csv "$out/rows_$device.csv"
