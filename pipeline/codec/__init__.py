"""The label record as named, typed columns, and back.

A codec names itself and its parameters in the manifest, so a reader needs no configuration.

    open.py        plain columns that anybody can read
    cells.py       plain columns of a detector's cells
    packed.py      one record of bytes for each position: smaller, within a stated error
    layout.py      where in such a record everything is
    prediction.py  what the tail is expected to be, so that little is left to store
    packing.py     writing such records
    unpacking.py   reading them
    kernels.py     the compiled part of that
    columns.py     what a column is, and what every codec checks
    described.py   a codec from what a manifest says
    stored.py      what is checked of every record that is read
"""

from pipeline.codec.cells import CellCodec
from pipeline.codec.columns import Column
from pipeline.codec.described import AnyCodec, Codec, codec_from_dict
from pipeline.codec.open import OpenCodec
from pipeline.codec.packed import COARSEST, DEFAULT_STEP, FINEST, PackedCodec
from pipeline.codec.stored import check_stored

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
