"""`[labels.positions]`: which positions of a sample get a label row. A row that is skipped costs no byte.

Eligible are the rows that the source has (`softcache.data.sources.text.packing`); of a sample with n of them

    all       every one
    every     rows 0, N, 2N, … of them: ceil(n / every)
    random    ceil(share * n), drawn without replacement
    entropy   the ceil(share * n) at which the teacher is least certain, ties by position

All this is of texts, and of the cells of masks. Of a detector's cells, "cells" takes exactly `top` of each image: those of
its ground truth, then the best by the teacher's class score (`softcache.labels.sparsify.detection`).

How many a sample keeps is known before the teacher runs; only `entropy` needs its answer to say which. Under `every` and
`random` the teacher's head runs on the chosen rows alone; its backbone runs on all tokens under any policy.

A random draw is counter-based: row t of a sample has the number

    splitmix64(xxh3_64(key utf-8, seed) + (t + 1) * 0x9E3779B97F4A7C15)         modulo 2^64

where t is its position, and the rows with the largest numbers are taken. So a rerun, another worker, batch or unit
chooses the same. About 15 microseconds for a sample of 256 tokens on one core.

Shape suffixes: B samples, L rows of the longest, P eligible rows of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import xxhash
from pydantic import Field, model_validator

from softcache.hashing.splitmix import SPLITMIX64_GAMMA, splitmix64
from softcache.runtime.indexing import concatenated_ranges
from softcache.settings import Settings

if TYPE_CHECKING:
    import torch

__all__ = ["LabelKind", "PositionSettings", "chosen_rows", "highest_rows"]

LabelKind = Literal["image", "tokens", "cells"]
"""Of a classifier of images, a row each; of a language model, a row per token; of a detector, a row per kept anchor, and of
masks, a row per cell of a grid."""
DEFAULT_STRIDE = 4
ROUNDING = 1e-9
"""Of share * n: 0.07 * 100 is 7.000000000000001, and means 7."""


class PositionSettings(Settings):
    """[labels.positions]: which positions of a sample get a label row.

    Attributes:
        policy: of texts and masks "all"; "every" `every`-th one; a "random" `share`; the `share` of highest teacher
            "entropy". Of a detector's cells "cells".
        every: of "every".
        share: of a sample's rows, of "random" and "entropy"; rounded up, so that each sample keeps one at least.
        seed: of "random".
        top: rows of each image, of "cells".
        stride: of masks: pixels of a cell's side in the viewed image; None: `DEFAULT_STRIDE`.
    """

    policy: Literal["all", "every", "random", "entropy", "cells"] = "all"
    every: int = Field(4, ge=1)
    share: float = Field(0.25, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=2**63)
    top: int = Field(64, ge=1, le=2**20)
    stride: int | None = Field(None, ge=1, le=2**14)

    @model_validator(mode="after")
    def _check_policy(self) -> Self:
        given_keys = self.model_fields_set - {"stride"}
        if given_keys and "policy" not in given_keys:
            given = ", ".join(sorted(given_keys))
            raise ValueError(
                f'{given} without a policy would be ignored; set policy = "every", "random", "entropy" or "cells"'
            )
        return self

    @property
    def cell_side(self) -> int:
        """Pixels of a cell's side, of masks."""
        return self.stride or DEFAULT_STRIDE

    @property
    def chooses_cells(self) -> bool:
        """Whether the rows are a detector's cells."""
        return self.policy == "cells"

    @property
    def is_static(self) -> bool:
        """Whether rows are left out, and which is known before the teacher runs."""
        return self.policy in ("every", "random")

    def counts(self, num_rows: np.ndarray) -> np.ndarray:
        """Returns how many [N] int64 of a sample's `num_rows` [N] rows are labeled; at least one of one or more.

        >>> PositionSettings(policy="every", every=4).counts(np.array([1, 4, 5, 30])).tolist()
        [1, 1, 2, 8]
        >>> PositionSettings(policy="random", share=0.1).counts(np.array([1, 4, 5, 30, 31])).tolist()
        [1, 1, 1, 3, 4]
        """
        if self.policy == "all":
            return num_rows
        if self.chooses_cells:
            return np.full(len(num_rows), self.top, np.int64)
        if self.policy == "every":
            return -(-num_rows // self.every)
        wanted = np.ceil(self.share * num_rows - ROUNDING).astype(np.int64)
        return np.clip(wanted, np.minimum(num_rows, 1), num_rows)

    def identity(self) -> dict[str, Any]:
        """Returns the policy and the numbers that it reads."""
        read = {
            "all": (),
            "every": ("every",),
            "random": ("share", "seed"),
            "entropy": ("share",),
            "cells": ("top",),
        }
        return {name: getattr(self, name) for name in ("policy", *read[self.policy])}


def chosen_rows(
    settings: PositionSettings, keys: Sequence[str], row_counts: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """Returns which rows are labeled, ascending int64, where that is known before the teacher runs.

    Args:
        settings: of a policy that is `is_static`.
        keys: [B] of the samples.
        row_counts: [B] eligible rows of each.
        positions: [P] where in its sample each of them is.
    """
    wanted_B = settings.counts(row_counts)
    if settings.policy == "every":
        starts_B = np.cumsum(row_counts) - row_counts
        return concatenated_ranges(starts_B, wanted_B, settings.every)
    assert settings.policy == "random"
    scores_P = _random_numbers(settings.seed, keys, row_counts, positions)
    return highest_rows(scores_P, row_counts, wanted_B).numpy()


def highest_rows(scores_P: torch.Tensor, row_counts: np.ndarray, wanted: np.ndarray) -> torch.Tensor:
    """Returns the rows of the highest scores of each sample, ascending int64, on the scores' device; waits for nothing.

    Args:
        scores_P: [P] numbers; of equal ones the earlier row is taken.
        row_counts: [B] rows of each sample, P in all.
        wanted: [B] how many of them to take.
    """
    import torch

    num_samples, length, most = len(row_counts), int(row_counts.max(initial=0)), int(wanted.max(initial=0))

    def there(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(scores_P.device, non_blocking=True)

    # Padded to a table, a sample a line: many short sorts are five times as fast as a long one.
    starts = np.cumsum(row_counts) - row_counts
    lowest = -torch.inf if scores_P.is_floating_point() else torch.iinfo(scores_P.dtype).min
    scores_BL = scores_P.new_full((num_samples * length,), lowest)
    cells = concatenated_ranges(np.arange(num_samples) * length, row_counts)
    scores_BL[there(cells)] = scores_P
    order_BL = scores_BL.view(num_samples, length).sort(dim=1, descending=True, stable=True).indices[:, :most]
    is_taken = torch.arange(most, device=scores_P.device) < there(wanted)[:, None]
    taken = order_BL.where(is_taken, length).sort(dim=1).values.flatten()
    places = concatenated_ranges(np.arange(num_samples) * most, wanted)
    return taken[there(places)] + there(np.repeat(starts, wanted))


def _random_numbers(
    seed: int, keys: Sequence[str], row_counts: np.ndarray, positions: np.ndarray
) -> torch.Tensor:
    """[P] int64, from 0 on: the upper 63 bits, because torch sorts signed numbers only."""
    import torch

    bases_B = np.array([xxhash.xxh3_64_intdigest(key.encode(), seed) for key in keys], np.uint64)
    bases_P = torch.from_numpy(np.repeat(bases_B, row_counts).view(np.int64))
    counters_P = bases_P + (torch.from_numpy(positions.astype(np.int64)) + 1) * SPLITMIX64_GAMMA
    return (splitmix64(counters_P) >> 1) & (2**63 - 1)
