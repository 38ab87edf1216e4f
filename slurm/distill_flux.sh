#!/usr/bin/env bash
# Distil a flow-matching model on a Slurm cluster. The job resumes after time limits, preemption and lost nodes.
#
#   sbatch slurm/distill_flux.sh                                              # flux_dev_lora.yaml on 2 nodes of 8 GPUs
#   sbatch -N 4 slurm/distill_flux.sh flux_dev_full.yaml data=my_data.yaml train.global_batch_size=32 train.steps=3000
#   sbatch --array=0-1 slurm/distill_flux.sh first.yaml second.yaml           # task k of the array runs recipe k
#   bash slurm/distill_flux.sh recipes/configs/flux_dev_lora.yaml             # the same on this machine, without Slurm
#
# Options of sbatch's command line override the #SBATCH lines here. docs/cluster.md has the details.
#SBATCH --job-name=scfm-distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

# sbatch runs a copy of this file, so scfm's folder is the one from which the job was submitted.
root="$(dirname "$0")/.."
if [[ ! -f "$root/slurm/lib.sh" ]]; then root="${SLURM_SUBMIT_DIR:-$root}"; fi
root="${SCFM_ROOT:-$root}"
if [[ ! -f "$root/slurm/lib.sh" ]]; then
    echo "slurm: there is no slurm/lib.sh in '$root'. Submit from scfm's folder, or set SCFM_ROOT to it" >&2
    exit 2
fi
# shellcheck source=slurm/lib.sh
source "$root/slurm/lib.sh"

main flux_dev_lora.yaml -- "$@"
