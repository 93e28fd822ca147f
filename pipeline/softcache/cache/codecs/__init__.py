"""Codecs: labels as named, typed columns, and back; a codec names itself and its parameters in the manifest."""

from softcache.cache.codecs.base import CODECS, AnyCodecSettings, Codec, CodecSettings, codec_from_dict
from softcache.cache.codecs.column import Column
from softcache.cache.codecs.detection import CellCodec
from softcache.cache.codecs.packed.codec import (
    COARSEST,
    DEFAULT_STEP,
    FINEST,
    HIGHEST_LEVEL,
    PackedCodec,
    PackedSettings,
    Tail,
)
from softcache.cache.codecs.plain import OpenCodec, OpenSettings
from softcache.cache.codecs.soft_labels import SoftLabelCodec
from softcache.cache.codecs.vectors import VectorCodec

__all__ = [
    "COARSEST",
    "CODECS",
    "DEFAULT_STEP",
    "FINEST",
    "HIGHEST_LEVEL",
    "AnyCodecSettings",
    "CellCodec",
    "Codec",
    "CodecSettings",
    "Column",
    "OpenCodec",
    "OpenSettings",
    "PackedCodec",
    "PackedSettings",
    "SoftLabelCodec",
    "Tail",
    "VectorCodec",
    "codec_from_dict",
]
