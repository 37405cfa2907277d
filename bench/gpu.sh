#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and its own torch >= 2.11, nvcc, cmake and ninja: build for that GPU, test, sanitize,
# measure. Writes bench/results/<gpu>/*.json (or to $1). Exit 2 without a GPU, 1 if a step failed; every step is tried.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if ! facts=$($PYTHON -c '
import torch
if not torch.cuda.is_available(): raise SystemExit(1)
major, minor = torch.cuda.get_device_capability()
print(torch.cuda.get_device_name().replace(" ", "-"), f"{major}{minor}" + "a" * (major >= 9))'); then
  echo "bench/gpu.sh: no CUDA GPU that torch can use, so nothing was built, tested or measured" >&2
  exit 2
fi
read -r gpu arch <<<"$facts"
out=${1:-bench/results/$gpu}
mkdir -p "$out"
failed=""
step() {  # name, seconds, command...
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then echo "ok     $name ($((SECONDS - begin)) s)"
  else echo "FAILED $name ($((SECONDS - begin)) s): see $out/$name.log"; tail -n 25 "$out/$name.log"; failed="$failed $name"; fi
}
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD:$PWD/tests"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader | tee "$out/gpu.txt"
step build 200 env KEEPLORA_CUDA=1 KEEPLORA_CUDA_ARCHS="$arch" "$PYTHON" setup.py build_ext --inplace
[ -z "$failed" ] || exit 1
step tests 240 "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops tests/math tests/lora tests/methods tests/test_tiny.py
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    only=(--kernel-regex kns=project_kernel --kernel-regex kns=leak_kernel)
    [ "$tool" != initcheck ] || only=()  # it must see who wrote what our kernels read
    step "$tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 9 "${only[@]}" "$PYTHON" -m bench.sanitize
  done
else
  echo "compute-sanitizer is not here: not run"
fi
step bench 200 "$PYTHON" -m bench.run B4 B6 B3 B2 --device cuda --seconds 4 --json "$out/bench.json"
cat "$out/bench.log"
[ -z "$failed" ] || exit 1
