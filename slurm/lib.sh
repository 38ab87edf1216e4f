# shellcheck shell=bash
# Functions of the job scripts: `main DEFAULTS... -- ARGUMENTS...`. Optional settings, as environment variables:
#
#   SCFM_CLUSTER          source slurm/clusters/NAME.env: modules, network, scratch and container of a site
#   SCFM_SECRETS          a file of NAME=value lines that only you may read (chmod 600): keys for storage, W&B, the hub
#   SCFM_PYTHON           the interpreter; default: .venv/bin/python of scfm's folder, else python3
#   SCFM_PROCESSES        processes per node; default: the number of its GPUs
#   SCFM_RENDEZVOUS_HOST  host of the rendezvous; default: the first node of the job
#   SCFM_RENDEZVOUS_PORT  port of the rendezvous; default: computed from the job's id
#   SCFM_RETRIES          how many times in a row a run may fail without a new checkpoint; default: 3
#   SCFM_HEALTH           0: no health check before the run

main() {
    local defaults=()
    while [[ "$1" != -- ]]; do
        defaults+=("$1")
        shift
    done
    shift
    local here
    here="$(dirname "${BASH_SOURCE[0]}")"
    load_settings "$here"
    choose_recipe "$@"
    if ((${#arguments[@]} == 0)) || [[ "${arguments[0]}" == *=* ]]; then arguments=("${defaults[@]}" "${arguments[@]}"); fi
    local run_dir
    run_dir="$("${python[@]}" -m recipes.cli job run-dir "${arguments[@]}")"
    if is_own_job; then
        run_job "$here" "$run_dir"
    else
        if [[ -n "${SLURM_JOB_ID:-}" ]]; then
            echo "slurm: this is not the batch script of job $SLURM_JOB_ID: training on this machine only, without restarts." \
                "For a job of its own use sbatch; from a batch script, \`exec bash $0\`" >&2
        fi
        run_here
    fi
}

# Whether this shell is the batch script of the Slurm job, which may be requeued. The shells of salloc and of a notebook's
# job have the variables of a job too. Slurm runs a copy of the script with this name; SLURM_TASK_PID is its process.
is_own_job() {
    [[ -n "${SLURM_JOB_ID:-}" ]] && [[ "${0##*/}" == slurm_script || "${SLURM_TASK_PID:-}" == "$$" ]]
}

# Sets interpreter, site and secrets. The site's file may set arrays: `launcher`, the command that runs the interpreter, for
# example in a container; `srun_flags`, options of srun; `node_python`, another interpreter for the nodes.
load_settings() {
    launcher=() srun_flags=() node_python=()
    if [[ -n "${SCFM_CLUSTER:-}" ]]; then
        local site="$1/clusters/$SCFM_CLUSTER.env"
        if [[ "$SCFM_CLUSTER" == */* || ! -f "$site" ]]; then
            fail "SCFM_CLUSTER=$SCFM_CLUSTER: there is no slurm/clusters/$SCFM_CLUSTER.env. Copy example.env to that name"
        fi
        # shellcheck source=slurm/clusters/example.env
        source "$site"
    fi
    if [[ -n "${SCFM_SECRETS:-}" ]]; then read_secrets "$SCFM_SECRETS"; fi
    local interpreter="${SCFM_PYTHON:-}"
    if [[ -z "$interpreter" ]]; then
        if [[ -x "$1/../.venv/bin/python" ]]; then interpreter="$1/../.venv/bin/python"; else interpreter=python3; fi
    fi
    python=("${launcher[@]}" "$interpreter")
    if ! "${python[@]}" -c "import recipes.cli"; then
        fail "'${python[*]}' cannot import scfm. Run \`make setup\` in scfm's folder, or set SCFM_PYTHON"
    fi
    if ((${#node_python[@]} == 0)); then node_python=("${python[@]}"); fi
}

# Exports NAME=value lines. The values are not evaluated.
read_secrets() {
    if [[ ! -r "$1" ]]; then fail "SCFM_SECRETS=$1 cannot be read"; fi
    local mode
    mode="$(stat -L -c %a "$1")"
    if [[ "$mode" != ?00 ]]; then fail "SCFM_SECRETS=$1 can be read by others (mode $mode): chmod 600 it"; fi
    local line
    while IFS= read -r line || [[ -n "$line" ]]; do
        if [[ "$line" =~ ^(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]]; then
            export "${BASH_REMATCH[2]}=${BASH_REMATCH[3]}"
        elif [[ -n "$line" && "$line" != \#* ]]; then
            fail "SCFM_SECRETS=$1 has a line that is not NAME=value"
        fi
    done <"$1"
}

# Sets `arguments`: RECIPE OVERRIDES... The leading words without `=` are recipes. With several recipes, task k of a job
# array runs recipe k, counted from the first task of the array.
choose_recipe() {
    local recipes=()
    while (($#)) && [[ "$1" != *=* && "$1" != -* ]]; do
        recipes+=("$1")
        shift
    done
    local word
    for word in "$@"; do
        if [[ "$word" == -* ]]; then fail "$word: only section.key=value may follow the recipe"; fi
    done
    if ((${#recipes[@]} == 0)); then
        arguments=("$@")
        return
    fi
    local place=0
    if ((${#recipes[@]} > 1)); then
        if [[ -z "${SLURM_ARRAY_TASK_ID:-}" ]]; then
            fail "${#recipes[@]} recipes need a job array: sbatch --array=0-$((${#recipes[@]} - 1)) ..."
        fi
        place=$((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:-0}))
        if ((place >= ${#recipes[@]})); then fail "task $SLURM_ARRAY_TASK_ID: there are only ${#recipes[@]} recipes"; fi
    fi
    arguments=("${recipes[place]}" "$@")
}

run_here() {
    local processes="${SCFM_PROCESSES:-}"
    if [[ -z "$processes" ]]; then
        processes="$("${python[@]}" -c "import torch; print(max(1, torch.cuda.device_count()))")"
    fi
    exec "${python[@]}" -m recipes.launch --standalone --nproc-per-node="$processes" \
        -m recipes.cli train "${arguments[@]}"
}

run_job() {
    local here="$1" run_dir="$2" job="$SLURM_JOB_ID" restart="${SLURM_RESTART_COUNT:-0}"
    local gpus="${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-1}}"
    export SCFM_PROCESSES="${SCFM_PROCESSES:-${gpus##*:}}" # may be "a100:8"
    local hosts
    hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    export MASTER_ADDR="${SCFM_RENDEZVOUS_HOST:-${hosts%%$'\n'*}}"
    # A different port for each start, because the last one may still be in use.
    local port="${SCFM_RENDEZVOUS_PORT:-$((20000 + (job * 16 + restart * 2) % 12000))}"
    export SLURM_EXPORT_ENV=ALL # otherwise `sbatch --export=...` hides these variables from the nodes
    export SCFM_LOGS="$run_dir/logs/job-$job.$restart"
    echo "job $job, start $((restart + 1)), ${SLURM_JOB_NUM_NODES:-1} nodes ($SLURM_JOB_NODELIST), $SCFM_PROCESSES processes each"
    echo "run $run_dir, logs of all nodes and ranks in $SCFM_LOGS"

    # On SIGTERM this shell waits for the processes to end, so that it can requeue the job.
    trap : TERM USR1 USR2
    local code=0
    if [[ "${SCFM_HEALTH:-1}" != 0 ]]; then step "$here" "$((port + 1))" health "${arguments[@]}" || code=$?; fi
    if ((code == 0)); then step "$here" "$port" train "${arguments[@]}" || code=$?; fi

    # If Slurm ended the job, requeue it only after a time limit. Otherwise it was cancelled, or Slurm has requeued it
    # already.
    local cancelled=() shown alone verdict
    ask_slurm "$job"
    # While Slurm sends a signal the state is SIGNALING. Without an answer of scontrol the job counts as not cancelled.
    case "$shown" in
    '' | *JobState=RUNNING* | *JobState=SIGNALING* | *Reason=TimeLimit*) ;;
    *) cancelled=(--cancelled) ;;
    esac
    verdict="$("${python[@]}" -m recipes.cli job verdict "$run_dir" --exit-code "$code" \
        --retries "${SCFM_RETRIES:-3}" "${cancelled[@]}")"
    echo "job $job: $verdict"
    case "$verdict" in
    finished) exit 0 ;;
    busy) exit 75 ;; # EX_TEMPFAIL of sysexits.h; `job run-dir` ends with it too
    requeue)
        if scontrol requeue "$alone"; then exit 0; fi
        fail "this cluster does not permit a job to requeue itself. The same sbatch command resumes from the last checkpoint"
        ;;
    *) exit $((code == 0 ? 1 : code)) ;;
    esac
}

# Sets `shown`, what Slurm says of this job alone, and `alone`, its name for a requeue. One task of a job array has the number of the
# whole array: scontrol shows all tasks for this number, and would requeue all of them. (A job that was submitted from within an array
# may have the variables of that array, but has another number.)
ask_slurm() {
    shown="$(scontrol --oneliner show job "$1" | grep "^JobId=$1 " || true)"
    alone="$1"
    if [[ "${SLURM_ARRAY_JOB_ID:-}" == "$1" ]]; then alone="$1_$SLURM_ARRAY_TASK_ID"; fi
}

# Runs one task per node, which is torchrun, and waits for its end, also after a signal to this shell.
#
# The task gets all CPUs and all memory that the job has on its node: srun gives them if nothing asks for less. These variables
# would: the CPUs of one of the job's tasks, of which it may have several a node; and, if somebody typed sbatch in an interactive
# job, what belongs to that job. Some sites bind a task to one core unless told otherwise.
step() {
    local here="$1"
    export MASTER_PORT="$2"
    shift 2
    unset SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK SLURM_TRES_PER_TASK \
        "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" "${!SLURM_MEM_PER_@}"
    srun --cpu-bind=none "${srun_flags[@]}" \
        --kill-on-bad-exit=1 --ntasks="${SLURM_JOB_NUM_NODES:-1}" --ntasks-per-node=1 \
        bash "$here/node.sh" "${node_python[@]}" -- "$@" &
    local child=$! code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    return "$code"
}

fail() {
    echo "slurm: $*" >&2
    exit 2
}
