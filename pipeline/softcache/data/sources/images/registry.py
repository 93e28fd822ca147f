"""Image classification datasets by name: samples by number, each with a stable key, a class and uint8 pixels.

    digits                                       embedded in scikit-learn: 1,797 images of 8x8
    fashion-mnist | mnist | cifar10 | cifar100   torchvision's classes; source.root is where the files are
    imagefolder                                  root/train/CLASS/* and root/eval/CLASS/* (or val/CLASS/*)
    package.module:factory                       your own: factory(split="train" | "eval") returns a Source

The first two kinds are held in memory, image folders are decoded when asked for; your own are checked here for what
the rest of softcache needs of them.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from softcache.data.sources.images.base import InMemorySource, Source, SourceSettings, Split, load_images
from softcache.data.sources.images.image_folder import open_image_folder
from softcache.data.sources.images.torchvision import TORCHVISION, open_torchvision
from softcache.errors import SourceError, SpecError
from softcache.hashing.digests import digest_source
from softcache.runtime.suggest import closest_matches

__all__ = ["Source", "SourceSettings", "open_source"]


def open_source(settings: SourceSettings, *, split: Split) -> Source:
    """Returns a split of the dataset that the settings name.

    Raises:
        SpecError: there is no dataset of that name (the nearest are listed).
        SourceError: its files are missing, truncated or of another dataset.
    """
    limit = settings.max_train_samples if split == "train" else settings.max_eval_samples
    if ":" in settings.name:
        return _own(settings.name, split, limit)
    if settings.name == "digits":
        return _digits(split, limit)
    if settings.name == "imagefolder":
        return open_image_folder(settings, split, limit)
    if settings.name in TORCHVISION:
        return open_torchvision(settings, split, limit)
    known = ["digits", "imagefolder", *TORCHVISION]
    near = closest_matches(settings.name, known) or known
    raise SpecError(
        f"source.name {settings.name!r}: unknown; nearest: {', '.join(near)}; or your own module:factory"
    )


def _digits(split: Split, limit: int | None) -> Source:
    """Every sixth image of each class, in order of appearance, is for evaluation: 296 of 1,797, stratified."""
    from sklearn.datasets import load_digits

    data = load_digits()
    rank = np.zeros(len(data.target), np.int64)  # how many of its class came before
    for digit in range(10):
        members = np.flatnonzero(data.target == digit)
        rank[members] = np.arange(len(members))
    chosen = np.flatnonzero((rank % 6 == 5) == (split == "eval"))[:limit]
    # Values 0..16 become 0..255.
    images = torch.from_numpy(np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    keys = [f"digits/{number:04d}" for number in chosen]
    return InMemorySource(f"digits/{split}", images, data.target[chosen], keys, [str(d) for d in range(10)])


class Subset:
    """The first samples of another source."""

    def __init__(self, source: Source, count: int) -> None:
        self._source, self._count = source, min(count, len(source))
        self.name, self.num_classes, self.class_names = source.name, source.num_classes, source.class_names
        self.digest = digest_source(self.keys(), self.targets(), {"first_of": source.digest})

    def __len__(self) -> int:
        return self._count

    def key(self, sample: int) -> str:
        return self._source.key(range(self._count)[sample])

    def keys(self) -> Sequence[str]:
        return self._source.keys()[: self._count]

    def target(self, sample: int) -> int:
        return self._source.target(range(self._count)[sample])

    def targets(self) -> np.ndarray:
        return self._source.targets()[: self._count]

    def image(self, sample: int) -> torch.Tensor:
        return self._source.image(range(self._count)[sample])

    def images(self, samples: np.ndarray) -> torch.Tensor | list[torch.Tensor]:
        if len(samples) and samples.max() >= self._count:
            raise IndexError(f"source {self.name}: sample {samples.max()} of {self._count}")
        return load_images(self._source, samples)


_MEMBERS = (
    "name",
    "num_classes",
    "class_names",
    "digest",
    "key",
    "keys",
    "target",
    "targets",
    "image",
    "__len__",
)


def _own(spec: str, split: Split, limit: int | None) -> Source:
    module, _, attribute = spec.partition(":")
    try:
        source = getattr(importlib.import_module(module), attribute)(split=split)
    except (ImportError, AttributeError, TypeError) as error:
        raise SpecError(
            f"source.name {spec!r}: {error}; expected module:factory, called with split="
        ) from error
    wanted = [name for name in _MEMBERS if not hasattr(source, name)]
    if wanted:
        raise SpecError(
            f"source.name {spec!r}: factory(split={split!r}) is not a Source; missing: {', '.join(wanted)}"
        )
    keys, targets = source.keys(), np.asarray(source.targets())
    if len(set(keys)) != len(source) or len(keys) != len(source) or targets.shape != (len(source),):
        twice = [key for key, count in Counter(keys).most_common(1) if count > 1]
        raise SourceError(
            f"source {source.name}: {len(source)} samples with {len(set(keys))} different keys"
            f"{f' ({twice[0]!r} comes twice)' if twice else ''} and targets of shape {targets.shape}; expected a key of its "
            "own and one class for each sample"
        )
    if len(source) and not 0 <= targets.min() <= targets.max() < source.num_classes:
        raise SourceError(
            f"source {source.name}: classes {targets.min()} to {targets.max()}; expected 0 to {source.num_classes - 1}"
        )
    return source if limit is None else Subset(source, limit)
