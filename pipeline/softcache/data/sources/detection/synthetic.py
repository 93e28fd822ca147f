"""Scenes composed from small real images, with a box around each: detection with no download.

Scene n of a split is a pure function of (seed, split, n). A Philox stream, keyed by the seed and the split's
hash and counting from n, draws in this order: the grey level and slope of the background, 12 clutter pieces
(quarters of originals, which have no box), then 2 to 6 objects: an original, a side between 10 and 28
pixels, a place. An object whose box overlaps an earlier one by an IoU above 0.3 is drawn again, at most ten
times, and left out then. Pixels are added by maximum and scaled by whole numbers, so that they are the same
bytes on every CPU.

The objects of the two splits come from different originals: those of the originals' own splits. A box is the
smallest around the object's pixels above a fifth of full ink, not its whole square.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
import xxhash
from pydantic import Field

from softcache.data.sources.base import SOURCES, Split, open_source
from softcache.data.sources.detection.base import BoxAnnotations, DetectionSettings, digest_truths
from softcache.data.sources.images.base import InMemorySource, Source, load_images
from softcache.data.transforms import ops as view_ops
from softcache.errors import SourceError
from softcache.hashing.digests import digest_bytes, digest_source

__all__ = ["ComposedScenes", "SceneSource", "Scenes", "compose_scenes"]

SIDES = (10, 28)  # of an object, in pixels
OBJECTS = (2, 6)
CLUTTER = 12
MAX_IOU = 0.3
INK = 255 // 5  # below it a pixel is not of the object


class SceneSource(InMemorySource):
    """Composed scenes, all in memory, with their boxes."""

    def __init__(
        self,
        name: str,
        images: torch.Tensor,
        truths: list[BoxAnnotations],
        keys: list[str],
        class_names: list[str],
    ) -> None:
        super().__init__(name, images, [len(truth) for truth in truths], keys, class_names)
        self._truths = truths
        pixels = digest_bytes(self._images.numpy().data)
        self.digest = digest_source(keys, self._targets, {"pixels": pixels, "truth": digest_truths(truths)})

    def truth(self, sample: int) -> BoxAnnotations:
        return self._truths[sample]


@SOURCES.register("detection/scenes")
class Scenes(DetectionSettings):
    """Scenes composed from `originals`: digits, or Fashion-MNIST whose files are in `root`.

    `size` is the side of a scene in pixels, `train_scenes` and `eval_scenes` are how many there are.

    Attributes:
        seed: of the scenes.
    """

    name: str = "scenes"
    root: str | None = None
    originals: Literal["digits", "fashion-mnist"] = "digits"
    size: int = Field(64, ge=48, le=512, multiple_of=8)
    train_scenes: int = Field(1200, ge=1)
    eval_scenes: int = Field(400, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)

    def open(self, split: Split) -> SceneSource:
        made = compose_scenes(self, split)
        return SceneSource(made.name, made.images, made.truths, made.keys, made.class_names)


class ComposedScenes(NamedTuple):
    """The scenes of a split.

    Attributes:
        images: [N, 1, H, W] uint8.
        truths: N of boxes.
        masks: [N, H, W] uint8, 0 for the background and clutter, c + 1 where the ink of an object of class c is seen.
        class_names: of the objects.
    """

    name: str
    images: torch.Tensor
    truths: list[BoxAnnotations]
    masks: np.ndarray
    keys: list[str]
    class_names: list[str]


def compose_scenes(settings: Scenes, split: Split) -> ComposedScenes:
    """Returns the scenes of a split.

    Raises:
        SourceError: the originals' files are not there.
    """
    table: dict[str, str] = {"name": settings.originals}
    if settings.root is not None and settings.originals != "digits":  # which are embedded
        table["root"] = settings.root
    originals = open_source(table, split=split)
    count = settings.train_scenes if split == "train" else settings.eval_scenes
    limit = settings.max_samples(split)
    images, truths, masks = [], [], []
    for number in range(min(count, limit or count)):
        image, truth, mask = _compose(originals, settings, split, number)
        images.append(image)
        truths.append(truth)
        masks.append(mask)
    name = f"scenes-{settings.originals}/{split}"
    keys = [f"{name}/{settings.size}/{settings.seed}/{number:05d}" for number in range(len(images))]
    stacked = torch.stack(images).unsqueeze(1)
    return ComposedScenes(name, stacked, truths, np.stack(masks), keys, list(originals.class_names))


def _compose(
    originals: Source, settings: Scenes, split: Split, number: int
) -> tuple[torch.Tensor, BoxAnnotations, np.ndarray]:
    """Returns a scene uint8 [H, W], its boxes and its mask uint8 [H, W]."""
    stream = np.random.Philox(
        key=np.array([settings.seed, xxhash.xxh3_64_intdigest(split.encode())], np.uint64),
        counter=np.array([0, number, 0, 0], np.uint64),
    )
    size, scene = settings.size, _background(stream, settings.size)
    mask = np.zeros((size, size), np.uint8)
    for _ in range(CLUTTER):
        piece, _ = _object(originals, stream, size)
        half = (piece.shape[0] + 1) // 2
        rows, columns = (
            _below(stream, 2) * (piece.shape[0] - half),
            _below(stream, 2) * (piece.shape[1] - half),
        )
        _paste(
            scene,
            piece[rows : rows + half, columns : columns + half],
            _below(stream, size),
            _below(stream, size),
        )
    boxes: list[list[float]] = []
    classes: list[int] = []
    for _ in range(OBJECTS[0] + _below(stream, OBJECTS[1] - OBJECTS[0] + 1)):
        pixels, kind = _object(originals, stream, size)
        for _ in range(10):
            top, left = _below(stream, size - len(pixels) + 1), _below(stream, size - len(pixels) + 1)
            box = _box_of(pixels, top, left)
            if all(_iou(box, other) <= MAX_IOU for other in boxes):
                place = slice(top, top + len(pixels)), slice(left, left + len(pixels))
                mask[place][_is_inked(pixels) & (pixels >= scene[place])] = kind + 1
                _paste(scene, pixels, top, left)
                boxes.append(box)
                classes.append(kind)
                break
    return torch.from_numpy(scene), BoxAnnotations.of(boxes, classes), mask


def _below(stream: np.random.Philox, count: int) -> int:
    """A whole number from 0 to count - 1; the bias is below count / 2^32."""
    return (int(stream.random_raw()) >> 32) * count >> 32


def _background(stream: np.random.Philox, size: int) -> np.ndarray:
    """A slope between two dark greys, uint8 [H, W]."""
    first, last, across = _below(stream, 90), _below(stream, 90), bool(_below(stream, 2))
    line = (first * (size - 1) + (last - first) * np.arange(size)) // (size - 1)
    plane = np.broadcast_to(line if across else line[:, None], (size, size))
    return plane.astype(np.uint8)


def _object(originals: Source, stream: np.random.Philox, size: int) -> tuple[np.ndarray, int]:
    """An original scaled to a drawn side and dimmed to a drawn ink, uint8 [side, side], and its class."""
    sample = _below(stream, len(originals))
    side = SIDES[0] + _below(stream, min(SIDES[1], size // 2) - SIDES[0] + 1)
    ink = 140 + _below(stream, 116)
    image = load_images(originals, np.array([sample]))[0]
    pixels = view_ops.resize(image[:1], side, side)[0].numpy()
    if pixels.max() < 2 * INK:
        raise SourceError(
            f"source {originals.name}: image {originals.key(sample)!r} is as good as empty (brightest pixel {pixels.max()} "
            "of 255); scenes need originals that show something"
        )
    return (pixels.astype(np.int64) * ink // 255).astype(np.uint8), originals.target(sample)


def _is_inked(pixels: np.ndarray) -> np.ndarray:
    inked: np.ndarray = pixels.astype(np.int64) * 5 >= int(pixels.max())
    return inked


def _box_of(pixels: np.ndarray, top: int, left: int) -> list[float]:
    inked = _is_inked(pixels)
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    return [
        float(left + columns[0]),
        float(top + rows[0]),
        float(left + columns[-1] + 1),
        float(top + rows[-1] + 1),
    ]


def _iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if min(width, height) <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def _paste(scene: np.ndarray, pixels: np.ndarray, top: int, left: int) -> None:
    """Adds pixels by maximum, cut at the scene's edges."""
    there = scene[top : top + pixels.shape[0], left : left + pixels.shape[1]]
    np.maximum(there, pixels[: there.shape[0], : there.shape[1]], out=there)
