# Sourced by slurm.sbatch and srun.sbatch: a job that hears signals while its step runs, and goes back into the queue when it stopped early.

. "$root/launch/prepare.sh"

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
    python="$(find_python)"
    dir="$(run_dir ${words[@]+"${words[@]}"})" || exit
    before="$(cat "$dir/preempted" 2>/dev/null || true)"
    # SLURM signals the step itself (--signal, scancel, pre-emption); this script gets what is sent to it alone (--signal=B:, scancel
    # --batch), and some of the others. It must not die of any: its end is the end of the job.
    for word in TERM INT USR1 USR2 HUP; do
        trap "pass_on $word" "$word"
    done
}

pass_on() {
    told="$1"
    scancel --signal=USR2 "$job" 2>/dev/null || true # to the step, which may have it already
}

# Runs a step of the job to its end, also when signals come; its exit code is in `code`.
run_step() {
    local step
    code=0
    srun --mpi=none "$@" &
    step=$!
    wait "$step" || code=$?
    while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
        code=0
        wait "$step" || code=$?
    done
}

# What SLURM says of the job: KEY=... without the key.
of_job() { scontrol show job --oneliner "$job" 2>/dev/null | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }

# Whether the run was told to stop. srun gives the largest exit code of all, which says little: ranks leave a file.
stopped_early() {
    local now
    [ "$code" -ne 0 ] || return 1
    now="$(cat "$dir/preempted" 2>/dev/null || true)"
    if [ -n "$told" ] || { [ -n "$now" ] && [ "$now" != "$before" ]; }; then return 0; fi
    case "$(of_job PreemptTime)" in "" | None | Unknown) return 1 ;; esac
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
