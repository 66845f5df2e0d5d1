#!/usr/bin/env bash
# Trains on several machines: run this on each of them, with the same variables.
#
#   NNODES=2 MASTER_ADDR=node1 bash launch/multinode.sh CONFIG.yaml [section.key=value ...]
#   NNODES=2 MASTER_ADDR=node1 bash launch/multinode.sh doctor|bench|eval|generate ...      another verb of megatrain
#
#   NNODES               machines, or MIN:MAX: a run that has lost one goes on with those that are left, if they are MIN or more
#   MASTER_ADDR          name or address of one of them, as the others reach it: where all meet
#   MASTER_PORT          a free port there (29400)
#   NPROC_PER_NODE       processes on each machine (its GPUs, or 1)
#   MEGATRAIN_INTERFACE  the network interface to use: a name, an address, or a network such as 10.0.0.0/16, which is the same on all
#                        machines (the one that leads to MASTER_ADDR)
#   RUN_ID               the same on all machines, different for each job that meets at that port (megatrain)
#   MEGATRAIN_SECRET     the same on all machines, new for each job: `openssl rand -hex 32`. Without it any process that reaches the port
#                        could disturb the start of the job
#   MAX_RESTARTS         how often a run that fails is started again, from its newest checkpoint (0)
#   JOIN_TIMEOUT         seconds to wait for the other machines (600)
#   PYTHON               the interpreter
#
# SIGTERM, SIGINT, SIGUSR1, SIGUSR2 or SIGHUP to any one saves and ends all. Exit code: 0 done, 75 stopped early: start it again,
# 76 training went wrong: look first, 2 wrong use, else a failure.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/prepare.sh"

case "${1:-}" in -h | --help) show_help && exit 0 ;; esac
[ $# -ge 1 ] || wrong_use "usage: NNODES=2 MASTER_ADDR=node1 bash launch/multinode.sh CONFIG.yaml [section.key=value ...]"
nodes="${NNODES:-}"
case "$nodes" in
    "" | *[!0-9:]* | *:*:* | :* | *: | 0 | 0:*)
        wrong_use "NNODES=$nodes is not a number of machines. Set NNODES=2, or NNODES=1:2, or use launch/local.sh for one."
        ;;
esac
[ "${nodes%%:*}" -le "${nodes##*:}" ] || wrong_use "NNODES=$nodes: the smaller number comes first. Set NNODES=${nodes##*:}:${nodes%%:*}."
[ -n "${MASTER_ADDR:-}" ] || wrong_use "MASTER_ADDR is not set. Set it to the name or address of one of the ${nodes##*:} machines."
case "$(printf '%s' "$MASTER_ADDR" | tr '[:upper:]' '[:lower:]')" in
    localhost | localhost.* | ip6-localhost | ::1 | 127.* | 0.0.0.0 | ::)
        [ "$nodes" = 1 ] || wrong_use "MASTER_ADDR=$MASTER_ADDR, but ${nodes##*:} machines cannot meet at localhost. \
Set it to the name or address of one of them."
        ;;
esac
whole_number MASTER_PORT "${MASTER_PORT:-29400}" 1 29400
whole_number NPROC_PER_NODE "${NPROC_PER_NODE:-1}" 1 8
whole_number MAX_RESTARTS "${MAX_RESTARTS:-0}" 0 3
whole_number JOIN_TIMEOUT "${JOIN_TIMEOUT:-600}" 1 600
take_verb "$@"

python="$(find_python)"
dir="$(run_dir ${words[@]+"${words[@]}"})" || exit
ranks="${NPROC_PER_NODE:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
share_cores "$ranks"
exec "$python" -m megatrain.lifecycle.agent "$dir" --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-0}" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}" --rdzv-id "${RUN_ID:-megatrain}" \
    -m megatrain "$verb" ${words[@]+"${words[@]}"}
