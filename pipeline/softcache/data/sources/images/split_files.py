"""Files of pictures and labels in two splits: a path of each, or a share of one that is held out."""

from __future__ import annotations

from abc import ABC
from collections.abc import Collection, Sequence

import numpy as np
from pydantic import Field

from softcache.data.sources.base import Split
from softcache.data.sources.files import CorpusFiles, find_files
from softcache.data.sources.images.classes import Classes, find_classes
from softcache.data.sources.images.pictures import PictureSettings
from softcache.data.sources.splits import choose_samples
from softcache.errors import SourceError

__all__ = ["SplitFiles", "file_facts"]


class SplitFiles(PictureSettings, ABC):
    """`path` and `eval_path` are a file, a glob, a folder, numbers in braces, or each of them in a bucket (`s3://`, `gs://`).

    Without `eval_path`, `eval_share` of the samples of `path` are held out, chosen by a hash of their key.
    """

    path: str | None = None
    eval_path: str | None = None
    eval_share: float = Field(0.1, gt=0, lt=1)

    def files(self, split: Split, kinds: Collection[str]) -> CorpusFiles:
        """Returns the local files of a split, unpacked.

        Raises:
            SourceError: there are none, or they are of other kinds.
        """
        given = self.eval_path if split == "eval" and self.eval_path is not None else self.path
        what = f"one ending in {', '.join(kinds)}, a glob, a folder, or each of them in a bucket"
        if given is None:
            raise SourceError(f"source.path: missing; expected {what}")
        found = find_files(given, self, kinds=kinds)
        if found is None:
            raise SourceError(f"source.path {given!r}: no such file; expected {what}")
        found = found.unpacked(self)
        paths = [path for path in found.paths if path.suffix in kinds]
        if not paths:
            raise SourceError(f"source.path {given!r}: no such file in the folder; expected {what}")
        return CorpusFiles(found.given, found.root, paths, found.is_folder)

    def chosen(self, keys: Sequence[str], split: Split) -> np.ndarray:
        """Returns the numbers [N] int64 of the samples of a file that are of a split, in order."""
        share = self.eval_share if self.eval_path is None else None
        return choose_samples(keys, split, eval_share=share, shuffle=False)[: self.max_samples(split)]

    def classes(
        self, labels: Sequence[object] | np.ndarray, where: str, known: Sequence[str] | None = None
    ) -> Classes:
        """Returns the classes, from the labels of all training samples."""
        return find_classes(labels, given=self.class_names, order=self.class_order, known=known, where=where)


def file_facts(files: CorpusFiles) -> list[list[object]]:
    """Returns names, sizes and times of files, which change when one of them does."""
    return [[files.name(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files.paths]
