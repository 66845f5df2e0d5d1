#!/usr/bin/env bash
# Checks the chat page in a headless Chromium: types Chinese, sees a streamed answer, stops one, presses a thumb, takes screenshots.
#
#   bash launch/browser_checks.sh                                          half a minute on 2 cores, beside the installation
#   MEGATRAIN_SCREENSHOTS=shots bash launch/browser_checks.sh              keeps the pictures in a folder; what follows goes to pytest
#
# Installs Debian's chromium and Chinese fonts where they are missing, and runs the tests marked `browser`. Another Chromium: CHROMIUM=PATH.
# Exit code: 0 all passed, 77 where a Chromium cannot be had on this machine, else a failure.
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/checks.sh"

# PACKAGE...: installs them, as root or by sudo; the last line of what went wrong where that cannot be.
install_packages() {
    local said
    if [ "$(id -u)" -eq 0 ]; then
        said="$( (apt-get update -qq && apt-get install -y -qq "$@") 2>&1)" && return
    else
        said="$( (sudo -n apt-get update -qq && sudo -n apt-get install -y -qq "$@") 2>&1)" && return
    fi
    echo "browser_checks.sh: $* cannot be installed here: $(printf '%s' "$said" | tail -n 1)" >&2
    return 1
}

read_options browser "$@"
if [ -z "${CHROMIUM:-}" ]; then
    CHROMIUM="$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)"
    if [ -z "$CHROMIUM" ]; then
        install_packages chromium || exit 77
        CHROMIUM="$(command -v chromium)"
    fi
fi
export CHROMIUM
if ! fc-list 2>/dev/null | grep -qiE 'cjk|wqy|noto sans sc'; then
    install_packages fonts-noto-cjk || echo "NOTE: without Chinese fonts the screenshots have boxes" >&2
fi
if [ -n "${MEGATRAIN_SCREENSHOTS:-}" ]; then
    mkdir -p -- "$MEGATRAIN_SCREENSHOTS"
    MEGATRAIN_SCREENSHOTS="$(CDPATH='' cd -- "$MEGATRAIN_SCREENSHOTS" && pwd)"
    export MEGATRAIN_SCREENSHOTS
fi
find_test_python
run_checks tests/serving/test_page.py
