# Sourced by docs_checks.sh, slurm_checks.sh, network_checks.sh, browser_checks.sh, faults.sh and fuzz.sh: what to run, and with which Python. Runs on bash 3.2 (macOS).

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

# MARK "$@": shows the script's header for --help; sets marks (--all: the slow tests too) and options, what is left for pytest.
read_options() {
    marks="$1 and not slow"
    options=("${@:2}")
    case "${2:-}" in
        -h | --help)
            awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
            exit 0
            ;;
        --all)
            marks="$1"
            options=("${@:3}")
            ;;
    esac
}

# FILE...: runs its tests, and what of pytest's options stands beside it.
run_checks() {
    cd "$root"
    OMP_NUM_THREADS=1 "$PYTHON" -m pytest -m "$marks" "$@" ${options[@]+"${options[@]}"}
}

# Sets PYTHON, unless the user has, to that of an environment with the test tools, which it installs.
find_test_python() {
    [ -z "${PYTHON:-}" ] || return 0
    bash "$root/launch/install.sh" test
    PYTHON="${MEGATRAIN_VENV:-$root/.venv}/bin/python"
}
