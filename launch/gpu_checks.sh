#!/usr/bin/env bash
# One GPU, one command: the tests marked `gpu`, a table of kernels and one of models. Ended after 9 minutes, whatever is not done.
#
#   bash launch/gpu_checks.sh [OUTPUT]        writes OUTPUT.json and OUTPUT.md (default runs/gpu_checks)
#   PYTHON=/path/python bash launch/gpu_checks.sh    with the PyTorch of that interpreter; nothing is downloaded
#
# It uses the PyTorch that is there (2.9 or newer, with its Triton) and installs nothing but this checkout's own package, into a folder
# of its own, without network. Exit code 0 only if all tests passed and every measurement came to its end.
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
output="${1:-$root/runs/gpu_checks}"
mkdir -p "$(dirname "$output")"
"$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || {
    echo "gpu_checks.sh: $python has no PyTorch that sees a GPU. Set PYTHON to one that does." >&2
    exit 1
}

# The package as it would be installed: megatrain with kernels/ inside, by links, found through PYTHONPATH.
package="$(mktemp -d)"
trap 'rm -rf "$package"' EXIT
mkdir "$package/megatrain"
ln -s "$root"/megatrain/* "$package/megatrain/"
ln -s "$root/kernels" "$package/megatrain/kernels"
export PYTHONPATH="$package:$root/docs/benchmarks${PYTHONPATH:+:$PYTHONPATH}"

failed=0
if "$python" -c 'import pytest' 2>/dev/null; then
    echo "tests marked gpu"
    workers=() # kernels are compiled on the CPU, one by each worker at a time
    if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n logical --maxprocesses 8 --dist worksteal); fi
    (cd "$root" && timeout 120 "$python" -m pytest -q -m gpu -p no:cacheprovider -o addopts="--import-mode=importlib" -o timeout=0 \
        -o filterwarnings= ${workers[@]+"${workers[@]}"} tests/kernels tests/parallel tests/end_to_end/test_gpu.py) || failed=1
else
    echo "NOTE: pytest is not installed here: the tests marked gpu are left out"
    failed=1
fi
echo "kernels and models"
(cd "$root" && timeout 400 "$python" "$root/docs/benchmarks/gpu_checks.py" --output "$output") || failed=1
echo "written: $output.json, $output.md"
exit "$failed"
