"""What copies of timm's `train.py` and of torchvision's reference script need, to train on a cache by a config.

timm's, two lines, and `--dataset softcache:CACHE --data-dir CONFIG.toml --no-aug`:

    from softcache.runs.foreign_scripts import TimmLoss, create_dataset    # after the imports of timm
    train_loss_fn = TimmLoss(dataset_train)                                # after its own

torchvision's `references/classification/train.py`, six lines:

    from softcache.runs.foreign_scripts import TorchvisionLoss, open_datasets, truth_of
    dataset, dataset_test = open_datasets("CONFIG.toml", "CACHE")          # in place of load_data(...)
    train_sampler, test_sampler = RandomSampler(dataset), SequentialSampler(dataset_test)
    criterion = TorchvisionLoss(dataset)                                   # in place of its own
    dataset.set_epoch(epoch)                                               # before train_one_epoch(...)
    acc1, acc5 = utils.accuracy(output, truth_of(target), topk=(1, 5))     # in train_one_epoch
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

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

__all__ = ["TimmLoss", "TorchvisionLoss", "create_dataset", "open_datasets", "truth_of"]

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


def _open(config: str | Path, cache: str, kind: type[Images]) -> Images:
    run = load_config(config)
    split: Split = "train" if issubclass(kind, TimmDataset) else "eval"
    found = kind(open_source(run.source, split=split), open_cache(cache, memmap=MemmapSettings()))
    found.loss = run.loss
    return found
