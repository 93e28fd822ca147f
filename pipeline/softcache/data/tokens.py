"""Batches of token samples: what the teacher labels, and what a student must see again.

The text half of batches.py: both halves of softcache load tokens here and nowhere else, so that a fingerprint
taken at capture and one taken at training time are of the same thing by construction. A batch is padded to its
longest sample. A sample of 256 tokens costs about 11 microseconds on one core, 6 of them for its fingerprint.

Shape suffixes: B batch, L positions, P rows of all samples together, Q those of them that have a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from softcache.data.batch import Dataset
from softcache.data.row_batch import RowBatch, span
from softcache.errors import SourceError
from softcache.hashing.digests import fingerprint
from softcache.labels import LabelKind, SoftLabels

if TYPE_CHECKING:
    import torch

    from softcache.data.sources.text.table import TokenSource
    from softcache.data.transforms import Views
    from softcache.labels.positions import PositionSettings

__all__ = ["TokenBatch", "TokenData"]

ACROSS_DOCUMENTS = "across documents"


@dataclass(frozen=True, eq=False)
class TokenBatch(RowBatch):
    """Samples of tokens, padded on the right; see `softcache.data.batch.Batch`.

    Attributes:
        tokens: [B, L] int64, padded with 0.
        segments: [B, L] int64, from 0; padding is one more segment of its own.
        rows: [P] int64, the flat positions b * L + t that have something to predict, sample by sample, ascending.
        targets: [P] int64, the token that each row predicts: that of position t + 1.
        lengths: [B] int64 (NumPy), the tokens of each sample.
        row_counts: [B] int64 (NumPy), the rows of each sample.
        view: always 0; text has one view.
        labels: the record of the rows that have a label, where there is one.
        labeled: [Q] int64, which of the P rows they are, ascending; None: all of them.
        label_counts: [B] int64 (NumPy), how many each sample has; None: `row_counts`.
        sampling_log_probs: [P] float32, of the policy that sampled the targets, in nats, NaN where none did; None: of no
            rollouts.
    """

    tokens: torch.Tensor
    segments: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    lengths: np.ndarray
    row_counts: np.ndarray
    samples: np.ndarray
    view: int
    fingerprints: np.ndarray
    unit: int | None = None
    labels: SoftLabels | None = None
    labeled: torch.Tensor | None = None
    label_counts: np.ndarray | None = None
    sampling_log_probs: torch.Tensor | None = None

    @property
    def row_stride(self) -> int:
        return self.tokens.shape[1]

    def _slice(self, start: int, stop: int) -> TokenBatch:
        samples, log_probs_P = slice(start, stop), self.sampling_log_probs
        return replace(
            self,
            tokens=self.tokens[samples],
            segments=self.segments[samples],
            lengths=self.lengths[samples],
            sampling_log_probs=None
            if log_probs_P is None
            else log_probs_P[span(self.row_counts, start, stop)],
            **self._sliced_rows(start, stop),
        )

    def select(self, chosen: np.ndarray) -> TokenBatch:
        import torch

        kept, log_probs_P = super().select(chosen), self.sampling_log_probs
        if log_probs_P is None:
            return kept
        return replace(kept, sampling_log_probs=log_probs_P[torch.from_numpy(chosen).to(log_probs_P.device)])

    def pin_memory(self) -> TokenBatch:
        return replace(
            self,
            tokens=self.tokens.pin_memory(),
            segments=self.segments.pin_memory(),
            rows=self.rows.pin_memory(),
            targets=self.targets.pin_memory(),
            labels=self.labels and self.labels.pin_memory(),
            labeled=None if self.labeled is None else self.labeled.pin_memory(),
            sampling_log_probs=self.sampling_log_probs
            if self.sampling_log_probs is None
            else self.sampling_log_probs.pin_memory(),
        )

    def to(self, device: torch.device) -> TokenBatch:
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            segments=self.segments.to(device, non_blocking=True),
            rows=self.rows.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            labels=self.labels and self.labels.to_torch(device, non_blocking=True),
            labeled=None if self.labeled is None else self.labeled.to(device, non_blocking=True),
            sampling_log_probs=None
            if self.sampling_log_probs is None
            else self.sampling_log_probs.to(device, non_blocking=True),
        )

    @classmethod
    def merge(cls, batches: Sequence[TokenBatch]) -> TokenBatch:
        """Returns one batch of all samples, in order, padded to the longest."""
        import torch

        length = max(batch.tokens.shape[1] for batch in batches)
        tokens, segments, rows, before = [], [], [], 0
        for batch in batches:
            added = length - batch.tokens.shape[1]
            tokens.append(torch.nn.functional.pad(batch.tokens, (0, added)))
            # A sample that was not padded yet gets a new segment, one that was has its padding prolonged.
            is_full_B = torch.from_numpy(batch.lengths == batch.tokens.shape[1]).to(batch.segments.device)
            padding_B = batch.segments[:, -1] + is_full_B
            segments.append(torch.cat([batch.segments, padding_B[:, None].expand(-1, added)], 1))
            rows.append(batch.rows + batch.rows // batch.tokens.shape[1] * added + before * length)
            before += len(batch)
        sampled = [batch.sampling_log_probs for batch in batches if batch.sampling_log_probs is not None]
        return replace(
            batches[0],
            sampling_log_probs=torch.cat(sampled) if sampled else None,
            tokens=torch.cat(tokens),
            segments=torch.cat(segments),
            rows=torch.cat(rows),
            lengths=np.concatenate([batch.lengths for batch in batches]),
            **cls._merged_rows(batches),
        )


class TokenData(Dataset):
    """A source of tokens in batches."""

    kind: ClassVar[LabelKind] = "tokens"
    is_ragged: ClassVar[bool] = True
    class_names: tuple[str, ...] = ()

    def __init__(self, source: TokenSource, *, cross_documents: bool = False) -> None:
        self.source, self.cross_documents = source, cross_documents

    @classmethod
    def from_identity(
        cls, source: TokenSource, identity: dict[str, Any], *, views: Views | None, rows_per_sample: int
    ) -> Self:
        """Returns a source as the teacher of a cache saw it; see `ViewedSource.from_identity`."""
        return cls(source, cross_documents=identity["attention"]["digest"] == ACROSS_DOCUMENTS)

    @property
    def mean_rows(self) -> float:
        return float(self.source.num_rows().mean())

    @property
    def max_rows(self) -> int:
        return self.source.seq_len

    def label_rows(self, positions: PositionSettings) -> np.ndarray:
        self._refuse_cells(positions, 'choose "all", "every", "random" or "entropy"')
        return positions.counts(self.source.num_rows())

    def sample_columns(self) -> dict[str, np.ndarray]:
        return {"num_rows": self.source.num_rows()}

    def targets(self, samples: np.ndarray) -> np.ndarray:
        read = (self.source.sample(number) for number in samples.tolist())
        return np.concatenate([sample.tokens[sample.rows + 1] for sample in read])

    def describe_position(self, position: int) -> str:
        return f", position {position}"

    def picture(self, sample: int) -> None:
        return None

    def identity(self, num_views: int) -> dict[str, dict[str, Any]]:
        """Returns the part of a cache's identity for the tokenizer and attention inside a packed sample.

        Raises:
            SourceError: there is to be more than one view.
        """
        if num_views != 1:
            raise SourceError(f"source {self.source.name}: {num_views} views; text has one view only")
        tokenizer = {"digest": self.source.tokenizer_digest, "vocab_size": self.source.vocab_size}
        if self.source.prefix:
            tokenizer["prefix"] = self.source.prefix
        return {
            "tokenizer": tokenizer,
            "attention": {"digest": ACROSS_DOCUMENTS if self.cross_documents else "inside a document"},
        }

    def load(
        self, samples: Sequence[int] | np.ndarray, view: int = 0, *, fingerprints: bool | np.ndarray = True
    ) -> TokenBatch:
        """Returns `samples` in the order given.

        Args:
            fingerprints: of which samples to take the fingerprint: all, none, or a mask [B].

        Raises:
            SourceError: a view other than 0 is asked for.
            IndexError: there is no such sample.
        """
        import torch

        if view != 0:
            raise SourceError(f"source {self.source.name}: view {view}; text has one view only, number 0")
        numbers = np.asarray(samples, np.int64)
        loaded = [self.source.sample(number) for number in numbers.tolist()]
        lengths = np.array([len(sample.tokens) for sample in loaded], np.int64)
        shape = len(loaded), int(lengths.max(initial=0))
        tokens_BL, segments_BL = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        learnt_BL = np.zeros(shape, bool)
        is_sampled = any(sample.log_probs is not None for sample in loaded)
        log_probs_BL = np.full(shape if is_sampled else (0, 0), np.nan, np.float32)
        for row, (sample, length) in enumerate(zip(loaded, lengths.tolist(), strict=True)):
            tokens_BL[row, :length] = sample.tokens
            segments_BL[row, :length] = sample.segments
            segments_BL[row, length:] = sample.segments[-1] + 1
            learnt_BL[row, :length] = sample.learnt
            if sample.log_probs is not None:
                log_probs_BL[row, :length] = sample.log_probs
        labeled_BL = np.zeros(shape, bool)
        labeled_BL[:, :-1] = (segments_BL[:, 1:] == segments_BL[:, :-1]) & learnt_BL[:, 1:]
        rows_P = np.flatnonzero(labeled_BL)
        prints = np.zeros(len(loaded), np.uint64)
        for row in np.flatnonzero(np.broadcast_to(fingerprints, len(loaded))).tolist():
            prints[row] = fingerprint(self.source.key(int(numbers[row])), view, loaded[row].content)
        return TokenBatch(
            tokens=torch.from_numpy(tokens_BL),
            segments=torch.from_numpy(segments_BL),
            rows=torch.from_numpy(rows_P),
            targets=torch.from_numpy(tokens_BL.reshape(-1)[rows_P + 1]),
            lengths=lengths,
            row_counts=labeled_BL.sum(1),
            samples=numbers,
            view=view,
            fingerprints=prints,
            sampling_log_probs=torch.from_numpy(log_probs_BL.reshape(-1)[rows_P + 1]) if is_sampled else None,
        )
