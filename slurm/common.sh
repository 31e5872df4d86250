# Sourced by the pretraining scripts of this folder after their #SBATCH lines and defaults.
#
#   MEGAMF_PRESET        packaged preset
#   MEGAMF_RUN_DIR       run directory, on a file system that all nodes share   (runs/PRESET)
#   MEGAMF_TOKENIZER     tokenizer that the data was prepared with
#   MEGAMF_TRAIN         training data: PREFIX or PREFIX:WEIGHT, several separated by spaces
#   MEGAMF_VALID         validation data, likewise (none)
#   MEGAMF_EP            ranks that share one copy of the experts               (1)
#   MEGAMF_CONTEXT       ranks that share one sequence                          (1)
#   MEGAMF_DEEPSPEED     packaged DeepSpeed configuration or a JSON file        (zero1)
#   MEGAMF_OVERRIDES     further section.key=value, separated by spaces
#   MEGAMF_VENV          virtual environment to activate                        (.venv in the checkout)
#   MEGAMF_MASTER_PORT   rendezvous port                                        (from the job id)
#   MEGAMF_MAX_FAILURES  starts in a row without a new checkpoint that end the job (3)
#   MEGAMF_GRACE         seconds that the other ranks have to end once one has  (60)
#
# Nodes, processes and cores come from the #SBATCH lines; sbatch's own options win over those, so the same script runs
# anywhere: sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=8 slurm/pretrain_8b.sh
#
# One process a rank: `srun` starts `megamf train`, which reads SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID. In the log
# every line begins with its rank.
#
# How the job ends, and what happens then:
#   time limit near      Slurm sends USR1 to every rank (--signal): checkpoint, exit 75, the job puts itself back in the queue
#   preemption           the same with TERM, if the partition grants a GraceTime that is enough for a checkpoint
#   a node dies          Slurm puts the job back (--requeue)
#   a rank dies, exit 1  the other ranks end or are killed after MEGAMF_GRACE seconds, and the job puts itself back
#   exit 2               a mistake that the next start would meet again: the job has failed
#   scancel              the ranks write a checkpoint if KillWait is long enough; the job stays cancelled
# Every start goes on from the newest checkpoint. Starts that bring none and were not asked to stop are counted in
# RUN_DIR/slurm-starts; after MEGAMF_MAX_FAILURES in a row the job has failed. Another sbatch counts from zero.

: "${SLURM_SUBMIT_DIR:?start this with sbatch, from the checkout}"
# shellcheck source=environment.sh
source "$SLURM_SUBMIT_DIR/slurm/environment.sh"

: "${MEGAMF_PRESET:?the script that sources common.sh sets it}"
: "${MEGAMF_TOKENIZER:?set MEGAMF_TOKENIZER to the tokenizer that the data was prepared with}"
: "${MEGAMF_TRAIN:?set MEGAMF_TRAIN to the training data: PREFIX[:WEIGHT] ...}"
MEGAMF_RUN_DIR=${MEGAMF_RUN_DIR:-runs/$MEGAMF_PRESET}
MEGAMF_MAX_FAILURES=${MEGAMF_MAX_FAILURES:-3}
MEGAMF_GRACE=${MEGAMF_GRACE:-60}
for name in MEGAMF_MAX_FAILURES MEGAMF_GRACE; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || die "$name=${!name} is not a whole number above 0"
done
starts_file=$MEGAMF_RUN_DIR/slurm-starts

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

# newest_step: the step of the newest complete checkpoint, 0 where there is none.
newest_step() {
  local name=""
  if [[ -f $MEGAMF_RUN_DIR/checkpoints/latest ]]; then read -r name <"$MEGAMF_RUN_DIR/checkpoints/latest" || true; fi
  if [[ $name =~ ^step-([0-9]+)$ ]]; then echo "$((10#${BASH_REMATCH[1]}))"; else echo 0; fi
}

# note_starts COUNT: so many starts of this job since `best`, the highest step it has reached.
note_starts() {
  printf '%s %s %s\n' "$SLURM_JOB_ID" "$best" "$1" >"$starts_file.tmp"
  mv "$starts_file.tmp" "$starts_file"
}

# read_starts: `best` and `starts` from the file and the newest checkpoint.
read_starts() {
  local job="" before=0 count=0
  if [[ -f $starts_file ]]; then read -r job before count <"$starts_file" || true; fi
  best=$(newest_step)
  starts=0
  if [[ $job == "$SLURM_JOB_ID" ]] && ((best <= before)); then best=$before starts=$count; fi
}

give_up() {
  say "$starts starts in a row brought no checkpoint beyond step $best; giving up" >&2
  exit 1
}

# put_back: into the queue, unless the job has been cancelled or Slurm has put it there already. A job that has met its
# time limit is ending, too, like a cancelled one; its reason tells them apart.
put_back() {
  local facts
  facts=$(scontrol -o show job "$SLURM_JOB_ID")
  if [[ $facts == *JobState=RUNNING* || $facts == *Reason=TimeLimit* ]]; then
    scontrol requeue "$SLURM_JOB_ID"
  else
    say "Slurm is ending this job ($(grep -o 'JobState=[^ ]* Reason=[^ ]*' <<<"$facts")), so it is not put back from here"
  fi
}

# node_address NODE: where Slurm reaches it.
node_address() {
  local facts
  facts=$(scontrol -o show node "$1")
  if [[ $facts =~ NodeAddr=([^ ]+) ]]; then echo "${BASH_REMATCH[1]}"; else echo "$1"; fi
}

mkdir -p "$MEGAMF_RUN_DIR" || die "MEGAMF_RUN_DIR=$MEGAMF_RUN_DIR cannot be made"
read_starts
if ((starts >= MEGAMF_MAX_FAILURES)); then give_up; fi
# Counted before the work begins: after the death of this node nobody would be left to do it.
note_starts $((starts + 1))

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(node_address "${nodes%%$'\n'*}")
# Jobs that share a node get different ports, and a requeued job the one it had.
MASTER_PORT=${MEGAMF_MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

arguments=(
  --preset "$MEGAMF_PRESET"
  "run.dir=$MEGAMF_RUN_DIR"
  "data.tokenizer=$MEGAMF_TOKENIZER"
  "data.train=$(sources "$MEGAMF_TRAIN")"
  "parallel.ep=${MEGAMF_EP:-1}"
  "parallel.context=${MEGAMF_CONTEXT:-1}"
  "deepspeed=${MEGAMF_DEEPSPEED:-zero1}"
  logging.progress=false
)
if [[ -n ${MEGAMF_VALID:-} ]]; then arguments+=("data.valid=$(sources "$MEGAMF_VALID")"); fi
read -r -a overrides <<<"${MEGAMF_OVERRIDES:-}"

say "$MEGAMF_PRESET on ${SLURM_NTASKS:-?} ranks, ${SLURM_JOB_NUM_NODES:-?} nodes ($SLURM_JOB_NODELIST)," \
  "rendezvous $MASTER_ADDR:$MASTER_PORT, start ${SLURM_RESTART_COUNT:-0} from step $best"

# Ranks that are about to exit with 75 like their neighbour are not to be killed for it (nor by a site's KillOnBadExit):
# --wait ends what is left of a step after one rank has ended.
srun --label --wait="$MEGAMF_GRACE" --kill-on-bad-exit=0 megamf train "${arguments[@]}" "${overrides[@]}" &
srun_pid=$!
# This shell outlives the signals, so that it can put the job back. Slurm sends TERM to the ranks, too; USR1 comes here
# alone (scancel --batch, --signal=B:), and srun passes it on.
asked=false heard=false
trap 'asked=true heard=true' TERM
trap 'asked=true heard=true; kill -USR1 "$srun_pid" || true' USR1
while true; do
  code=0
  wait "$srun_pid" || code=$?
  # A signal ends `wait` before srun has ended.
  if ! $heard; then break; fi
  heard=false
done
say "srun ended with exit code $code"

case $code in
0 | "$MEGAMF_EXIT_WRONG")
  rm -f "$starts_file"
  rmdir --ignore-fail-on-non-empty "$MEGAMF_RUN_DIR"
  ;;
"$MEGAMF_EXIT_AGAIN")
  note_starts "$starts"
  say "stopped early with a complete checkpoint; back into the queue"
  put_back
  ;;
*)
  # A rank that does not listen for signals yet ends by TERM (143) or USR1 (138); what srun ends itself, it kills (137).
  if $asked || ((code == 143 || code == 138)); then note_starts "$starts"; fi
  read_starts
  if ((starts >= MEGAMF_MAX_FAILURES)); then give_up; fi
  say "failed; back into the queue, $starts of at most $MEGAMF_MAX_FAILURES starts without a new checkpoint"
  put_back
  ;;
esac
exit "$code"
