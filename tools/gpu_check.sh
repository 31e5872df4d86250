#!/usr/bin/env bash
# On a machine with a GPU: build with CUDA, run the GPU's tests and its benchmarks. Needs no network.
#
#   bash tools/gpu_check.sh [pytest arguments ...]
#
#   OUT              gets gpu_check.log and gpu.json                            (runs/gpu_check)
#   MEGAMF_PYTHON    an interpreter whose torch has CUDA                        (python3)
#   MEGAMF_WHEELS    folder of wheels; those whose package is missing are used  (.whl, if it exists)
#
# Beside torch it takes nvcc, a C++ compiler, setuptools, wheel, ninja, pytest, pytest-timeout and the dependencies of
# pyproject.toml; what of these the interpreter lacks must be among the wheels.
# The packages and megamf itself go to a folder that is removed at the end: nothing is installed into the interpreter.
# Exit code 0 when everything passed, else 1; the log and what was measured are left in either case.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-runs/gpu_check}
PYTHON=${MEGAMF_PYTHON:-python3}
WHEELS=${MEGAMF_WHEELS:-.whl}
mkdir -p "$OUT" || exit 1
LOG=$OUT/gpu_check.log
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT

say() { printf '\n== %s\n' "$*"; }

stop() {
  printf 'megamf: %s\n' "$*" >&2
  exit 1
}

check() {
  say "machine"
  date -u +%FT%TZ
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv 2>/dev/null
  "$PYTHON" -c '
import sys, torch
print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
if not torch.cuda.is_available():
    sys.exit("torch sees no CUDA device")
print(torch.cuda.get_device_name(), "compute capability", torch.cuda.get_device_capability())
' || stop "no GPU to check"
  local capability
  capability=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')

  export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
  say "packages from $WHEELS"
  missing_packages || stop "the wheels of $WHEELS cannot be installed"

  say "build"
  MEGAMF_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} \
    "$PYTHON" -m pip install -q --no-index --no-deps --no-build-isolation --target "$SITE" . || stop "the build failed"

  # From outside the checkout, so that the package just built is the one that is tested.
  local root=$PWD failed=0 files
  mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' "$root/tests" | sort)
  say "tests"
  (cd "$SITE" && "$PYTHON" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider \
    -m gpu -rs "${files[@]}" "$@") ||
    failed=1
  say "benchmarks"
  (cd "$SITE" && "$PYTHON" -m megamf.tools.bench --suite gpu --json "$RESULT") || failed=1
  say "$([[ $failed == 0 ]] && echo passed || echo FAILED)"
  return $failed
}

# Wheels of packages that the interpreter lacks, into $SITE. Their requirements must be there or among the wheels.
missing_packages() {
  [[ -d $WHEELS ]] || { echo "no such folder: nothing to install"; return 0; }
  local wanted
  wanted=$("$PYTHON" - "$WHEELS" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
for wheel in sorted(Path(sys.argv[1]).glob("*.whl")):
    try:
        version(wheel.name.split("-")[0].replace("_", "-"))
    except PackageNotFoundError:
        print(wheel)
PYTHON
  ) || return 1
  [[ -n $wanted ]] || { echo "nothing is missing"; return 0; }
  echo "$wanted"
  xargs -d '\n' "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SITE" <<<"$wanted"
}

RESULT=$(cd "$OUT" && pwd)/gpu.json
rm -f "$RESULT"
check "$@" 2>&1 | tee "$LOG"
exit "${PIPESTATUS[0]}"
