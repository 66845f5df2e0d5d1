#!/usr/bin/env bash
# Checks runs over several machines: hosts with names and addresses of their own, made of network namespaces on this one.
#
#   bash launch/network_checks.sh          about 3 minutes on 2 cores
#   bash launch/network_checks.sh --all    the slow ones too; what follows goes to pytest
#
# Two hosts train, one is lost in mid-step, the error names it, it comes back; also with fewer nodes. Installs iproute2 where it is
# missing; needs root on Linux. Exit code: 0 all passed, 77 where network namespaces cannot be made, else a failure.
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/checks.sh"

read_options network "$@"
cannot() {
    echo "network_checks.sh: $*" >&2
    exit 77
}

export PATH="$PATH:/usr/sbin:/sbin"
[ "$(uname -s)" = Linux ] || cannot "network namespaces are of Linux; this is $(uname -s)."
[ "$(id -u)" -eq 0 ] || cannot "this needs root: sudo bash launch/network_checks.sh"
if ! command -v ip >/dev/null; then
    command -v apt-get >/dev/null || cannot "there is no ip command, and no apt-get to install iproute2 with."
    # virtual_cluster.sh may install at the same time, and apt-get would not wait.
    flock /var/lib/apt sh -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends iproute2' >/dev/null 2>&1 ||
        cannot "iproute2 could not be installed."
fi
{ ip netns add "megatrain-$$" && ip netns del "megatrain-$$"; } 2>/dev/null || cannot "this machine forbids network namespaces."

find_test_python
run_checks tests/launch/test_network.py
