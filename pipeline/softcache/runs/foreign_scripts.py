"""What copies of timm's `train.py` and of torchvision's reference script need, to train on a cache by a config.

timm's, two lines, and `--dataset softcache:CACHE --data-dir CONFIG.toml --no-aug`:

    from softcache.runs.foreign_scripts import TimmLoss, create_dataset    # after the imports of timm
    train_loss_fn = TimmLoss(dataset_train, arguments=args)                # after its own

torchvision's `references/classification/train.py`, five lines:

    from softcache.runs.foreign_scripts import TorchvisionLoss, load_cached_data, truth_of
    dataset, dataset_test, train_sampler, test_sampler = load_cached_data("CONFIG.toml", "CACHE", args)  # for load_data(...)
    criterion = TorchvisionLoss(dataset)                                   # in place of its own
    dataset.set_epoch(epoch)                                               # before train_one_epoch(...)
    acc1, acc5 = utils.accuracy(output, truth_of(target), topk=(1, 5))     # in train_one_epoch
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import DistributedSampler, RandomSampler, Sampler, SequentialSampler

from softcache.config.load import load_config
from softcache.data.sources.base import Split, open_source
from softcache.errors import ConfigError
from softcache.reader.memmap import MemmapSettings
from softcache.reader.open import open_cache
from softcache.student.integrations.timm import TimmDataset, TimmImages, TimmLoss
from softcache.student.integrations.torchvision import (
    TorchvisionDataset,
    TorchvisionImages,
    TorchvisionLoss,
    truth_of,
)
from softcache.student.integrations.validate import check_arguments

__all__ = ["TimmLoss", "TorchvisionLoss", "create_dataset", "load_cached_data", "open_datasets", "truth_of"]

Images = TypeVar("Images", bound=TimmImages)


def create_dataset(
    name: str, root: str | None = None, split: str = "train", is_training: bool = False, **options: Any
) -> Any:
    """Returns a split for timm's `train.py`: of a config and its cache where `name` is softcache:CACHE, else timm's own.

    Args:
        root: path of the config (`--data-dir`); its [source] is opened, and its [loss] is the dataset's.
        split: of a dataset of timm's.
        is_training: whether the labeled split is wanted, else the held-out one.
        options: of timm's function; not read for a cache, whose config has all of it.

    Raises:
        ConfigError: there is no config.
        AlignmentError: its source is not what was labeled.
    """
    kind, _, cache = name.partition(":")
    if kind != "softcache":
        from timm.data import create_dataset as timm_dataset

        return timm_dataset(name, root=root, split=split, is_training=is_training, **options)
    if not root or not cache:
        raise ConfigError(
            f"--dataset {name}, --data-dir {root}: expected a cache and a config: --dataset softcache:CACHE "
            "--data-dir CONFIG.toml"
        )
    return _open(root, cache, TimmDataset if is_training else TimmImages)


def open_datasets(config: str | Path, cache: str) -> tuple[TorchvisionDataset, TorchvisionImages]:
    """Returns the labeled split and the held-out split of a config, as the cache's views show them.

    Raises:
        ConfigError: the config is missing or of something else than images.
        AlignmentError: its source is not what was labeled.
    """
    return _open(config, cache, TorchvisionDataset), _open(config, cache, TorchvisionImages)


def load_cached_data(
    config: str | Path, cache: str, arguments: Any
) -> tuple[TorchvisionDataset, TorchvisionImages, Sampler[int], Sampler[int]]:
    """Returns both splits and their samplers, as `load_data` of torchvision's script does.

    Args:
        arguments: that the script parsed; with `distributed`, each process has a part of an epoch.

    Raises:
        ConfigError: as `open_datasets`, or an argument would mix or change images, or be ignored.
        AlignmentError: the source is not what was labeled.
    """
    check_arguments(arguments, "load_cached_data")
    train, held_out = open_datasets(config, cache)
    if arguments.distributed:
        return train, held_out, DistributedSampler(train), DistributedSampler(held_out, shuffle=False)
    return train, held_out, RandomSampler(train), SequentialSampler(held_out)


def _open(config: str | Path, cache: str, kind: type[Images]) -> Images:
    run = load_config(config)
    split: Split = "train" if issubclass(kind, TimmDataset) else "eval"
    found = kind(open_source(run.source, split=split), open_cache(cache, memmap=MemmapSettings()))
    found.loss = run.loss
    return found
