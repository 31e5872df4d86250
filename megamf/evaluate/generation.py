"""Text from a model: sampling, batches of prompts of unequal length, streaming.

Shapes: B prompts, T time, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megamf.data.tokenizer import Tokenizer
from megamf.errors import UserError
from megamf.model import ModuleFormer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: the most likely one. top_k 0 and top_p 1 leave all tokens in.

    Raises UserError for values outside their range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature} must not be negative")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must not be negative (0 leaves all tokens in)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is outside (0, 1]")


def next_token(logits_BV: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Choose one token of each row, int64 [B]. Ties at the edge of top_k stay in; the first of top_p always does."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    # float64 on the CPU: the same draw on every device.
    logits_BV = logits_BV.double().cpu() / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[1]:
        edge_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < edge_B1, -torch.inf)
    prob_BV = logits_BV.softmax(-1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = prob_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        dropped_BV = (before_BV >= sampling.top_p).scatter(1, order_BV, before_BV >= sampling.top_p)
        prob_BV = prob_BV.masked_fill(dropped_BV, 0.0)
    return torch.multinomial(prob_BV, 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate(
    model: ModuleFormer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    eod_id: int | None = None,
) -> Iterator[list[int | None]]:
    """Continue every prompt (token ids, not empty), one token of each a step: yields B ids, None for finished rows.

    A row is finished when it made `eod_id` (which is not yielded); the iteration ends when all are, or after
    `max_new_tokens` steps. A row's tokens do not depend on the other prompts, save for the draws of sampling.
    Raises UserError for an empty prompt or a token id outside the vocabulary.
    """
    check_prompts(prompts, model.config.vocab_size)
    device = model.lm_head.weight.device
    longest = max(map(len, prompts))
    input_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_BT[row, longest - len(prompt) :] = torch.tensor(list(prompt))
    pad_B = torch.tensor([longest - len(prompt) for prompt in prompts], dtype=torch.int32, device=device)
    padded = bool(pad_B.any())
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = model.new_cache()
    input_BT = input_BT.to(device)
    done = [False] * len(prompts)
    for _ in range(max_new_tokens):
        start_BT = pad_B[:, None].expand(input_BT.shape).contiguous() if padded else None
        hidden_BTD = model(input_BT, start_BT=start_BT, cache=cache).hidden_BTD
        token_B = next_token(model.logits(hidden_BTD[:, -1]), sampling, generator).tolist()
        done = [was or token == eod_id for was, token in zip(done, token_B)]
        if all(done):
            return
        yield [None if finished else token for finished, token in zip(done, token_B)]
        input_BT = torch.tensor(token_B, device=device)[:, None]


def check_prompts(prompts: Sequence[Sequence[int]], vocab: int) -> None:
    """Raise UserError, naming the prompt, for an empty one or a token id that the model does not know."""
    if not prompts:
        raise UserError("there is no prompt to continue")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number} has no token; begin it with the token that ends documents")
        wrong = [token for token in prompt if not 0 <= token < vocab]
        if wrong:
            raise UserError(f"prompt {number} holds token id {wrong[0]}, outside the model's vocabulary of {vocab}")


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Token ids as they come -> pieces of text. A character that is spread over tokens appears when it is complete."""
    seen: list[int] = []
    shown = ""
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)
        # Incomplete UTF-8 decodes to U+FFFD at the end: wait for the rest of it.
        if text.endswith("\ufffd"):
            continue
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(seen)[len(shown) :]
    if rest:
        yield rest
