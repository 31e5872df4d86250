#!/usr/bin/env bash
# Tokenises a corpus as an array job: every task takes its share of the input files, and a job that waits for all of them
# merges their shards into the bytes that one process would have written. Example, 32 tasks:
#   MEGAMF_INPUT=/data/pile MEGAMF_TOKENIZER=/data/tokenizer.json MEGAMF_OUTPUT=/data/tokens/pile \
#     sbatch --array=0-31 slurm/prepare_data.sh
#
#   MEGAMF_INPUT            what `megamf prepare --input` takes, several separated by spaces
#   MEGAMF_TOKENIZER        tokenizer
#   MEGAMF_OUTPUT           path of the datasets without .bin and .idx, on a file system that all nodes share
#   MEGAMF_VALID_FRACTION   share of the documents for OUTPUT-valid               (0)
#   MEGAMF_PREPARE_OPTIONS  further options of `megamf prepare`, separated by spaces
#   MEGAMF_SHARDS           number of shards                                      (the number of tasks)
#   MEGAMF_MERGE_OPTIONS    options of sbatch for the job that merges, for instance --partition=long
#   MEGAMF_VENV             virtual environment to activate                       (.venv in the checkout)
#
# Files are not split, so give at least as many as there are tasks. When a task has failed, nothing is merged, and the
# shards of the others stay; to do it again alone (task 5 of 32) and then merge:
#   MEGAMF_SHARDS=32 MEGAMF_INPUT=... sbatch --array=5 slurm/prepare_data.sh
#SBATCH --job-name=megamf-prepare
#SBATCH --array=0-15
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
set -euo pipefail
: "${SLURM_SUBMIT_DIR:?start this with sbatch, from the checkout}"
# shellcheck source=environment.sh
source "$SLURM_SUBMIT_DIR/slurm/environment.sh"
: "${MEGAMF_INPUT:?set MEGAMF_INPUT to the files and folders to tokenise}"
: "${MEGAMF_TOKENIZER:?set MEGAMF_TOKENIZER to the tokenizer}"
: "${MEGAMF_OUTPUT:?set MEGAMF_OUTPUT to the path of the datasets without .bin and .idx}"
: "${SLURM_ARRAY_TASK_ID:?this is an array job: sbatch --array=0-15}"

export MEGAMF_SHARDS=${MEGAMF_SHARDS:-$SLURM_ARRAY_TASK_COUNT}
((SLURM_ARRAY_TASK_ID < MEGAMF_SHARDS)) ||
  die "task $SLURM_ARRAY_TASK_ID of $MEGAMF_SHARDS shards: tasks count from 0, as in --array=0-$((MEGAMF_SHARDS - 1))"

if ((SLURM_ARRAY_TASK_ID == SLURM_ARRAY_TASK_MIN && ${SLURM_RESTART_COUNT:-0} == 0)); then
  read -r -a merge_options <<<"${MEGAMF_MERGE_OPTIONS:-}"
  merge=$(sbatch --parsable --dependency="afterok:$SLURM_ARRAY_JOB_ID" --kill-on-invalid-dep=yes \
    "${merge_options[@]}" slurm/merge_data.sh)
  say "job $merge merges the shards when all tasks of job $SLURM_ARRAY_JOB_ID have done their work"
fi

read -r -a inputs <<<"$MEGAMF_INPUT"
read -r -a options <<<"${MEGAMF_PREPARE_OPTIONS:-}"
say "shard $SLURM_ARRAY_TASK_ID of $MEGAMF_SHARDS"
exec megamf prepare --input "${inputs[@]}" --tokenizer "$MEGAMF_TOKENIZER" --output "$MEGAMF_OUTPUT" \
  --workers "${SLURM_CPUS_PER_TASK:-1}" --shard "$SLURM_ARRAY_TASK_ID" --num-shards "$MEGAMF_SHARDS" "${options[@]}"
