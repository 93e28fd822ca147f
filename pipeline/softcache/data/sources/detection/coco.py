"""A folder in COCO's format, as COCO is distributed or with shorter names:

    root/annotations/instances_train2017.json and instances_val2017.json, images in root/train2017 and root/val2017
    root/train.json and root/eval.json (or val.json), images in root/images
    root/annotations/instances_train.json, images in root/images/train: CVAT's export
    root/train/_annotations.coco.json, images in the same folder: Roboflow's
    root/train/labels.json, images in root/train/data: FiftyOne's, exported once for each split

The split that is held out may be named eval, val, valid, validation or test.

    {"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}],
     "annotations": [{"image_id", "category_id", "bbox": [left, top, width, height], "iscrowd"}]}

COCO's annotation files hold more; what is not named above is not read. Ids may be numbers or texts, those of categories
with gaps: class c is the c-th smallest id of the training file, counted from 0, and both files must have the same
categories. An image without width and height has those of its file; one with no annotation is a sample with no box.
`iscrowd = 1` marks a group: kept, but nothing to learn (`Truth.crowd`). A box that reaches out of its image is cut at the
edge; one that lies outside, or has no area, as two of COCO's train2017 have, is dropped and counted. A file whose boxes are
all shares of the image, or two corners, is refused. Keys are the images'
file names.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.data.sources.base import SOURCES
from softcache.data.sources.detection.base import BoxAnnotations, DetectionSettings, digest_truths
from softcache.data.sources.images.base import Split
from softcache.data.sources.images.image_folder import EVAL_FOLDERS, ImageFolderSource
from softcache.errors import SourceError
from softcache.hashing.digests import digest_source
from softcache.runtime.files import parse_json
from softcache.runtime.logging import log_info

__all__ = ["Coco", "CocoSource"]

FEWEST_BOXES = 8
"""By which a file is judged to have corners in the place of sizes."""


class CocoSource(ImageFolderSource):
    """Images of a COCO folder, decoded to RGB when asked for, with their boxes, which are of the pixels as stored."""

    upright, can_skip = False, False

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

    def image_size(self, sample: int) -> tuple[int, int]:
        """Returns height and width, which `image` checks."""
        width, height = self._sizes[sample]
        return height, width

    def image(self, sample: int) -> torch.Tensor:
        """Returns uint8 [3, H, W].

        Raises:
            SourceError: the file cannot be decoded, or has another size than its annotations say.
        """
        image = super().image(sample)
        width, height = self._sizes[sample]
        if tuple(image.shape[1:]) != (height, width):
            turned = tuple(image.shape[1:]) == (width, height)
            advice = (
                "save it turned, without an EXIF orientation"
                if turned
                else "use the images that were annotated"
            )
            raise SourceError(
                f"image {self.root / self._keys[sample]}: {image.shape[2]}x{image.shape[1]} pixels as stored; its "
                f"annotations say {width}x{height}, so that boxes would be misplaced; {advice}"
            )
        return image


@SOURCES.register("detection/coco")
class Coco(DetectionSettings):
    """`root` has COCO's own folders, `train.json`, `eval.json` and the folder `images`, or an export of other tools."""

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
            "source.root: missing; a coco folder has annotations/instances_train*.json and train*/, or train.json, "
            "eval.json (or val.json) and images/, or what CVAT, Roboflow and FiftyOne export"
        )
    root = Path(settings.root).expanduser()
    train = _Annotations(*_place(root, "train"))
    here = train if split == "train" else _Annotations(*_place(root, split))
    if here.categories != train.categories:
        raise SourceError(
            f"source {here.path}: categories differ from those of {train.path}; give both the same ids and names"
        )
    files, sizes, truths = here.samples(settings.max_samples(split))
    if here.dropped:
        log_info(
            f"source coco/{split}: {len(here.dropped):,} of {here.num_annotations:,} annotations have no area inside of "
            f"their image and are dropped, such as {here.dropped[0]}"
        )
    return CocoSource(
        f"coco/{split}", here.images, files, sizes, truths, [name for _, name in train.categories]
    )


def _place(root: Path, split: Split) -> tuple[Path, Path]:
    """Returns where a split's annotations and images are.

    Raises:
        SourceError: there are none, or several such files.
    """
    for name in ("train",) if split == "train" else EVAL_FOLDERS:
        found = [
            (root / f"{name}.json", root / "images"),
            *(
                (path, _images_of(root, path))
                for path in sorted(root.glob(f"annotations/instances_{name}*.json"))
            ),
            (root / name / "_annotations.coco.json", root / name),
            (root / name / "labels.json", root / name / "data"),
        ]
        found = [(path, images) for path, images in found if path.is_file()]
        if len(found) > 1:
            raise SourceError(
                f"source {root}: {', '.join(path.relative_to(root).as_posix() for path, _ in found)}; expected one file of "
                f"annotations for {name}; move the others away"
            )
        if found:
            return found[0]
    raise SourceError(
        f"source {root}: no annotations of the {split} split; expected annotations/instances_{split}*.json, {split}.json, "
        f"{split}/_annotations.coco.json (Roboflow) or {split}/labels.json (FiftyOne)"
        + ("" if split == "train" else f"; {split} may be named {', '.join(EVAL_FOLDERS[1:])}, too")
    )


def _images_of(root: Path, annotations: Path) -> Path:
    """Returns where images are: beside the folder of annotations, as COCO has it, or in `images`, as CVAT does."""
    name = annotations.stem.removeprefix("instances_")
    inner = root / "images" / name
    return inner if inner.is_dir() and not (root / name).is_dir() else root / name


class _Annotations:
    """One file of annotations, checked.

    Attributes:
        path, images: the file, and the folder of its images.
        dropped: annotations without area, described.
    """

    def __init__(self, path: Path, images: Path) -> None:
        self.path, self.images = path, images
        self.dropped: list[str] = []
        try:
            tables = parse_json(path.read_bytes())
            self._images = [
                (_id(entry["id"]), str(entry["file_name"]), _size(entry)) for entry in tables["images"]
            ]
            self.categories = sorted(
                ((_id(entry["id"]), str(entry["name"])) for entry in tables["categories"]),
                key=lambda category: (isinstance(category[0], str), category),
            )
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
        self.num_annotations = len(self._boxes)
        self._check_unique("image id", [number for number, *_ in self._images])
        self._check_unique("file_name", [os.path.normpath(file) for _, file, _ in self._images])
        self._check_unique("category id", [number for number, _ in self.categories])
        if not self._images or not self.categories:
            raise SourceError(
                f"annotations {path}: no images or no categories; expected at least one of each"
            )
        unsafe = [file for _, file, _ in self._images if Path(file).is_absolute() or ".." in Path(file).parts]
        if unsafe:
            raise SourceError(
                f"annotations {path}: file_name {unsafe[0]!r} leaves the images' folder; use names within it"
            )

    @staticmethod
    def _entry(entry: dict[str, Any]) -> tuple[Any, int | str, int | str, list[float], bool]:
        box = [float(value) for value in entry["bbox"]]
        if len(box) != 4 or not np.isfinite(box).all():
            raise ValueError(f"annotation {entry.get('id')}: bbox {entry['bbox']} is not four finite numbers")
        if (crowd := str(int(entry.get("iscrowd") or 0))) not in ("0", "1"):
            raise ValueError(f"annotation {entry.get('id')}: iscrowd {entry['iscrowd']!r} is neither 0 nor 1")
        return entry.get("id"), _id(entry["image_id"]), _id(entry["category_id"]), box, crowd == "1"

    def _check_unique(self, what: str, values: list[Any]) -> None:
        twice = [value for value, count in Counter(values).most_common(1) if count > 1]
        if twice:
            raise SourceError(f"annotations {self.path}: {what} {twice[0]!r} comes twice; each needs its own")

    def samples(self, limit: int | None) -> tuple[list[str], list[tuple[int, int]], list[BoxAnnotations]]:
        """Returns files, sizes (width, height) and truths, in order of the file names."""
        images = sorted(self._images, key=lambda entry: entry[1])[:limit]
        missing = [file for _, file, _ in images if not (self.images / file).is_file()]
        if missing:
            raise SourceError(
                f"source {self.images}: {len(missing)} of {len(images)} images of {self.path.name} are missing, the first "
                f"is {missing[0]!r}; put them there"
            )
        class_of = {number: place for place, (number, _) in enumerate(self.categories)}
        known = {number for number, *_ in self._images}
        size_of = {number: size or _size_of_file(self.images / file) for number, file, size in images}
        kept: dict[int | str, list[tuple[list[float], int, bool]]] = {number: [] for number in size_of}
        placed: list[list[float]] = []
        for name, image, category, box, crowd in self._boxes:
            if image not in known or category not in class_of:
                what = f"image_id {image}" if image not in known else f"category_id {category}"
                raise SourceError(
                    f"annotations {self.path}: annotation {name}: {what} is not in the file; add it, or drop the annotation"
                )
            if image not in size_of:
                continue
            width, height = size_of[image]
            placed.append([*box, width, height])
            left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
            cut = [max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))]
            if box[2] <= 0 or box[3] <= 0 or cut[0] >= cut[2] or cut[1] >= cut[3]:
                self.dropped.append(f"annotation {name}, bbox {box} of a {width}x{height} image")
                continue
            kept[image].append((cut, class_of[category], crowd))
        self._check_form(np.array(placed).reshape(-1, 6))
        truths = [
            BoxAnnotations.of(*([list(part) for part in zip(*kept[number], strict=True)] or [[], [], []]))
            for number, *_ in images
        ]
        return [file for _, file, _ in images], [size_of[number] for number, *_ in images], truths

    def _check_form(self, placed: np.ndarray) -> None:
        """Checks that boxes are of pixels, and of corner and size, as far as all of them together tell.

        Args:
            placed: [M, 6], the four numbers of each box, and width and height of its image.

        Raises:
            SourceError: all are within one pixel, or as two corners all would be in their images, out of which half reach.
        """
        placed = placed[(placed[:, 2:4] > 0).all(1)]
        if not len(placed):
            return
        starts, ends, sizes = placed[:, :2], placed[:, 2:4], placed[:, 4:]
        form = (
            f"such as {placed[0, :4].tolist()}; expected [left, top, width, height] in pixels; convert them"
        )
        if (starts + ends <= 1.001).all() and (sizes > 1).all():
            raise SourceError(
                f"annotations {self.path}: all {len(placed):,} boxes are within one pixel, as shares are, {form}"
            )
        reaching = int((starts + ends > sizes + 1).any(1).sum())
        may_be_corners = (starts < ends).all() and (ends <= sizes + 1).all()
        if may_be_corners and len(placed) >= FEWEST_BOXES and 2 * reaching >= len(placed):
            raise SourceError(
                f"annotations {self.path}: {reaching:,} of {len(placed):,} boxes reach out of their images, and none would "
                f"as [left, top, right, bottom], {form}"
            )


def _id(value: Any) -> int | str:
    """Returns a number or a text as the same id, however it is written: 7 and "7" are one."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"id {value!r} is neither a number nor a text")
    text = str(value)
    return int(text) if text.isdecimal() and text == str(int(text)) else text


def _size(entry: dict[str, Any]) -> tuple[int, int] | None:
    """Returns width and height of an image's entry, None where it has neither."""
    if entry.get("width") is None and entry.get("height") is None:
        return None
    return int(entry["width"]), int(entry["height"])


def _size_of_file(path: Path) -> tuple[int, int]:
    """Returns width and height of an image from its header.

    Raises:
        SourceError: it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, Image.DecompressionBombError) as error:
        raise SourceError(
            f"image {path}: cannot be read: {error}; replace it, or drop its annotations"
        ) from error
