"""Folders of image files, one folder per class.

    root/train/CLASS/*  root/eval/CLASS/*     also val, validation, valid or test
    root/train/CLASS/*                        `eval_share` of the images are held out
    root/CLASS/*                              the same
    root/train/CLASS/*  root/val/*            ImageNet's: one folder for evaluation, whose classes are in `eval_labels`

`train_folder` and `eval_folder` name others. `eval_labels` has a line for each file: its name, and the folder of its class
or the class's number from 0 on, divided by a comma or by spaces, as in Kaggle's LOC_val_solution.csv and in Caffe's val.txt;
or the class alone, for the files in order of their names.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from softcache.data.sources.base import SOURCES
from softcache.data.sources.files import files_below
from softcache.data.sources.images.base import Split
from softcache.data.sources.images.classes import Classes, alike_hint, find_classes
from softcache.data.sources.images.pictures import PictureSettings, PictureSource
from softcache.data.sources.splits import choose_samples
from softcache.errors import SourceError
from softcache.runtime.logging import log_info

__all__ = ["SUFFIXES", "ImageFolder", "ImageFolderSource"]

SUFFIXES = {
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".bmp",
    ".webp",
    ".avif",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
}
MAX_SHOWN = 5
EVAL_FOLDERS = ("eval", "val", "validation", "valid", "test")


class ImageFolderSource(PictureSource):
    """Image files, decoded to RGB when asked for; keys are paths relative to `root`."""

    def __init__(
        self,
        name: str,
        root: Path,
        files: Sequence[tuple[str, int]],
        class_names: Sequence[str],
        **options: Any,
    ) -> None:
        keys = [key for key, _ in files]
        self.root = root
        sizes = [(root / key).stat().st_size for key in keys]
        super().__init__(name, keys, [target for _, target in files], class_names, sizes, **options)

    def content_facts(self) -> Mapping[str, Any]:
        return {"file_sizes": hashlib.sha256(self.places.astype("<i8").tobytes()).hexdigest()}

    def stamp(self) -> Any:
        times = [(self.root / key).stat().st_mtime_ns for key in self._keys]
        return hashlib.sha256(np.array(times, "<i8").tobytes()).hexdigest()

    @property
    def location(self) -> str:
        return str(self.root)

    def place_name(self, sample: int) -> str:
        return str(self.root / self._keys[sample])

    def file_bytes(self, sample: int) -> bytes:
        """Returns a file as it is.

        Raises:
            SourceError: it cannot be read; it is named.
        """
        try:
            return (self.root / self._keys[sample]).read_bytes()
        except OSError as error:
            raise self.read_error(sample, error) from error


@SOURCES.register("image/imagefolder")
class ImageFolder(PictureSettings):
    """Folders of image files; the maxima take the first samples, class after class.

    `eval_share` holds out so many of the training images, chosen by a hash of their path.

    Attributes:
        root: a folder of splits, or of classes.
        train_folder, eval_folder: folders of classes, in place of `root`.
        eval_labels: a file of the classes of a flat folder of held-out images.
    """

    name: str = "imagefolder"
    root: str | None = None
    train_folder: str | None = None
    eval_folder: str | None = None
    eval_labels: str | None = None
    eval_share: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_hold_out(self) -> Self:
        for key in ("eval_folder", "eval_labels") if self.eval_share is not None else ():
            if getattr(self, key) is not None:
                raise ValueError(
                    f"source.eval_share and source.{key}: two ways to hold images out; give one of them"
                )
        return self

    def pictures(self, split: Split) -> ImageFolderSource:
        if self.root is None:
            raise SourceError(
                "source.root: missing; an imagefolder has root/train/CLASS/* and root/eval/CLASS/*"
            )
        root = Path(self.root).expanduser()
        train = self._train_folder(root)
        classes = self._classes(train)
        folder = train if split == "train" else self._eval_folder(root, train)
        if folder is not train and self.eval_labels is not None:
            files = _labeled_files(root, folder, Path(self.eval_labels).expanduser(), classes)
        else:
            if folder is not train:
                _check_same_classes(folder, train, classes)
            files = _class_files(root, folder, classes)
            if folder is train and self.class_names is None:
                _check_not_empty(folder, files, classes)
        if self.eval_share is not None:
            keys = [key for key, _ in files]
            chosen = choose_samples(keys, split, eval_share=self.eval_share, shuffle=False)
            files = [files[number] for number in chosen.tolist()]
        if not files:
            raise SourceError(
                f"source {folder}: no images ({', '.join(sorted(SUFFIXES))}) of the {split} split in its class folders"
            )
        files = files[: self.max_samples(split)]
        return ImageFolderSource(
            f"imagefolder/{split}", root, files, classes.names, order_is_guessed=classes.is_guessed
        )

    def _train_folder(self, root: Path) -> Path:
        """Returns the folder of the training images; `root` itself where it has the folders of classes."""
        if not root.is_dir():
            raise SourceError(f"source {root}: no such folder; check source.root")
        if self.train_folder is not None:
            return _existing(root / self.train_folder, "source.train_folder")
        if (root / "train").is_dir() or self.eval_share is None:
            if not (root / "train").is_dir():
                raise SourceError(
                    f"source {root}: no folder train in it; expected one, with a folder per class; where {root} itself has "
                    "the folders of classes, set source.eval_share to the share that is held out"
                )
            return root / "train"
        return _existing(root, "source.root")

    def _eval_folder(self, root: Path, train: Path) -> Path:
        if self.eval_share is not None:
            return train
        if self.eval_folder is not None:
            return _existing(root / self.eval_folder, "source.eval_folder")
        for name in EVAL_FOLDERS:
            if (root / name).is_dir():
                return root / name
        raise SourceError(
            f"source {root}: no folder {', '.join(EVAL_FOLDERS[:-1])} or {EVAL_FOLDERS[-1]} in it; expected one, with a "
            "folder per class; set source.eval_share to hold out a share of the training images"
        )

    def _classes(self, train: Path) -> Classes:
        found = _class_folders(train)
        if not found:
            raise SourceError(f"source {train}: no folders in it; expected one per class")
        classes = find_classes(found, given=self.class_names, order=self.class_order, where=f"source {train}")
        _check_folders(f"source {train}", found, classes, "classes of source.class_names")
        return classes


def _existing(folder: Path, key: str) -> Path:
    if not folder.is_dir():
        raise SourceError(f"{key}: no folder {folder}; check source.root and {key}")
    return folder


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))


def _check_same_classes(folder: Path, train: Path, classes: Classes) -> None:
    found = _class_folders(folder)
    if not found and any(path.suffix.lower() in SUFFIXES for path in folder.iterdir()):
        raise SourceError(
            f"source {folder}: images without folders of classes; set source.eval_labels to a file with the class of "
            "each, or move them into folders"
        )
    _check_folders(f"source {folder}", found, classes, f"class folders of {train}")


def _check_folders(where: str, found: Sequence[str], classes: Classes, of: str) -> None:
    lost, extra = sorted(set(classes.labels) - set(found)), sorted(set(found) - set(classes.labels))
    if lost or extra:
        raise SourceError(
            f"{where}: expected the {len(classes.labels)} {of}; missing {lost[:10]}, not there {extra[:10]}; give both the "
            f"same (at least one){alike_hint(extra, lost)}"
        )


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _check_not_empty(folder: Path, files: Sequence[tuple[str, int]], classes: Classes) -> None:
    if files and (empty := sorted(set(range(len(classes.labels))) - {target for _, target in files})):
        raise SourceError(
            f"source {folder}: no image in {len(empty):,} of the {len(classes.labels):,} folders of classes, such as "
            f"{classes.labels[empty[0]]!r}, which timm leaves out of its classes; fill or remove them, or give all classes "
            f"as source.class_names (images are {', '.join(sorted(SUFFIXES))})"
        )


def _class_files(root: Path, folder: Path, classes: Classes) -> list[tuple[str, int]]:
    """Returns the files of each class, class after class, in order of their paths; logs what is of another kind."""
    files: list[tuple[str, int]] = []
    others: Counter[str] = Counter()
    for target, label in enumerate(classes.labels):
        for path in files_below(folder / label):
            if _is_image(path):
                files.append((_key(path, root), target))
            else:
                others[path.suffix.lower() or path.name] += 1
    if others:
        shown = ", ".join(f"{count:,} {kind}" for kind, count in others.most_common(MAX_SHOWN))
        log_info(f"source {folder}: files of other kinds than pictures are left out: {shown}")
    return files


def _key(path: Path, root: Path) -> str:
    key = path.relative_to(root).as_posix()
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"source {path.parent}: the file name {key!r} is not UTF-8; rename it") from error
    return key


def _labeled_files(root: Path, folder: Path, labels: Path, classes: Classes) -> list[tuple[str, int]]:
    """Returns the files of a folder without folders of classes, with those of a file of labels.

    Raises:
        SourceError: the file cannot be read, or has not one class for each image.
    """
    where = f"source.eval_labels {labels}"
    try:
        lines = [line for line in labels.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise SourceError(f"{where}: {error}; expected a text file with the class of each image") from error
    paths = [path for path in files_below(folder) if _is_image(path)]
    keys = [_key(path, root) for path in paths]
    rows = [_name_and_label(line.strip(), classes) for line in lines]
    if rows and len(rows[0]) > 1 and not _names_of(rows[0][0], paths):
        rows = rows[1:]  # a header
    if all(len(row) == 1 for row in rows):
        found = [row[0] for row in rows]
        if all(label.isdecimal() for label in found) and not set(found) <= set(classes.labels):
            raise SourceError(
                f"{where}: numbers alone; those of ILSVRC's ground truth are not the numbers of sorted classes; expected "
                "the name of each class's folder, or NAME NUMBER on each line"
            )
        if len(found) != len(paths):
            raise SourceError(
                f"{where}: {len(found):,} classes for the {len(paths):,} images of {folder}; expected one each"
            )
    else:
        stem, count = Counter(path.stem for path in paths).most_common(1)[0] if paths else ("", 0)
        by_name: dict[str, str] = {}
        for name, label in (row for row in rows if len(row) > 1):
            if by_name.setdefault(Path(name).stem, label) != label:
                stem, count = Path(name).stem, 2
        if count > 1:
            raise SourceError(
                f"{where}: {stem!r} is the name of several images; they are found by name, without folder and extension; "
                "give each one of its own, or move them into folders of classes"
            )
        lost = [path.name for path in paths if path.stem not in by_name]
        if lost:
            raise SourceError(
                f"{where}: no line for {len(lost):,} of the {len(paths):,} images of {folder}, such as {lost[0]}; expected "
                "one for each"
            )
        found = [by_name[path.stem] for path in paths]
    if set(found) - set(classes.labels) and all(label.isdecimal() for label in found):
        classes = Classes(classes.names, tuple(str(number) for number in range(len(classes.names))))
    return list(zip(keys, classes.targets(found, keys, where).tolist(), strict=True))


def _name_and_label(line: str, classes: Classes) -> list[str]:
    """Returns the name of an image and its class, or the class alone, of a line with a comma or spaces between them.

    Behind a class there may be more, as boxes in LOC_val_solution.csv; a class of several words is one of the folders.
    """
    if line in classes.labels:
        return [line]
    name, comma, rest = line.partition(",")
    if not comma:
        name, *others = line.split(maxsplit=1)
        rest = others[0] if others else ""
    rest = rest.strip()
    whole = next((part for part in (rest, rest.partition(",")[0].strip()) if part in classes.labels), "")
    return [name.strip(), *(([whole] if whole else re.split(r"[,\s]+", rest)[:1]) if rest else [])]


def _names_of(name: str, paths: Sequence[Path]) -> bool:
    return any(path.stem == Path(name).stem for path in paths)
