# shellcheck shell=bash
# What the job scripts share: `main DEFAULTS... -- ARGUMENTS...`. Settings, all of them optional, by environment:
#
#   SCFM_CLUSTER          slurm/clusters/NAME.env is sourced: modules, network, scratch, container of a site
#   SCFM_SECRETS          a file of NAME=value lines that only you may read (chmod 600): keys for storage, W&B, the hub
#   SCFM_PYTHON           the interpreter; default .venv/bin/python of scfm's folder, else python3
#   SCFM_PROCESSES        processes a node; default: its GPUs
#   SCFM_RENDEZVOUS_HOST  where the processes meet; default: the job's first node
#   SCFM_RENDEZVOUS_PORT  default: by the job's number
#   SCFM_RETRIES          how often in a row a run may break off without a new checkpoint; default 3
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
    if [[ -z "${SLURM_JOB_ID:-}" ]]; then
        run_here
    else
        run_job "$here" "$run_dir"
    fi
}

# Interpreter, site and secrets. `launcher` may be set by the site's file: what runs the interpreter on a node (a container).
load_settings() {
    launcher=()
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
        fail "'${python[*]}' has no scfm. Run \`make setup\` in scfm's folder, or set SCFM_PYTHON"
    fi
}

# NAME=value lines, taken as they are: nothing in them is run.
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

# Sets `arguments`: RECIPE OVERRIDES... as given. Leading words without `=` are recipes; task k of a job array takes recipe k, counted from the array's first task.
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
            fail "${#recipes[@]} recipes are for a job array: sbatch --array=0-$((${#recipes[@]} - 1)) ..."
        fi
        place=$((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:-0}))
        if ((place >= ${#recipes[@]})); then fail "task $SLURM_ARRAY_TASK_ID: there are ${#recipes[@]} recipes"; fi
    fi
    arguments=("${recipes[place]}" "$@")
}

run_here() {
    local processes="${SCFM_PROCESSES:-}"
    if [[ -z "$processes" ]]; then
        processes="$("${python[@]}" -c "import torch; print(max(1, torch.cuda.device_count()))")"
    fi
    exec "${python[@]}" -m torch.distributed.run --standalone --nproc-per-node="$processes" \
        -m recipes.cli train "${arguments[@]}"
}

run_job() {
    local here="$1" run_dir="$2" job="$SLURM_JOB_ID" restart="${SLURM_RESTART_COUNT:-0}"
    local gpus="${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-1}}"
    export SCFM_PROCESSES="${SCFM_PROCESSES:-${gpus##*:}}" # "a100:8"
    local hosts
    hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    export MASTER_ADDR="${SCFM_RENDEZVOUS_HOST:-${hosts%%$'\n'*}}"
    # Another port at each start, since the last one's may not be free again yet.
    local port="${SCFM_RENDEZVOUS_PORT:-$((20000 + (job * 16 + restart * 2) % 12000))}"
    export SLURM_EXPORT_ENV=ALL                            # else `sbatch --export=...` keeps all of this from the nodes
    export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun takes it from the job no more, since 22.05
    export SCFM_LOGS="$run_dir/logs/job-$job.$restart"
    echo "job $job, start $((restart + 1)), ${SLURM_JOB_NUM_NODES:-1} nodes ($SLURM_JOB_NODELIST), $SCFM_PROCESSES processes each"
    echo "run $run_dir, logs of all nodes and ranks in $SCFM_LOGS"

    # The batch shell outlives a SIGTERM for the processes' end, so that it can say what is to be done.
    trap : TERM USR2
    local code=0
    if [[ "${SCFM_HEALTH:-1}" != 0 ]]; then step "$here" "$((port + 1))" health "${arguments[@]}" || code=$?; fi
    if ((code == 0)); then step "$here" "$port" train "${arguments[@]}" || code=$?; fi

    # Where Slurm itself ends the job, only a time limit is a reason to go on: else it was cancelled, or is requeued already.
    local cancelled=() shown verdict
    shown="$(scontrol --oneliner show job "$job" || true)"
    # While a signal is on its way the state is SIGNALING; no answer is no reason either.
    case "$shown" in
    '' | *JobState=RUNNING* | *JobState=SIGNALING* | *Reason=TimeLimit*) ;;
    *) cancelled=(--cancelled) ;;
    esac
    verdict="$("${python[@]}" -m recipes.cli job verdict "$run_dir" --exit-code "$code" \
        --retries "${SCFM_RETRIES:-3}" "${cancelled[@]}")"
    echo "job $job: $verdict"
    case "$verdict" in
    finished) exit 0 ;;
    requeue)
        if scontrol requeue "$job"; then exit 0; fi
        fail "this cluster lets no job requeue itself. The same sbatch command goes on from the last checkpoint"
        ;;
    *) exit $((code == 0 ? 1 : code)) ;;
    esac
}

# One task a node, which is a torchrun; waited for even after a signal to this shell.
step() {
    local here="$1"
    export MASTER_PORT="$2"
    shift 2
    srun --kill-on-bad-exit=1 --ntasks="${SLURM_JOB_NUM_NODES:-1}" --ntasks-per-node=1 \
        bash "$here/node.sh" "${python[@]}" -- "$@" &
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
