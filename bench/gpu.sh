#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and its own torch >= 2.11, nvcc, cmake and ninja: build for that GPU, check the
# primitives, measure, test, sanitize, in nine minutes; bench/gpu.py says what and in which order. Writes summary.txt,
# table.md, results.json, done.json and logs.tar.gz into bench/results/<gpu> (or $1), anew after every stage. A second
# run that is given the folder of the first as $2 does the rest. `python -m bench.kit` on another machine makes
# build/gpu-kit, which saves the compiling and brings the packages that are missing there.
# Exit status 2 without a GPU, 1 if a stage failed. REHEARSE=1 runs every stage small and on the CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if [ -n "${REHEARSE:-}" ]; then
  gpu=rehearsal
elif ! gpu=$($PYTHON -c '
import torch
if not torch.cuda.is_available(): raise SystemExit(1)
print(torch.cuda.get_device_name().replace(" ", "-"))'); then
  echo "bench/gpu.sh: no CUDA GPU that torch can use, so nothing was built, tested or measured" >&2
  exit 2
fi
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G "build/gpu-kit/wheels/*.whl" >/dev/null; then # they come before what is installed
  $PYTHON -m pip install --quiet --no-index --no-deps --no-compile --target build/gpu-kit/site build/gpu-kit/wheels/*.whl
  export PYTHONPATH="$PYTHONPATH:$PWD/build/gpu-kit/site"
fi
exec "$PYTHON" -m bench.gpu "${1:-bench/results/$gpu}" ${2:+"$2"}
