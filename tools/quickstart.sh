#!/usr/bin/env bash
# From nothing to a pretrained ModuleFormer on two processes: environment, tokenizer, data, training with expert
# parallelism and ZeRO-1, a stop by signal and a resume, evaluation, Hugging Face export, sample text.
#
#   bash tools/quickstart.sh [section.key=value ...]     overrides go to every training start
#
#   MEGAMF_OUT        where everything is written          (runs/quickstart; replaced when an earlier quickstart made it)
#   MEGAMF_STEPS      optimizer steps                      (320)
#   MEGAMF_STOP_AT    the run is stopped after this step   (an eighth of the steps), then resumed
#   MEGAMF_COMPARE    an uninterrupted run goes this far   (STOP_AT + 30), and its losses must be the same ones
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

RANKS=2
OUT=${MEGAMF_OUT:-runs/quickstart}
STEPS=${MEGAMF_STEPS:-320}
STOP_AT=${MEGAMF_STOP_AT:-$((STEPS / 8))}
COMPARE=${MEGAMF_COMPARE:-$((STOP_AT + 30))}
OVERRIDES=("$@")
PIDS=()

((STOP_AT < COMPARE && COMPARE < STEPS)) ||
  fail "MEGAMF_STOP_AT=$STOP_AT < MEGAMF_COMPARE=$COMPARE < MEGAMF_STEPS=$STEPS does not hold"

if [[ -e $OUT && ! -e $OUT/.quickstart ]]; then
  fail "$OUT exists and no quickstart wrote it; move it away or set MEGAMF_OUT"
fi

install_megamf data hf report

rm -rf "$OUT"
mkdir -p "$OUT"
touch "$OUT/.quickstart"
START=$SECONDS

export DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=$((cores > 2 * RANKS ? cores / RANKS : 1))
trap 'for pid in "${PIDS[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done' EXIT

settings() { # settings DIR: what every start has in common
  printf '%s\n' --preset nano "run.dir=$1" "data.tokenizer=$OUT/tokenizer.model" \
    "data.train=[{path: $OUT/data/stdlib-train}]" "data.valid=[{path: $OUT/data/stdlib-valid}]" "train.steps=$STEPS" parallel.ep=$RANKS \
    deepspeed=zero1 checkpoint.every=0 "${OVERRIDES[@]}"
}

steps_done() { # the newest step of metrics.jsonl
  local step
  step=$(tail -n 1 "$1/metrics.jsonl" 2>/dev/null | grep -o '"step": [0-9]*' | grep -o '[0-9]*$') || true
  echo "${step:-0}"
}

# stop_after STEP DIR: start plain processes, send all of them SIGTERM after STEP; each must then exit with 75,
# which says that a complete checkpoint is written.
stop_after() {
  local step=$1 dir=$2 rank code arguments port
  mapfile -t arguments < <(settings "$dir")
  port=$(python -c 'from megamf.parallel.launch import free_port; print(free_port())')
  PIDS=()
  for ((rank = 0; rank < RANKS; rank++)); do
    RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$RANKS MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
      python -m megamf.train "${arguments[@]}" &
    PIDS+=($!)
  done
  while (($(steps_done "$dir") < step)); do
    for pid in "${PIDS[@]}"; do kill -0 "$pid" 2>/dev/null || fail "a training process ended before step $step"; done
    sleep 0.3
  done
  kill -TERM "${PIDS[@]}"
  for pid in "${PIDS[@]}"; do
    code=0
    wait "$pid" || code=$?
    ((code == 75)) || fail "a stopped training process exited with $code instead of 75"
  done
  PIDS=()
}

say "tokenizer and data from this Python's standard library"
megamf tokenizer --input stdlib --vocab-size 4096 --max-megabytes 8 --output "$OUT/tokenizer.model"
mkdir "$OUT/data"
megamf prepare --input stdlib --tokenizer "$OUT/tokenizer.model" --output "$OUT/data/stdlib" --valid-fraction 0.02

say "training on $RANKS processes (expert parallelism $RANKS, ZeRO-1); stopped by SIGTERM after step $STOP_AT"
stop_after "$STOP_AT" "$OUT/run"

say "resuming, with torchrun"
mapfile -t arguments < <(settings "$OUT/run")
torchrun --standalone --nproc-per-node $RANKS -m megamf.train "${arguments[@]}"

say "the same run without the stop, as far as step $COMPARE"
stop_after "$COMPARE" "$OUT/uninterrupted"

say "evaluation, export, sample"
latest=$OUT/run/checkpoints/latest
megamf evaluate "$latest" --data "$OUT/data/stdlib-valid" --tokenizer "$OUT/tokenizer.model" --json "$OUT/evaluation.json"
megamf export-hf "$latest" "$OUT/hf" --tokenizer "$OUT/tokenizer.model"
megamf generate "$latest" --tokenizer "$OUT/tokenizer.model" --prompt "def " --max-new-tokens 120 --seed 0 >"$OUT/sample.txt"

megamf report "$OUT/run" --same-as "$OUT/uninterrupted" --evaluation "$OUT/evaluation.json" --hf "$OUT/hf" \
  --checkpoint "$latest" --sample "$OUT/sample.txt" --seconds $((SECONDS - START)) --summary "$OUT/summary.json" \
  --plot "$OUT/report.png"
