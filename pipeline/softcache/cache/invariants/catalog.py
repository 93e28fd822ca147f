"""The invariants by number, and what one that is broken is reported with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from softcache.cache.codecs.precision import ARITHMETIC

__all__ = ["INVARIANTS", "Violation", "arithmetic", "first_violation", "name_invariant"]

INVARIANTS: dict[str, str] = {
    "I1": "manifest.json is as its schema and its table say",
    "I2": "the table of samples has the manifest's sha256, samples 0 to N - 1, and keys that differ",
    "I3": "num_rows and first_row of the table of samples are as the plan implies",
    "I4": "a marker is of its unit, of this manifest, and names the unit's objects",
    "I5": "an object has the size and sha256 of its marker",
    "I6": "zarr.json describes the numbers that the manifest implies",
    "I7": "an object that the manifest names has its size and sha256",
    "I10": "objects decode to the unit's rows, by sample, then position, with one value for what is known per sample",
    "I11": "the column num_rows is that of the table of samples",
    "I12": "positions ascend within a sample, as far apart as the policy makes them",
    "I20": "ids are 0 to V - 1 in used slots; the first slot is used, and V marks the unused ones behind",
    "I21": "the ids of a row's used slots differ",
    "I22": "an unused slot has the log-probability -inf and the count 0",
    "I30": "no number is NaN or +inf, but for the log-probability of a ground truth that there is not",
    "I31": "log-probabilities are at most 0",
    "I32": "log-probabilities descend over the exact slots, and over the drawn ones",
    "I33": "the mass of the exact slots and of the tail is 1",
    "I40": "log_tail is -inf at all temperatures or at none",
    "I41": "log_tail rises with the temperature",
    "I42": "log_tail is convex in beta, its value at beta = 0 included",
    "I43": "no dropped class is more likely than the last exact slot",
    "I44": "log_tail is -inf exactly where no class with p > 0 was dropped",
    "I50": "support is a whole number from 1 to V, and not below the used slots with p > 0",
    "I51": "entropy is between 0 and log support",
    "I52": "entropy is what the exact slots and the tail allow",
    "I53": "the mean of the logits is at most -log support, and their deviation not below 0",
    "I60": "target_log_prob is at most 0, and NaN exactly where there is no ground truth (-inf of masks), or an "
    "imported row dropped it unknown",
    "I61": "target_log_prob is that of the ground truth's slot, where it has an exact one",
    "I62": "target_log_prob is at most that of the last exact slot and of the tail, where it has none",
    "I70": "counts are at least 1 in used slots, and sum to the draws",
    "I71": "all draws found a class where log_threshold is finite",
    "I80": "logits descend",
    "I81": "dropped_bound is at most the last logit, and -inf where K = V",
    "I82": "dropped_mass is between the share of dropped_bound and V - K times it",
    "I90": "cells are cells of the grid, and differ within a sample",
    "I91": "what else a head gives for a cell is finite",
    "I95": "the numbers of vectors are finite, and their scales above 0",
}
"""Numbers are never given to another invariant."""


class Violation(NamedTuple):
    """An invariant that some of a unit's rows break.

    Attributes:
        number: of the invariant.
        row: the first such row, counted from the unit's first.
        num_rows: how many there are.
        detail: column, found and expected.
    """

    number: str
    row: int
    num_rows: int
    detail: str

    def __str__(self) -> str:
        more = f" (and {self.num_rows - 1} rows more)" if self.num_rows > 1 else ""
        return name_invariant(self.number, f"row {self.row}: {self.detail}{more}")


def name_invariant(number: str, fault: object) -> str:
    """Returns the line of a fault that breaks an invariant."""
    return f"{fault}; invariant {number}: {INVARIANTS[number]}"


def arithmetic(values: np.ndarray) -> np.ndarray:
    """Returns what a writer's arithmetic may add to each of the finite values."""
    return ARITHMETIC.absolute + ARITHMETIC.relative * np.abs(values)


def first_violation(
    number: str, wrong: np.ndarray, column: str, values: np.ndarray, expected: np.ndarray | str
) -> list[Violation]:
    """Returns the violation of the rows where `wrong` [P] or [P, S] is set; none where it is nowhere.

    Args:
        values: as `wrong`, or [P]; what was found.
        expected: in words, or the same shape as `wrong`.
    """
    if not wrong.any():
        return []
    place = tuple(np.argwhere(wrong)[0].tolist())
    rows = wrong.any(axis=1) if wrong.ndim > 1 else wrong
    found = values[place[: values.ndim]]
    wanted = expected if isinstance(expected, str) else f"{expected[place[: expected.ndim]]:.7g}"
    slot = f" in slot {place[1]}" if len(place) > 1 and values.ndim > 1 else ""
    shown = f"{found:.7g}" if np.asarray(found).dtype.kind == "f" else str(found)
    return [
        Violation(number, place[0], int(rows.sum()), f"column {column}: {shown}{slot}; expected {wanted}")
    ]
