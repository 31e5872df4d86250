#!/usr/bin/env bash
# Install, build, lint and test, on a fresh machine too. Arguments go to pytest: bash tools/test.sh tests/ops -x
# MEGAMF_TEST_WORKERS tests run at one time (2); tests compute with one thread, some start up to four processes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

install_oracle() { python -m pip install -q --no-deps megatron-core==0.16.1; }

# CUDA builds of torch bring the Triton they need. Its interpreter fails with numpy 2.4.
install_triton() {
  if python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then return; fi
  python -m pip install -q triton==3.6.0 'numpy<2.4'
}

# Its kernels run in Triton's interpreter; on a CUDA build of torch it would compile for minutes.
install_megablocks() {
  if python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then return; fi
  python -m pip install -q --no-deps --no-build-isolation megablocks==0.10.0 stanford-stk==0.7.1
}

install_megamf data hf report eval adapt moefy test
once triton triton==3.6.0 "triton, which compiles and interprets the kernels without a GPU" install_triton
# The tests compare our indexed datasets with this package's; it is no dependency, and its own would replace torch.
once oracle megatron-core==0.16.1 "megatron-core, an oracle of the tests" install_oracle
once megablocks megablocks==0.10.0 "megablocks, an oracle of the tests" install_megablocks

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

say "ruff"
ruff check .
ruff format --check .
say "pytest"
exec python -m pytest -rs -n "${MEGAMF_TEST_WORKERS:-2}" --no-loadscope-reorder "$@"
