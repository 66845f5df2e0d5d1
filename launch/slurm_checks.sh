#!/usr/bin/env bash
# Checks that jobs start, are pre-empted, signalled, cancelled and lose a rank under a real SLURM, on a cluster of two virtual nodes.
#
#   bash launch/slurm_checks.sh          about 4 minutes on 2 cores
#   bash launch/slurm_checks.sh --all    each with both scripts, and the slow ones; what follows goes to pytest
#
# Installs SLURM where it is missing (see virtual_cluster.sh), starts the cluster in a folder of its own, runs the tests marked `slurm`,
# and stops what it started. Exit code: 0 all passed, 77 where SLURM cannot be had on this machine, else a failure.
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
case "${1:-}" in -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0" && exit 0 ;; esac
marks="slurm and not slow"
if [ "${1:-}" = --all ]; then
    marks="slurm"
    shift
fi
if [ -z "${PYTHON:-}" ]; then
    bash "$root/launch/install.sh" test
    PYTHON="${MEGATRAIN_VENV:-$root/.venv}/bin/python"
fi
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
cd "$root"
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -m "$marks" tests/launch/test_slurm.py "$@"
