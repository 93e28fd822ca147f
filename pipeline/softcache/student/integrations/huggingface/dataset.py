"""A cache and its source as a `datasets.Dataset`, and the collator that makes batches with labels of it.

    dataset = to_hf_dataset(open_cache(URL), open_text(settings, split="train"))

A row is a sample. What every trainer of transformers and TRL reads:

    input_ids       its tokens
    labels          the token itself where it is to be learned, -100 elsewhere: where a document begins, in prompts
    seq_lengths     lengths of the documents in it, as TRL's packing has them

and with a cache, of each label row, which predicts the token after its position:

    soft_cache      of the whole sample: a digest of teacher, tokenizer, label policy and codec
    soft_sample     of the whole sample: a fingerprint of what was labeled, input_ids, labels and seq_lengths
    soft_positions  position in the sample
    soft_*          the arrays of `SoftLabels`: ids and log_probs [K] over the whole vocabulary at T = 1 (nats), log_tail,
                    and what else the cache has

Decoded, a label row takes 8 bytes per kept class on disk, several times what the cache takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from softcache.data.sources.text.source import TokenSource
from softcache.data.tokens import TokenBatch, TokenData
from softcache.errors import AlignmentError
from softcache.hashing.digests import digest_json, fingerprint
from softcache.labels import SoftLabels
from softcache.labels.validate import ARRAYS
from softcache.losses.target_class import IGNORED
from softcache.reader.cache import Cache
from softcache.reader.dataset import SoftLabelDataset
from softcache.runtime.optional import text_library
from softcache.student.integrations.validate import check_cache

__all__ = ["SOFT_COLUMNS", "SoftLabelCollator", "to_hf_dataset"]

SOFT_COLUMNS = ("soft_cache", "soft_sample", "soft_positions", *(f"soft_{name}" for name in ARRAYS))
BATCH_SAMPLES = 64


def to_hf_dataset(
    cache: Cache | None, source: TokenSource | TokenData, *, cache_dir: str | None = None
) -> Any:
    """Returns the samples of a source with their labels as a `datasets.Dataset`, memory-mapped, in NumPy format.

    Samples keep their order, and are compared with what the teacher saw. The same cache and source are found again in
    `cache_dir`.

    Args:
        cache: of that source, complete; None leaves out the soft columns, for a held-out source.
        cache_dir: where the dataset lies; None is the datasets library's own folder.

    Raises:
        AlignmentError: the source is not what was labeled.
        IncompleteCacheError: the cache is not finished.
        ConfigError: the cache is not one of tokens.
        MissingExtraError: datasets is not installed.
    """
    library = text_library("datasets")
    tokens = library.Value("int32")
    features = {name: library.Sequence(tokens) for name in ("input_ids", "labels", "seq_lengths")}
    if cache is None:
        data: Any = source if isinstance(source, TokenData) else TokenData(source)
        made_from = ["tokens", data.source.digest]
    else:
        check_cache(cache, "tokens", 'to_hf_dataset is for language models ("tokens")')
        data = SoftLabelDataset(source, cache)
        made_from = ["labels of a cache, with soft_sample", cache.manifest_sha256, cache.markers.digest()]
        features |= {name: library.Value("string") for name in ("soft_cache", "soft_sample")}
        features["soft_positions"] = library.Sequence(tokens)
        for name, array in _arrays(cache.read([])).items():
            value = library.Value("int32" if array.dtype.kind in "iu" else "float32")
            row = value if array.ndim == 1 else library.Sequence(value, length=array.shape[1])
            features[f"soft_{name}"] = library.Sequence(row)
    made = library.Dataset.from_generator(
        _rows,
        features=library.Features(features),
        cache_dir=cache_dir,
        gen_kwargs={
            "data": data,
            "num_samples": len(source if isinstance(source, TokenSource) else source.source),
        },
        fingerprint=digest_json(made_from)[:32],
    )
    return made.with_format("numpy")


def _rows(data: Any, num_samples: int) -> Iterator[dict[str, Any]]:
    """The rows of the dataset, of `TokenData` without soft labels, of a `SoftLabelDataset` with them."""
    for start in range(0, num_samples, BATCH_SAMPLES):
        batch: TokenBatch = data.load(np.arange(start, min(start + BATCH_SAMPLES, num_samples)), 0)
        labels_BL = np.full(batch.tokens.shape, IGNORED, np.int32)
        labels_BL.reshape(-1)[batch.rows.numpy() + 1] = batch.targets.numpy()
        labeled = None
        if batch.labels is not None:
            labeled = batch.rows if batch.labeled is None else batch.rows[batch.labeled]
            counts = batch.row_counts if batch.label_counts is None else batch.label_counts
            ends = np.cumsum(counts)
            arrays, made_by = _arrays(batch.labels.to_numpy()), labels_digest(data.cache)
        for number, length in enumerate(batch.lengths.tolist()):
            row: dict[str, Any] = {
                "input_ids": batch.tokens[number, :length].numpy(),
                "labels": labels_BL[number, :length],
                "seq_lengths": np.unique(batch.segments[number, :length].numpy(), return_counts=True)[1],
            }
            if labeled is not None:
                mine = slice(ends[number] - counts[number], ends[number])
                row["soft_cache"], row["soft_sample"] = made_by, _sample_digest(row)
                row["soft_positions"] = labeled[mine].numpy() % batch.tokens.shape[1]
                row |= {f"soft_{name}": array[mine] for name, array in arrays.items()}
            yield row


def labels_digest(cache: Cache) -> str:
    """A digest of what the labels of a cache are, whatever their source: teacher, tokenizer, label policy, codec."""
    identity = {name: part for name, part in cache.manifest.identity.items() if name != "source"}
    teacher = {name: value for name, value in identity["teacher"].items() if name != "spec"}
    return digest_json(identity | {"teacher": teacher})[:16]


def _sample_digest(row: Mapping[str, Any]) -> str:
    """A fingerprint of a row's tokens, of which of them are learned, and of its documents."""
    columns = [np.asarray(row[name], np.int64) for name in ("input_ids", "labels", "seq_lengths")]
    return f"{fingerprint('', 0, np.concatenate(columns)):016x}"


def _arrays(labels: SoftLabels) -> dict[str, np.ndarray]:
    return {name: array for name in ARRAYS if (array := getattr(labels, name)) is not None}


class SoftLabelCollator:
    """Makes a batch of rows of `to_hf_dataset`; a row without soft columns, or None in them, has no soft labels.

    Returns {"input_ids", "labels" [B, L], "attention_mask" [B, L], "batch": `TokenBatch` with labels}.

    Args:
        cache: that the dataset was made of, open, or one of the same teacher, tokenizer, label policy and codec.

    Raises:
        AlignmentError: a row was cut or changed since, or is of another teacher's cache.
    """

    def __init__(self, cache: Cache) -> None:
        self._pattern = cache.read([])
        self._url, self._digest = cache.url, labels_digest(cache)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        for example in examples:
            self._check_columns(example)
        lengths = np.array([len(example["input_ids"]) for example in examples])
        shape = len(examples), int(lengths.max())
        tokens_BL, segments_BL = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels_BL = np.full(shape, IGNORED, np.int64)
        for row, (example, length) in enumerate(zip(examples, lengths.tolist(), strict=True)):
            documents = np.asarray(example.get("seq_lengths", [length]), np.int64)
            if documents.sum() != length or len(example["labels"]) != length:
                raise AlignmentError(
                    f"sample: {length} input_ids, {len(example['labels'])} labels, seq_lengths of {documents.sum()} in all; "
                    "expected the same number; leave the columns of to_hf_dataset as they are, without max_length or packing"
                )
            tokens_BL[row, :length] = example["input_ids"]
            segments_BL[row, :length] = np.arange(len(documents)).repeat(documents)
            segments_BL[row, length:] = len(documents)
            labels_BL[row, :length] = example["labels"]
        is_row_BL = np.zeros(shape, bool)
        is_row_BL[:, :-1] = (segments_BL[:, 1:] == segments_BL[:, :-1]) & (labels_BL[:, 1:] != IGNORED)
        rows_P = np.flatnonzero(is_row_BL)
        batch = TokenBatch(
            tokens=torch.from_numpy(tokens_BL),
            segments=torch.from_numpy(segments_BL),
            rows=torch.from_numpy(rows_P),
            targets=torch.from_numpy(labels_BL.reshape(-1)[rows_P + 1]),
            lengths=lengths,
            row_counts=is_row_BL.sum(1),
            samples=np.arange(len(examples)),
            view=0,
            fingerprints=np.zeros(len(examples), np.uint64),
        )
        is_token_BL = np.arange(shape[1]) < lengths[:, None]
        return {
            "input_ids": batch.tokens,
            "labels": torch.from_numpy(labels_BL),
            "attention_mask": torch.from_numpy(is_token_BL.astype(np.int64)),
            "batch": self._with_labels(batch, examples),
        }

    def _check_columns(self, example: dict[str, Any]) -> None:
        """Raises AlignmentError where a row has lost a part: another one would not say what it is a label of."""
        needed = {"input_ids", "labels"}
        if any(example.get(name) is not None for name in SOFT_COLUMNS):
            needed |= {
                "seq_lengths",
                "soft_cache",
                "soft_sample",
                "soft_positions",
                *(f"soft_{name}" for name in _arrays(self._pattern)),
            }
        if lost := sorted(name for name in needed if example.get(name) is None):
            raise AlignmentError(
                f"sample: without {', '.join(lost)}; expected all columns of to_hf_dataset, or of a row without soft labels "
                "input_ids and labels; leave the columns as they are"
            )

    def _with_labels(self, batch: TokenBatch, examples: Sequence[dict[str, Any]]) -> TokenBatch:
        labeled = [example for example in examples if example.get("soft_positions") is not None]
        if any(example.get("soft_cache") != self._digest for example in labeled):
            raise AlignmentError(
                f"sample: its soft labels are not of cache {self._url}, nor of one of its teacher, tokenizer, label policy "
                "and codec; expected rows of to_hf_dataset(cache, source) of that cache; make it of that, or pass the "
                "cache that the dataset was made of"
            )
        counts = np.array([len(_positions(example)) for example in examples])
        rows_Q = batch.rows_at(np.concatenate([_positions(example) for example in examples]), counts)
        if (rows_Q < 0).any():
            raise AlignmentError(
                "sample: a soft label at a position where nothing is learned; expected soft_positions and labels as "
                "to_hf_dataset makes them; filter, select or shuffle its rows, and change none"
            )
        for example in labeled:
            if (found := _sample_digest(example)) != example["soft_sample"]:
                raise AlignmentError(
                    "sample: its input_ids, labels or seq_lengths are not those that were labeled (soft_sample "
                    f"{example['soft_sample']}, found {found}); expected rows as to_hf_dataset makes them; filter, select "
                    "or shuffle them and change none, or change the source and make its cache anew"
                )
        arrays = {}
        for name, pattern in _arrays(self._pattern).items():
            stacked = [
                np.asarray(example[f"soft_{name}"], pattern.dtype).reshape(-1, *pattern.shape[1:])
                for example in labeled
            ]
            arrays[name] = np.concatenate([pattern, *stacked])
        labels = self._pattern.with_arrays(arrays).to_torch()
        if len(rows_Q) == batch.num_rows:
            return replace(batch, labels=labels)
        return replace(batch, labels=labels, labeled=torch.from_numpy(rows_Q), label_counts=counts)


def _positions(example: dict[str, Any]) -> np.ndarray:
    found = example.get("soft_positions")
    return np.asarray([] if found is None else found, np.int64)
