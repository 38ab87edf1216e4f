#!/usr/bin/env bash
# Pretrain a flow-matching model with shortcut rows on a Slurm cluster. The job resumes after time limits, preemption
# and lost nodes.
#
#   sbatch -N 4 slurm/pretrain_flux.sh                                       # flux_pretrain.yaml on 4 nodes of 8 GPUs
#   sbatch -N 16 slurm/pretrain_flux.sh flux_pretrain.yaml data=my_data.yaml engine.shard=8 train.micro_batch_size=2
#   bash slurm/pretrain_flux.sh recipes/configs/tiny_pretrain.yaml            # on this machine, without Slurm
#
# Options of sbatch's command line override the #SBATCH lines here. docs/cluster.md has the details.
#SBATCH --job-name=scfm-pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@600
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

# Shard the weights within each node, and replicate them over the nodes.
main flux_pretrain.yaml engine.shard=8 -- "$@"
