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

__all__ = ["CustomImages", "Subset", "call_factory", "check_members", "check_source"]


@SOURCES.register("image/custom")
class CustomImages(ImageSourceSettings):
    """A function of the user's that returns a `Source`, which is checked here."""

    def open(self, split: Split) -> Source:
        source, limit = call_factory(self.name, split), self.max_samples(split)
        check_source(source, self.name, split)
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


def check_source(source: Any, spec: str, split: Split) -> None:
    """Checks a user-defined source for what the rest of softcache needs.

    Raises:
        SpecError: a member is missing.
        SourceError: keys or classes are not one of each sample.
    """
    check_members(source, spec, split, IMAGE_MEMBERS)
    keys, targets = source.keys(), np.asarray(source.targets())
    if targets.ndim == 2:
        raise SourceError(
            f"source {source.name}: targets of shape {targets.shape}; expected one class for each sample; several are the "
            'member multi_hot of a source of source.modality = "multi_label"'
        )
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
