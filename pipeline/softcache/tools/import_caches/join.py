"""Which sample of a source another program's key is of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from softcache.errors import AlignmentError

__all__ = ["SampleKeys"]


class SampleKeys:
    """The samples of a source by their key, by its last part without suffix, or by their number.

    Which of them other keys are follows from the first one.

    Args:
        of: the format, for messages.
        by_number: they are numbers, whatever the source's keys are.
    """

    def __init__(self, source: Any, of: str, *, by_number: bool = False) -> None:
        self._keys: list[str] = list(source.keys())
        self._name, self._of = source.name, of
        self._numbers: dict[str, int] | None = None
        self.joined_by = ""
        if by_number:
            self._numbers, self.joined_by = self._by_number(), "number"

    def samples(self, keys: Sequence[str], *, of: str) -> np.ndarray:
        """Returns the number [len(keys)] int64 of each key's sample.

        Raises:
            AlignmentError: the source has no such sample, or keys do not name one.
        """
        numbers = self._numbers or self._index(keys[0])
        found = np.array([numbers.get(key, -1) for key in keys], np.int64)
        for place in np.flatnonzero(found < 0)[:1].tolist():
            raise AlignmentError(
                f"{self._of}, {of}: key {keys[place]!r}; source {self._name} has none such (of {len(self._keys):,} the "
                f"first {self._keys[0]!r}; joined by {self.joined_by}); give the source that was labeled"
            )
        return found

    def check_all(self, is_found_N: np.ndarray, *, of: str) -> None:
        """Raises AlignmentError unless every sample was found."""
        for sample in np.flatnonzero(~is_found_N)[:1].tolist():
            raise AlignmentError(
                f"{self._of}, {of}: has no labels of {int((~is_found_N).sum()):,} of {len(self._keys):,} samples of source "
                f"{self._name}, the first {self._keys[sample]!r}; give all of its files, or the source that was labeled"
            )

    def _index(self, first: str) -> dict[str, int]:
        numbers = {key: number for number, key in enumerate(self._keys)}
        self.joined_by = "key"
        if first not in numbers:
            for parts in (1, 2):
                names = {last_parts(key, parts): number for number, key in enumerate(self._keys)}
                if first in names and len(names) == len(self._keys):
                    numbers, self.joined_by = names, "file name"
                    break
            else:
                if first.isdigit():
                    numbers, self.joined_by = self._by_number(), "number"
        self._numbers = numbers
        return numbers

    def _by_number(self) -> dict[str, int]:
        return {str(number): number for number in range(len(self._keys))}


def last_parts(key: str, count: int) -> str:
    """Returns the last parts of a key, without what follows the first dot of its last one.

    >>> last_parts("train/n01440764/n01440764_10026.JPEG", 2)
    'n01440764/n01440764_10026'
    """
    *folders, name = key.split("/")[-count:]  # a million of them: no PurePath
    return "/".join([*folders, name.split(".")[0]])
