#!/usr/bin/env bash
# Runs the commands of README.md and docs/, page by page, each in a copy of the checkout of its own.
#
#   bash launch/docs_checks.sh                about 13 minutes on 2 cores beside .ci/run's other checks
#   bash launch/docs_checks.sh -k README.md   one page; everything goes to pytest
#
# A command is run as it is written unless a comment above its block says otherwise: tests/test_docs.py. Of gpu_checks.sh the
# form for a machine without a GPU is run. Exit code 0 if all could be run.
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/checks.sh"

read_options docs "$@"
find_test_python
run_checks tests/test_docs.py tests/launch/test_gpu_checks.py -n logical --maxprocesses 4
