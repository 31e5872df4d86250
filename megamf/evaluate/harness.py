"""A megamf model as a model of lm-eval (the Language Model Evaluation Harness), for checkpoints and folders alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamf.data.tokenizer import Tokenizer
from megamf.errors import UserError
from megamf.evaluate.generation import Sampling, generate
from megamf.evaluate.scoring import score, windows
from megamf.model import ModuleFormer

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    raise UserError("evaluation tasks need lm-eval; install it with: pip install 'megamf[eval]'") from None

MAX_NEW_TOKENS = 256


class HarnessModel(TemplateLM):
    """What lm-eval asks of a model: three kinds of request. Only whole prompts are batched, so results are exact."""

    def __init__(self, model: ModuleFormer, tokenizer: Tokenizer, *, seq_len: int, batch: int) -> None:
        super().__init__()
        self.model, self.ids = model, tokenizer
        self.seq_len, self.batch = seq_len, batch

    @property
    def eot_token_id(self) -> int:
        return self.ids.eod_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids; documents are trained without a token before them, so none is added."""
        return self.ids.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [
            (item.logprob, item.greedy) for item in score(self.model, pairs, seq_len=self.seq_len, batch=self.batch)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Total log-likelihood of each document, in nats."""
        pairs, owner = [], []
        for number, request in enumerate(requests):
            for pair in windows(self.ids.encode(request.args[0]), self.ids.eod_id, self.seq_len):
                pairs.append(pair)
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, item in zip(owner, score(self.model, pairs, seq_len=self.seq_len, batch=self.batch)):
            totals[number] += item.logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each prompt up to the first of its stop strings."""
        texts = []
        for request in requests:
            prompt, settings = request.args
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            sampled = bool(settings.get("do_sample")) and settings.get("temperature", 1.0) > 0
            sampling = Sampling(
                temperature=settings.get("temperature", 1.0) if sampled else 0.0,
                top_k=settings.get("top_k", 0) if sampled else 0,
                top_p=settings.get("top_p", 1.0) if sampled else 1.0,
            )
            limit = settings.get("max_gen_toks", MAX_NEW_TOKENS)
            texts.append(self._continue(prompt, until, limit, sampling))
        return texts

    def _continue(self, prompt: str, until: list[str], limit: int, sampling: Sampling) -> str:
        ids = (self.ids.encode(prompt) or [self.ids.eod_id])[-self.seq_len :]
        made: list[int] = []
        for (token,) in generate(self.model, [ids], limit, sampling, self.ids.eod_id):
            made.append(token)
            text = self.ids.decode(made)
            if any(stop in text for stop in until):
                break
        return cut(self.ids.decode(made), until)


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    ends = [at for at in (text.find(stop) for stop in until if stop) if at >= 0]
    return text[: min(ends)] if ends else text


def run_tasks(
    model: ModuleFormer,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    seq_len: int,
    batch: int,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """lm-eval's results (`results`, `n-samples`, `versions`, `config`) of the tasks, plain JSON values.

    `include_path`: a folder of task files (YAML) besides those that lm-eval brings. Raises UserError for unknown tasks.
    """
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        where = "" if include_path is None else f" or in {include_path}"
        raise UserError(f"unknown task {', '.join(unknown)}: not among the {len(manager.all_tasks)} of lm-eval{where}")
    found = lm_eval.simple_evaluate(
        model=HarnessModel(model, tokenizer, seq_len=seq_len, batch=batch),
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        log_samples=False,
        bootstrap_iters=1000,
    )
    kept = {key: found[key] for key in ("results", "n-samples", "versions", "n-shot") if key in found}
    return plain(kept)


def plain(value: Any) -> Any:
    """Nested values as JSON can hold them."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return handle_non_serializable(value)
