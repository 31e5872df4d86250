# Sourced by the pretraining scripts of this folder after their #SBATCH lines and defaults.
#
#   MEGAMF_PRESET      packaged preset
#   MEGAMF_RUN_DIR     run directory, on a file system that all nodes share   (runs/PRESET)
#   MEGAMF_TOKENIZER   tokenizer that the data was prepared with
#   MEGAMF_TRAIN       training data: PREFIX or PREFIX:WEIGHT, several separated by spaces
#   MEGAMF_VALID       validation data, likewise (none)
#   MEGAMF_EP          ranks that share one copy of the experts               (1)
#   MEGAMF_DEEPSPEED   packaged DeepSpeed configuration or a JSON file        (zero1)
#   MEGAMF_OVERRIDES   further section.key=value, separated by spaces
#   MEGAMF_VENV        virtual environment to activate                        (.venv in the checkout)
#   MEGAMF_MASTER_PORT rendezvous port                                        (from the job id)
#
# Nodes, processes and cores come from the #SBATCH lines; sbatch's own options win over those, so the same script runs
# anywhere: sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=8 slurm/pretrain_8b.sh
#
# One process a rank: `srun` starts `megamf train`, which reads SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID. Before the
# time limit Slurm sends USR1 to every rank; they write a checkpoint and exit with 75, and the job puts itself back
# into the queue. A preempted or failed node does the same through --requeue, from the newest checkpoint.

MEGAMF_EXIT_AGAIN=75

die() {
  printf 'megamf: %s\n' "$*" >&2
  exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || die "start this with sbatch"
: "${MEGAMF_PRESET:?the script that sources common.sh sets it}"
: "${MEGAMF_TOKENIZER:?set MEGAMF_TOKENIZER to the tokenizer that the data was prepared with}"
: "${MEGAMF_TRAIN:?set MEGAMF_TRAIN to the training data: PREFIX[:WEIGHT] ...}"

# Slurm runs a copy of the script from its spool, so the checkout is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:?}"
MEGAMF_VENV=${MEGAMF_VENV:-.venv}
[[ -f $MEGAMF_VENV/bin/activate ]] || die "no virtual environment at $MEGAMF_VENV; set MEGAMF_VENV"
# shellcheck source=/dev/null
source "$MEGAMF_VENV/bin/activate"

# sources "PREFIX[:WEIGHT] ...": the list as YAML.
sources() {
  local item list=""
  for item in $1; do
    if [[ $item =~ ^(.+):([0-9.]+)$ ]]; then
      list+="{path: ${BASH_REMATCH[1]}, weight: ${BASH_REMATCH[2]}}, "
    else
      list+="{path: $item}, "
    fi
  done
  printf '[%s]' "${list%, }"
}

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${nodes%%$'\n'*}
# Jobs that share a node get different ports, and a requeued job the one it had.
export MASTER_PORT=${MEGAMF_MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
# srun takes the cores of a task from this variable, not from sbatch's option of the same name.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

arguments=(
  --preset "$MEGAMF_PRESET"
  "run.dir=${MEGAMF_RUN_DIR:-runs/$MEGAMF_PRESET}"
  "data.tokenizer=$MEGAMF_TOKENIZER"
  "data.train=$(sources "$MEGAMF_TRAIN")"
  "parallel.ep=${MEGAMF_EP:-1}"
  "deepspeed=${MEGAMF_DEEPSPEED:-zero1}"
  logging.progress=false
)
if [[ -n ${MEGAMF_VALID:-} ]]; then arguments+=("data.valid=$(sources "$MEGAMF_VALID")"); fi
read -r -a overrides <<<"${MEGAMF_OVERRIDES:-}"

echo "megamf: $MEGAMF_PRESET on ${SLURM_NTASKS:-?} ranks, ${SLURM_JOB_NUM_NODES:-?} nodes, rendezvous $MASTER_ADDR:$MASTER_PORT," \
  "start ${SLURM_RESTART_COUNT:-0}"
code=0
# A rank that crashes takes the others with it after a minute, by --wait; --kill-on-bad-exit would do it at once, and with
# it kill ranks that are about to exit with 75 like their neighbour.
srun --wait=60 megamf train "${arguments[@]}" "${overrides[@]}" || code=$?

if ((code == MEGAMF_EXIT_AGAIN)); then
  echo "megamf: stopped early with a complete checkpoint; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
