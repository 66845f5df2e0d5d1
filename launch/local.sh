#!/usr/bin/env bash
# Trains with N processes on this machine.
#
#   bash launch/local.sh N CONFIG.yaml [section.key=value ...]
#   bash launch/local.sh 2 launch/configs/gpt_tiny.yaml parallel.tensor_parallel_size=2
#   bash launch/local.sh N doctor|bench|eval|generate ...      another verb of megatrain
#
#   MAX_RESTARTS      how often a run that fails is started again, from its newest checkpoint (0)
#   OMP_NUM_THREADS   threads of each process (cores / N)
#   PYTHON            the interpreter
#
# One process per GPU, or N processes that share the CPU cores. SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and SIGHUP save and end.
# Exit code: 0 done, 75 stopped early: start it again, 76 training went wrong: look first, 2 wrong use, else a failure.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/prepare.sh"

case "${1:-}" in -h | --help) show_help && exit 0 ;; esac
[ $# -ge 2 ] || wrong_use "usage: bash launch/local.sh N CONFIG.yaml [section.key=value ...]"
ranks="$1"
case "$ranks" in "" | *[!0-9]* | 0) wrong_use "N=$ranks is not a number of processes. Use 1 or more." ;; esac
whole_number MAX_RESTARTS "${MAX_RESTARTS:-0}" 0 3
take_verb "${@:2}"

python="$(find_python)"
dir="$(run_dir ${words[@]+"${words[@]}"})" || exit
share_cores "$ranks"
if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && [ -e /sys/class/net/lo ]; then
    export GLOO_SOCKET_IFNAME=lo # all ranks are here: no need of a name or a network
fi
exec "$python" -m megatrain.lifecycle.agent "$dir" --standalone --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-0}" \
    -m megatrain "$verb" ${words[@]+"${words[@]}"}
