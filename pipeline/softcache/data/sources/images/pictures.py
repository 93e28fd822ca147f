"""Pictures as encoded files: bytes that are decoded when they are asked for, wherever they are.

What is decoded is RGB of 8 bits: turned by its EXIF orientation, what is transparent on white, grey of 16 bits scaled. The
digest of a source covers keys, classes and sizes: contents are checked sample by sample later.
"""

from __future__ import annotations

import copy
import hashlib
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
import torch
import xxhash
from pydantic import BeforeValidator, model_validator

from softcache.data.sources.images.base import ImageSourceSettings, IndexedSource, Split
from softcache.data.sources.images.classes import ClassOrder
from softcache.data.sources.images.decode import to_rgb
from softcache.data.sources.images.unreadable import find_unreadable, leave_out_unreadable, unreadable_error
from softcache.errors import SourceError
from softcache.hashing.digests import digest_bytes, digest_source

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PictureSettings", "PictureSource"]

_OPENING = threading.Lock()
Names = Annotated[
    str | tuple[str, ...],
    BeforeValidator(lambda names: tuple(names) if isinstance(names, list) else names),
]


class PictureSettings(ImageSourceSettings, ABC):
    """[source] of encoded pictures; a subclass has where they are.

    `class_names` are the names of classes in the order of their numbers: a list, or a file. `class_order` is how classes are
    sorted whose order neither that nor the data give.

    `skip_unreadable = true` decodes every picture once, when the source is opened for the first time, and leaves out those
    that cannot be decoded. Their keys are part of the source's identity. The list lies under `data_dir`, in
    unreadable/DIGEST, and is made anew when a file changes.
    """

    class_names: Names | None = None
    class_order: ClassOrder | None = None
    skip_unreadable: bool = False
    data_dir: str = "runs/data"

    @model_validator(mode="after")
    def _one_order(self) -> Self:
        if self.class_names is not None and self.class_order is not None:
            raise ValueError(
                "source.class_names and source.class_order: the names have an order; give one of them"
            )
        return self

    @abstractmethod
    def pictures(self, split: Split) -> PictureSource:
        """Returns a split with all of its pictures.

        Raises:
            SourceError: files are missing or of something else.
        """

    def open(self, split: Split) -> PictureSource:
        source = self.pictures(split)
        return leave_out_unreadable(source, self) if self.skip_unreadable else source


def _what_it_is(content: bytes) -> str:
    """Returns why bytes are no picture."""
    if not content:
        return "the file is empty"
    if content.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in the picture's place; `git lfs pull` fetches it"
    return "no picture of a kind that Pillow knows"


class PictureSource(IndexedSource, ABC):
    """Encoded pictures, decoded to RGB when asked for; picklable.

    Attributes:
        upright: whether they are turned by their EXIF orientation.
        unreadable: keys of those that are left out, in order; empty where `source.skip_unreadable` is not set.
        order_is_guessed: whether classes are sorted by name, and timm would sort them differently.
        multi_hot: [N, V] uint8, 1 for each class that a picture has, where it may have any number; else None.
    """

    upright, can_skip = True, True
    unreadable: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        keys: Sequence[str],
        targets: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        places: np.ndarray | Sequence[Any],
        *,
        order_is_guessed: bool = False,
        multi_hot: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            places: [N, ...] where the pictures are, as the subclass reads it.
        """
        super().__init__(name, keys, targets, class_names)
        self.places, self.order_is_guessed = np.asarray(places), order_is_guessed
        self.multi_hot = multi_hot
        self._set_digest()

    def _set_digest(self) -> None:
        facts = dict(self.content_facts())
        if self.multi_hot is not None:
            facts["classes"] = digest_bytes(np.packbits(self.multi_hot, axis=1).tobytes())
        if self.unreadable:
            facts["unreadable"] = list(self.unreadable)
        self.digest = digest_source(self._keys, self._targets, facts)

    @abstractmethod
    def content_facts(self) -> Mapping[str, Any]:
        """Returns what names the contents of the pictures, the same on every machine."""

    @abstractmethod
    def stamp(self) -> Any:
        """Returns a JSON value that changes when a file here does, by size and time."""

    @property
    @abstractmethod
    def location(self) -> str:
        """Where the pictures are: sources of another place may be copies."""

    @abstractmethod
    def place_name(self, sample: int) -> str:
        """Returns where a picture is, for messages."""

    @abstractmethod
    def file_bytes(self, sample: int) -> bytes:
        """Returns an encoded picture as it is.

        Raises:
            SourceError: it cannot be read; it is named.
        """

    def decode(self, sample: int) -> np.ndarray:
        """Returns uint8 [H, W, 3].

        Raises:
            SourceError: the file is missing, or may not be read.
            Exception: of any kind; decoders meet broken bytes with all of them.
        """
        from PIL import Image as images

        content = BytesIO(self.file_bytes(sample))
        with _OPENING, warnings.catch_warnings():  # which are of the process, not of the thread
            # Pillow refuses twice as many pixels, and warns of these.
            warnings.simplefilter("error", images.DecompressionBombWarning)
            try:
                image: Image = images.open(content)
            except images.UnidentifiedImageError:  # whose message has an address in memory
                raise ValueError(_what_it_is(content.getvalue())) from None
        with image:
            return to_rgb(image, upright=self.upright)

    def image(self, sample: int) -> torch.Tensor:
        """Returns uint8 [3, H, W].

        Raises:
            SourceError: the picture cannot be decoded in full, or has more pixels than Pillow takes for sound; all
                others that cannot are named, too.
        """
        try:
            pixels = self.decode(sample)
        except SourceError:
            raise
        except Exception as error:
            raise unreadable_error(self, find_unreadable(self, sample, error)) from error
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def read_error(self, sample: int, error: OSError) -> SourceError:
        """Returns the error of a file that is missing, or may not be read."""
        reason = error.strerror or error
        return SourceError(
            f"image {self.place_name(sample)}: cannot be read: {reason}; restore it, or take it out"
        )

    def without(self, samples: Sequence[int]) -> Self:
        """Returns the source without some samples, whose keys are in its digest."""
        kept = np.ones(len(self), bool)
        kept[list(samples)] = False
        left = copy.copy(self)
        left._keys = [key for key, is_kept in zip(self._keys, kept.tolist(), strict=True) if is_kept]
        left.multi_hot = None if self.multi_hot is None else self.multi_hot[kept]
        left._targets, left.places = self._targets[kept], self.places[kept]
        left.unreadable = tuple(self._keys[sample] for sample in sorted(samples))
        left._set_digest()
        return left

    def contents_digest(self) -> str:
        """Returns a digest of all pictures' bytes; reads each of them once."""
        hashes = [xxhash.xxh3_64_intdigest(self.file_bytes(sample)) for sample in range(len(self))]
        return hashlib.sha256(np.array(hashes, "<u8").tobytes()).hexdigest()
