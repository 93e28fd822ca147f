"""One package per modality: source, teacher, student data, task, score, table columns and config checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softcache.modalities.base import (
    MODALITIES,
    Data,
    Modality,
    Score,
    modality_of,
    percent,
)

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = [
    "MODALITIES",
    "Data",
    "Modality",
    "Score",
    "modality_of",
    "open_data",
    "percent",
]


def open_data(config: RunConfig) -> Data:
    """Returns the data of a config; files are opened, not copied."""
    return modality_of(config).open(config)
