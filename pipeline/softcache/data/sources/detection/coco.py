"""A folder in COCO's format: root/train.json and root/eval.json (or val.json), their images in root/images.

    {"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}],
     "annotations": [{"image_id", "category_id", "bbox": [left, top, width, height], "iscrowd"}]}

COCO's annotation files hold more; what is not named above is not read. A category's id may be any number,
with gaps: class c is the c-th smallest id of train.json, counted from 0, and both files must have the same
categories. An image with no annotation is a sample with no box. `iscrowd = 1` marks a group: kept, but
nothing to learn (`Truth.crowd`). A box that reaches out of its image is cut at the edge; one that lies
outside, or has no area, is an error that names it. Keys are the images' file names.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.data.sources.base import SOURCES
from softcache.data.sources.detection.base import BoxAnnotations, DetectionSettings, digest_truths
from softcache.data.sources.images.base import Split
from softcache.data.sources.images.image_folder import ImageFolderSource
from softcache.errors import SourceError
from softcache.hashing.digests import digest_source

__all__ = ["Coco", "CocoSource"]


class CocoSource(ImageFolderSource):
    """Images of a COCO folder, decoded to RGB when asked for, with their boxes."""

    def __init__(
        self,
        name: str,
        root: Path,
        files: list[str],
        sizes: list[tuple[int, int]],
        truths: list[BoxAnnotations],
        class_names: list[str],
    ) -> None:
        super().__init__(
            name, root, [(file, len(truth)) for file, truth in zip(files, truths, strict=True)], class_names
        )
        self._sizes, self._truths = sizes, truths
        lengths = np.array([(root / key).stat().st_size for key in self._keys], "<i8").tobytes()
        facts = {"file_sizes": hashlib.sha256(lengths).hexdigest(), "truth": digest_truths(truths)}
        self.digest = digest_source(self._keys, self._targets, facts)

    def truth(self, sample: int) -> BoxAnnotations:
        return self._truths[sample]

    def image(self, sample: int) -> torch.Tensor:
        """Returns uint8 [3, H, W].

        Raises:
            SourceError: the file cannot be decoded, or has another size than its annotations say.
        """
        image = super().image(sample)
        width, height = self._sizes[sample]
        if tuple(image.shape[1:]) != (height, width):
            raise SourceError(
                f"image {self.root / self._keys[sample]}: {image.shape[2]}x{image.shape[1]} pixels; its annotations say "
                f"{width}x{height}, so that boxes would be misplaced; use the images that were annotated"
            )
        return image


@SOURCES.register("detection/coco")
class Coco(DetectionSettings):
    """`root` has `train.json`, `eval.json` and the folder `images`."""

    name: str = "coco"
    root: str | None = None

    def open(self, split: Split) -> CocoSource:
        return _open(self, split)


def _open(settings: Coco, split: Split) -> CocoSource:
    """Returns a split of a COCO folder.

    Raises:
        SourceError: a file is missing or not in the format; the message names file and entry.
    """
    if settings.root is None:
        raise SourceError(
            "source.root: missing; a coco folder has train.json, eval.json (or val.json) and images/"
        )
    root = Path(settings.root).expanduser()
    train = _Annotations(root / "train.json")
    names = ("eval.json", "val.json")
    found = next((root / name for name in names if (root / name).is_file()), root / names[0])
    here = train if split == "train" else _Annotations(found)
    if here.categories != train.categories:
        raise SourceError(
            f"source {here.path}: categories differ from those of {train.path}; give both the same ids and names"
        )
    files, sizes, truths = here.samples(settings.max_samples(split))
    missing = [file for file in files if not (root / "images" / file).is_file()]
    if missing:
        raise SourceError(
            f"source {root / 'images'}: {len(missing)} of {len(files)} images of {here.path.name} are missing, the first is "
            f"{missing[0]!r}; put them there"
        )
    return CocoSource(
        f"coco/{split}", root / "images", files, sizes, truths, [name for _, name in train.categories]
    )


class _Annotations:
    """One file of annotations, checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            tables = json.loads(path.read_bytes())
            self._images = [
                (int(i["id"]), str(i["file_name"]), int(i["width"]), int(i["height"]))
                for i in tables["images"]
            ]
            self.categories = sorted((int(c["id"]), str(c["name"])) for c in tables["categories"])
            self._boxes = [self._entry(entry) for entry in tables["annotations"]]
        except OSError as error:
            raise SourceError(
                f"annotations {path}: cannot be read: {error.strerror}; expected COCO's JSON there"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(
                f"annotations {path}: not COCO's instances format ({type(error).__name__}: {error}); expected images (id, "
                "file_name, width, height), categories (id, name), annotations (image_id, category_id, bbox of 4 numbers)"
            ) from error
        self._check_unique("image id", [number for number, *_ in self._images])
        self._check_unique("file_name", [file for _, file, *_ in self._images])
        self._check_unique("category id", [number for number, _ in self.categories])
        if not self._images or not self.categories:
            raise SourceError(
                f"annotations {path}: no images or no categories; expected at least one of each"
            )
        unsafe = [
            file for _, file, *_ in self._images if Path(file).is_absolute() or ".." in Path(file).parts
        ]
        if unsafe:
            raise SourceError(
                f"annotations {path}: file_name {unsafe[0]!r} leaves the images' folder; use names within it"
            )

    @staticmethod
    def _entry(entry: dict[str, Any]) -> tuple[Any, int, int, list[float], bool]:
        box = [float(value) for value in entry["bbox"]]
        if len(box) != 4 or not np.isfinite(box).all():
            raise ValueError(f"annotation {entry.get('id')}: bbox {entry['bbox']} is not four finite numbers")
        return (
            entry.get("id"),
            int(entry["image_id"]),
            int(entry["category_id"]),
            box,
            bool(entry.get("iscrowd", 0)),
        )

    def _check_unique(self, what: str, values: list[Any]) -> None:
        twice = [value for value, count in Counter(values).most_common(1) if count > 1]
        if twice:
            raise SourceError(f"annotations {self.path}: {what} {twice[0]!r} comes twice; each needs its own")

    def samples(self, limit: int | None) -> tuple[list[str], list[tuple[int, int]], list[BoxAnnotations]]:
        """Returns files, sizes (width, height) and truths, in order of the file names."""
        class_of = {number: place for place, (number, _) in enumerate(self.categories)}
        size_of = {number: (width, height) for number, _, width, height in self._images}
        kept: dict[int, list[tuple[list[float], int, bool]]] = {number: [] for number in size_of}
        for name, image, category, box, crowd in self._boxes:
            if image not in size_of or category not in class_of:
                what = f"image_id {image}" if image not in size_of else f"category_id {category}"
                raise SourceError(
                    f"annotations {self.path}: annotation {name}: {what} is not in the file; add it, or drop the annotation"
                )
            cut = self._cut(name, box, *size_of[image])
            kept[image].append((cut, class_of[category], crowd))
        images = sorted(self._images, key=lambda entry: entry[1])[:limit]
        truths = [
            BoxAnnotations.of(*([list(part) for part in zip(*kept[number], strict=True)] or [[], [], []]))
            for number, *_ in images
        ]
        return [file for _, file, *_ in images], [size_of[number] for number, *_ in images], truths

    def _cut(self, name: Any, box: list[float], width: int, height: int) -> list[float]:
        left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
        inside = [max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))]
        if box[2] <= 0 or box[3] <= 0 or inside[0] >= inside[2] or inside[1] >= inside[3]:
            raise SourceError(
                f"annotations {self.path}: annotation {name}: bbox {box} (left, top, width, height) has no area inside "
                f"of its {width}x{height} image; correct it, or drop the annotation"
            )
        return inside
