# Sourced by local.sh and multinode.sh: which Python, how many threads, and torchrun with exit code 75. Runs on bash 3.2 (macOS).

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

wrong_use() {
    printf '%s: %s\n' "$(basename -- "$0")" "$*" >&2
    exit 2
}

# The header comment of the script is its help.
show_help() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        printf '%s' "$PYTHON"
    elif [ -x "${MEGATRAIN_VENV:-$root/.venv}/bin/python" ]; then
        printf '%s' "${MEGATRAIN_VENV:-$root/.venv}/bin/python"
    else
        command -v python || command -v python3 || wrong_use "no Python found; set PYTHON=/path/to/python, or run launch/install.sh."
    fi
}

# Reads the config as the workers will (so that a mistake in it is told once, and at once) and prints the run's directory.
log_dir() {
    "$python" -c '
import sys
from megatrain.config.load import load
try:
    print(load(sys.argv[1], sys.argv[2:]).config.log.dir)
except (OSError, ValueError) as error:
    sys.exit(f"megatrain: error: {error}")
' "$@"
}

# The cores of this machine are shared among its ranks: torchrun would give each a single thread.
share_cores() {
    [ -n "${OMP_NUM_THREADS:-}" ] && return
    OMP_NUM_THREADS="$("$python" -c '
import os, sys
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
print(max(1, cores // int(sys.argv[1])))
' "$1")"
    export OMP_NUM_THREADS
}

# torchrun, without its traceback of some 30 lines when it is told to stop: that is no error.
torchrun_quietly='
import sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main
try:
    main()
except SignalException as stop:
    sys.exit(128 + stop.sigval)
'

# torchrun with the given options, in the background so that SIGTERM reaches it at once; it passes it on to the workers, which save.
# torchrun exits 1 whatever its workers return: the file `preempted` in the run's directory says that they stopped with 75.
run_torchrun() {
    local marker="$1/preempted" child code=0
    shift
    rm -f "$marker"
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}" # seconds to finish a step and save
    "$python" -c "$torchrun_quietly" "$@" &
    child=$!
    trap 'kill -TERM "$child" 2>/dev/null || true' TERM
    trap 'kill -INT "$child" 2>/dev/null || true' INT
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, not the child
        code=0
        wait "$child" || code=$?
    done
    if [ "$code" -ne 0 ] && [ -e "$marker" ]; then
        exit 75
    fi
    exit "$code"
}
