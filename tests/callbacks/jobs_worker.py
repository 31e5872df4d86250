"""One rank that runs `megamf train` several times in one process group, each with its faults.

Run as `python jobs_worker.py OUT JOBS_JSON`; a job is {"name": ..., "arguments": [...], "faults": [...]}. Writes the
exit codes of this rank, by name, to OUT/codes-RANK.json, and what a job said on stderr to OUT/NAME-RANK.err.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch

from megamf import faults, train
from megamf.cli import run
from megamf.parallel.launch import identify, process_group


def main() -> None:
    torch.set_num_threads(1)
    process, out, codes = identify(os.environ), Path(sys.argv[1]), {}
    with process_group(process):
        for job in json.loads(Path(sys.argv[2]).read_text()):
            torch.distributed.barrier()
            faults._faults = faults.parse({"MEGAMF_FAULTS": json.dumps(job["faults"])})
            with (out / f"{job['name']}-{process.rank}.err").open("w") as file, contextlib.redirect_stderr(file):
                codes[job["name"]] = run(train.main, job["arguments"])
    (out / f"codes-{process.rank}.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
