#!/usr/bin/env bash
# Breaks training runs on purpose, one way after the other, checks what is promised for each, and writes the table of docs/reliability.md.
#
#   bash launch/faults.sh            all of them
#   bash launch/faults.sh --quick    without the long ones (random kills, the soak)
#   bash launch/faults.sh -k disk    what follows goes to pytest
#
#   MEGATRAIN_FAULTS           file of the rows, a line of JSON each (runs/faults.jsonl)
#   MEGATRAIN_FAULTS_SECONDS   limit of all together (4 hours); each test has one of its own
#
# Only the whole run without options writes the page; any other shows the table of all rows that there are. Exit code 0 if all held.
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/checks.sh"

quick=""
if [ "${1:-}" = --quick ]; then
    quick=yes
    shift
    read_options fault "$@"
elif [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
    read_options fault "$@"
else
    read_options fault --all "$@"
fi
find_test_python
MEGATRAIN_FAULTS="${MEGATRAIN_FAULTS:-$root/runs/faults.jsonl}"
export MEGATRAIN_FAULTS

whole=""
if [ -z "$quick" ] && [ $# -eq 0 ]; then
    whole=yes
    rm -f "$MEGATRAIN_FAULTS"
fi
code=0
run_checks tests -v -s -p no:xdist --session-timeout "${MEGATRAIN_FAULTS_SECONDS:-14400}" || code=$?
"$PYTHON" "$root/tests/faults/promises.py" "$MEGATRAIN_FAULTS" ${whole:+"$root/docs/reliability.md"}
exit "$code"
