"""TinyViT's saved logits (github.com/microsoft/Cream, TinyViT): a folder for each epoch, a pair of files for each rank.

    logits_top100_epoch0/rank0-keys.txt      a key on each line
    logits_top100_epoch0/rank0-values.bin    as many records: int32 seed, K int16 ids, K float16 probabilities

Numbers are those of the machine that wrote them, little-endian in practice. K is not in the file: it follows from sizes.
An epoch is a view of every sample; the seed and the code of TinyViT's augmentation make its pixels, which softcache cannot
replay. With mixup, views are mixtures of the pairs of a batch. Samples that padded an epoch come twice; the first counts, of
the lowest rank.

Ids are softmax's largest, as int16: of up to 32,768 classes a negative one is damage; of up to 65,536 the two's complement
holds all; beyond that ids are ambiguous, and the format is refused. Probabilities are over all classes at T = 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from softcache.data.batch import Dataset
from softcache.errors import LabelError, SourceError
from softcache.labels import LabelKind
from softcache.tools.import_caches.base import IMPORTERS, Original, digest_files
from softcache.tools.import_caches.join import SampleKeys
from softcache.tools.import_caches.top_rows import TopRows, from_probabilities

__all__ = ["TinyViT"]

KEYS, VALUES = "-keys.txt", "-values.bin"


class _Rank(NamedTuple):
    """The pair of files of one rank.

    Attributes:
        values: [N] records, memory-mapped.
    """

    path: Path
    keys: list[str]
    values: np.ndarray


class _Epoch(NamedTuple):
    """One view.

    Attributes:
        rank_N, place_N: [N] of each sample the rank, and its record.
    """

    ranks: list[_Rank]
    rank_N: np.ndarray
    place_N: np.ndarray


@IMPORTERS.register("tinyvit")
class TinyViT(Original):
    """Folders of epochs, or the folder that has them."""

    kind: ClassVar[LabelKind] = "image"

    def __init__(self, paths: Sequence[Path], data: Dataset) -> None:
        self._source = data.source
        self._num_classes = int(data.source.num_classes)
        if self._num_classes > 2**16:
            raise LabelError(
                f"tinyvit: {self._num_classes:,} classes of source {data.source.name}; its ids are of 16 bits, and those of "
                f"more than {2**16:,} classes are ambiguous"
            )
        self._folders = [epoch for path in paths for epoch in _epochs(path)]
        if not self._folders:
            raise SourceError(
                f"tinyvit, {', '.join(map(str, paths))}: no pair *{KEYS} and *{VALUES}; expected folders logits_topK_epochE"
            )
        self._keys = SampleKeys(data.source, "tinyvit")
        files = [file for folder in self._folders for file in sorted(folder.iterdir())]
        self.digest = digest_files((f"{file.parent.name}/{file.name}", file) for file in files)
        self.num_views = len(self._folders)
        self._view, self._epoch = 0, self._open(self._folders[0])
        self.k = (self._epoch.ranks[0].values.dtype.itemsize - 4) // 4
        self.facts = {"views": [folder.name for folder in self._folders], "joined_by": self._keys.joined_by}

    def read(self, samples: np.ndarray, view: int, batch: Any) -> TopRows:
        records = self._records(samples, view)
        ids_RK = records["ids"].astype(np.int64)
        if self._num_classes > 2**15:
            ids_RK &= 0xFFFF
        return from_probabilities(ids_RK, records["probs"], self._num_classes)

    def parameters(self, samples: np.ndarray, view: int) -> dict[str, Any]:
        """Returns `seed`, [B] int32: of NumPy's PCG64, from which TinyViT's augmentation draws."""
        return {"seed": self._records(samples, view)["seed"]}

    def _records(self, samples: np.ndarray, view: int) -> np.ndarray:
        epoch = self._at(view)
        records = np.empty(len(samples), epoch.ranks[0].values.dtype)
        for number, rank in enumerate(epoch.ranks):
            here = np.flatnonzero(epoch.rank_N[samples] == number)
            records[here] = rank.values[epoch.place_N[samples[here]]]
        return records

    def where(self, sample: int, view: int) -> str:
        epoch = self._at(view)
        return f"{epoch.ranks[epoch.rank_N[sample]].path}, record {epoch.place_N[sample]}"

    def _at(self, view: int) -> _Epoch:
        if view != self._view:  # one is held: of a million samples it takes 200 MB while it is read
            self._view, self._epoch = view, self._open(self._folders[view])
        return self._epoch

    def _open(self, folder: Path) -> _Epoch:
        ranks = [_open_rank(path) for path in _values(folder)]
        if len(sizes := {rank.values.dtype.itemsize for rank in ranks}) > 1:
            raise SourceError(
                f"tinyvit, {folder}: records of {' and '.join(map(str, sorted(sizes)))} bytes; expected one; a file is cut"
            )
        k = (sizes.pop() - 4) // 4
        if (named := re.search(r"_top(\d+)_", folder.name)) and int(named[1]) != k:
            raise SourceError(
                f"tinyvit, {folder}: records of K = {k} by their size; expected {named[1]}, as its name has; a file is cut"
            )
        if hasattr(self, "k") and k != self.k:
            raise SourceError(f"tinyvit, {folder}: K = {k}; expected {self.k} as of {self._folders[0].name}")
        num_samples = len(self._source)
        rank_N, place_N = np.full(num_samples, -1, np.int32), np.zeros(num_samples, np.int64)
        for number, rank in enumerate(ranks):
            found = self._keys.samples(rank.keys, of=str(rank.path))
            new = np.unique(found, return_index=True)[1]
            new = new[rank_N[found[new]] < 0]
            rank_N[found[new]], place_N[found[new]] = number, new
        self._keys.check_all(rank_N >= 0, of=str(folder))
        return _Epoch(ranks, rank_N, place_N)


def _values(folder: Path) -> list[Path]:
    """Returns the values of all ranks, by rank."""
    found = [path for path in folder.iterdir() if path.name.endswith(VALUES)] if folder.is_dir() else []
    return sorted(found, key=lambda path: (_number(path.name), path.name))


def _epochs(path: Path) -> Iterator[Path]:
    """Yields the folder, where it is of an epoch, or those of epochs in it, by epoch."""
    if not path.is_dir():
        raise SourceError(f"tinyvit, {path}: no such folder; check the path")
    if _values(path):
        yield path
        return
    yield from sorted(
        (inner for inner in path.iterdir() if _values(inner)), key=lambda inner: _number(inner.name)
    )


def _number(name: str) -> int:
    """Returns the last number in a name, -1 where there is none."""
    found = re.findall(r"\d+", name.removesuffix(VALUES))
    return int(found[-1]) if found else -1


def _open_rank(values: Path) -> _Rank:
    keys_path = values.with_name(values.name.removesuffix(VALUES) + KEYS)
    try:
        keys = keys_path.read_text("utf-8").splitlines()
        num_bytes = values.stat().st_size
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"tinyvit, {keys_path}: cannot be read: {error}; restore the pair of files"
        ) from error
    size = num_bytes // max(len(keys), 1)
    if not keys or num_bytes != size * len(keys) or size < 8 or size % 4:
        raise SourceError(
            f"tinyvit, {values}: {num_bytes:,} bytes for {len(keys):,} keys; expected 4 + 4 K bytes for each; the pair of "
            "files is not whole, or not of TinyViT; restore it"
        )
    k = (size - 4) // 4
    record = np.dtype([("seed", "<i4"), ("ids", "<i2", (k,)), ("probs", "<f2", (k,))])
    return _Rank(values, keys, np.memmap(values, record, mode="r"))
