# Sourced by the scripts of this folder after their #SBATCH lines and defaults: what a job needs before it starts work.
#
#   MEGAMF_VENV   virtual environment to activate (.venv in the checkout)
#
# shellcheck disable=SC2034  # the exit codes are for the scripts that source this file

# Exit code of every rank: a complete checkpoint is written, start again.
MEGAMF_EXIT_AGAIN=75
# Exit code: a wrong configuration, damaged data, a full disk: starting again would meet the same.
MEGAMF_EXIT_WRONG=2

say() { printf 'megamf: %s\n' "$*"; }

die() {
  say "$*" >&2
  exit "$MEGAMF_EXIT_WRONG"
}

[[ -n ${SLURM_JOB_ID:-} ]] || die "start this with sbatch"

# Slurm runs a copy of the script from its spool, so the checkout is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:?}" || exit
MEGAMF_VENV=${MEGAMF_VENV:-.venv}
[[ -f $MEGAMF_VENV/bin/activate ]] || die "no virtual environment at $MEGAMF_VENV; set MEGAMF_VENV"
# shellcheck source=/dev/null
source "$MEGAMF_VENV/bin/activate"

# srun takes the cores of a task from this variable, not from sbatch's option of the same name.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
# Lines reach the log when they are printed: the last ones of a killed process are the interesting ones.
export PYTHONUNBUFFERED=1
