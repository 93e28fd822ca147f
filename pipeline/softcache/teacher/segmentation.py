"""A frozen model of semantic segmentation as a teacher: a label row for each cell of a grid.

Shape suffixes: `B` images, `V` classes, `P` rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from softcache.cache.codecs import CODECS, Codec, CodecSettings
from softcache.data.batch import Dataset
from softcache.data.masks import SegmentationBatch
from softcache.data.sources.segmentation.base import IGNORED
from softcache.errors import ConfigError, LabelError
from softcache.labels import SoftLabels
from softcache.labels.sparsify import LabelSettings
from softcache.models.mean_iou import confusion_matrix, mask_scores
from softcache.models.segmentation import build_segmenter, scaled_logits
from softcache.teacher.base import ClassVotes, RowScores
from softcache.teacher.image import ImageTeacher

__all__ = ["SegmentationTeacher"]

CHUNK_ELEMENTS = 2**24
"""Logits that are made into labels at once."""


class SegmentationTeacher(ImageTeacher):
    """A model of semantic segmentation, with its normalisation."""

    fewest_samples = 32
    build = staticmethod(build_segmenter)

    def codec(self, k: int, labels: LabelSettings, settings: CodecSettings) -> Codec:
        if "cells" not in CODECS.get(settings.name).kinds or settings.name == "cells":
            raise ConfigError(
                f"capture.codec: {settings.name!r}; a mask's rows are distributions over all classes; choose open or packed"
            )
        return super().codec(k, labels, settings)

    @torch.inference_mode()
    def chunks(self, batch: Any) -> Iterator[torch.Tensor]:
        maps_BVhw = scaled_logits(self.logits(batch.images), batch.cells.height, batch.cells.width)
        maps_BAV = maps_BVhw.flatten(2).transpose(1, 2)
        image_P, cell_P = (part.to(self.device) for part in _places(batch))
        step = max(1, CHUNK_ELEMENTS // self.num_classes)
        for start in range(0, max(1, batch.num_rows), step):
            rows = slice(start, start + step)
            yield maps_BAV[image_P[rows], cell_P[rows]]

    def _checked(self, logits: Any, images: torch.Tensor) -> torch.Tensor:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if (
            not isinstance(logits, torch.Tensor)
            or logits.ndim != 4
            or logits.shape[:2] != (len(images), self._num_outputs)
        ):
            raise LabelError(
                f"teacher {self.spec}: expected logits of shape ({len(images)}, {self._num_outputs}, height, width); found "
                f"{found}; the head must have one output per class of the source, or teacher.class_map choose among them"
            )
        return logits

    @torch.inference_mode()
    def label(self, batch: Any, settings: LabelSettings, **more: Any) -> tuple[SoftLabels, torch.Tensor]:
        """Returns the batch's record and the faults [P] uint8 of its logits; of a pixel without a class, the log-probability
        of the truth is -inf."""
        is_ignored_P = batch.targets == IGNORED
        record, faults_P = super().label(replace(batch, targets=batch.targets.clamp(min=0)), settings, **more)
        truth_P = record.target_log_prob
        if truth_P is not None and bool(is_ignored_P.any()):
            is_ignored_P = is_ignored_P.to(truth_P.device)
            record = replace(record, target_log_prob=truth_P.masked_fill(is_ignored_P, -torch.inf))
        return record, faults_P

    @torch.inference_mode()
    def score(self, batch: Any) -> RowScores:
        """Returns how well the rows of a batch are predicted, as if those without a class were as the others."""
        targets_P = batch.targets.to(self.device)
        loss, guess_loss, start, guesses = 0.0, 0.0, 0, []
        for logits_PV in self.chunks(batch):
            rows = slice(start, start + len(logits_PV))
            loss += float(
                nn.functional.cross_entropy(logits_PV, targets_P[rows], reduction="sum", ignore_index=IGNORED)
            )
            guesses.append(logits_PV.argmax(-1))
            guess_loss += float(nn.functional.cross_entropy(logits_PV, guesses[-1], reduction="sum"))
            start = rows.stop
        guesses_P = torch.cat(guesses)
        share = len(targets_P) / max(1, int((targets_P != IGNORED).sum()))
        correct = int((guesses_P == targets_P).sum())
        return RowScores(loss * share, round(correct * share), guesses_P.cpu(), guess_loss)

    def votes(self, batch: Any, scored: RowScores | None) -> ClassVotes:
        """Returns one guess for each class of each image: the commonest of its pixels, which are not independent."""
        assert scored is not None
        has_class_P = batch.targets != IGNORED
        places_P = (_places(batch)[0] * self.num_classes + batch.targets)[has_class_P]  # of image and class
        places_Q, inverse_P = places_P.unique(return_inverse=True)
        counts_QV = torch.zeros(len(places_Q), self.num_classes, dtype=torch.int64)
        counts_QV.index_put_(
            (inverse_P, scored.guesses_P[has_class_P]), torch.ones_like(inverse_P), accumulate=True
        )
        loss = scored.guess_loss / max(1, batch.num_rows)
        return ClassVotes(places_Q % self.num_classes, counts_QV.argmax(1), loss)

    @torch.inference_mode()
    def scores(
        self,
        data: Dataset,
        *,
        batches: Iterable[range],
        progress: Callable[[int], None] = lambda samples: None,
    ) -> dict[str, Any]:
        """Returns its mean intersection over union, accuracy and loss on the pixels of a split's plain view, in a manifest's
        names."""
        matrix_VV = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64, device=self.device)
        loss, pixels = 0.0, 0
        for samples in batches:
            batch: Any = data.load(samples, 0, fingerprints=False)
            masks = batch.masks.to(self.device).long()
            logits = scaled_logits(self.logits(batch.images), *masks.shape[1:])
            matrix_VV += confusion_matrix(logits.argmax(1), masks, self.num_classes, ignored=IGNORED)
            loss += float(nn.functional.cross_entropy(logits, masks, reduction="sum", ignore_index=IGNORED))
            pixels += int((masks != IGNORED).sum())
            progress(len(batch.samples))
        found = mask_scores(matrix_VV)
        return {
            "eval_miou": found["miou"],
            "eval_accuracy": found["accuracy"],
            "eval_loss": loss / max(1, pixels) if math.isfinite(loss) else None,
        }


def _places(batch: SegmentationBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The image and the cell [P] of each row."""
    return batch.rows // len(batch.cells), batch.rows % len(batch.cells)
