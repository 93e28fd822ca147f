"""What an image source with boxes is, and the base of the [source] tables of `modality = "detection"`.

The ground truth of an image is a `BoxAnnotations`: boxes in pixels, and their classes. It comes from the source (and through
the view), never from a cache; the source's digest covers it.

Shape suffixes: `N` images, `M` boxes of an image.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from softcache.data.sources.base import SOURCES, SourceSettings, Split
from softcache.data.sources.images.base import Source
from softcache.data.sources.images.custom import Subset, call_factory, check_source, tried_samples
from softcache.errors import SourceError

__all__ = ["BoxAnnotations", "BoxSource", "CustomBoxes", "DetectionSettings", "check_truth", "digest_truths"]


@dataclass(frozen=True, eq=False)
class BoxAnnotations:
    """The ground truth of one image.

    Attributes:
        boxes: [M, 4] float32, left, top, right, bottom in pixels; right and bottom are exclusive edges.
        classes: [M] int64, 0 to num_classes - 1.
        crowd: [M] bool, boxes around a group that is not separated: they are no targets to learn, and detections in them
            are neither right nor wrong.
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray

    def __len__(self) -> int:
        return len(self.classes)

    @classmethod
    def of(
        cls,
        boxes: Sequence[Sequence[float]] | np.ndarray,
        classes: Sequence[int] | np.ndarray,
        crowd: Sequence[bool] | np.ndarray | None = None,
    ) -> BoxAnnotations:
        """Returns the truth of plain numbers, which may be none."""
        group = np.zeros(len(classes), bool) if crowd is None else np.asarray(crowd, bool)
        return cls(
            np.asarray(boxes, np.float32).reshape(-1, 4), np.asarray(classes, np.int64).reshape(-1), group
        )

    def take(self, rows: np.ndarray) -> BoxAnnotations:
        """Returns the boxes that a mask [M] or numbers choose."""
        return BoxAnnotations(self.boxes[rows], self.classes[rows], self.crowd[rows])


@runtime_checkable
class BoxSource(Source, Protocol):
    """A `Source` whose images have boxes; `targets()` counts them: [N] int64.

    It may have `image_size(sample)`, the (height, width) of an image: boxes are then moved without reading it.
    """

    def truth(self, sample: int) -> BoxAnnotations: ...


class DetectionSettings(SourceSettings):
    """[source] with `modality = "detection"`; `open` returns a `BoxSource`."""

    modality: Literal["detection"] = "detection"

    @abstractmethod
    def open(self, split: Split) -> BoxSource: ...


@SOURCES.register("detection/custom")
class CustomBoxes(DetectionSettings):
    """A function of the user's: factory(split="train" | "eval") returns a `BoxSource`."""

    def open(self, split: Split) -> BoxSource:
        source, limit = call_factory(self.name, split), self.max_samples(split)
        check_source(source, self.name, split, ("truth",), of="BoxSource")
        for sample in tried_samples(source):
            if (found := len(source.truth(sample))) != source.target(sample):
                raise SourceError(
                    f"source {source.name}: truth({sample}) has {found} boxes, and target({sample}) is "
                    f"{source.target(sample)}; expected their number"
                )
        return source if limit is None else BoxSubset(source, limit)


class BoxSubset(Subset):
    """The first images of another source with boxes."""

    _source: BoxSource

    def truth(self, sample: int) -> BoxAnnotations:
        return self._source.truth(range(self._count)[sample])


def check_truth(truth: BoxAnnotations, height: int, width: int, num_classes: int, what: str) -> None:
    """Checks the truth of one image.

    Args:
        what: names the image in messages.

    Raises:
        SourceError: boxes are not left, top, right, bottom in pixels within the image, or classes are none.
    """
    boxes, form = truth.boxes, "expected left, top, right, bottom in pixels"
    if boxes.shape != (len(truth), 4) or truth.crowd.shape != (len(truth),):
        raise SourceError(
            f"{what}: boxes of shape {boxes.shape}, {len(truth)} classes, and crowd of shape {truth.crowd.shape}; expected "
            "one box, class and crowd each"
        )
    if not len(truth):
        return
    if not (0 <= truth.classes.min() <= truth.classes.max() < num_classes):
        raise SourceError(
            f"{what}: classes {truth.classes.min()} to {truth.classes.max()} of boxes; expected 0 to {num_classes - 1}"
        )
    empty = ~((boxes[:, :2] < boxes[:, 2:]).all(1))  # NaN, too
    outside = (boxes < -1).any(1) | (boxes > np.array([width, height] * 2) + 1).any(1)
    if empty.any():
        raise SourceError(
            f"{what}: the box {boxes[empty][0].tolist()} has no area; {form}, and not width and height"
        )
    if outside.any():
        raise SourceError(
            f"{what}: the box {boxes[outside][0].tolist()} reaches out of the image of {width}x{height} pixels; {form}; cut "
            "it at the edge"
        )
    if boxes.max() <= 1 < min(width, height):
        raise SourceError(
            f"{what}: the box {boxes[0].tolist()} is within one pixel; {form}, and not shares of the image"
        )


def digest_truths(truths: Sequence[BoxAnnotations]) -> str:
    """Returns the sha256 of boxes, classes and crowds of all images, in order."""
    digest = hashlib.sha256()
    for truth in truths:
        digest.update(np.int64(len(truth)).tobytes())
        for part, dtype in ((truth.boxes, "<f4"), (truth.classes, "<i8"), (truth.crowd, "|b1")):
            digest.update(np.ascontiguousarray(part, dtype).tobytes())
    return digest.hexdigest()
