#!/usr/bin/env bash
# Pretrains MoLM-700M-4B on 4 nodes of 8 GPUs.
# What to set: slurm/common.sh. Example:
#   MEGAMF_TOKENIZER=/data/tokenizer.json MEGAMF_TRAIN="/data/pile" sbatch slurm/pretrain_700m_4b.sh
#SBATCH --job-name=megamf-molm-700m-4b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=48:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
MEGAMF_PRESET=${MEGAMF_PRESET:-molm-700m-4b}
# Slurm runs a copy of this file from its spool; what it sources is found from where sbatch was called.
# shellcheck source=common.sh
source "${SLURM_SUBMIT_DIR:?start this with sbatch, from the checkout}/slurm/common.sh"
