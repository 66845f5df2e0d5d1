#!/usr/bin/env bash
# Trains on several machines: run this on each of them, with the same variables.
#
#   NNODES=2 MASTER_ADDR=node1 bash launch/multinode.sh CONFIG.yaml [section.key=value ...]
#
#   NNODES          machines
#   MASTER_ADDR     name or address of one of them, as the others reach it: where all meet
#   MASTER_PORT     a free port there (29400)
#   NPROC_PER_NODE  processes on each machine (its GPUs, or 1)
#   RUN_ID          the same on all machines, different for each job that meets at that port (megatrain)
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME   the network interface to use, such as eth0, where there are several
#
# SIGTERM to each saves and ends. Exit code: 0 done, 75 stopped early with a checkpoint saved (where log.dir is on a shared disk, or
# rank 0 ran here), 2 wrong use, else a failure. PYTHON chooses the interpreter.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/torchrun.sh"

case "${1:-}" in -h | --help) show_help && exit 0 ;; esac
[ $# -ge 1 ] || wrong_use "usage: NNODES=2 MASTER_ADDR=node1 bash launch/multinode.sh CONFIG.yaml [section.key=value ...]"
nodes="${NNODES:-}"
case "$nodes" in "" | *[!0-9]* | 0) wrong_use "NNODES=$nodes is not a number of machines. Set NNODES=2, or use launch/local.sh for one." ;; esac
[ -n "${MASTER_ADDR:-}" ] || wrong_use "MASTER_ADDR is not set. Set it to the name or address of one of the $nodes machines."
case "$MASTER_ADDR" in
    localhost | ip6-localhost | ::1 | 127.*)
        [ "$nodes" -eq 1 ] || wrong_use "MASTER_ADDR=$MASTER_ADDR, but $nodes machines cannot meet at localhost. \
Set it to the name or address of one of them."
        ;;
esac

python="$(find_python)"
dir="$(log_dir "$@")" || exit
ranks="${NPROC_PER_NODE:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
share_cores "$ranks"
run_torchrun "$dir" --nnodes "$nodes" --nproc-per-node "$ranks" --rdzv-backend c10d \
    --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}" --rdzv-id "${RUN_ID:-megatrain}" -m megatrain train "$@"
