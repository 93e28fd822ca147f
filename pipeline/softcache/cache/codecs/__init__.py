"""The label record as named, typed columns, and back.

A codec names itself and its parameters in the manifest, so a reader needs no configuration.

    plain.py               plain columns that anybody can read
    detection.py           plain columns of a detector's cells
    packed/codec.py        one record of bytes for each position: smaller, within a stated error
    packed/layout.py       where in such a record everything is
    packed/prediction.py   what the tail is expected to be, so that little is left to store
    packed/encode.py       writing such records
    packed/decode.py       reading them
    packed/kernels.py      the compiled part of that
    column.py              what a column is, and what every codec checks
    registry.py            a codec from what a manifest says
    validate.py            what is checked of every record that is read
"""

from softcache.cache.codecs.column import Column
from softcache.cache.codecs.detection import CellCodec
from softcache.cache.codecs.packed.codec import COARSEST, DEFAULT_STEP, FINEST, PackedCodec
from softcache.cache.codecs.plain import OpenCodec
from softcache.cache.codecs.base import AnyCodec, Codec, codec_from_dict
from softcache.cache.codecs.soft_labels import check_stored

__all__ = [
    "COARSEST",
    "DEFAULT_STEP",
    "FINEST",
    "AnyCodec",
    "CellCodec",
    "Codec",
    "Column",
    "OpenCodec",
    "PackedCodec",
    "check_stored",
    "codec_from_dict",
]
