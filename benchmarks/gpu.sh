#!/usr/bin/env bash
# Everything worth doing on a machine with a GPU, in one command of less than nine minutes:
#     bash benchmarks/gpu.sh OUTDIR [STEP...]
# Ceilings, tests, compute-sanitizer on small shapes, all kernel benchmarks. OUTDIR gets log.txt, summary.txt and the CSVs.
# A step that fails or outlasts its limit is named at the end, and in the exit code; the others run all the same. STEP:
# these alone, after the build, to do again what failed: ceilings, tests, small_shapes, memcheck, racecheck, step,
# descent, norms, update, linear_rows, rows. Only where they are named: unlearn, the setting of the paper (pillow,
# $NABLA_TAU_DATA with cifar10, eight minutes by itself), tofu (transformers, weights, $NABLA_TAU_DATA with tofu, four
# minutes) and lm_memory (transformers).
# Needs python3 with torch, triton, numpy, scikit-learn, setuptools, pybind11 and pytest, and a C++17 compiler; no network.
# Without a GPU it runs the same steps in small on the CPU, to see that they run; those figures mean nothing.
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
only=("${@:2}")
steps="ceilings tests small_shapes memcheck racecheck step descent norms update linear_rows rows"
for name in "${only[@]}"; do
  [[ " $steps unlearn tofu lm_memory " == *" $name "* ]] || { echo "no step is called $name" >&2; exit 2; }
done
root=$PWD site=$(mktemp -d) failed=() until=$((SECONDS + 530))
trap 'rm -rf "$site"' EXIT
: >"$out/log.txt"

say() { echo "$*" | tee -a "$out/log.txt"; }

wanted() { # NAME
  [[ " build ${only[*]:-$steps} " == *" $1 "* ]]
}

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 left=$((until - SECONDS)) start=$SECONDS code
  shift 2
  wanted "$name" || return 0
  ((limit < left)) || limit=$left
  say "== $name"
  if ((limit < 5)); then
    say "== $name: left out, no time left"
    failed+=("$name")
    return 1
  fi
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$out/log.txt"
  code=${PIPESTATUS[0]}
  if ((code == 0)); then
    say "== $name: done in $((SECONDS - start)) s"
  else
    say "== $name: FAILED with $code after $((SECONDS - start)) s (124: outlasted $limit s)"
    failed+=("$name")
  fi
  return "$code"
}

bench() { # NAME SECONDS
  step "$1" "$2" python3 "$root/benchmarks/run.py" "$1" --device "$device" "${quick[@]}" --csv "$out/$1_$device.csv"
}

finish() {
  {
    echo "device $device, $SECONDS s; failed: ${failed[*]:-nothing}"
    grep -hE '^==.*(done|FAILED|left out)|passed|ERROR SUMMARY|RACECHECK SUMMARY' "$out/log.txt"
    grep -hE '^(ceilings|rows|linear_rows|update|norms|step|descent|unlearn|tofu|lm_memory) .*(nabla_tau|copy|matmul)' "$out/log.txt"
  } | tee "$out/summary.txt"
  exit $((${#failed[@]} > 0))
}

device=cpu quick=(--quick)
if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  device=cuda quick=()
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv | tee -a "$out/log.txt"
else
  say "no GPU here: small shapes on the CPU, to check this script only"
fi
python3 -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)' | tee -a "$out/log.txt"

step build 240 python3 -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$site" . || finish
# Away from the root, which holds the sources: what is measured and tested is what was installed.
export PYTHONPATH=$site OMP_WAIT_POLICY=passive
cd "$site" || exit 2

bench ceilings 30
tests=()
for name in gpu mean_gradient rows_triton update_triton gram_triton multilabel_triton linear_rows performance gradients library loss objective row_objectives numerics rows_cpp; do
  [ -f "$root/tests/test_$name.py" ] && tests+=("$root/tests/test_$name.py")
done
parallel=() # compiling the kernels takes longer than running them
python3 -c 'import xdist' 2>/dev/null && parallel=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
step tests 200 env OMP_NUM_THREADS=1 python3 -m pytest -q -p no:cacheprovider --rootdir "$root" -c "$root/pyproject.toml" \
  "${parallel[@]}" "${tests[@]}"

# Once by itself, which also compiles the kernels; then watched. Without PyTorch's cache every tensor is an
# allocation of its own, so that a read past its end is one past an allocation.
step small_shapes 60 python3 "$root/benchmarks/small_shapes.py" "$device"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
for tool in memcheck racecheck; do
  if [ $device = cpu ]; then
    say "== $tool: left out, no GPU"
  elif [ -z "$sanitizer" ]; then
    say "== $tool: left out, compute-sanitizer is not installed"
  else
    step $tool 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool $tool --error-exitcode 9 --print-limit 20 \
      python3 "$root/benchmarks/small_shapes.py" cuda
  fi
done

bench step 120
bench descent 80
bench norms 40
bench update 60
bench linear_rows 110
bench rows 260
bench unlearn 500
bench tofu 400
bench lm_memory 120

finish
