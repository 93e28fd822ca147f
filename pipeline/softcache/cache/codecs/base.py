"""What a codec is, the registry of codecs, and a codec from what a manifest describes.

Manifests are untrusted: every parameter is checked, and a name in a manifest imports no module.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import BeforeValidator, SerializeAsAny

from softcache.cache.codecs.column import Column, RowPlaces
from softcache.errors import ManifestError, SpecError
from softcache.labels import Sampling
from softcache.runtime.registry import Registry, variant
from softcache.settings import Settings

__all__ = ["CODECS", "AnyCodecSettings", "Codec", "CodecSettings", "codec_from_dict"]


class CodecSettings(Settings):
    """`[capture.codec]`: a codec by name; the settings that a codec reads are those of a subclass.

    Attributes:
        name: "open", "packed", or `package.module:Name`.
    """

    name: str

    def parameters(self) -> dict[str, Any]:
        """Returns the codec's parameters that the settings hold."""
        return self.model_dump(exclude={"name"})


class Codec(ABC):
    """Turns labels into named, typed columns and back; a codec and its parameters stand in the manifest.

    A subclass is a frozen dataclass of its parameters. One that is not registered has the name `package.module:Name`.

    Attributes:
        name: in manifests and in `[capture.codec]`.
        kinds: the kinds of caches whose labels it encodes.
        captures_softmax: whether `[capture.codec]` may name it for the labels of one distribution over all classes.
        captures_detections: whether `[capture.codec]` may name it for a detector's labels.
        settings: of `[capture.codec]`.
        shared: names of the objects of the cache that its labels need (`Manifest.objects`).
        num_classes, k, temperatures, stats, max_temperature, sampling: of the labels (`SoftLabels`).
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[str]]
    captures_softmax: ClassVar[bool] = True
    captures_detections: ClassVar[bool] = False
    settings: ClassVar[type[CodecSettings]] = CodecSettings
    shared: tuple[str, ...] = ()

    num_classes: int
    k: int
    temperatures: tuple[float, ...]
    stats: bool
    max_temperature: float | None
    sampling: Sampling | None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        path = f"{cls.__module__}:{cls.__qualname__}"
        if not path.startswith("softcache."):
            if "name" not in vars(cls):
                cls.name = path
            CODECS.add_custom(path, cls)

    @property
    @abstractmethod
    def columns(self) -> tuple[Column, ...]:
        """The columns of a label row."""

    @property
    def features(self) -> tuple[str, ...]:
        """Features of the format that caches of this codec name (`softcache.cache.features`), besides version 1 as it is."""
        return ()

    @property
    def row_bytes(self) -> int:
        """Bytes of a label row, before compression."""
        return sum(np.dtype(column.dtype).itemsize * math.prod(column.shape) for column in self.columns)

    @abstractmethod
    def encode(self, labels: Any) -> dict[str, np.ndarray]:
        """Returns the columns [P, ...] of NumPy labels.

        Raises:
            LabelError: the labels do not fit the codec, or hold numbers that no labels have; the first such row is named.
        """

    def unpack(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the labels' arrays by name, and any other columns unchanged; by default the columns as they are."""
        return dict(columns)

    def unpack_to(
        self, columns: Mapping[str, np.ndarray], places: RowPlaces, out: Mapping[str, np.ndarray]
    ) -> None:
        """Writes the arrays of columns [P, ...] to the rows of those of `out` [N, ...], each number looked at.

        By default what `unpack` returns, after `validate`; a subclass may be faster.

        Args:
            columns: may be in memory that is used for other columns afterwards.
            out: in C order; other names in `columns` that it has are written as well.

        Raises:
            LabelError: a number that no labels have; the first such row is named.
        """
        arrays = self.unpack(columns)
        self.validate(arrays)
        for name, values in arrays.items():
            if name in out:
                places.put(values, out[name])

    @abstractmethod
    def decode(self, columns: Mapping[str, np.ndarray]) -> Any:
        """Returns the labels of columns [P, ...]."""

    @abstractmethod
    def validate(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Checks every number of unpacked arrays [P, ...] that come from a cache.

        Raises:
            LabelError: a number that no labels have; the first such row is named.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Returns the codec's part of a manifest."""

    @classmethod
    @abstractmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Self:
        """Returns the codec that a manifest describes.

        Raises:
            KeyError, TypeError, ValueError: parameters that are missing, unknown or out of range.
        """


CODECS: Registry[type[Codec]] = Registry(
    "codec", package="softcache.cache.codecs", group="softcache.codecs", subclass_of=Codec
)


def codec_from_dict(described: Mapping[str, Any]) -> Codec:
    """Returns the codec that a manifest describes.

    A custom codec as `package.module:Name` is found only if its module has been imported.

    Raises:
        ManifestError: unknown name, or parameters out of range.
    """
    name = described.get("name")
    try:
        kind = CODECS.get(name, trusted=False) if isinstance(name, str) else None
    except SpecError:
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, Codec)):
        custom, colon, _ = str(name).partition(":")
        hint = f"import {custom} first" if colon else "upgrade softcache"
        raise ManifestError(
            f"codec.name {name!r}: unknown; this version reads: {', '.join(CODECS.names())}; {hint}"
        )
    try:
        codec = kind.from_dict(described)
        _ = codec.columns
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ManifestError(f"codec {name}: bad parameters: {error!r}; found {dict(described)}") from error
    return codec


def _table(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


AnyCodecSettings = Annotated[
    SerializeAsAny[CodecSettings],
    variant(CODECS, lambda codec: codec.settings, key="name", default="open"),
    BeforeValidator(_table),
]
"""The type of a field that holds `[capture.codec]` of any codec; a bare name stands for a table with that name."""
