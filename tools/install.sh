# Sourced by tools/quickstart.sh and tools/test.sh: one virtual environment, installed once, rebuilt when needed.
#
#   MEGAMF_VENV    where the environment lives            (.venv in the checkout)
#   MEGAMF_PYTHON  the interpreter that creates it         (python3, or the first python3.X >= 3.11)
#   MEGAMF_TORCH   what pip installs as torch              (torch==2.13.0)
#
# A step that fails stops the script and shows the end of its log.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

MEGAMF_VENV=${MEGAMF_VENV:-.venv}
MEGAMF_TORCH=${MEGAMF_TORCH:-torch==2.13.0}

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }

fail() {
  printf 'megamf: %s\n' "$*" >&2
  exit 1
}

# quietly WHAT COMMAND...: run it with its output in a log, which is shown when it fails.
quietly() {
  local what=$1 log
  shift
  log=$(mktemp)
  local start=$SECONDS
  if "$@" >"$log" 2>&1; then
    say "$what ($((SECONDS - start)) s)"
    rm -f "$log"
  else
    tail -n 60 "$log" >&2
    rm -f "$log"
    fail "$what failed; its last lines are above"
  fi
}

find_python() {
  local candidate
  for candidate in ${MEGAMF_PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python >= 3.11 found (tried: ${MEGAMF_PYTHON:-python3 python3.13 python3.12 python3.11}); set MEGAMF_PYTHON"
}

# once STAMP HASH WHAT COMMAND...: skip the command when it last succeeded with the same hash.
once() {
  local stamp=$MEGAMF_VENV/.megamf-$1 hash=$2 what=$3
  shift 3
  if [[ -f $stamp && $(<"$stamp") == "$hash" ]]; then return; fi
  rm -f "$stamp"
  quietly "$what" "$@"
  printf '%s\n' "$hash" >"$stamp"
}

hash_of() { { printf '%s\n' "$@"; cat; } | sha256sum | cut -d' ' -f1; }

make_venv() {
  if [[ ! -x $MEGAMF_VENV/bin/python ]]; then
    local python
    python=$(find_python)
    quietly "virtual environment in $MEGAMF_VENV" "$python" -m venv "$MEGAMF_VENV"
  fi
  # shellcheck source=/dev/null
  source "$MEGAMF_VENV/bin/activate"
}

install_torch() {
  python -m pip install -q --upgrade pip &&
    python -m pip install -q 'numpy<2.4' 'setuptools>=69,<82' wheel ninja psutil "$MEGAMF_TORCH"
}

# Isolated builds would not see the torch just installed and fetch another one.
install_requirements() {
  DS_BUILD_OPS=0 DS_ACCELERATOR=cpu python -m pip install -q --no-build-isolation 'numpy<2.4' deepspeed==0.19.8 &&
    python - "$@" <<'PYTHON' | xargs -d '\n' python -m pip install -q 'numpy<2.4'
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
wanted = project["dependencies"] + [r for extra in sys.argv[1:] for r in project["optional-dependencies"][extra]]
print("\n".join(r for r in wanted if not r.startswith("torch>")))
PYTHON
}

build_megamf() { python -m pip install -q --no-build-isolation --no-deps -e .; }

# install_megamf EXTRA...: everything above, with these extras of pyproject.toml.
install_megamf() {
  command -v g++ >/dev/null || command -v c++ >/dev/null || fail "no C++ compiler found (g++); megamf builds an extension"
  make_venv
  MEGAMF_VENV=$(cd "$MEGAMF_VENV" && pwd)
  local version
  version=$(python -V)
  once torch "$(hash_of "$version" "$MEGAMF_TORCH" </dev/null)" "torch and build tools" install_torch
  local requirements
  requirements=$(hash_of "$version" "$MEGAMF_TORCH" <<<"$(cat pyproject.toml tools/install.sh)")
  local extra
  for extra in "$@"; do
    once "requirements-$extra" "$requirements" "requirements: $extra" install_requirements "$extra"
  done
  local sources
  sources=$(find csrc setup.py pyproject.toml -type f -print0 | sort -z | xargs -0 sha256sum | hash_of "$version" "$MEGAMF_TORCH")
  if ! python -c 'import torch, megamf._C' >/dev/null 2>&1; then rm -f "$MEGAMF_VENV/.megamf-build"; fi
  once build "$sources" "megamf and its extension" build_megamf
}
