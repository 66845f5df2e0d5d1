#!/usr/bin/env bash
# Changes files of every kind that the program reads, 20 seconds a kind, four kinds at a time: tests/test_file_kinds.py.
#
#   bash launch/fuzz.sh                             about two minutes on 2 cores
#   bash launch/fuzz.sh -k arpa                     one kind; everything goes to pytest
#   MEGATRAIN_FUZZ_SECONDS=600 bash launch/fuzz.sh  ten minutes a kind; MEGATRAIN_FUZZ_SEED=N: the same cases again
#
# Exit code 0 if no changed file made a crash, a hang, or an error that is not ours, took memory without bound, or was taken for whole.
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/checks.sh"

read_options fault "$@"
find_test_python
run_checks tests/test_file_kinds.py -n 4
