# Sourced by slurm.sbatch and srun.sbatch: a job that hears signals while its step runs, and goes back into the queue when it stopped early.

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
