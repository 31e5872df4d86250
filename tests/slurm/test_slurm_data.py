"""`slurm/prepare_data.sh` on a real Slurm: an array of tasks and a merge that writes the bytes of one process."""

import json
import re
import sys
from pathlib import Path

import pytest

from megamf.cli import run
from megamf.tools import prepare, tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
FILES = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder of files, a tokenizer, and `whole`, what one process makes of them."""
    top = tmp_path_factory.mktemp("array")
    (top / "in").mkdir()
    for n in range(FILES):
        texts = [f"{n} {k}: " + "value = other " * (k % 11) for k in range(30 * n + 5)]
        (top / "in" / f"{n}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    inputs = ["--input", str(top / "in")]
    assert run(tokenizer.main, [*inputs, "--vocab-size", "300", "--output", str(top / "t.model")]) == 0
    options = ["--tokenizer", str(top / "t.model"), "--output", str(top / "whole"), "--valid-fraction", "0.1"]
    assert run(prepare.main, [*inputs, *options]) == 0
    return top


def submit(cluster, corpus: Path, name: str, *options: str, **variables: str) -> str:
    values = {
        "MEGAMF_INPUT": str(corpus / "in"),
        "MEGAMF_TOKENIZER": str(corpus / "t.model"),
        "MEGAMF_OUTPUT": str(corpus / name / "data"),
        "MEGAMF_VALID_FRACTION": "0.1",
        "MEGAMF_VENV": sys.prefix,
        "MEGAMF_MERGE_OPTIONS": f"--output={corpus}/{name}-merge.log --partition=shared",
    }
    return cluster.submit(
        "--cpus-per-task=1", "--partition=shared", f"--output={corpus}/{name}-%a.log", *options,
        ROOT / "slurm" / "prepare_data.sh", **values | variables,
    )  # fmt: skip


def finish(cluster, report: list[str], corpus: Path, name: str, job: str, first: int = 0) -> dict[str, str]:
    """State by task of the array, and of the job that merges; sacct's lines go to the report."""
    cluster.wait_for(f"the end of {name}", lambda: not cluster.run("squeue", "--noheader").strip())
    [merge] = re.findall(rf"job (\d+) merges the shards when all tasks of job {job}", log(corpus, name, first))
    states = {}
    for number in (job, merge):
        report += [f"{name}, job {number}:", *cluster.sacct(number, "--allocations").splitlines()]
        lines = cluster.run("sacct", "-n", "-P", "-X", "-j", number, "--format=JobID,State").splitlines()
        states |= dict(line.split("|") for line in lines)
    return {key.removeprefix(f"{job}_").replace(merge, "merge"): state for key, state in states.items()}


def log(corpus: Path, name: str, task: int) -> str:
    return (corpus / f"{name}-{task}.log").read_text()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_as_one_process(corpus: Path, name: str) -> None:
    wanted = files(corpus / name)
    assert wanted == [f"data-{side}.{suffix}" for side in ("train", "valid") for suffix in ("bin", "idx", "json")]
    for file in wanted:
        assert (corpus / name / file).read_bytes() == (corpus / file.replace("data", "whole")).read_bytes()


def test_an_array_job_writes_the_bytes_of_one_process(cluster, report, corpus):
    job = submit(cluster, corpus, "array", "--array=0-2")
    states = finish(cluster, report, corpus, "array", job)
    assert states == {"0": "COMPLETED", "1": "COMPLETED", "2": "COMPLETED", "merge": "COMPLETED"}
    same_as_one_process(corpus, "array")


def test_a_failed_task_leaves_nothing_merged_and_can_be_done_again(cluster, report, corpus):
    """One file cannot be read; then it can."""
    victim = corpus / "in" / f"{FILES - 1}.jsonl"
    good = victim.read_bytes()
    victim.write_bytes(good.replace(b"{", b"[", 1))
    try:
        job = submit(cluster, corpus, "again", "--array=0-1", MEGAMF_PREPARE_OPTIONS="--on-bad fail")
        states = finish(cluster, report, corpus, "again", job)
        assert (states["0"], states["1"]) == ("COMPLETED", "FAILED")
        assert states["merge"].startswith("CANCELLED")
        assert files(corpus / "again") == ["data.shards"]
        assert files(corpus / "again" / "data.shards") == ["00000-of-00002"]
    finally:
        victim.write_bytes(good)
    again = {"MEGAMF_PREPARE_OPTIONS": "--on-bad fail", "MEGAMF_SHARDS": "2"}
    job = submit(cluster, corpus, "again", "--array=1", **again)
    states = finish(cluster, report, corpus, "again", job, first=1)
    assert states == {"1": "COMPLETED", "merge": "COMPLETED"}
    same_as_one_process(corpus, "again")
