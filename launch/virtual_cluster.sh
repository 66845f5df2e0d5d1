#!/usr/bin/env bash
# A SLURM cluster of two virtual nodes, n1 and n2, on this machine: a controller and two node daemons, for trying things out.
#
#   eval "$(bash launch/virtual_cluster.sh start)"     installs SLURM where it is missing (Debian, Ubuntu; root or sudo), starts it
#   sinfo; sbatch ...; squeue                           use it
#   bash launch/virtual_cluster.sh stop                 cancels what runs, ends the daemons, removes the folder
#
# All it writes is in one folder ($MEGATRAIN_CLUSTER, /tmp/megatrain-cluster-USER). Jobs of the partition `high` pre-empt those of
# `low`, the default. Exit code: 0 done, 77 where SLURM cannot be had on this machine, 1 another failure.
set -euo pipefail

folder="${MEGATRAIN_CLUSTER:-/tmp/megatrain-cluster-$(id -un)}"
export PATH="$PATH:/usr/sbin:/sbin"

fail() {
    printf 'virtual_cluster.sh: %s\n' "$1" >&2
    exit "${2:-1}"
}

install_slurm() {
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
    command -v apt-get >/dev/null || fail "SLURM is not installed, and this machine has no apt-get to install it with." 77
    local as=()
    [ "$(id -u)" -eq 0 ] || as=(sudo -n)
    echo "installing slurm-wlm and munge" >&2
    # network_checks.sh may install at the same time, and apt-get would not wait.
    flock /var/lib/apt ${as[@]+"${as[@]}"} env DEBIAN_FRONTEND=noninteractive \
        sh -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge' >"$folder/install.log" 2>&1 || fail "slurm-wlm and munge could not be installed: $(tail -n 1 "$folder/install.log")" 77
}

# Three ports in a row at which nobody listens.
free_ports() {
    local base tries port
    for tries in 1 2 3 4 5 6 7 8 9; do
        base=$((30000 + RANDOM % 2000))
        for port in "$base" $((base + 1)) $((base + 2)); do
            if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then continue 2; fi
        done
        printf '%s' "$base"
        return
    done
    fail "no free ports were found in $tries tries"
}

configure() {
    local host address port cores user
    host="$(hostname -s)"
    address="$(hostname -I | tr ' ' '\n' | grep -m 1 '^[0-9]*\.[0-9]*\.[0-9]*\.[0-9]*$')" ||
        fail "this machine has no address but loopback: nodes need one to meet at" 77
    port="$(free_ports)"
    cores="$(nproc)"
    user="$(id -un)"
    mkdir -p "$folder/state" "$folder/spool" "$folder/log" "$folder/munge"
    chmod 755 "$folder" "$folder/munge"
    dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 2>/dev/null
    chmod 400 "$folder/munge.key"
    cat >"$folder/slurm.conf" <<CONF
ClusterName=megatrain
SlurmctldHost=$host($address)
SlurmUser=$user
SlurmdUser=$user
SlurmctldPort=$port
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
UnkillableStepTimeout=300
SchedulerParameters=bf_interval=3,sched_interval=5
NodeName=n1 NodeHostname=$host NodeAddr=$address Port=$((port + 1)) CPUs=$((cores < 4 ? 4 : cores))
NodeName=n2 NodeHostname=$host NodeAddr=$address Port=$((port + 2)) CPUs=$((cores < 4 ? 4 : cores))
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
}

start() {
    if [ -e "$folder/slurm.conf" ] && SLURM_CONF="$folder/slurm.conf" scontrol ping 2>/dev/null | grep -q UP; then
        echo "it runs already" >&2
    else
        [ ! -e "$folder" ] || [ -e "$folder/slurm.conf" ] || [ -e "$folder/install.log" ] ||
            fail "$folder exists and is no cluster of this script"
        end_daemons
        rm -rf "$folder"
        mkdir -p "$folder"
        trap 'end_daemons' EXIT # until all is up
        install_slurm
        configure
        export SLURM_CONF="$folder/slurm.conf"
        munged --force --key-file="$folder/munge.key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
            --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" >&2
        slurmctld >&2
        slurmd -N n1 >&2
        slurmd -N n2 >&2
        local _
        for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
            [ "$(sinfo --noheader --Node --partition low --states idle 2>/dev/null | wc -l)" -eq 2 ] && break
            sleep 0.5
        done
        sinfo --noheader --Node --partition low --states idle | grep -q n2 || fail "the nodes do not come up; see $folder/log"
    fi
    trap - EXIT
    echo "nodes n1 and n2 are up; stop them with: bash launch/virtual_cluster.sh stop" >&2
    printf 'export SLURM_CONF=%q\n' "$folder/slurm.conf"
}

# Waits for the end of a daemon, by its pid file; ends it for good after 10 s.
finish() {
    local pid _
    pid="$(cat "$1" 2>/dev/null)" || return 0
    kill "$pid" 2>/dev/null || return 0
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.5
    done
    kill -KILL "$pid" 2>/dev/null || true
}

end_daemons() {
    local pid
    for pid in "$folder"/slurmd-n1.pid "$folder"/slurmd-n2.pid "$folder"/slurmctld.pid "$folder"/munge/pid; do finish "$pid"; done
}

stop() {
    [ -e "$folder/slurm.conf" ] || fail "no cluster was started in $folder"
    export SLURM_CONF="$folder/slurm.conf"
    local job _
    for job in $(squeue --noheader --format %A 2>/dev/null | sort -u); do scancel "$job" || true; done
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        [ -n "$(squeue --noheader 2>/dev/null)" ] || break
        sleep 1
    done
    end_daemons
    rm -rf "$folder"
}

case "${1:-}" in
    start) start ;;
    stop) stop ;;
    *)
        awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
        [ "${1:-}" = --help ] || exit 2
        ;;
esac
