# Sourced by slurm.sbatch and srun.sbatch: a job that hears signals while its step runs, goes back into the queue when it stopped early, and
# goes on with fewer nodes when it has lost some.

. "$root/launch/prepare.sh"

# What the ranks share, so that they obey only each other: srun gives it to them, and no file and no command line holds it.
export MEGATRAIN_SECRET="${MEGATRAIN_SECRET:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"

case "${SLURM_ARRAY_TASK_ID:-}" in # the plain number may stand for the whole array
    "") job="$SLURM_JOB_ID" ;;
    *) job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" ;;
esac
told="" # the signal that this script was told to stop by
code=0  # of the step that ran last

# Sets verb, words, python and dir of the job from the script's words.
begin_job() {
    local word filled=()
    for word in "$@"; do
        word="${word//%a/${SLURM_ARRAY_TASK_ID:-0}}"
        filled+=("${word//%j/$SLURM_JOB_ID}")
    done
    take_verb "${filled[@]}"
    whole_number MAX_RESTARTS "${MAX_RESTARTS:-3}" 0 3
    export MAX_RESTARTS="${MAX_RESTARTS:-3}"
    [ "$verb" = train ] || MAX_RESTARTS=0 # what fails once, fails again
    count="$SLURM_JOB_NUM_NODES"
    elastic="${MIN_NODES:-}"
    whole_number MIN_NODES "${MIN_NODES:-$count}" 1 "$count"
    MIN_NODES="${MIN_NODES:-$count}"
    # shellcheck disable=SC2207
    left=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
    python="$(find_python)"
    # SLURM signals the step itself (--signal, scancel, pre-emption); this script gets what is sent to it alone (--signal=B:, scancel
    # --batch), and some of the others. It must not die of any: its end is the end of the job.
    for word in TERM INT USR1 USR2 HUP; do
        trap "pass_on $word" "$word"
    done
    dir="$(run_dir ${words[@]+"${words[@]}"})" || exit
    before="$(cat "$dir/preempted" 2>/dev/null || true)"
    diverged="$(cat "$dir/diverged" 2>/dev/null || true)"
}

pass_on() {
    told="$1"
    scancel --signal=USR2 "$job" 2>/dev/null || true # to the step, which may have it already
}

# Runs a step of the job to its end, also when signals come; its exit code is in `code`.
run_step() {
    local step
    code=75
    [ -z "$told" ] || return 0 # by a signal that came before there was a step
    srun --mpi=none "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
        if [ -z "$told" ]; then
            wait "$step" || true
        else
            pass_on "$told" # again: SLURM may have been about to start the step
            sleep 3 &
            wait $! || true
        fi
    done
    code=0
    wait "$step" || code=$?
}

# RESTARTS: calls `step`, which runs the job's step on `count` nodes as srun's options in `where` say, again from the newest checkpoint where
# it has failed, up to so many times, and on the nodes that are left where some are lost.
run_job() {
    local attempt=0
    where=()
    guard=""
    [ -z "$elastic" ] || take_nodes || true # the run then says why it cannot be laid over all
    while
        [ -z "$elastic" ] || guard_first_node
        step
        [ "$code" -ne 0 ] && [ -z "$told" ] && ! stopped_early
    do
        find_nodes
        if [ "${#left[@]}" -lt "$count" ]; then
            take_nodes || { wait_in_queue && break; }
        elif [ "$attempt" -lt "$1" ]; then
            attempt=$((attempt + 1))
            say "the run failed ($code); starting it again from its newest checkpoint, $attempt of $1 times"
        else
            break
        fi
    done
    [ -z "$guard" ] || kill "$guard" 2>/dev/null || true
}

say() { echo "megatrain: $1"; }

# Sets `left`: the job's nodes that SLURM has not lost, and that nobody takes out of service. SLURM itself takes a node that is down from the job.
find_nodes() {
    local name state listed
    listed="$(sinfo --noheader --Node --nodes "$(of_job NodeList)" --format '%N %t' | sort -u || true)"
    [ -n "$listed" ] || return 0 # SLURM does not answer
    left=()
    while read -r name state; do
        case "$state" in *'*' | down* | drain* | drng* | fail* | unk*) ;; *) left+=("$name") ;; esac
    done <<<"$listed"
}

# Lays the run over as many of the nodes that are left as its config can be: sets `count` and `where`. False where these are too few.
take_nodes() {
    local fit=""
    [ "$verb" != train ] || fit="$(fitting_nodes "${#left[@]}")"
    [ -n "$fit" ] || return 1
    [ "$fit" -ne "$count" ] || return 0
    say "${#left[@]} of $count nodes are there; the run goes on with $fit of them, from its newest checkpoint"
    count="$fit"
    where=(--nodes "$count" --ntasks $((count * tasks)) --nodelist "$(IFS=, && printf '%s' "${left[*]:0:count}")")
}

# The job goes back into the queue, until it has as many nodes as it asks for: `code` is that of a run that is to be started again.
wait_in_queue() {
    say "${#left[@]} of $count nodes are there, and the run needs $MIN_NODES (MIN_NODES): it waits in the queue"
    code=75
}

# A job may outlive its nodes (sbatch --no-kill). But this script dies with the first one, and SLURM would let the others stand idle to the end
# of the job's time: so a step on another node puts the job back into the queue when the first is no more among its nodes.
guard_first_node() {
    [ "${#left[@]}" -gt 1 ] || return 0
    [ -z "$guard" ] || ! kill -0 "$guard" 2>/dev/null || return 0
    # shellcheck disable=SC2016
    srun --mpi=none --overlap --no-kill --nodes 1 --ntasks 1 --ntasks-per-node 1 --nodelist "${left[1]}" --output none --error none \
        bash -c 'trap "" USR1 USR2 HUP INT
            while sleep 10; do
                nodes="$(scontrol show job --oneliner "$1" | sed -n "s/.* NodeList=\([^ ]*\).*/\1/p")"
                [ -n "$nodes" ] || continue
                scontrol show hostnames "$nodes" | grep -qx "$2" || { scontrol requeue "$1" && exit; }
            done' guard "$job" "${left[0]}" 2>/dev/null &
    guard=$!
}

# MOST: the largest number of nodes, MIN_NODES to MOST, over which the config can be laid with `ranks` on each; nothing where there is none.
fitting_nodes() {
    "$python" -c '
import sys
from megatrain.config.load import load
from megatrain.config.validate import validate_step
most, least, ranks = map(int, sys.argv[1:4])
config = load(sys.argv[4], sys.argv[5:]).config
for nodes in range(most, least - 1, -1):
    try:
        validate_step(config, nodes * ranks)
    except ValueError:
        continue
    print(nodes)
    break
' "$1" "$MIN_NODES" "$ranks" "${words[@]}"
}

# What SLURM says of the job: KEY=... without the key.
of_job() { scontrol show job --oneliner "$job" 2>/dev/null | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }

# Whether the run was told to stop, and nothing is lost. srun gives the largest exit code of all: ranks that stopped also leave a file, and
# one that a signal met in its first tenth of a second, before it could hear it, has died of it. A run that could not save has failed (1).
stopped_early() {
    local now
    now="$(cat "$dir/diverged" 2>/dev/null || true)"
    if [ "$code" != 0 ] && [ -n "$now" ] && [ "$now" != "$diverged" ]; then
        code=76 # training went wrong: a person should look before it starts again
        return 1
    fi
    now="$(cat "$dir/preempted" 2>/dev/null || true)"
    case "$code" in
        0 | 1 | 2 | 76) return 1 ;;
        75 | 129 | 130 | 138 | 140) return 0 ;;
        143) # a launcher also ends the others so when one has failed
            [ -n "$told" ] || { [ -n "$now" ] && [ "$now" != "$before" ]; } && return 0
            case "$(of_job PreemptTime)" in "" | None | Unknown) return 1 ;; esac
            ;;
        *) [ -n "$now" ] && [ "$now" != "$before" ] ;;
    esac
}

# Ends the job: back into the queue where it stopped early. Not where SLURM ends the job already (COMPLETING): somebody cancelled it, or its
# time is over; or SLURM puts it back by itself, as after the grace time of a pre-emption.
end_job() {
    local state
    stopped_early || exit "$code"
    state="$(of_job JobState)"
    case "$state" in
        RUNNING | SIGNALING)
            scontrol requeue "$job" || echo "the job could not be put back into the queue; submit it again to go on" >&2
            ;;
        *) echo "SLURM ends this job by itself ($state): it is not put back into the queue from here" ;;
    esac
    exit 75
}
