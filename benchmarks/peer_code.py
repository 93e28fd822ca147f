"""The peers' own code, imported from a checkout that the user gives: none of it is in this repository.

Each class here drives one peer: its writer makes the files, its reader reads them back, its loader walks an epoch. What had
to be replaced so that it runs is in `patch`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import typing
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import typing_extensions
from torch.utils.data import DataLoader, Dataset

from softcache.reader.cache import Cache

__all__ = ["DistillKit", "Megatron", "PeerError", "TinyVit", "commit_of", "load"]

Rows = tuple[np.ndarray, np.ndarray]
"""Ids [P, K] and log-probabilities [P, K] float32."""

IMAGE = torch.full((1, 2, 2), 128, dtype=torch.uint8)
MICRO_BATCH = 4
"""Samples of a microbatch of Megatron-LM's, eight of which are an iteration."""


class PeerError(click.ClickException):
    """A peer's code does not run here, or does something else than was expected of it."""


def load(checkout: Path, *modules: str) -> list[Any]:
    """Returns modules of a checkout; its folder goes to the end of the path, where it hides nothing."""
    if not checkout.is_dir():
        raise PeerError(f"{checkout}: no such folder; expected a checkout")
    if str(checkout) not in sys.path:
        sys.path.append(str(checkout))
    try:
        return [import_module(module) for module in modules]
    except ImportError as error:
        raise PeerError(f"{checkout}: {error}; install what it needs") from error


def commit_of(checkout: Path) -> str:
    """Returns the first twelve digits of a checkout's commit, "" where git knows none."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def own(batch: Any) -> Any:
    return batch


# -- arcee-ai/DistillKit -----------------------------------------------------------------------------------


class DistillKit:
    """Its compressor with the settings that its README recommends, at another k, its Parquet writer and its collation."""

    name, patch = "DistillKit", ""

    def __init__(self, checkout: Path, num_classes: int, k: int) -> None:
        self._compression, self._common, self._signals, self._main = load(
            checkout,
            "distillkit.compression",
            "distillkit.sample_common",
            "distillkit.signals",
            "distillkit.main",
        )
        config = self._compression.DistributionQuantizationConfig(
            d=num_classes,
            k=k,
            exact_k=16,
            exact_dtype="bfloat16",
            polynomial_terms=[0, 1, 2, 3, 4, "sqrt"],
            term_dtype="float32",
            residual_bins=[],
            delta_encoding=False,
            error_diffusion=False,
        )
        self.compressor = self._compression.LogprobCompressor(config=config)
        self._signal = self._signals.OfflineSignalSource(self.compressor, vocab_size=num_classes)
        self._settings = config.model_dump(mode="json")

    def encode(self, ids_PK: np.ndarray, log_probs_PK: np.ndarray) -> dict[str, torch.Tensor]:
        values = torch.from_numpy(log_probs_PK.astype(np.float32))[None]
        return self.compressor.compress_from_sparse(torch.from_numpy(ids_PK.astype(np.int64))[None], values)

    def decode(self, batch: dict[str, torch.Tensor]) -> Rows:
        signal = self._signal.get_signal(batch)
        ids, values = signal.sparse_ids.flatten(0, 1), signal.sparse_values.flatten(0, 1)
        return ids.numpy(), values.float().numpy()

    def write(self, folder: Path, documents: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        """Writes documents of tokens [L], ids and log-probabilities [L - 1, K], as its sampler does with vLLM's."""
        schema = self._common.compressed_logit_schema()
        how = {"file_max_rows": 256, "queue_maxsize": 512}  # those of its command
        with self._common.StreamingParquetWriter(str(folder), schema=schema, **how) as writer:
            for tokens, ids, log_probs in documents:
                row = {name: value[0].tolist() for name, value in self.encode(ids, log_probs).items()}
                writer.write({"input_ids": tokens.tolist(), **row})
        import yaml

        (folder / "compression_config.yaml").write_text(yaml.safe_dump(self._settings))

    def loader(self, folder: Path, batch_samples: int, workers: int, *, shuffle: bool = True) -> DataLoader:
        """A data set of Parquet files as its trainer loads it; the process that trains decodes batches by `decode`."""
        import datasets

        datasets.disable_progress_bars()
        files = sorted(map(str, folder.glob("*.parquet")))
        rows = datasets.load_dataset(
            "parquet", data_files=files, split="train", cache_dir=str(folder / "datasets")
        )
        return DataLoader(
            rows,
            batch_size=batch_samples,
            shuffle=shuffle,
            num_workers=workers,
            collate_fn=self._main.collate_packed_batch,
            persistent_workers=workers > 0,
        )


# -- NVIDIA/Megatron-LM ------------------------------------------------------------------------------------


class Megatron:
    """`LogitsSaverHooks` and `TeacherTarDataset`, in a group of one process; iterations of `MICRO_BATCH` x 8 samples."""

    name, patch = "Megatron-LM", ""

    def __init__(self, checkout: Path, num_classes: int, k: int) -> None:
        if not hasattr(typing, "override"):  # of Python 3.12
            typing.override = typing_extensions.override  # type: ignore[attr-defined]
            type(self).patch = "typing.override of Python 3.12, in 3.11"
        self._saver, self._utils, self._reader, variables, parallel = load(
            checkout,
            "megatron.training.distillation.logits_saver",
            "megatron.training.distillation.utils_logits",
            "megatron.training.distillation.cached_logits_loss",
            "megatron.training.global_vars",
            "megatron.core.parallel_state",
        )
        if not self._utils.HAVE_ZSTANDARD:
            raise PeerError("Megatron-LM: zstandard is not installed; pip install zstandard")
        if num_classes > self._saver._MAX_VOCAB_SIZE:
            raise PeerError(f"Megatron-LM: {num_classes:,} classes; it has {self._saver._MAX_VOCAB_SIZE:,}")
        self.k = k
        if not torch.distributed.is_initialized():
            path = Path(tempfile.mkdtemp(), "group").as_uri()
            torch.distributed.init_process_group("gloo", init_method=path, rank=0, world_size=1)
            parallel.initialize_model_parallel()
        paths = ("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path")
        self._args = Namespace(
            seed=1,
            seq_length=1,
            train_samples=1,
            mtp_num_layers=None,
            iteration=0,
            curr_iteration=0,
            per_split_data_args_path=None,
            **dict.fromkeys(paths),
        )
        variables.set_args(self._args)

    def write(self, folder: Path, iterations: Iterator[list[Rows]]) -> None:
        """Writes iterations, each a list of microbatches of ids and log-probabilities [S, B, K]."""
        saver = self._saver.LogitsSaverHooks(str(folder), self.k)
        for number, micro_batches in enumerate(iterations):
            self._args.curr_iteration = number
            packed = [
                (
                    torch.from_numpy(log_probs).to(saver._save_dtype),
                    *self._utils.pack_indices(torch.from_numpy(ids.astype(np.int64))),
                )
                for ids, log_probs in micro_batches
            ]
            saver._buffer_iteration(*map(list, zip(*packed, strict=True)))
        saver._write_batched_tar(*saver.take_pending_data())

    def read(self, folder: Path) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Yields log-probabilities and ids of each iteration, one thing after the other."""
        for path in self._utils.sorted_batched_tars([str(path) for path in folder.glob("*.tar")]):
            for entry in self._utils.iter_logprobs_tar_entries(path):
                yield self._utils.decode_logprobs_payload(entry.data)

    def loader(self, folder: Path, workers: int) -> DataLoader:
        """Its data set in a DataLoader as `CachedLogitsKDLoss` makes it; `workers` is 1 there."""
        dataset = self._reader.TeacherTarDataset(str(folder), cp_rank=0, dp_rank=0, dp_size=1)
        return DataLoader(
            dataset, batch_size=None, collate_fn=own, num_workers=workers, persistent_workers=workers > 0
        )


# -- microsoft/Cream, TinyViT ------------------------------------------------------------------------------


class WithKeys(Dataset):
    """Images that are all one, with keys and classes, as TinyViT's wrapper wants its data set."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def get_keys(self) -> list[str]:
        return self._source.keys()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, sample: int) -> tuple[torch.Tensor, int]:
        return IMAGE, self._source.target(sample)


class TinyVit:
    """`TxtManager`, `DatasetWrapper` and `MyDistributedSampler`."""

    name, patch = "TinyViT", ""

    def __init__(self, checkout: Path, num_classes: int, k: int) -> None:
        self._manager, self._wrapper, self._sampler = load(
            checkout / "TinyViT" / "data", "augmentation.manager", "augmentation.dataset_wrapper", "sampler"
        )
        self.k = k
        try:
            int(np.zeros(1, np.int32))  # type: ignore[call-overload]
        except TypeError:  # NumPy 2.4
            type(
                self
            ).patch = "int() of an array of one number, which NumPy 2.4 refuses, in DatasetWrapper's module"
            self._wrapper.int = lambda x: x.item() if isinstance(x, np.ndarray) else int(x)

    def write(self, folder: Path, keys: list[str], ids_PK: np.ndarray, log_probs_PK: np.ndarray) -> None:
        """Writes an epoch's records as its `save_logits.py` does; seeds are the samples' numbers."""
        manager = self._manager.TxtManager(str(folder / f"logits_top{self.k}_epoch0"), 4 + 4 * self.k, rank=0)
        seeds = np.arange(len(keys), dtype=np.int32)
        probs_PK = np.exp(log_probs_PK.astype(np.float32)).astype(np.float16)
        for key, seed, ids, probs in zip(keys, seeds, ids_PK.astype(np.int16), probs_PK, strict=True):
            manager.write(key, seed.tobytes() + ids.tobytes() + probs.tobytes())
        del manager  # it waits for its process, which moves the files to their place

    def dataset(self, folder: Path, source: Any) -> Any:
        return self._wrapper.DatasetWrapper(WithKeys(source), str(folder), self.k, write=False)

    def loader(self, dataset: Any, batch_samples: int, workers: int) -> DataLoader:
        """Its loader of training with mixup: pairs of samples stay together, and the last few are left out."""
        sampler = self._sampler.MyDistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True, pair=True)
        return DataLoader(
            dataset, batch_size=batch_samples, sampler=sampler, num_workers=workers, drop_last=True
        )


def micro_batches(cache: Cache, samples: int) -> Iterator[list[Rows]]:
    """Yields iterations of the first texts of a cache, all of one length, as ids and log-probabilities [S, B, K]."""
    for start in range(0, samples, 8 * MICRO_BATCH):
        iteration = []
        for first in range(start, min(start + 8 * MICRO_BATCH, samples), MICRO_BATCH):
            count = min(MICRO_BATCH, samples - first)
            labels = cache.read(np.arange(first, first + count))
            shape = (count, -1, labels.k)
            iteration.append(
                (
                    labels.ids.reshape(shape).swapaxes(0, 1),
                    np.ascontiguousarray(labels.log_probs.reshape(shape).swapaxes(0, 1), np.float32),
                )
            )
        yield iteration
