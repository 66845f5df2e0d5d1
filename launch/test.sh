#!/usr/bin/env bash
# The whole check of a checkout: virtual environment, installation with the test tools, lint, types, import contracts, tests.
#
#   bash launch/test.sh                    about 12 minutes on 2 cores
#   bash launch/test.sh --all              the slow tests too, and the commands of the pages (launch/docs_checks.sh)
#   bash launch/test.sh tests/data -k bpe  everything after --all goes to pytest (`-n 0`: in one process, for a debugger)
#
# Tests that need a GPU run where there is one. Exit code 0 only if every check passed. Runs on bash 3.2 (macOS).
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
case "${1:-}" in
    -h | --help)
        sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac

slow="not slow and not docs"
if [ "${1:-}" = --all ]; then
    slow=""
    shift
fi

bash "$root/launch/install.sh" test
python="${MEGATRAIN_VENV:-$root/.venv}/bin/python"
cd "$root"

failed=0
PYTHON="$python" bash "$root/launch/lint.sh" || failed=1

gpu=""
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    gpu="not gpu"
fi
compiler=""
if ! command -v c++ >/dev/null 2>&1 && ! command -v g++ >/dev/null 2>&1 && ! command -v clang++ >/dev/null 2>&1; then
    compiler="not compiler"
    echo "NOTE: no C++ compiler here: the tests marked 'compiler' are left out (Debian, Ubuntu: sudo apt install g++)"
fi
if [ "${python#* }" != "$python" ]; then
    compiler="not compiler"
    echo "NOTE: torch.compile cannot link against a PyTorch whose path has a blank: the tests marked 'compiler' are left out"
fi
marks=""
for mark in "$slow" "$gpu" "$compiler" "not slurm and not network and not fault and not browser"; do
    if [ -n "$mark" ]; then marks="${marks:+$marks and }$mark"; fi
done

# KenLM's reader, which the n-gram scores are compared with; a source package, so it may not build everywhere.
if ! "$python" -c 'import kenlm' 2>/dev/null; then
    if [ -n "$compiler" ] || ! "$python" -m pip install -q kenlm >/dev/null 2>&1; then
        echo "NOTE: kenlm could not be installed here: the tests that compare n-gram scores with it are left out"
    fi
fi

# Three workers for two cores, since many tests wait for processes, and four at most (each keeps processes of its own waiting, about 2 GB);
# those that are done take tests from the end of another's, so that most files, with what their tests share, stay with one worker. One
# thread per process: the workers, simulated ranks and gloo processes share the cores already.
cores="$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)')"
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$python" -m pytest -n "$(((3 * cores + 1) / 2))" --maxprocesses 4 --dist worksteal -m "$marks" "$@" || failed=1
if [ "$failed" -ne 0 ]; then
    echo "launch/test.sh: FAILED" >&2
fi
exit "$failed"
