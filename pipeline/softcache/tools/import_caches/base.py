"""What another program's cache is to an import: its probabilities by sample of the config's source.

A format is a subclass of `Original` in a module of its own:

    @IMPORTERS.register("tinyvit")
    class TinyViT(Original): ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from softcache.data.batch import Dataset
from softcache.errors import ConfigError, SourceError
from softcache.hashing.digests import digest_json
from softcache.labels import LabelKind
from softcache.runtime.registry import Registry
from softcache.tools.import_caches.top_rows import TopRows

__all__ = ["IMPORTERS", "Original", "digest_files", "open_original"]

UNKNOWN = ("the tail above T = 1", "statistics", "the ground truth's probability where it was dropped")
"""What no format has that keeps the top K at one temperature."""


class Original(ABC):
    """Another program's cache, joined with the samples of a source.

    Attributes:
        name: registered; set by `open_original`.
        kind: of its labels.
        sees_source: whether the teacher saw the samples as the source has them, which then have fingerprints; else views
            that softcache cannot replay.
        by_view: whether units are read view by view; else all views of a range of samples after one another.
        max_mass: how far above 1 the probabilities of a row may sum before it is refused.
        bounds_tail: whether no dropped class is likelier than the last one that a row kept.
        missing: what the labels lack, in words, for the manifest.
        k: slots of a row.
        num_views: of each sample.
        digest: of the files' names and sizes.
        facts: what else the files say, for the manifest.
    """

    name: str
    kind: ClassVar[LabelKind]
    sees_source: ClassVar[bool] = False
    by_view: ClassVar[bool] = True
    max_mass: ClassVar[float] = 1e-3
    bounds_tail: ClassVar[bool] = True
    missing: ClassVar[tuple[str, ...]] = UNKNOWN

    k: int
    num_views: int = 1
    digest: str
    facts: dict[str, Any]

    @abstractmethod
    def __init__(self, paths: Sequence[Path], data: Dataset) -> None:
        """Opens the files and joins them with the samples.

        Raises:
            SourceError: a file is missing, damaged or not of this format, or a sample has no labels.
            LabelError: its numbers cannot be made into labels.
            AlignmentError: the files are of other samples.
        """

    @abstractmethod
    def read(self, samples: np.ndarray, view: int, batch: Any) -> TopRows:
        """Returns the labels of samples, all their rows.

        Args:
            samples: [B] int64, ascending.
            batch: of a source of text the samples' `TokenBatch`; else None.

        Raises:
            LabelError, AlignmentError, SourceError: as the constructor; a LabelError's `position` is the row at fault.
        """

    def parameters(self, samples: np.ndarray, view: int) -> dict[str, Any]:
        """Returns what the original keeps of how a view of samples was made, by name; nothing of text."""
        return {}

    def where(self, sample: int, view: int) -> str:
        """Returns the file that a sample's labels are in, for messages."""
        return self.name


IMPORTERS: Registry[type[Original]] = Registry(
    "cache format",
    package="softcache.tools.import_caches.formats",
    group="softcache.importers",
    subclass_of=Original,
)


def open_original(name: str, paths: Sequence[str | Path], data: Dataset) -> Original:
    """Returns another program's cache, joined with the samples of a source.

    Raises:
        SpecError: there is no such format.
        ConfigError: it is of another kind of data than the source.
        SourceError, LabelError, AlignmentError: as `Original`.
    """
    kind = IMPORTERS.get(name)
    if kind.kind != data.kind or getattr(data, "has_several_classes", False):
        raise ConfigError(
            f"import, format {name}: holds labels of kind {kind.kind!r}; source {data.source.name} is of kind "
            f"{data.kind!r}{', with several classes per sample' * (kind.kind == data.kind)}; give the config of the source "
            "that was labeled"
        )
    original = kind([Path(path) for path in paths], data)
    original.name = name
    return original


def digest_files(files: Iterable[tuple[str, Path]]) -> str:
    """Returns a digest of names and sizes.

    Raises:
        SourceError: a file cannot be read.
    """
    try:
        return digest_json([[name, path.stat().st_size] for name, path in files])
    except OSError as error:
        raise SourceError(f"import: {error.filename}: {error.strerror}; check the path") from error
