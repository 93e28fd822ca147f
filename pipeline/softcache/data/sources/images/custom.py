"""Images of the user's: `name = "package.module:factory"`, where factory(split="train" | "eval") returns a `Source`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from softcache.data.sources.base import SOURCES
from softcache.data.sources.images.base import ImageSourceSettings, Source, Split, decodes, load_images
from softcache.errors import SourceError, SpecError
from softcache.hashing.digests import digest_source

__all__ = ["CustomImages", "Subset", "call_factory", "check_members", "check_source", "tried_samples"]


@SOURCES.register("image/custom")
class CustomImages(ImageSourceSettings):
    """A function of the user's that returns a `Source`, which is checked here."""

    def open(self, split: Split) -> Source:
        source, limit = call_factory(self.name, split), self.max_samples(split)
        check_source(source, self.name, split)
        check_classes(source)
        return source if limit is None else Subset(source, limit)


class Subset:
    """The first samples of another source."""

    def __init__(self, source: Source, count: int) -> None:
        self._source, self._count = source, min(count, len(source))
        self.name, self.num_classes, self.class_names = source.name, source.num_classes, source.class_names
        self.digest = digest_source(self.keys(), self.targets(), {"first_of": source.digest})
        multi_hot = getattr(source, "multi_hot", None)
        self.multi_hot = None if multi_hot is None else multi_hot[: self._count]

    @property
    def decodes(self) -> bool:
        return decodes(self._source)

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


IMAGE_MEMBERS = (
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


def call_factory(spec: str, split: Split) -> Any:
    """Returns what a function of the user's returns for a split.

    Raises:
        SpecError: it cannot be imported, or takes no split.
    """
    try:
        return SOURCES.get(spec)(split=split)
    except (SpecError, AttributeError, TypeError) as error:
        raise SpecError(
            f"source.name {spec!r}: {error}; expected module:factory, called with split="
        ) from error


def check_members(
    source: Any, spec: str, split: Split, members: Sequence[str], *, of: str = "Source"
) -> None:
    """Raises SpecError unless what a function of the user's returned has the members of a protocol."""
    if wanted := [name for name in members if not hasattr(source, name)]:
        raise SpecError(
            f"source.name {spec!r}: what it returns for split={split!r} is no {of}; missing: {', '.join(wanted)}"
        )


def check_source(
    source: Any, spec: str, split: Split, members: Sequence[str] = (), *, of: str = "Source"
) -> None:
    """Checks a user-defined source of images for what the rest of softcache needs.

    That `key` and `keys`, `target` and `targets` agree is tried on a few samples.

    Args:
        members: that it has besides those of every source of images.
        of: what the whole is called.

    Raises:
        SpecError: a member is missing.
        SourceError: keys or targets are not one of each sample, or are others one by one than all at once; names are not one
            of each class; the first image is not uint8 [C, H, W].
    """
    check_members(source, spec, split, (*IMAGE_MEMBERS, *members), of=of)
    what, keys, targets = f"source {source.name}", source.keys(), np.asarray(source.targets())
    if targets.ndim == 2:
        raise SourceError(
            f"{what}: targets of shape {targets.shape}; expected one class for each sample; several are the "
            'member multi_hot of a source of source.modality = "multi_label"'
        )
    if len(set(keys)) != len(source) or len(keys) != len(source) or targets.shape != (len(source),):
        twice = [key for key, count in Counter(keys).most_common(1) if count > 1]
        raise SourceError(
            f"{what}: {len(source)} samples with {len(set(keys))} different keys"
            f"{f' ({twice[0]!r} comes twice)' if twice else ''} and targets of shape {targets.shape}; expected a key of its "
            "own and one class for each sample"
        )
    if len(source.class_names) not in (0, source.num_classes):
        raise SourceError(
            f"{what}: {len(source.class_names)} class_names, and num_classes is {source.num_classes}; expected one each"
        )
    for sample in tried_samples(source):
        for one, several in (("key", keys), ("target", targets)):
            if (found := getattr(source, one)(sample)) != several[sample]:
                raise SourceError(
                    f"{what}: {one}({sample}) is {found!r}, and {one}s() has {several[sample]} there; expected the same"
                )
    if len(source):
        _check_image(source.image(0), f"{what}: image(0)")


def tried_samples(source: Source) -> list[int]:
    """Returns some samples of a source, the first and the last among them."""
    numbers = np.linspace(0, len(source) - 1, TRIED).round() if len(source) else np.zeros(0)
    return np.unique(numbers.astype(int)).tolist()


TRIED = 64
"""Samples that members are compared on."""


def _check_image(image: Any, what: str) -> None:
    """Raises SourceError unless an image is uint8 [C, H, W]."""
    if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8 or image.ndim != 3:
        found = (
            f"{image.dtype} of shape {tuple(image.shape)}"
            if hasattr(image, "dtype")
            else type(image).__name__
        )
        raise SourceError(
            f"{what} is {found}; expected a torch tensor, uint8 [C, H, W] of 0 to 255, which [views] normalizes"
        )
    if len(image) > MAX_COLORS >= image.shape[2]:
        raise SourceError(
            f"{what} has the shape {tuple(image.shape)}, which looks like [H, W, C]; expected [C, H, W]; permute(2, 0, 1)"
        )


MAX_COLORS = 4


def check_classes(source: Source) -> None:
    """Raises SourceError unless each target is the number of a class."""
    targets = np.asarray(source.targets())
    if not len(source):
        return
    if not (0 <= targets.min() <= targets.max() < source.num_classes and (targets == np.rint(targets)).all()):
        raise SourceError(
            f"source {source.name}: classes {targets.min()} to {targets.max()}; expected whole numbers from 0 to "
            f"{source.num_classes - 1}"
        )
