"""Folders of images and of masks: one mask for each image, of one channel, whose numbers are classes.

root/train/images/*.jpg  root/train/masks/*.png      also eval, val, validation, valid or test
root/images/train/*      root/masks/train/*          images = "images/{split}", masks = "masks/{split}"
root/JPEGImages/*        root/SegmentationClass/*    a list of names for each split, as of Pascal VOC
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import xxhash
from pydantic import Field, model_validator

from softcache.data.sources.base import SOURCES, Split
from softcache.data.sources.files import files_below
from softcache.data.sources.images.classes import find_classes
from softcache.data.sources.images.custom import tried_samples
from softcache.data.sources.images.image_folder import EVAL_FOLDERS, SUFFIXES, ImageFolderSource
from softcache.data.sources.images.pictures import Names
from softcache.data.sources.segmentation.base import IGNORED, SegmentationSettings
from softcache.data.sources.splits import choose_samples
from softcache.errors import SourceError
from softcache.hashing.digests import digest_bytes

__all__ = ["MaskFolderSource", "MaskFolders"]

MODES = ("1", "L", "P", "I", "I;16")
"""Pillow's modes of one channel; the numbers of a palette are those before it is applied."""
MAX_SHOWN = 10
ORIENTATION, KEEPS_SIZE = 0x0112, (2, 3, 4)
"""EXIF's tag, and its values that mirror an image or turn it upside down."""


class MaskFolderSource(ImageFolderSource):
    """Image files with mask files; keys are the paths of images relative to `root`."""

    can_skip = False

    def __init__(
        self,
        name: str,
        root: Path,
        pairs: Sequence[tuple[str, str]],
        class_names: Sequence[str],
        *,
        first_value: int,
        ignore: Sequence[int],
    ) -> None:
        """
        Args:
            pairs: paths of each image and its mask, relative to `root`.
            first_value: the mask's number of class 0.
            ignore: numbers of pixels that have no class.
        """
        self.mask_files = [mask for _, mask in pairs]
        self._first_value, self._ignore = first_value, tuple(ignore)
        contents = [xxhash.xxh3_64_intdigest((root / mask).read_bytes()) for mask in self.mask_files]
        self._masks_digest = digest_bytes(np.array(contents, "<u8").tobytes())
        super().__init__(name, root, [(image, 0) for image, _ in pairs], class_names)

    def content_facts(self) -> Mapping[str, Any]:
        values = [self._first_value, sorted(self._ignore), self.num_classes]
        return {**super().content_facts(), "masks": self._masks_digest, "values": values}

    def decode(self, sample: int) -> np.ndarray:
        from PIL import Image

        with Image.open(BytesIO(self.file_bytes(sample))) as image:
            orientation = image.getexif().get(ORIENTATION)
        if orientation in KEEPS_SIZE:
            raise SourceError(
                f"image {self.place_name(sample)}: its EXIF orientation, {orientation}, turns it, and its size does not "
                "show whether its mask is of the turned image; save the image as it is to be seen, without an orientation"
            )
        return super().decode(sample)

    def mask(self, sample: int) -> torch.Tensor:
        """Returns int16 [H, W].

        Raises:
            SourceError: the file cannot be read, has several channels, or a number of no class; all others that do are
                counted, too.
        """
        try:
            return self._mask(sample)
        except ValueError as error:
            raise self._faults(sample, error) from error

    def _mask(self, sample: int) -> torch.Tensor:
        from PIL import Image, UnidentifiedImageError

        path = self.root / self.mask_files[sample]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as image:
                    mode, values = image.mode, np.array(image)
        except UnidentifiedImageError:
            raise ValueError("no picture of a kind that Pillow knows") from None
        except Exception as error:  # decoders meet broken bytes with errors of every kind
            raise ValueError(f"cannot be decoded: {' '.join(str(error).split())}") from error
        if mode not in MODES:
            raise ValueError(
                f"pixels of mode {mode}; expected one channel with the number of each pixel's class"
            )
        if mode == "1" and self.num_classes > 2:  # white is 1, or the 255 of a file that was made smaller
            raise ValueError(f"one bit for each pixel, of {self.num_classes} classes; expected 8 bits or 16")
        classes_HW = values.astype(np.int64) - self._first_value
        classes_HW[np.isin(values, self._ignore)] = IGNORED
        wrong_HW = (classes_HW != IGNORED) & ((classes_HW < 0) | (classes_HW >= self.num_classes))
        if wrong_HW.any():
            raise ValueError(f"pixels of {sorted(set(values[wrong_HW].tolist()))[:MAX_SHOWN]}")
        return torch.from_numpy(classes_HW.astype(np.int16))

    def _faults(self, sample: int, error: ValueError) -> SourceError:
        """Returns the error that names the masks which are no masks; reads them all."""
        found = {sample: str(error)}
        for number in range(len(self)):
            try:
                self._mask(number)
            except ValueError as other:
                found[number] = str(other)
        last = self._first_value + self.num_classes - 1
        shown = [f"{self.root / self.mask_files[n]}: {found[n]}" for n in sorted(found)[:MAX_SHOWN]]
        more = [f"and {len(found) - MAX_SHOWN:,} more"] if len(found) > MAX_SHOWN else []
        return SourceError(
            f"source {self.name}: {len(found):,} of {len(self):,} masks cannot be read as classes; expected one channel of "
            f"{self._first_value} to {last} ({self.num_classes} classes), and {list(self._ignore)} where there is none:\n  "
            + "\n  ".join([*shown, *more])
            + "\nRepair them, or set source.class_names, source.first_value and source.ignore"
        )


def _check_yes_or_no(source: MaskFolderSource) -> None:
    """Checks that masks of two classes are not of one, with 255 for the other, as programs write black and white.

    Raises:
        SourceError: those that are looked at have one of the two classes, and pixels that are ignored.
    """
    if source.num_classes != 2:
        return
    values: set[int] = set()
    for sample in tried_samples(source)[::TRIED_MASKS]:
        try:
            values.update(source._mask(sample).unique().tolist())
        except ValueError:  # which `mask` names
            return
    if IGNORED in values and len(values) == 2:
        (found,) = values - {IGNORED}
        raise SourceError(
            f"source {source.name}: masks of {source._first_value + found} ({source.class_names[found]!r}) and "
            f"{list(source._ignore)} alone, which source.ignore leaves out, and none of {source.class_names[1 - found]!r}; "
            f"where {list(source._ignore)} is that class, write {source._first_value + 1 - found} in its place"
        )


TRIED_MASKS = 4
"""Every such of the samples that sources are tried on."""


@SOURCES.register("segmentation/folders")
class MaskFolders(SegmentationSettings):
    """Folders of images and masks, relative to `root`; {split} in them is `train_split` or `eval_split`.

    A mask has its image's name, with `mask_suffix` in the place of `image_suffix` (None: the extension). `train_list` and
    `eval_list` are files with a name on each line, without suffix: the images of a split. `eval_share` holds out so many of
    the training images, chosen by a hash of their path.

    The number n in a mask is class n - `first_value`; those of `ignore` are no class. `class_names` are a list, or a file.

    Attributes:
        images, masks: folders with files of the same names.
    """

    name: str = "folders"
    root: str | None = None
    images: str = "{split}/images"
    masks: str = "{split}/masks"
    train_split: str = "train"
    eval_split: str | None = None
    image_suffix: str | None = None
    mask_suffix: str = ".png"
    train_list: str | None = None
    eval_list: str | None = None
    eval_share: float | None = Field(None, gt=0, lt=1)
    class_names: Names | None = None
    first_value: int = Field(0, ge=0, lt=2**15)
    ignore: tuple[int, ...] = Field((255,), strict=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.eval_share is not None and (self.eval_list or self.eval_split):
            raise ValueError("source.eval_share: a second way to hold images out; give one of them")
        has_splits = "{split}" in self.images or (self.train_list and self.eval_list) or self.eval_share
        if not has_splits:
            raise ValueError(
                "source.images: without {split} both splits would have the same images; set source.train_list and "
                "source.eval_list, or source.eval_share"
            )
        return self

    def open(self, split: Split) -> MaskFolderSource:
        if self.root is None or self.class_names is None:
            missing = "root" if self.root is None else "class_names"
            raise SourceError(
                f"source.{missing}: missing; expected the folder of images and masks, and the name of each class"
            )
        root = Path(self.root).expanduser()
        classes = find_classes([0], given=self.class_names, order=None, where=f"source {root}")
        part = self._split(root, split)
        images, masks = (
            self._existing(root, getattr(self, key).replace("{split}", part), key)
            for key in ("images", "masks")
        )
        stems = self._stems(root, images, split)
        if self.eval_share is not None:
            chosen = choose_samples(stems, split, eval_share=self.eval_share, shuffle=False)
            stems = [stems[number] for number in chosen.tolist()]
        pairs = self._pairs(root, images, masks, stems[: self.max_samples(split)])
        source = MaskFolderSource(
            f"folders/{split}",
            root,
            pairs,
            classes.names,
            first_value=self.first_value,
            ignore=self.ignore,
        )
        _check_yes_or_no(source)
        return source

    def _split(self, root: Path, split: Split) -> str:
        """Returns what stands for {split}."""
        if split == "train" or self.eval_share is not None or "{split}" not in self.images:
            return self.train_split
        if self.eval_split is not None:
            return self.eval_split
        for name in EVAL_FOLDERS:
            if (root / self.images.replace("{split}", name)).is_dir():
                return name
        raise SourceError(
            f"source {root}: no folder {self.images} for any split of {', '.join(EVAL_FOLDERS)}; set source.eval_split, or "
            "source.eval_share to hold out a share of the training images"
        )

    def _existing(self, root: Path, folder: str, key: str) -> Path:
        if not (root / folder).is_dir():
            raise SourceError(
                f"source.{key}: no folder {root / folder}; check source.root, source.images and source.masks"
            )
        return root / folder

    def _stems(self, root: Path, images: Path, split: Split) -> list[str]:
        """Returns the names of a split's images, relative to their folder."""
        listed = self.train_list if split == "train" else self.eval_list
        paths = [path for path in files_below(images) if self._is_image(path)]
        stems = [path.relative_to(images).as_posix() for path in paths]
        if listed is not None:
            try:
                names = [
                    line.strip()
                    for line in (root / listed).read_text("utf-8-sig").splitlines()
                    if line.strip()
                ]
            except (OSError, ValueError) as error:
                raise SourceError(
                    f"source.{split}_list: {error}; expected a file with the name of an image on each line"
                ) from error
            by_name = {self._without_suffix(stem): stem for stem in stems}
            if lost := [name for name in names if name not in by_name]:
                raise SourceError(
                    f"source.{split}_list {listed}: {len(lost):,} of {len(names):,} names have no image in {images}, such "
                    f"as {lost[0]!r}; expected names without {self.image_suffix or 'the extension'}"
                )
            stems = [by_name[name] for name in names]
        if not stems:
            raise SourceError(
                f"source {images}: no images ({self.image_suffix or ', '.join(sorted(SUFFIXES))}) in it"
            )
        return stems

    def _is_image(self, path: Path) -> bool:
        named = (
            path.name.endswith(self.image_suffix) if self.image_suffix else path.suffix.lower() in SUFFIXES
        )
        return named and not path.name.startswith(".") and path.is_file()

    def _without_suffix(self, stem: str) -> str:
        return stem.removesuffix(self.image_suffix) if self.image_suffix else stem.rpartition(".")[0]

    def _pairs(self, root: Path, images: Path, masks: Path, stems: Sequence[str]) -> list[tuple[str, str]]:
        found = [(images / stem, masks / (self._without_suffix(stem) + self.mask_suffix)) for stem in stems]
        lost = [(image, mask) for image, mask in found if not mask.is_file()]
        if lost:
            raise SourceError(
                f"source {images}: {len(lost):,} of {len(found):,} images have no mask, such as {lost[0][0].name}: expected "
                f"{lost[0][1]}; check source.masks, source.image_suffix and source.mask_suffix, or take the images out"
            )
        return [tuple(path.relative_to(root).as_posix() for path in pair) for pair in found]  # type: ignore[misc]
