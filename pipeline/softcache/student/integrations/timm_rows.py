"""Label records as rows of one float tensor, for loops that know a batch as (images, targets) and nothing else.

A row is the ground truth and then the record's columns, one after the other:

    target | ids K | log_probs K | log_tail G | target_log_prob 1 | stats S | counts K | log_threshold 1

the last four only where the record has them. So a label goes wherever a tensor goes: through any collate, pinned memory,
`.to(device)`, slices and concatenation. float32 holds every one of them: ids and counts are whole numbers below 2^24
(checked), log-probabilities are float16 or float32 in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from softcache.errors import LabelError
from softcache.labels import SoftLabels

__all__ = ["LabelRows"]

COLUMNS = ("ids", "log_probs", "log_tail", "target_log_prob", "stats", "counts", "log_threshold")
INTEGER_COLUMNS = {"ids", "counts"}
MAX_EXACT_FLOAT32_INT = 2**24


@dataclass(frozen=True)
class LabelRows:
    """What the columns of a row are.

    Attributes:
        widths: of each column that the record has; None: it is [P], not [P, width].
        fixed: what all records of a cache have in common.
    """

    widths: dict[str, int | None]
    fixed: dict[str, Any]

    @classmethod
    def of(cls, labels: SoftLabels) -> LabelRows:
        """Returns the layout of a record, and of all records of its cache.

        Raises:
            LabelError: it has too many classes for a float32.
        """
        if labels.num_classes >= MAX_EXACT_FLOAT32_INT:
            raise LabelError(
                f"LabelRows: {labels.num_classes:,} classes; expected fewer than {MAX_EXACT_FLOAT32_INT:,}, the whole "
                "numbers that a float32 tells apart; use SoftLabelDataset"
            )
        there = {name: value for name in COLUMNS if (value := getattr(labels, name)) is not None}
        fixed = {
            name: getattr(labels, name)
            for name in ("num_classes", "temperatures", "max_temperature", "sampling")
        }
        return cls(
            {name: None if value.ndim == 1 else value.shape[1] for name, value in there.items()}, fixed
        )

    @property
    def width(self) -> int:
        """The numbers of a row, the ground truth included."""
        return 1 + sum(width or 1 for width in self.widths.values())

    def pack(self, labels: SoftLabels, targets_P: torch.Tensor) -> torch.Tensor:
        """Returns [P, width] float32."""
        columns = [targets_P, *(getattr(labels, name) for name in self.widths)]
        return torch.cat([torch.as_tensor(c).float().reshape(len(targets_P), -1) for c in columns], dim=1)

    def unpack(self, rows: torch.Tensor) -> tuple[SoftLabels, torch.Tensor]:
        """Returns the record, and the ground truth [P] int64, of [P, width] rows.

        Raises:
            LabelError: the tensor is not what `pack` made.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width or rows.dtype != torch.float32:
            raise LabelError(
                f"targets: {rows.dtype} of shape {tuple(rows.shape)}; expected float32 [batch, {self.width}], the rows of "
                "the labelled dataset; mixup, cutmix and label smoothing make others: switch them off"
            )
        target, *columns = rows.split([1, *(width or 1 for width in self.widths.values())], dim=1)
        values = {}
        for (name, width), column in zip(self.widths.items(), columns, strict=True):
            column = column[:, 0] if width is None else column
            values[name] = column.long() if name in INTEGER_COLUMNS else column
        return SoftLabels(**values, **self.fixed), target[:, 0].long()
