"""One pair of texts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Pair"]


@dataclass(frozen=True)
class Pair:
    """A source text and its translation; neither is empty.

    Attributes:
        key: stable, and its own.
        language: of the target, e.g. "de"; "" where a file names none.
        reference: a person's translation, where the target is a teacher's; else None.
    """

    key: str
    source: str
    target: str
    language: str
    reference: str | None = None
