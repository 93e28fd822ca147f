"""Label records as rows of one float tensor, for loops that know a batch as (images, targets) and nothing else.

A row is the ground truth and then the record's columns, one after the other:

    target | second target, share | ids K | log_probs K | log_tail G | target_log_prob 1 | stats S | counts K |
    log_threshold 1 | checksum 1

the second target with the first one's share only where the views are mixed, the four before the checksum only where the
record has them. So a label goes wherever a tensor goes: through any collate,
pinned memory, `.to(device)`, slices and concatenation. float32 holds every one of them: ids and counts are whole numbers
below 2^24 (checked), log-probabilities are float16 or float32 in the cache. The checksum is of the bits of the other
numbers: an average of two rows, as mixup and cutmix make, has the average of two checksums, and not the checksum of the
averages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from softcache.errors import LabelError
from softcache.labels import MixedTargets, SoftLabels

__all__ = ["LabelRows"]

COLUMNS = ("ids", "log_probs", "log_tail", "target_log_prob", "stats", "counts", "log_threshold")
INTEGER_COLUMNS = {"ids", "counts"}
MAX_EXACT_FLOAT32_INT = 2**24
CHECKSUM_SEED = 0x50F7CAC4E


MIXERS = (
    "mixing (timm's Mixup and FastCollateMixup, v2.MixUp, v2.CutMix) and label smoothing do not go with stored labels: "
    "switch them off (timm's train.py: --mixup 0 --cutmix 0 --smoothing 0)"
)


@dataclass(frozen=True)
class LabelRows:
    """What the columns of a row are.

    Attributes:
        widths: of each column that the record has; None: it is [P], not [P, width].
        fixed: what all records of a cache have in common.
        mixed: whether a row has two targets and the share of the first.
    """

    widths: dict[str, int | None]
    fixed: dict[str, Any]
    mixed: bool = False

    @classmethod
    def of(cls, labels: SoftLabels, *, mixed: bool = False) -> LabelRows:
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
            for name in ("num_classes", "temperatures", "max_temperature", "sampling", "tail_rounding")
        }
        return cls(
            {name: None if value.ndim == 1 else value.shape[1] for name, value in there.items()}, fixed, mixed
        )

    @property
    def width(self) -> int:
        """The numbers of a row, the ground truth and the checksum included."""
        return self._truth_width + 1 + sum(width or 1 for width in self.widths.values())

    @property
    def _truth_width(self) -> int:
        return 3 if self.mixed else 1

    def pack(self, labels: SoftLabels, targets_P: torch.Tensor | MixedTargets) -> torch.Tensor:
        """Returns [P, width] float32."""
        truth: list[Any] = [targets_P]
        if self.mixed:  # view 0 of such a cache has one class per row
            mixed = targets_P if isinstance(targets_P, MixedTargets) else MixedTargets.of_single(targets_P)
            truth = [mixed.first, mixed.second, mixed.shares]
        columns = [*truth, *(getattr(labels, name) for name in self.widths)]
        rows = torch.cat([torch.as_tensor(c).float().reshape(len(targets_P), -1) for c in columns], dim=1)
        return torch.cat([rows, _checksums(rows)[:, None]], dim=1)

    def unpack(self, rows: torch.Tensor) -> tuple[SoftLabels, torch.Tensor | MixedTargets]:
        """Returns the record, and the ground truth [P] int64 (`MixedTargets` of mixed views), of [P, width] rows.

        Raises:
            LabelError: the tensor is not what `pack` made.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width or rows.dtype != torch.float32:
            raise LabelError(
                f"targets: {rows.dtype} of shape {tuple(rows.shape)}; expected float32 [batch, {self.width}], the rows of "
                f"the labeled dataset; {MIXERS}"
            )
        wrong = torch.count_nonzero(_checksums(rows[:, :-1]) != rows[:, -1])
        if wrong:
            raise LabelError(
                f"targets: {int(wrong)} of {len(rows)} rows are not those of the labeled dataset but were computed from "
                f"them, and an average of class numbers is no class; {MIXERS}"
            )
        widths = [self._truth_width, *(width or 1 for width in self.widths.values())]
        truth, *columns = rows[:, :-1].split(widths, dim=1)
        values = {}
        for (name, width), column in zip(self.widths.items(), columns, strict=True):
            column = column[:, 0] if width is None else column
            values[name] = column.long() if name in INTEGER_COLUMNS else column
        labels, first = SoftLabels(**values, **self.fixed), truth[:, 0].long()
        return labels, MixedTargets(first, truth[:, 1].long(), truth[:, 2]) if self.mixed else first


def _checksums(rows_PW: torch.Tensor) -> torch.Tensor:
    """Returns whole numbers [P] float32 below 2^24, a hash of the bits of float32 rows; alike by chance once in 2^24."""
    generator = torch.Generator().manual_seed(CHECKSUM_SEED)
    factors_W = torch.randint(-(2**63), 2**63 - 1, (rows_PW.shape[1],), generator=generator) | 1
    bits_PW = rows_PW.contiguous().view(torch.int32).long()
    hashed_P = (bits_PW * factors_W.to(rows_PW.device)).sum(1)  # modulo 2^64
    return ((hashed_P >> 40) & (MAX_EXACT_FLOAT32_INT - 1)).float()
