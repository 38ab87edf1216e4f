#!/usr/bin/env bash
# srun starts this once on each node: `node.sh PYTHON... -- COMMAND ARGUMENTS...` runs `scfm COMMAND` under torchrun.
set -euo pipefail
python=()
while [[ "$1" != -- ]]; do
    python+=("$1")
    shift
done
shift
logs="$SCFM_LOGS/$1/${SLURMD_NODENAME:-$(hostname)}"
mkdir -p "$logs"
# Slurm signals every process of the job. The training processes handle the signals and decide when to stop. torchrun
# must ignore them: it would kill the training after 30 seconds. `--tee` writes one log file per rank; rank 0 of the
# node is also printed.
trap '' TERM USR1 USR2
exec "${python[@]}" -m recipes.launch \
    --nnodes="${SLURM_JOB_NUM_NODES:-1}" --node-rank="$SLURM_NODEID" --nproc-per-node="$SCFM_PROCESSES" \
    --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --signals-to-handle=SIGINT \
    --log-dir="$logs" --tee=3 --local-ranks-filter=0 \
    -m recipes.cli "$@"
