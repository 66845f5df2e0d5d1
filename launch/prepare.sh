# Sourced by the launch scripts: which Python, which run, how many threads. Runs on bash 3.2 (macOS).

root="${MEGATRAIN_ROOT:-$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)}"
export MEGATRAIN_SCRIPT="${MEGATRAIN_SCRIPT:-$0}" # the run keeps a copy of what started it

wrong_use() {
    printf '%s: %s\n' "$(basename -- "$MEGATRAIN_SCRIPT")" "$*" >&2
    exit 2
}

# NAME VALUE LEAST EXAMPLE: ends unless the variable's value is a whole number that is large enough.
whole_number() {
    case "$2" in "" | *[!0-9]*) wrong_use "$1=$2 is not a whole number. Set $1=$4, or leave it out." ;; esac
    [ "$2" -ge "$3" ] || wrong_use "$1=$2 is too small. Set $1=$4, or leave it out."
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

# The verb that the words begin with, `train` where they begin with a config; `words` holds the rest. Words: an array, never empty.
take_verb() {
    verb=train
    words=("$@")
    case "$1" in
        train | doctor | bench | eval | generate)
            verb="$1"
            words=("${@:2}")
            ;;
    esac
}

# Reads the config as the workers will (so that a mistake in it is told once, and at once) and prints the run's directory.
run_dir() {
    case "${1:-}" in
        *.yaml | *.yml) ;;
        *)
            [ "$verb" != train ] || wrong_use "'${1:-}' is no CONFIG.yaml."
            printf '%s' "runs/$verb"
            return
            ;;
    esac
    if [ "$verb" != train ]; then # options of a verb are not for the config
        local word overrides=("$1")
        for word in "${@:2}"; do
            case "$word" in -*) ;; *=*) overrides+=("$word") ;; esac
        done
        set -- "${overrides[@]}"
    fi
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
