#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and its own torch >= 2.11, nvcc, cmake and ninja: build for that GPU, check the
# primitives, test, measure, sanitize. In under 8 minutes; every stage has a time limit and a log, and bench/gpu.py says
# what they are. Writes bench/results/<gpu> (or $1): *.json, table.md, summary.txt.
# Exit status 2 without a GPU, 1 if a stage failed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if ! gpu=$($PYTHON -c '
import torch
if not torch.cuda.is_available(): raise SystemExit(1)
print(torch.cuda.get_device_name().replace(" ", "-"))'); then
  echo "bench/gpu.sh: no CUDA GPU that torch can use, so nothing was built, tested or measured" >&2
  exit 2
fi
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD:$PWD/tests"
exec "$PYTHON" -m bench.gpu "${1:-bench/results/$gpu}"
