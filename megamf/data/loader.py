"""From the run configuration to micro batches: what is trained and evaluated on, and in which portions.

Shapes: `B` sequences of a micro batch, `T` = seq_len tokens.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any, Self

import numpy as np
import torch

from megamf.config import RunConfig
from megamf.config.run import Source
from megamf.data.blend import Blend, Documents
from megamf.data.indexed import IndexedDataset, Metadata, part_path, read_metadata
from megamf.data.tokenizer import load_tokenizer
from megamf.data.zigzag import take_part
from megamf.errors import UserError

IGNORE = -100
VALID_SEED = 0  # evaluations of different runs see the same samples


@dataclass(frozen=True)
class MicroBatch:
    """`input_BT` and `label_BT` int64, label -100 is not counted in the loss.

    `start_BT` int32: where in its sequence the document of each token begins; None when documents see each other.
    Where a sequence is split over ranks, T counts this rank's tokens, and the starts remain positions in the whole.
    """

    input_BT: torch.Tensor
    label_BT: torch.Tensor
    start_BT: torch.Tensor | None


def open_train(config: RunConfig) -> Blend:
    """The training blend of `config.data`, in the order of `config.run.seed`.

    Raises UserError for missing or damaged datasets, datasets of another tokenizer or a larger vocabulary than
    the model's, and a corpus smaller than one sample or one global batch.
    """
    if not config.data.train:
        raise UserError(
            "data.train is empty; it needs at least one {path, weight} of a dataset made by `megamf prepare`"
        )
    datasets = _open(config, config.data.train)
    sources = [_split(dataset, config.data.valid_fraction)[0] for dataset in datasets]
    blend = Blend(
        sources,
        [source.weight for source in config.data.train],
        config.train.seq_len,
        config.run.seed,
        config.model.vocab_size,
    )
    if blend.num_windows < config.train.global_batch:
        raise UserError(
            f"the training data holds {blend.num_windows} samples of train.seq_len={config.train.seq_len}, less "
            f"than one train.global_batch={config.train.global_batch}: give more data or smaller batches"
        )
    return blend


@dataclass(frozen=True)
class Validation:
    """One source that is evaluated on: its name among the sources, its share of the whole, its samples."""

    name: str
    share: float
    blend: Blend


def open_valid(config: RunConfig) -> list[Validation]:
    """What is evaluated on: `data.valid`, or the last share `data.valid_fraction` of each training source.

    Empty when the configuration asks for neither. Samples from 0 on are the same for every seed. Raises UserError as
    `open_train` does.
    """
    if config.data.valid:
        sources = config.data.valid
        parts = [Documents.all_of(dataset) for dataset in _open(config, sources)]
    elif config.data.valid_fraction:
        sources = config.data.train
        parts = [_split(dataset, config.data.valid_fraction)[1] for dataset in _open(config, sources)]
    else:
        return []
    total = sum(source.weight for source in sources)
    return [
        Validation(
            name,
            source.weight / total,
            Blend([part], [1.0], config.train.seq_len, VALID_SEED, config.model.vocab_size),
        )
        for name, source, part in zip(source_names(sources), sources, parts)
    ]


def source_names(sources: list[Source]) -> list[str]:
    """A name for each: the last part of its path, or as many parts as tell all of them apart; numbered if none do."""
    paths = [source.path.parts for source in sources]
    for length in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{index}:{source.path}" for index, source in enumerate(sources)]


def document_end(config: RunConfig) -> int | None:
    """The token id that ends documents, from the datasets' metadata or else from `data.tokenizer`.

    None when `data.document_mask` is off and neither tells. Raises UserError when they disagree, or when the
    mask is on and neither tells.
    """
    found: dict[int, str] = {}
    for source in [*config.data.train, *config.data.valid]:
        metadata = read_metadata(source.path)
        if metadata is not None:
            found.setdefault(metadata.eod_id, str(source.path))
    if len(found) > 1:
        raise UserError(f"the datasets end their documents with different token ids: {_listed(found)}")
    if found:
        return next(iter(found))
    if config.data.tokenizer is not None:
        return load_tokenizer(config.data.tokenizer).eod_id
    if config.data.document_mask:
        raise UserError(
            "data.document_mask=true needs the token id that ends documents, but the datasets have no .json metadata "
            "and data.tokenizer is not given: name the tokenizer, or set data.document_mask=false"
        )
    return None


def valid_bytes_per_token(config: RunConfig) -> float | None:
    """Raw UTF-8 bytes for each token of the validation blend, for bits per byte.

    Averaged over whole datasets by weight (with `valid_fraction`: over the training datasets they are part of).
    None when there is no validation data or a dataset has no metadata.
    """
    sources = config.data.valid or (config.data.train if config.data.valid_fraction else [])
    metadata = [read_metadata(source.path) for source in sources]
    if not sources or any(item is None for item in metadata):
        return None
    total = sum(source.weight for source in sources)
    return sum(
        source.weight / total * item.bytes / item.tokens for source, item in zip(sources, metadata) if item is not None
    )


class StepLoader:
    """The micro batches of one rank, by consumed samples; the next step is read in the background meanwhile.

    Of the global batch that starts at sample c, data rank r of W takes the samples c + r*global_batch/W to
    c + (r+1)*global_batch/W, so that the union over the ranks is the same for every W. With `context` > 1 that many
    ranks take the same samples, and of each sequence the part of `context_rank` (see `zigzag`). Close it, or use it as
    a context manager. Raises UserError when global_batch is not a multiple of micro_batch * num_ranks.
    """

    def __init__(
        self,
        blend: Blend,
        global_batch: int,
        micro_batch: int,
        rank: int,
        num_ranks: int,
        eod_id: int | None,
        document_mask: bool,
        context_rank: int = 0,
        context: int = 1,
    ) -> None:
        if global_batch % (micro_batch * num_ranks):
            raise UserError(
                f"train.global_batch={global_batch} is not divisible by train.micro_batch={micro_batch} x {num_ranks} "
                f"data-parallel ranks = {micro_batch * num_ranks}"
            )
        if document_mask and eod_id is None:
            raise UserError("data.document_mask=true needs the token id that ends documents, not None")
        assert 0 <= rank < num_ranks and 0 <= context_rank < context
        self._blend = blend
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._first = rank * (global_batch // num_ranks)
        self._count = global_batch // num_ranks
        self._mask_eod = eod_id if document_mask else None
        self._part = (context_rank, context)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megamf-data")
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def step(self, consumed: int) -> list[MicroBatch]:
        """This rank's micro batches of the global batch that begins at sample `consumed`."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != consumed:
            ahead = (consumed, self._thread.submit(self._read, consumed))
        batches = ahead[1].result()
        following = consumed + self._global_batch
        self._ahead = (following, self._thread.submit(self._read, following))
        return batches

    def close(self) -> None:
        """Stop the background thread; what it is reading is finished and thrown away."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, consumed: int) -> list[MicroBatch]:
        begin = consumed + self._first
        return [
            part_of(
                micro_batch([self._blend.sample(i) for i in range(at, at + self._micro_batch)], self._mask_eod),
                *self._part,
            )
            for at in range(begin, begin + self._count, self._micro_batch)
        ]


def micro_batch(samples: list[np.ndarray], mask_eod: int | None) -> MicroBatch:
    """Stack samples (int64 [T + 1] each). With `mask_eod`, the id that ends documents, documents are kept apart.

    Then a token after a document end starts a document, and predicting it from the document end is not asked.
    """
    tokens = np.stack(samples)
    inputs, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    if mask_eod is None:
        return MicroBatch(torch.from_numpy(inputs), torch.from_numpy(labels), None)
    ends = inputs == mask_eod
    labels[ends] = IGNORE
    starts = np.zeros(inputs.shape, dtype=np.int32)
    starts[:, 1:] = np.where(ends[:, :-1], np.arange(1, inputs.shape[1], dtype=np.int32), 0)
    np.maximum.accumulate(starts, axis=1, out=starts)
    return MicroBatch(torch.from_numpy(inputs), torch.from_numpy(labels), torch.from_numpy(starts))


def part_of(batch: MicroBatch, context_rank: int, context: int) -> MicroBatch:
    """This rank's part of every sequence, for sequences that `context` ranks share.

    Labels and document starts were found on whole sequences: the token behind a chunk is the label of its last one.
    """
    start_BT = batch.start_BT
    return MicroBatch(
        take_part(batch.input_BT, context_rank, context),
        take_part(batch.label_BT, context_rank, context),
        None if start_BT is None else take_part(start_BT, context_rank, context),
    )


def _split(dataset: IndexedDataset, valid_fraction: float) -> tuple[Documents, Documents]:
    """Training and validation documents: the last share, rounded up to whole documents, is for validation."""
    count = dataset.num_documents
    held = ceil(count * Fraction(repr(valid_fraction)))
    if held and held == count:
        raise UserError(
            f"data.valid_fraction={valid_fraction} takes all of the {count} documents of {dataset.prefix}; "
            "at least one must remain for training"
        )
    return Documents(dataset, 0, count - held), Documents(dataset, count - held, count)


def tokenizer_record(config: RunConfig) -> dict[str, Any] | None:
    """`name` and `sha256` (a list) of the tokenizer of the data, for a checkpoint; None where nothing tells.

    By the datasets' metadata or else `data.tokenizer`. Raises UserError as `load_tokenizer` does.
    """
    for source in [*config.data.train, *config.data.valid]:
        metadata = read_metadata(source.path)
        if metadata is not None:
            return {"name": metadata.tokenizer, "sha256": [metadata.tokenizer_sha256]}
    if config.data.tokenizer is None:
        return None
    tokenizer = load_tokenizer(config.data.tokenizer)
    return {"name": tokenizer.name, "sha256": [tokenizer.sha256]}


def _open(config: RunConfig, sources: list[Source]) -> list[IndexedDataset]:
    """Open datasets and compare their metadata, where there is some, with data, tokenizer and model."""
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer is not None else None
    datasets = []
    seen: dict[str, str] = {}
    for source in sources:
        dataset = IndexedDataset(source.path, mmap=config.data.mmap)
        datasets.append(dataset)
        metadata = read_metadata(source.path)
        if metadata is None:
            continue
        _check_counts(dataset, metadata)
        if metadata.vocab_size > config.model.vocab_size:
            raise UserError(
                f"{source.path} was prepared with a vocabulary of {metadata.vocab_size} (tokenizer "
                f"{metadata.tokenizer}), but model.vocab_size={config.model.vocab_size}: set it to at least the former"
            )
        if tokenizer is not None and tokenizer.sha256 != metadata.tokenizer_sha256:
            raise UserError(
                f"{source.path} was prepared with tokenizer {metadata.tokenizer} (sha256 "
                f"{metadata.tokenizer_sha256[:12]}), but data.tokenizer={config.data.tokenizer} has sha256 "
                f"{tokenizer.sha256[:12]}: prepare the data again or name its tokenizer"
            )
        seen.setdefault(metadata.tokenizer_sha256, str(source.path))
    if len(seen) > 1:
        raise UserError(f"the datasets were prepared with different tokenizers (sha256): {_listed(seen)}")
    return datasets


def _check_counts(dataset: IndexedDataset, metadata: Metadata) -> None:
    found = (dataset.num_documents, dataset.num_tokens)
    if found != (metadata.documents, metadata.tokens):
        raise UserError(
            f"{part_path(dataset.prefix, '.json')} describes {metadata.documents} documents and {metadata.tokens} "
            f"tokens, but the .idx beside it {found[0]} and {found[1]}: they are not of one dataset"
        )


def _listed(found: dict[int, str] | dict[str, str]) -> str:
    return ", ".join(f"{str(value)[:12]} in {path}" for value, path in found.items())
