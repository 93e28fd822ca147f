"""Folders of image files, one folder per class: root/train/CLASS/* and root/eval/CLASS/* (or val/CLASS/*).

Files are decoded when asked for: turned by their EXIF orientation, what is transparent on white, grey of 16 bits
scaled to 8. The digest covers their names, classes and sizes: contents are checked sample by
sample later.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash

from softcache.data.sources.base import SOURCES
from softcache.data.sources.images.base import ImageSourceSettings, IndexedSource, Source, Split
from softcache.data.sources.images.decode import to_rgb
from softcache.errors import SourceError
from softcache.hashing.digests import digest_source

__all__ = ["ImageFolder", "ImageFolderSource"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}


class ImageFolderSource(IndexedSource):
    """Image files in class folders, decoded to RGB when asked for; keys are paths relative to `root`.

    Attributes:
        upright: whether files are turned by their EXIF orientation.
    """

    upright = True

    def __init__(
        self, name: str, root: Path, files: Sequence[tuple[str, int]], class_names: Sequence[str]
    ) -> None:
        super().__init__(name, [key for key, _ in files], [target for _, target in files], class_names)
        self.root = root
        sizes = hashlib.sha256(np.array([(root / key).stat().st_size for key in self._keys], "<i8").tobytes())
        self.digest = digest_source(self._keys, self._targets, {"file_sizes": sizes.hexdigest()})

    def image(self, sample: int) -> torch.Tensor:
        """Returns uint8 [3, H, W].

        Raises:
            SourceError: the file cannot be decoded in full, or has more pixels than Pillow takes for sound; it is named.
        """
        from PIL import Image

        path = self.root / self._keys[sample]
        try:
            with warnings.catch_warnings():
                # Pillow refuses twice as many, and warns of these.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(path)
            with image:
                pixels = to_rgb(image, upright=self.upright)
        except Exception as error:  # decoders meet broken bytes with errors of every kind
            raise SourceError(
                f"image {path}: cannot be decoded: {error}; repair it, or take it out of the folder"
            ) from error
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def file_bytes(self, sample: int) -> bytes:
        """Returns a file as it is.

        Raises:
            SourceError: it cannot be read; it is named.
        """
        path = self.root / self._keys[sample]
        try:
            return path.read_bytes()
        except OSError as error:
            raise SourceError(
                f"image {path}: cannot be read: {error.strerror}; restore it, or take it out"
            ) from error

    def contents_digest(self) -> str:
        """Returns a digest of all files' bytes; reads each of them once."""
        hashes = [xxhash.xxh3_64_intdigest(self.file_bytes(sample)) for sample in range(len(self))]
        return hashlib.sha256(np.array(hashes, "<u8").tobytes()).hexdigest()


@SOURCES.register("image/imagefolder")
class ImageFolder(ImageSourceSettings):
    """Folders of image files; the maxima take the first samples, class after class."""

    name: str = "imagefolder"
    root: str | None = None

    def open(self, split: Split) -> Source:
        if self.root is None:
            raise SourceError(
                "source.root: missing; an imagefolder has root/train/CLASS/* and root/eval/CLASS/*"
            )
        return _open(Path(self.root).expanduser(), split, self.max_samples(split))


def _open(root: Path, split: Split, limit: int | None) -> Source:
    names = ("train",) if split == "train" else ("eval", "val")
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise SourceError(
            f"source {root}: no folder {' or '.join(names)} in it; expected one, with a folder per class"
        )
    classes, here = _class_folders(root / "train"), _class_folders(folder)
    if not classes or here != classes:
        lost, extra = sorted(set(classes) - set(here)), sorted(set(here) - set(classes))
        raise SourceError(
            f"source {folder}: expected the {len(classes)} class folders of {root / 'train'}; missing {lost[:10]}, "
            f"not there {extra[:10]}; give both splits the same folders (at least one)"
        )
    files = [
        (path.relative_to(root).as_posix(), target)
        for target, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()
    ][:limit]
    if not files:
        raise SourceError(f"source {folder}: no images ({', '.join(sorted(_SUFFIXES))}) in its class folders")
    for key, _ in files:
        try:
            key.encode()
        except UnicodeEncodeError as error:
            raise SourceError(f"source {folder}: the file name {key!r} is not UTF-8; rename it") from error
    return ImageFolderSource(f"imagefolder/{split}", root, files, classes)


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))
