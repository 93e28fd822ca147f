"""Batches of viewed images: what the teacher labels, and what a student must see again.

Both halves of softcache load pixels here and nowhere else, so that a fingerprint taken at capture and one
taken at training time are of the same thing by construction. `softcache.data.tokens` does the same for text.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from softcache.data.batch import Dataset
from softcache.data.sent_batch import SentBatch
from softcache.errors import SourceError
from softcache.hashing.digests import fingerprints as content_fingerprints
from softcache.labels import LabelKind, MixedTargets, SoftLabels, concat_labels

if TYPE_CHECKING:
    import torch

    from softcache.data.sources.images.base import Source
    from softcache.data.transforms import Views
    from softcache.data.transforms.mix import Mixes

__all__ = ["ImageBatch", "ViewedSource", "ViewedTruth"]


@dataclass(frozen=True, eq=False)
class ImageBatch(SentBatch):
    """Images of one view; see `softcache.data.batch.Batch`. One label row per image.

    Attributes:
        images: [B, C, H, W], uint8 (or what the user's own transform returns).
        targets: [B] int64, the ground truth; `MixedTargets` of a view that mixes images; [B, V] float where images have
            several classes.
        seen: [B, C', H', W'], what an online teacher sees of them, where that is something else.
    """

    images: torch.Tensor
    targets: torch.Tensor | MixedTargets
    samples: np.ndarray
    view: int
    fingerprints: np.ndarray
    unit: int | None = None
    labels: SoftLabels | None = None
    seen: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def num_rows(self) -> int:
        return len(self.samples)

    @property
    def row_counts(self) -> np.ndarray:
        return np.ones(len(self), np.int64)

    @property
    def positions(self) -> np.ndarray:
        return np.zeros(len(self), np.int64)

    def split(self, pieces: int) -> list[ImageBatch]:
        if pieces == 1:
            return [self]
        size = -(-len(self) // pieces)
        return [self._slice(slice(start, start + size)) for start in range(0, len(self), size)]

    def _slice(self, rows: slice) -> ImageBatch:
        return replace(
            self,
            images=self.images[rows],
            targets=self.targets[rows],
            samples=self.samples[rows],
            fingerprints=self.fingerprints[rows],
            labels=self.labels and self.labels.take(rows),
            seen=None if self.seen is None else self.seen[rows],
        )

    def pin_memory(self) -> ImageBatch:
        return replace(
            self,
            images=self.images.pin_memory(),
            targets=self.targets.pin_memory(),
            labels=self.labels and self.labels.pin_memory(),
            seen=None if self.seen is None else self.seen.pin_memory(),
        )

    def to(self, device: torch.device) -> ImageBatch:
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            labels=self.labels and self.labels.to_torch(device, non_blocking=True),
            seen=None if self.seen is None else self.seen.to(device, non_blocking=True),
        )

    @classmethod
    def merge(cls, batches: Sequence[ImageBatch]) -> ImageBatch:
        import torch

        labels = [batch.labels for batch in batches if batch.labels is not None]
        seen = [batch.seen for batch in batches if batch.seen is not None]
        return replace(
            batches[0],
            images=torch.cat([batch.images for batch in batches]),
            targets=MixedTargets.concat([batch.targets for batch in batches]),
            samples=np.concatenate([batch.samples for batch in batches]),
            fingerprints=np.concatenate([batch.fingerprints for batch in batches]),
            labels=concat_labels(labels) if labels else None,
            seen=torch.cat(seen) if seen else None,
        )


class ViewedSource(Dataset):
    """A source of images seen through its views."""

    def __init__(self, source: Source, views: Views) -> None:
        self.source, self.views = source, views
        self._targets: np.ndarray | None = None
        self._shared: dict[int, torch.Tensor | None] = {}

    @classmethod
    def from_identity(
        cls, source: Any, identity: dict[str, Any], *, views: Views | None, rows_per_sample: int
    ) -> Self:
        """Returns a source as the teacher of a cache saw it.

        Args:
            identity: of the cache, in its manifest.
            views: of the cache, where it has any.
            rows_per_sample: mean label rows of a sample in the cache.
        """
        assert views is not None
        return cls(source, views)

    def identity(self, num_views: int) -> dict[str, dict[str, Any]]:
        """Returns the views' part of a cache's identity."""
        settings = self.views.settings.identity()
        return {"views": {"digest": self.views.digest, "num_views": num_views, "settings": settings}}

    @property
    def decodes(self) -> bool:
        from softcache.data.sources.images.base import decodes

        return decodes(self.source)

    def sharing_reads(self, samples: Sequence[int] | np.ndarray) -> Self:
        numbers = np.asarray(samples).tolist()
        if not self.decodes or self._shared.keys() >= set(numbers):
            return self
        self._classes()
        dataset = copy(self)
        dataset._shared = dict.fromkeys(numbers)
        return dataset

    def read(self, samples: np.ndarray) -> torch.Tensor | list[torch.Tensor]:
        """Returns the images of `samples` [B] as the source has them: uint8 [B, C, H, W], or a list of B."""
        from softcache.data.sources.images.base import load_images

        if not self._shared:
            return load_images(self.source, samples)
        return [self._read(sample) for sample in samples.tolist()]

    def _read(self, sample: int) -> torch.Tensor:
        image = self._shared.get(sample)
        if image is None:
            image = self.source.image(sample)
            if sample in self._shared:
                self._shared[sample] = image
        return image

    def load(
        self, samples: Sequence[int] | np.ndarray, view: int, *, fingerprints: bool | np.ndarray = True
    ) -> ImageBatch:
        """Returns the images of `samples` as the view shows them; where it mixes images, with the others of the split.

        Args:
            fingerprints: of which samples to take the fingerprint: all, none, or a mask [B].

        Raises:
            SourceError: an image cannot be read, or the images differ in shape.
        """
        import torch

        numbers = np.asarray(samples, np.int64)
        keys = self._keys_of(numbers)
        classes_N = self._classes()
        targets: Any = torch.from_numpy(classes_N[numbers])
        mixes = self.views.teacher.draw_mixes(keys, numbers, view, len(self.source))
        if mixes is None:
            viewed = self._single(numbers, keys, view)
        else:
            viewed, shares = self._mixed(numbers, keys, view, mixes)
            second = targets.clone()
            second[mixes.rows] = torch.from_numpy(classes_N[mixes.seconds])
            shares_B = torch.from_numpy(shares).float()
            if targets.ndim == 2:  # several classes: the mixture is one truth
                targets = shares_B[:, None] * targets + (1 - shares_B[:, None]) * second
            else:
                targets = MixedTargets(targets, second, shares_B)
        viewed = self.views.reduce(viewed)
        if not isinstance(viewed, torch.Tensor):
            _check_shapes(viewed, keys, view)
            viewed = torch.stack(viewed)
        prints = np.zeros(len(numbers), np.uint64)
        wanted = np.flatnonzero(np.broadcast_to(fingerprints, len(numbers)))
        if len(wanted) == len(numbers):
            prints = content_fingerprints(keys, view, viewed.numpy())
        elif len(wanted):
            chosen = [keys[row] for row in wanted.tolist()]
            prints[wanted] = content_fingerprints(chosen, view, viewed.numpy()[wanted])
        return ImageBatch(viewed, targets, numbers, view, prints)

    def _classes(self) -> np.ndarray:
        """The ground truth of each sample, [N] int64, or of several classes [N, V] float32 of 0 and 1."""
        if self._targets is None:
            multi_hot_NV = getattr(self.source, "multi_hot", None)
            if multi_hot_NV is not None:
                self._targets = np.asarray(multi_hot_NV, np.float32)
            else:
                self._targets = np.asarray(self.source.targets(), np.int64)
        return self._targets

    def sample_columns(self) -> dict[str, np.ndarray]:
        return {} if self.has_several_classes else super().sample_columns()

    @property
    def uncompared(self) -> str:  # type: ignore[override]
        return "classes" if self.has_several_classes else ""

    @property
    def has_several_classes(self) -> bool:
        """Whether a sample has any number of classes."""
        return getattr(self.source, "multi_hot", None) is not None

    def _keys_of(self, numbers: np.ndarray) -> list[str]:
        return [self.source.key(sample) for sample in numbers.tolist()]

    def _single(self, numbers: np.ndarray, keys: list[str], view: int) -> Any:
        """The teacher's view of each sample by itself."""
        return self.views.teacher.apply_batch(self.read(numbers), keys=keys, view=view)

    def _mixed(self, numbers: np.ndarray, keys: list[str], view: int, mixes: Mixes) -> tuple[Any, np.ndarray]:
        from softcache.data.transforms.mix import mix_images

        # A sample that is in the batch twice, by itself or mixed in, is read and transformed once.
        wanted, places = np.unique(np.concatenate([numbers, mixes.seconds]), return_inverse=True)
        viewed = self._single(wanted, self._keys_of(wanted), view)
        first, second = places[: len(numbers)], places[len(numbers) :]
        if not isinstance(viewed, list):
            return mix_images(viewed[first], viewed[second], mixes, keys)
        return mix_images([viewed[n] for n in first], [viewed[n] for n in second], mixes, keys)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_targets": None, "_shared": {}}


def _check_shapes(images: Sequence[torch.Tensor], keys: Sequence[str], view: int) -> None:
    for image, key in zip(images, keys, strict=True):
        if image.shape != images[0].shape:
            raise SourceError(
                f"sample {key!r}, view {view}: image of shape {tuple(image.shape)}; expected "
                f"{tuple(images[0].shape)} like the others of its batch; set views.size"
            )


class ViewedTruth(Dataset):
    """Images whose ground truth, boxes or masks, moves with the view; the images themselves are a `ViewedSource`."""

    kind: ClassVar[LabelKind] = "cells"
    is_ragged: ClassVar[bool] = True

    def __init__(self, source: Any, views: Views) -> None:
        self.source, self.views = source, views
        self._images = ViewedSource(source, views)

    @property
    def decodes(self) -> bool:
        return self._images.decodes

    def sharing_reads(self, samples: Sequence[int] | np.ndarray) -> Self:
        dataset = copy(self)
        dataset._images = self._images.sharing_reads(samples)
        return dataset
