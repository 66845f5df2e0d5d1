#!/usr/bin/env bash
# Trains with N processes on this machine.
#
#   bash launch/local.sh N CONFIG.yaml [section.key=value ...]
#   bash launch/local.sh 2 launch/configs/gpt_tiny.yaml parallel.tensor_parallel_size=2
#
# One process per GPU, or N processes that share the CPU cores (OMP_NUM_THREADS each; default cores / N). SIGTERM saves and ends.
# Exit code: 0 done, 75 stopped early with a checkpoint saved, 2 wrong use, else a failure. PYTHON chooses the interpreter.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/torchrun.sh"

case "${1:-}" in -h | --help) show_help && exit 0 ;; esac
[ $# -ge 2 ] || wrong_use "usage: bash launch/local.sh N CONFIG.yaml [section.key=value ...]"
ranks="$1"
shift
case "$ranks" in "" | *[!0-9]* | 0) wrong_use "N=$ranks is not a number of processes. Use 1 or more." ;; esac

python="$(find_python)"
dir="$(log_dir "$@")" || exit
share_cores "$ranks"
if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && [ -e /sys/class/net/lo ]; then
    export GLOO_SOCKET_IFNAME=lo # all ranks are here: no need of a name or a network
fi
run_torchrun "$dir" --standalone --nproc-per-node "$ranks" -m megatrain train "$@"
