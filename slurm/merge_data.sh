#!/usr/bin/env bash
# Merges the shards of slurm/prepare_data.sh, which submits this; MEGAMF_* variables as there, MEGAMF_SHARDS included.
#SBATCH --job-name=megamf-merge
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
: "${SLURM_SUBMIT_DIR:?start this with sbatch, from the checkout}"
# shellcheck source=environment.sh
source "$SLURM_SUBMIT_DIR/slurm/environment.sh"
: "${MEGAMF_OUTPUT:?set MEGAMF_OUTPUT to the path of the datasets without .bin and .idx}"
: "${MEGAMF_SHARDS:?set MEGAMF_SHARDS to the number of shards}"
exec megamf merge-data --output "$MEGAMF_OUTPUT" --num-shards "$MEGAMF_SHARDS" \
  --valid-fraction "${MEGAMF_VALID_FRACTION:-0}"
