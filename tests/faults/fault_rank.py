"""One rank of a job, in a process forked from one that has imported everything: a start costs no imports."""

import os
import sys

# What a rank imports on its way to the first step, some of it late.
PRELOAD = ["megamf.train", "megamf.build", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"]


def run_rank(environment: dict[str, str], arguments: list[str], log: str) -> None:
    """`python -m megamf.train ARGUMENTS` with this environment and all output to `log`; exits as it does."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(target, stream.fileno())
    os.environ.clear()
    os.environ.update(environment)

    import torch

    from megamf import cli, faults, train

    torch.set_num_threads(1)
    faults._faults = faults.parse(environment)  # read at the import, which was before
    raise SystemExit(cli.run(train.main, arguments))
