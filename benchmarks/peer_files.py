"""The peers' files on disk with the labels of a cache, each read the way that its own loader reads.

    TinyViT      keys.txt and values.bin, a record of int32 seed, K int16 ids and K float16 probabilities (404 bytes at
                 K = 100); a reader parses all keys into a dict, once an epoch, and seeks one record per sample;
                 map-style, torch's default collate
    FKD          a file per sample, torch.save of crop box, flip, K ids and K float16 probabilities
    Megatron-LM  a tar of batches, each zstd of a torch.save: float16 log-probabilities, the ids' low 16 bits and a bool for
                 the 17th; in the order of writing only
    DistillKit   Parquet rows list<list<uint8>> of ids in ceil(log2 V) bits and of values, a list of bytes per position: 16
                 in bfloat16 and six float32 of a curve; a sample through `to_pylist`

Written from the formats, not with the peers' code, which `benchmarks.peers` runs. Where a choice was open, the
faster one was taken: no augmentation is replayed from TinyViT's seeds, FKD's files are unpickled without the checks that are
torch's default. Only files that this benchmark wrote are unpickled.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numcodecs import Zstd
from torch.utils.data import Dataset, IterableDataset

from softcache.reader.cache import Cache
from softcache.tools.import_caches.formats.distillkit import Compression, unpack_numbers

__all__ = [
    "DistillKitFiles",
    "FkdFiles",
    "MegatronFiles",
    "TinyVitFiles",
    "curve_settings",
    "parse_keys",
    "write_distillkit",
    "write_fkd",
    "write_megatron",
    "write_tinyvit",
]

PART_SAMPLES = 2048
_IMAGE = torch.full((1, 2, 2), 128, dtype=torch.uint8)


def _parts(cache: Cache, num_samples: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields sample numbers, ids and log-probabilities of some samples after the others."""
    for start in range(0, num_samples, size):
        samples = np.arange(start, min(start + size, num_samples))
        labels = cache.read(samples)
        yield samples, labels.ids.astype(np.int64), labels.log_probs.astype(np.float32)


# -- TinyViT -----------------------------------------------------------------------------------------------


def write_tinyvit(cache: Cache, keys: Sequence[str], folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "keys.txt").write_text("".join(f"{key}\n" for key in keys))
    with (folder / "values.bin").open("wb") as file:
        for samples, ids_PK, log_probs_PK in _parts(cache, len(keys), PART_SAMPLES):
            records = np.empty(len(samples), _tinyvit_record(ids_PK.shape[1]))
            records["seed"], records["ids"], records["probs"] = samples, ids_PK, np.exp(log_probs_PK)
            records.tofile(file)


def _tinyvit_record(k: int) -> np.dtype:
    return np.dtype([("seed", "<i4"), ("ids", "<i2", (k,)), ("probs", "<f2", (k,))])


def parse_keys(path: Path) -> dict[str, int]:
    """Returns the place of every key."""
    places = {}
    with path.open() as file:
        for number, line in enumerate(file):
            places[line.strip()] = number
    return places


class TinyVitFiles(Dataset):
    """Map-style; a worker parses the keys on its first sample, and workers live for one epoch."""

    def __init__(self, folder: Path, source: Any, k: int) -> None:
        self._folder, self._source, self._k = folder, source, k
        self._item_bytes = _tinyvit_record(k).itemsize
        self._places: dict[str, int] = {}
        self._values: Any = None

    def __len__(self) -> int:
        return len(self._source)

    def set_epoch(self) -> None:
        self._places, self._values = {}, None

    def __getitem__(self, sample: int) -> tuple[Any, tuple[np.ndarray, np.ndarray, np.int32]]:
        if self._values is None:
            self._places = parse_keys(self._folder / "keys.txt")
            self._values = (self._folder / "values.bin").open("rb")
        self._values.seek(self._places[self._source.key(sample)] * self._item_bytes)
        record, cut = self._values.read(self._item_bytes), 4 + 2 * self._k
        seed = np.frombuffer(record[:4], np.int32)[0]
        # Copied, so that torch may write to them.
        ids = np.frombuffer(record[4:cut], np.int16).copy()
        probs = np.frombuffer(record[cut:], np.float16).copy()
        return (_IMAGE, self._source.target(sample)), (ids, probs, seed)


# -- FKD ---------------------------------------------------------------------------------------------------


def write_fkd(cache: Cache, num_samples: int, folder: Path) -> None:
    folder.mkdir(parents=True)
    for samples, ids_PK, log_probs_PK in _parts(cache, num_samples, PART_SAMPLES):
        probs_PK = np.exp(log_probs_PK).astype(np.float16)
        for sample, ids, probs in zip(samples, ids_PK.astype(np.int16), probs_PK, strict=True):
            labels = (torch.from_numpy(probs.copy()), torch.from_numpy(ids.copy()))
            torch.save(
                [torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor(False), labels], _fkd(folder, sample)
            )


def _fkd(folder: Path, sample: int) -> Path:
    return folder / f"{sample:08d}.pt"


class FkdFiles(Dataset):
    """Map-style, a file per sample."""

    def __init__(self, folder: Path, source: Any, num_samples: int) -> None:
        self._folder, self._source, self._num_samples = folder, source, num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, sample: int) -> tuple[Any, Any]:
        box, flip, (probs, ids) = torch.load(_fkd(self._folder, sample), weights_only=False)
        return (_IMAGE, self._source.target(sample)), (ids, probs, box, flip, sample)


# -- Megatron-LM -------------------------------------------------------------------------------------------


def write_megatron(cache: Cache, path: Path, batch_samples: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    zstd = Zstd(level=3)
    with tarfile.open(path, "w") as tar:
        for samples, ids_PK, log_probs_PK in _parts(cache, len(cache), batch_samples):
            batch = {
                "samples": torch.from_numpy(samples),
                "values": torch.from_numpy(log_probs_PK.astype(np.float16)),
                "low": torch.from_numpy(ids_PK.astype(np.uint16)),
                "high": torch.from_numpy(ids_PK > 0xFFFF),
            }
            buffer = io.BytesIO()
            torch.save(batch, buffer)
            data = zstd.encode(buffer.getvalue())
            entry = tarfile.TarInfo(f"{samples[0]:08d}.pt.zst")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


class MegatronFiles(IterableDataset):
    """Batches in the order of the tar; each worker takes every so-manieth."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        worker, zstd = torch.utils.data.get_worker_info(), Zstd()
        step, mine = (worker.num_workers, worker.id) if worker else (1, 0)
        with tarfile.open(self._path) as tar:
            for number, entry in enumerate(tar):
                if number % step != mine:
                    continue
                file = tar.extractfile(entry)
                assert file is not None
                batch = torch.load(io.BytesIO(zstd.decode(file.read())), weights_only=True)
                yield batch["samples"], batch["high"].long() << 16 | batch["low"].long(), batch["values"]


# -- DistillKit --------------------------------------------------------------------------------------------


def curve_settings(num_classes: int, k: int) -> Compression:
    """Returns the settings that DistillKit recommends, at another k: 56 bytes for values at K = 64."""
    return Compression(
        d=num_classes,
        k=k,
        exact_k=min(16, k),
        exact_dtype="bfloat16",
        polynomial_terms=[0, 1, 2, 3, 4, "sqrt"],
        residual_bins=[],
        delta_encoding=False,
    )


def _curve(log_probs_PK: np.ndarray, settings: Compression) -> np.ndarray:
    """Returns the bytes [P, value_bytes] of values."""
    exact = torch.from_numpy(log_probs_PK[:, : settings.exact_k].copy()).bfloat16().view(torch.uint8).numpy()
    terms_TR, rest_PR = settings.terms(settings.k - settings.exact_k), log_probs_PK[:, settings.exact_k :]
    found_TP = np.linalg.lstsq(terms_TR.T, rest_PR.T.astype(np.float64), rcond=None)[0]
    return np.concatenate([exact, np.ascontiguousarray(found_TP.T, np.float32).view(np.uint8)], axis=1)


def _pack(ids_PK: np.ndarray, bits: int) -> np.ndarray:
    """Returns the bytes [P, id_bytes] of ids, the highest bit first."""
    split_PKB = (ids_PK[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(split_PKB.astype(np.uint8).reshape(len(ids_PK), -1), axis=1)


def write_distillkit(cache: Cache, path: Path, num_samples: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = curve_settings(cache.num_classes, cache.manifest.build_codec().k)
    schema = pa.schema([(name, pa.list_(pa.list_(pa.uint8()))) for name in ("values", "ids")])
    with pq.ParquetWriter(path, schema) as writer:
        for samples, ids_PK, log_probs_PK in _parts(cache, num_samples, 64):
            ends = np.cumsum(np.concatenate([[0], cache.rows.counts(samples)])).astype(np.int32)
            columns = []
            for records_PR in (_curve(log_probs_PK, settings), _pack(ids_PK, settings.id_bits)):
                starts = np.arange(0, records_PR.size + 1, records_PR.shape[1], dtype=np.int32)
                rows = pa.ListArray.from_arrays(starts, pa.array(records_PR.reshape(-1)))
                columns.append(pa.ListArray.from_arrays(ends, rows))
            writer.write_table(pa.table(columns, schema=schema))


class DistillKitFiles(Dataset):
    """Map-style, a sample of many positions at a time; the table is read whole by each process, which favours it."""

    def __init__(self, path: Path, num_classes: int, k: int, num_samples: int) -> None:
        self._path, self._settings, self._num_samples = path, curve_settings(num_classes, k), num_samples
        self._table: Any = None

    def __len__(self) -> int:
        return self._num_samples

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None}

    def __getitem__(self, sample: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        if self._table is None:
            self._table = pq.read_table(self._path).combine_chunks()
        (row,) = self._table.slice(sample, 1).to_pylist()
        values, ids = (np.array(row[name], np.uint8) for name in ("values", "ids"))
        ids_PK = unpack_numbers(ids, self._settings.id_bits, self._settings.k)
        log_probs_PK = self._settings.unpack(values).astype(np.float32)
        return sample, torch.from_numpy(ids_PK), torch.from_numpy(log_probs_PK)
