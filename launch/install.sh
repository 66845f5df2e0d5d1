#!/usr/bin/env bash
# Makes the virtual environment that the other scripts use, and installs megatrain with pinned packages into it.
#
#   bash launch/install.sh          what quickstart.sh needs: megatrain[data]
#   bash launch/install.sh test     with the test tools
#
# The environment is .venv in the repository, or $MEGATRAIN_VENV; the interpreter is $PYTHON, or the first of python3, python3.13 ...
# python3.10 that is new enough. Where it all stands already, it takes no time. Runs on bash 3.2 (macOS).
set -euo pipefail

extra="${1:-}"
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${MEGATRAIN_VENV:-$root/.venv}"
constraints="$root/launch/constraints.txt"
torch_version="$(sed -n 's/^torch==//p' "$constraints")"
cpu_index="https://download.pytorch.org/whl/cpu"

fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

case "$extra" in
    "" | test | dev) ;;
    *) fail "unknown extra '$extra'. Use nothing, test or dev." ;;
esac

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || fail "PYTHON=$PYTHON does not run, or is older than Python 3.10."
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if new_enough "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "megatrain needs Python 3.10 or newer; python3 here is $(python3 --version 2>&1 || true).
Install one (Debian, Ubuntu: sudo apt install python3 python3-venv), or name one: PYTHON=/path/to/python3.12 bash launch/..."
}

make_venv() {
    if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        fail "$venv exists and is no virtual environment. Move it away, or set MEGATRAIN_VENV to another place."
    fi
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 || fail "$python cannot make virtual environments: ensurepip is missing.
Debian, Ubuntu: sudo apt install python3-venv   (for a versioned python3.X: python3.X-venv)"
    echo "making the virtual environment $venv ($("$python" --version))"
    "$python" -m venv --clear "$venv" || fail "'$python -m venv $venv' failed."
}

# pip into a log; a line for each download so that a person sees it move. Returns pip's exit code.
pip_install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check -c "$constraints" "$@" 2>&1 |
        tee -a "$log" | awk '/^ *Downloading |^Installing collected/ { sub(/^ +/, ""); print "    " substr($0, 1, 100); fflush() }'
}

pip_install_or_fail() {
    pip_install "$@" && return
    tail -n 15 "$log" >&2
    fail "pip could not install what is needed; the whole output is in $log"
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

install_torch() {
    if "$venv/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch_version')" >/dev/null 2>&1; then
        return
    fi
    if [ "$(uname -s)" != Linux ] || has_gpu; then # elsewhere, the default wheel is the right one
        echo "installing PyTorch $torch_version"
        pip_install_or_fail "torch==$torch_version"
        return
    fi
    echo "no GPU here: looking for PyTorch's CPU wheel ($torch_version+cpu)"
    pip_install "torch==$torch_version+cpu" && return
    echo "    not among pip's configured sources: asking $cpu_index"
    pip_install "torch==$torch_version+cpu" --extra-index-url "$cpu_index" --retries 1 --timeout 20 && return
    echo "NOTE: no CPU wheel of PyTorch for this interpreter was found, here or at $cpu_index."
    echo "      Taking the default wheel, which brings several gigabytes of CUDA packages that this machine does not use."
    pip_install_or_fail "torch==$torch_version"
}

# What the installation depends on; the root, because it is editable and must point at this very checkout.
fingerprint() { { cat "$root/setup.cfg" "$root/pyproject.toml" "$constraints" && printf '%s' "$root"; } | cksum; }

stamp="$venv/megatrain-installed${extra:+-$extra}"
wanted="$(fingerprint)"
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && [ -x "$venv/bin/python" ]; then
    exit 0
fi

python="$(find_python)"
make_venv
rm -f "$venv"/megatrain-installed*
log="$venv/install.log"
: >"$log"
pip_install_or_fail setuptools # pinned, and used to build megatrain itself: no second download for an isolated build
install_torch
echo "installing megatrain and its pinned packages"
pins=()
if "$venv/bin/python" -c "import torch; raise SystemExit('+cpu' not in torch.__version__)" >/dev/null 2>&1; then
    pins=(-c "$root/launch/constraints-cpu.txt")
fi
pip_install_or_fail --no-build-isolation ${pins[@]+"${pins[@]}"} -e "$root[${extra:-data}]"
printf '%s\n' "$wanted" >"$stamp"
if [ -n "$extra" ]; then
    printf '%s\n' "$wanted" >"$venv/megatrain-installed" # the extras include the rest
fi
