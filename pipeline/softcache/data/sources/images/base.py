"""What an image dataset is to the rest of softcache, the base of its [source] tables, and one held in memory.

Keys are what samples are joined by and stay the same on every machine; the digest covers keys, order,
classes and contents (for image folders the files' sizes: contents are checked sample by sample later).
An in-memory image costs about a microsecond: it is a view of one tensor. A source may offer many at once (`images`),
which costs a tenth of that for small ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch

from softcache.data.sources.base import SourceSettings, Split
from softcache.hashing.digests import digest_bytes, digest_source
from softcache.runtime.display import Displayed, Summary, shorten_list

__all__ = [
    "ImageSourceSettings",
    "InMemorySource",
    "IndexedSource",
    "Source",
    "Split",
    "decodes",
    "load_images",
]


class ImageSourceSettings(SourceSettings):
    """[source] of images; `open` returns a `Source`."""

    modality: Literal["image"] = "image"

    @abstractmethod
    def open(self, split: Split) -> Source: ...


@runtime_checkable
class Source(Protocol):
    """What the rest of softcache needs of a dataset; it must be picklable.

    It may have one more method, images(samples) -> uint8 [B, C, H, W], or a list of B images where their sizes differ:
    `image` of each of samples [B] int64, all at once (`load_images`).

    Attributes:
        name: of the dataset and split, for messages.
        num_classes: V.
        class_names: [V] names.
        digest: names keys, order, classes and contents.
    """

    name: str
    num_classes: int
    class_names: Sequence[str]
    digest: str

    def __len__(self) -> int: ...
    def key(self, sample: int) -> str: ...
    def keys(self) -> Sequence[str]: ...
    def target(self, sample: int) -> int: ...
    def targets(self) -> np.ndarray: ...
    def image(self, sample: int) -> torch.Tensor: ...


class IndexedSource(Displayed):
    """Keys, classes and names of a dataset whose samples are known one by one; where the pixels are is a subclass's."""

    digest: str

    def __init__(
        self,
        name: str,
        keys: Sequence[str],
        targets: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
    ) -> None:
        self.name, self.num_classes = name, len(class_names)
        self.class_names: Sequence[str] = tuple(class_names)
        self._keys, self._targets = list(keys), np.asarray(targets, np.int64)

    def __len__(self) -> int:
        return len(self._keys)

    def summarize(self) -> Summary:
        title = f"{type(self).__name__} {self.name}: {len(self):,} samples, {self.num_classes:,} classes"
        return Summary(
            title, [("classes", shorten_list(self.class_names)), ("keys", shorten_list(self.keys()[:6]))]
        )

    def key(self, sample: int) -> str:
        return self._keys[sample]

    def keys(self) -> Sequence[str]:
        return self._keys

    def target(self, sample: int) -> int:
        return int(self._targets[sample])

    def targets(self) -> np.ndarray:
        return self._targets


class InMemorySource(IndexedSource):
    """Images of one size in one uint8 tensor [N, C, H, W]."""

    def __init__(
        self,
        name: str,
        images: torch.Tensor,
        targets: Sequence[int] | np.ndarray,
        keys: Sequence[str],
        class_names: Sequence[str],
    ) -> None:
        super().__init__(name, keys, targets, class_names)
        self._images = images.contiguous()
        shape, content = list(images.shape), digest_bytes(self._images.numpy().data)
        self.digest = digest_source(self._keys, self._targets, {"pixels": content, "shape": shape})

    def image(self, sample: int) -> torch.Tensor:
        """Returns uint8 [C, H, W], a view of the tensor."""
        return self._images[sample]

    def images(self, samples: np.ndarray) -> torch.Tensor:
        """Returns uint8 [B, C, H, W], a copy."""
        return self._images[torch.from_numpy(samples)]


def load_images(source: Source, samples: np.ndarray) -> torch.Tensor | list[torch.Tensor]:
    """Returns the images of `samples` [B] int64: uint8 [B, C, H, W] where the source gives that, else a list."""
    if _is_batched(type(source)) and "image" not in vars(source):
        return source.images(samples)  # type: ignore[attr-defined]
    return [source.image(sample) for sample in samples.tolist()]


def decodes(source: Source) -> bool:
    """Whether a source makes an image anew whenever it is asked for, as of files: several views are cheaper together."""
    own: bool | None = getattr(source, "decodes", None)
    return not _is_batched(type(source)) if own is None else own


@cache
def _is_batched(kind: type) -> bool:
    """Whether its `images` is of the same class as its `image`, or of one that knows that: a subclass that overrides
    `image` alone means that every image is as stored."""
    for level in kind.__mro__:
        if "images" in vars(level):
            return True
        if "image" in vars(level):
            return False
    return False
