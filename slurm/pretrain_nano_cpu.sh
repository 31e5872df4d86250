#!/usr/bin/env bash
# Pretrains the nano model on two CPU nodes, one process each: the same path as the large runs.
# What to set: slurm/common.sh. Example:
#   MEGAMF_TOKENIZER=data/tokenizer.model MEGAMF_TRAIN=data/stdlib MEGAMF_EP=2 sbatch slurm/pretrain_nano_cpu.sh
#SBATCH --job-name=megamf-nano
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=01:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
MEGAMF_PRESET=${MEGAMF_PRESET:-nano}
# Slurm runs a copy of this file from its spool; what it sources is found from where sbatch was called.
# shellcheck source=common.sh
source "${SLURM_SUBMIT_DIR:?start this with sbatch, from the checkout}/slurm/common.sh"
