"""Images as the bytes of their encoded files: what a student reads that never decodes a picture.

    [student.source]
    modality = "bytes"
    name = "imagefolder"      # files as they are; images that are held as pixels are encoded here, by Pillow

A file is read when it is asked for, and compared with the hash that it had when the source was opened; the digest is of
all these hashes, so that files which were swapped or written anew make another source. That reads every file once at the
start. Images that are encoded here are kept in memory, one behind the other: 60,000
of Fashion-MNIST take 30 MB as PNG. Encoders change their output between versions, so the version is in the digest too.
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from pydantic import Field, model_validator

from softcache.data.sources.base import SourceSettings, Split, built_in_sources, source_class
from softcache.data.sources.images.base import IndexedSource, Source
from softcache.data.sources.images.pictures import PictureSettings, PictureSource
from softcache.errors import ConfigError, SourceError
from softcache.hashing.digests import digest_bytes, digest_source

__all__ = [
    "BytesSettings",
    "EncodedSource",
    "FileSource",
    "bytes_class",
    "student_source_class",
    "student_source_classes",
]


class BytesSettings(SourceSettings):
    """[student.source] with modality "bytes": how images are encoded; which they are, a subclass adds (`bytes_class`).

    `format` None is the files as they are, and PNG where there are none. `quality` (None: 90) is JPEG's,
    `compress_level` (None: 6) PNG's; 0 stores the pixels' bytes as they are. `max_bytes` cuts what is longer.
    """

    modality: Literal["bytes"]
    format: Literal["png", "jpeg"] | None = None
    quality: int | None = Field(None, ge=1, le=100)
    compress_level: int | None = Field(None, ge=0, le=9)
    max_bytes: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check_format(self) -> BytesSettings:
        if self.quality is not None and self.format != "jpeg":
            raise ValueError('quality is of format = "jpeg"; set that, or drop quality')
        is_png = self.format == "png" or (self.format is None and not isinstance(self, PictureSettings))
        if self.compress_level is not None and not is_png:
            raise ValueError('compress_level is of format = "png"; set that, or drop compress_level')
        return self

    def describe(self) -> str:
        return f"{self.format or 'file'} bytes"

    def open(self, split: Split) -> EncodedSource | FileSource:
        """Returns a split of the images, as bytes.

        Raises:
            SpecError, SourceError: as the images' source; or a file cannot be read, or an image not be encoded.
        """
        source = super().open(split)  # type: ignore[safe-super]  # of the images, whose class comes next
        if isinstance(source, PictureSource) and self.format is None:
            return FileSource(source, self.max_bytes)
        return EncodedSource(source, self)


@cache
def bytes_class(images: type[SourceSettings]) -> type[BytesSettings]:
    """Returns the settings of a source of images and of how they are encoded, in one table."""
    fields = {"__annotations__": {"modality": Literal["bytes"]}, "__module__": __name__}
    return type(f"Bytes{images.__name__}", (BytesSettings, images), fields)


def student_source_class(modality: str, name: str) -> type[SourceSettings]:
    """Returns the settings class of what a student of images reads: images, or their bytes.

    Raises:
        SpecError: there is no source of that name.
        ConfigError: another modality.
    """
    if modality not in ("image", "bytes"):
        raise ConfigError(f"{modality!r}: input should be 'image' or 'bytes'")
    images = source_class("image", name)
    return images if modality == "image" else bytes_class(images)


def student_source_classes() -> list[type[SourceSettings]]:
    """Returns the settings classes of the built-in sources of images, and of their bytes."""
    images = built_in_sources("image/")
    return [*images, *map(bytes_class, images)]


class EncodedSource(IndexedSource):
    """Images of another source, encoded by Pillow and kept in memory; the same image gives the same bytes."""

    def __init__(self, source: Source, settings: BytesSettings) -> None:
        from PIL import Image, features

        kind = settings.format or "png"
        super().__init__(
            f"{source.name} as {kind}", source.keys(), source.targets(), tuple(source.class_names)
        )
        self.num_classes = source.num_classes
        options: dict[str, Any] = {
            "compress_level": 6 if settings.compress_level is None else settings.compress_level
        }
        if kind == "jpeg":
            options = {"quality": settings.quality or 90}
        parts = []
        for sample in range(len(source)):
            into = io.BytesIO()
            Image.fromarray(_array_of(source.image(sample), source.key(sample))).save(into, kind, **options)
            parts.append(into.getvalue()[: settings.max_bytes])
        self._content = np.frombuffer(b"".join(parts), np.uint8)
        self.lengths = np.array([len(part) for part in parts], np.int64)
        self._starts = np.cumsum(self.lengths) - self.lengths
        library = features.version("jpg" if kind == "jpeg" else "zlib")
        facts = {
            "bytes": digest_bytes(self._content.data),
            "lengths": digest_bytes(self.lengths.astype("<i8").tobytes()),
            "encoder": ["Pillow", features.version("pil"), library, kind, options, settings.max_bytes],
        }
        self.digest = digest_source(self._keys, self._targets, facts)

    def content(self, sample: int) -> np.ndarray:
        """Returns the bytes of a sample, [L] uint8."""
        return self._content[self._starts[sample] :][: self.lengths[sample]]


def _array_of(image_CHW: torch.Tensor, key: str) -> np.ndarray:
    if image_CHW.dtype != torch.uint8 or image_CHW.ndim != 3 or len(image_CHW) not in (1, 3):
        raise SourceError(
            f"sample {key!r}: {image_CHW.dtype} of shape {tuple(image_CHW.shape)}; only uint8 images of one or three "
            "channels can be encoded"
        )
    return (image_CHW[0] if len(image_CHW) == 1 else image_CHW.permute(1, 2, 0)).numpy()


class FileSource(IndexedSource):
    """The files of pictures, undecoded.

    Attributes:
        lengths: [N] int64, bytes of each sample.
    """

    def __init__(self, folder: PictureSource, max_bytes: int | None) -> None:
        super().__init__(f"{folder.name} as files", folder.keys(), folder.targets(), folder.class_names)
        self._folder, self._max_bytes = folder, max_bytes
        self.lengths = np.zeros(len(folder), np.int64)
        self._hashes = np.zeros(len(folder), np.uint64)
        for sample in range(len(folder)):
            content = self._folder.file_bytes(sample)
            if not content:
                raise SourceError(
                    f"source {self.name}: file {self.key(sample)!r} is empty; restore it, or take it out"
                )
            self.lengths[sample] = len(content[:max_bytes])
            self._hashes[sample] = xxhash.xxh3_64_intdigest(content)
        facts = {"files": digest_bytes(self._hashes.astype("<u8").tobytes()), "max_bytes": max_bytes}
        self.digest = digest_source(self._keys, self._targets, facts)

    def content(self, sample: int) -> np.ndarray:
        """Returns the bytes of a sample, [L] uint8.

        Raises:
            SourceError: the file is not what it was when the source was opened.
        """
        content = self._folder.file_bytes(sample)
        if xxhash.xxh3_64_intdigest(content) != int(self._hashes[sample]):
            raise SourceError(
                f"source {self.name}: file {self.key(sample)!r} changed since this run opened it; restore it, or start anew"
            )
        return np.frombuffer(content, np.uint8)[: self._max_bytes]
