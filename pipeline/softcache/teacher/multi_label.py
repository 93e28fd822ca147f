"""A frozen image classifier whose outputs are independent: a sigmoid for each class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from softcache.cache.codecs import CODECS, CodecSettings
from softcache.cache.codecs.bernoulli import BernoulliCodec
from softcache.data.batch import Dataset
from softcache.data.images import ImageBatch
from softcache.errors import ConfigError, LabelError
from softcache.labels import BernoulliLabels
from softcache.labels.sparsify import LabelSettings, bernoulli_faults, top_k_bernoulli
from softcache.models.average_precision import multi_label_scores
from softcache.teacher.base import ClassVotes, RowScores
from softcache.teacher.image import ImageTeacher

__all__ = ["MultiLabelTeacher"]


class MultiLabelTeacher(ImageTeacher):
    """A classifier with a sigmoid for each class, with its normalisation."""

    has_row_scores, has_sigmoids = False, True

    def identity(self) -> dict[str, dict[str, Any]]:
        found = super().identity()
        found["teacher"]["output"] = "sigmoid"
        return found

    def mean_logits(self, one_BV: torch.Tensor, other_BV: torch.Tensor) -> torch.Tensor:
        """Returns logits of the mean of each class's two probabilities: log(p / (1 - p)) of p = (p_1 + p_2) / 2."""
        yes, no = (
            torch.logaddexp(
                torch.nn.functional.logsigmoid(sign * one_BV), torch.nn.functional.logsigmoid(sign * other_BV)
            )
            for sign in (1, -1)
        )
        return yes - no

    def codec(self, k: int, labels: LabelSettings, settings: CodecSettings) -> BernoulliCodec:
        kind = CODECS.get(settings.name)
        if settings.name not in ("open", "bernoulli"):
            raise ConfigError(
                f"capture.codec: {settings.name!r} is of {'a detector' if 'image' not in kind.kinds else 'a softmax'}; the "
                f'outputs of teacher {self.spec} are sigmoids, kept as plain columns; set codec = "open"'
            )
        if labels.statistics != "all":
            raise ConfigError(
                f"labels.statistics: {labels.statistics!r} is of one distribution over all classes of an image or a token; "
                f"teacher {self.spec} has other labels; drop the setting"
            )
        if not labels.labels_detections:
            raise ConfigError(
                f"labels.policy: {labels.policy!r} is of one distribution over all classes; the outputs of teacher "
                f'{self.spec} are sigmoids, one for each class; set "top_k" or "dense"'
            )
        if "temperatures" in labels.model_fields_set:
            raise ConfigError(
                f"labels.temperatures: the outputs of teacher {self.spec} are sigmoids, one for each class, with no tail "
                "whose mass were to be kept at temperatures; drop the setting: any temperature is served"
            )
        return BernoulliCodec(num_classes=self.num_classes, k=k, **settings.parameters())

    @torch.inference_mode()
    def label(  # type: ignore[override]
        self, batch: ImageBatch, settings: LabelSettings
    ) -> tuple[BernoulliLabels, torch.Tensor]:
        """Returns the batch's record and the faults [P] uint8 of its logits, on the device."""
        k, records, faults = settings.num_slots(self.num_classes), [], []
        for logits_PV in self.chunks(batch):
            records.append(top_k_bernoulli(logits_PV, k))
            faults.append(bernoulli_faults(logits_PV))
        return BernoulliLabels.concat(records), torch.cat(faults)

    def score(self, batch: Any) -> RowScores:
        """Raises: quality is the average precision of classes, and not a sum over rows.

        Raises:
            LabelError: always.
        """
        raise LabelError(
            f"teacher {self.spec}: its classes are independent, and have no accuracy of rows; use `scores`"
        )

    @torch.inference_mode()
    def votes(self, batch: Any, scored: RowScores | None) -> ClassVotes:
        """Returns the likeliest class of each image that has one class alone."""
        is_one_B = batch.targets.sum(1) == 1
        logits_BV = self.logits(batch.images)[is_one_B.to(self.device)].float().cpu()
        best_B, guesses_B = logits_BV.max(1)
        loss = -torch.nn.functional.logsigmoid(best_B).mean() if len(best_B) else torch.zeros(())
        return ClassVotes(batch.targets[is_one_B].argmax(1), guesses_B, float(loss))

    def scores(
        self,
        data: Dataset,
        *,
        batches: Iterable[range],
        progress: Callable[[int], None] = lambda samples: None,
    ) -> dict[str, Any]:
        """Returns its mean average precision and binary cross-entropy on a split's plain view, in a manifest's names."""
        parts = []
        for samples in batches:
            batch: Any = data.load(samples, 0, fingerprints=False)
            parts.append((self.logits(batch.images).cpu(), batch.targets))
            progress(len(batch.samples))
        logits_NV, targets_NV = (torch.cat([part[place] for part in parts]) for place in (0, 1))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits_NV, targets_NV)
        found = multi_label_scores(logits_NV.numpy(), targets_NV.numpy())["map"]
        return {
            "eval_map": found if np.isfinite(found) else None,
            "eval_loss": float(loss) if torch.isfinite(loss) else None,
        }
