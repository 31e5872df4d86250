"""Samples of several token sources in fixed proportions, addressed by number: no state, any number of epochs.

One epoch of a source: its documents in an order drawn from (seed, source, epoch), joined and cut into windows of
seq_len + 1 tokens that overlap by one, and the windows in an order drawn likewise. What is left behind the last
window sits out that epoch.

Which source a sample comes from follows the earliest-deadline rule for the "chairman assignment problem"
(Tijdeman 1980): after any number of samples every source has had its share, rounded up or down.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np

from megamf.data.indexed import IndexedDataset
from megamf.data.shuffle import derive_key, permute
from megamf.errors import UserError

MAX_PERIOD = 2**16


@dataclass(frozen=True)
class Documents:
    """A run of whole documents of one dataset: those from `begin` to `end` (exclusive)."""

    dataset: IndexedDataset
    begin: int
    end: int

    @classmethod
    def all_of(cls, dataset: IndexedDataset) -> "Documents":
        """Every document."""
        return cls(dataset, 0, dataset.num_documents)

    @property
    def num_tokens(self) -> int:
        """Tokens in these documents."""
        ends = self.dataset.document_ends
        return int(ends[self.end] - ends[self.begin])


class Blend:
    """`sample(i)` for any i >= 0, depending only on (sources, weights, seq_len, seed, i).

    Weights need not sum to 1. Raises UserError for a source that cannot fill one window and for a weight whose
    share is below 1 in 65536. With `vocab_size`, a sample that holds a token id outside it is a UserError that
    names the document.
    """

    def __init__(
        self,
        sources: Sequence[Documents],
        weights: Sequence[float],
        seq_len: int,
        seed: int,
        vocab_size: int | None = None,
    ) -> None:
        assert len(sources) == len(weights) > 0
        self.seq_len = seq_len
        self.seed = seed
        self.vocab_size = vocab_size
        self.sources = [_Windows(documents, seq_len, seed, number) for number, documents in enumerate(sources)]
        self.shares = integer_shares(weights)
        self._source_of, self._rank_of = source_schedule(self.shares)

    @property
    def num_windows(self) -> int:
        """Different samples the sources hold together, each counted once."""
        return sum(source.num_windows for source in self.sources)

    def locate(self, i: int) -> tuple[int, int]:
        """The source of sample `i`, and which of that source's samples it is (0 is its first)."""
        if i < 0:
            raise IndexError(f"sample {i}: samples are numbered from 0")
        period, place = divmod(i, len(self._source_of))
        source = int(self._source_of[place])
        return source, period * self.shares[source] + int(self._rank_of[place])

    def sample(self, i: int) -> np.ndarray:
        """Tokens of sample `i`, int64 [seq_len + 1]: inputs are all but the last, labels all but the first."""
        number, within = self.locate(i)
        epoch, window = divmod(within, self.sources[number].num_windows)
        tokens = self.sources[number].window(epoch, window)
        if self.vocab_size is not None and (tokens.max() >= self.vocab_size or tokens.min() < 0):
            self._refuse(i, number, epoch, window, tokens)
        return tokens

    def _refuse(self, i: int, number: int, epoch: int, window: int, tokens: np.ndarray) -> None:
        assert self.vocab_size is not None
        at = int(np.flatnonzero((tokens >= self.vocab_size) | (tokens < 0))[0])
        source = self.sources[number]
        raise UserError(
            f"token id {tokens[at]} in document {source.document_at(epoch, window, at)} of "
            f"{source.documents.dataset.prefix} (sample {i}) is outside the model's vocabulary of {self.vocab_size}: "
            "prepare the data with the model's tokenizer"
        )


class _Windows:
    """The windows of one source, by epoch and number. The two document orders made last are kept."""

    def __init__(self, documents: Documents, seq_len: int, seed: int, number: int) -> None:
        self.documents = documents
        self.seq_len = seq_len
        self._key = (seed, number)
        self.num_windows = max(0, documents.num_tokens - 1) // seq_len
        if self.num_windows == 0:
            raise UserError(
                f"{documents.dataset.prefix} has {documents.num_tokens} tokens in {documents.end - documents.begin} "
                f"documents; one sample of seq_len {seq_len} takes {seq_len + 1}"
            )
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def window(self, epoch: int, number: int) -> np.ndarray:
        """The `number`-th window of `epoch`, int64 [seq_len + 1]."""
        order, ends = self._order(epoch)
        begin = self._begin(epoch, number)
        end = begin + self.seq_len + 1
        first = int(np.searchsorted(ends, begin, side="right")) - 1
        last = int(np.searchsorted(ends, end, side="left"))
        starts = self.documents.dataset.document_ends
        parts = []
        for place in range(first, last):
            shift = int(starts[order[place]]) - int(ends[place])
            parts.append(
                self.documents.dataset.tokens(
                    shift + max(begin, int(ends[place])), shift + min(end, int(ends[place + 1]))
                )
            )
        return np.concatenate(parts).astype(np.int64)

    def document_at(self, epoch: int, number: int, offset: int) -> int:
        """The number, in the dataset, of the document that holds token `offset` of a window."""
        order, ends = self._order(epoch)
        return int(order[int(np.searchsorted(ends, self._begin(epoch, number) + offset, side="right")) - 1])

    def _begin(self, epoch: int, number: int) -> int:
        key = derive_key("windows", *self._key, epoch)
        return int(permute(np.array([number]), self.num_windows, key)[0]) * self.seq_len

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents in the order of `epoch`, and where each ends once they are joined (int64, one longer)."""
        if epoch not in self._orders:
            count = self.documents.end - self.documents.begin
            order = permute(np.arange(count), count, derive_key("documents", *self._key, epoch))
            order += self.documents.begin
            starts = self.documents.dataset.document_ends
            ends = np.zeros(count + 1, dtype=np.int64)
            np.cumsum(np.diff(starts)[order], out=ends[1:])
            if self.documents.end < 2**32:
                order = order.astype(np.uint32)  # half the memory
            if len(self._orders) == 2:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = (order, ends)
        return self._orders[epoch]


def integer_shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of the weights, with the smallest possible sum, at most 65536.

    Decimal weights such as 0.7 and 0.3 are met exactly; where that takes a larger sum, shares are rounded to
    65536ths (largest remainder). Raises UserError for a share that would round to 0.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    total = sum(exact)
    quotas = [weight / total for weight in exact]
    period = lcm(*(quota.denominator for quota in quotas))
    if period <= MAX_PERIOD:
        return [int(quota * period) for quota in quotas]
    shares = [int(quota * MAX_PERIOD) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda s: shares[s] - quotas[s] * MAX_PERIOD)
    for s in by_remainder[: MAX_PERIOD - sum(shares)]:
        shares[s] += 1
    for weight, share in zip(weights, shares):
        if share == 0:
            raise UserError(
                f"data weight {weight} is less than 1/{MAX_PERIOD} of the sum of weights {float(total)}: "
                "raise it or leave the source out"
            )
    return shares


def source_schedule(shares: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """One period of the blend: the source of each sample, and how often that source came before (int64 both).

    A source may be served its (c+1)-th sample at time t once that leaves it less than one sample ahead; among
    those, the one whose deadline comes first is served. All arithmetic is in whole numbers.
    """
    period, num = sum(shares), len(shares)
    share = np.array(shares, dtype=np.int64)
    slack = 2 * max(1, num - 1)  # Tijdeman's bound: nobody is ever off by more than 1 - 1/slack
    served = np.zeros(num, dtype=np.int64)
    source_of, rank_of = np.empty(period, dtype=np.int64), np.empty(period, dtype=np.int64)
    never = np.iinfo(np.int64).max
    for time in range(1, period + 1):
        # With c served of share q / period: ready when q*t/period - c >= 1/slack; due (rounded down, so that
        # ties go to the lower number) when q*t/period - c would reach 1 - 1/slack.
        ready = slack * (share * time - served * period) >= period
        due = ((served + 1) * slack - 1) * period // (slack * share)
        chosen = int(np.argmin(np.where(ready, due, never)))
        source_of[time - 1], rank_of[time - 1] = chosen, served[chosen]
        served[chosen] += 1
    return source_of, rank_of
