#!/usr/bin/env bash
# Checks that jobs start, are pre-empted, signalled, cancelled and lose a rank under a real SLURM, on a cluster of two virtual nodes.
#
#   bash launch/slurm_checks.sh          about 4 minutes on 2 cores
#   bash launch/slurm_checks.sh --all    each with both scripts, and the slow ones; what follows goes to pytest
#
# Installs SLURM where it is missing (see virtual_cluster.sh), starts the cluster in a folder of its own, runs the tests marked `slurm`,
# and stops what it started. Exit code: 0 all passed, 77 where SLURM cannot be had on this machine, else a failure.
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/checks.sh"

read_options slurm "$@"
find_test_python
MEGATRAIN_CLUSTER="$(mktemp -d)/cluster"
export MEGATRAIN_CLUSTER

cleanup() {
    bash "$root/launch/virtual_cluster.sh" stop || true
    rm -rf "$(dirname -- "$MEGATRAIN_CLUSTER")"
}

chmod 755 "$(dirname -- "$MEGATRAIN_CLUSTER")" # munge refuses a socket that others cannot reach
started="$(bash "$root/launch/virtual_cluster.sh" start)" || { code=$? && rm -rf "$(dirname -- "$MEGATRAIN_CLUSTER")" && exit "$code"; }
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
eval "$started"
run_checks tests/launch/test_slurm.py
