#!/usr/bin/env bash
# One GPU, one command, ten minutes: speeds, the tests marked `gpu`, a step taken apart, three models against plain PyTorch, kernels.
#
#   bash launch/gpu_checks.sh [FOLDER]           FOLDER/report.md and report.json, logs, a trace (default runs/gpu_checks)
#   bash launch/gpu_checks.sh --smoke [FOLDER]   every item with tiny shapes on a CPU, in less than a minute: only that it runs
#   PYTHON=/path/python bash launch/gpu_checks.sh    with the PyTorch of that interpreter; nothing is downloaded or installed
#
# At most 540 s, whatever fails; the report is rewritten after each part (docs/benchmarks/gpu_checks.py). What follows FOLDER goes to that
# program: --items 456 runs some of them. Exit code 0 only if all of it came to its end without a failure.
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
smoke=""
if [ "${1:-}" = --smoke ]; then
    smoke=--smoke
    shift
fi
folder="$(mkdir -p "${1:-$root/runs/gpu_checks}" && CDPATH='' cd -- "${1:-$root/runs/gpu_checks}" && pwd)"
if [ $# -gt 0 ]; then shift; fi

# A new process for the question: one that has asked cannot fork processes that use CUDA.
if [ -z "$smoke" ]; then
    timeout 60 "$python" -c 'import torch; assert torch.cuda.is_available()' 2>"$folder/gpu.log" || {
        echo "gpu_checks.sh: $python has no PyTorch that sees a GPU. Set PYTHON to one that does. ($(tail -n 1 "$folder/gpu.log"))" >&2
        exit 1
    }
else
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
fi

# The package as it would be installed: megatrain with kernels/ inside, by links. It is also the current folder, where `python -m` looks first.
package="$(mktemp -d)"
trap 'rm -rf "$package"' EXIT
mkdir "$package/megatrain"
ln -s "$root"/megatrain/* "$package/megatrain/"
ln -s "$root/kernels" "$package/megatrain/kernels"
export PYTORCH_NVML_BASED_CUDA_CHECK=1 # so that asking whether there is a GPU does not touch it
export PYTHONPATH="$package:$root/docs/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
cd "$package"
failed=0
timeout -k 4 $((535 - SECONDS)) "$python" "$root/docs/benchmarks/gpu_checks.py" "$folder" --seconds $((522 - SECONDS)) $smoke "$@" || failed=$?
echo "written: $folder/report.md, report.json"
exit "$failed"
