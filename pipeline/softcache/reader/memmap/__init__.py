"""Thawed views: a view of a cache, decoded once into a local memory map that every process of the machine shares.

    FOLDER/KEY.thaw   magic | header (JSON) | zeros up to 4096 | records | fingerprints (where samples have many rows)
    FOLDER/KEY.use    locked while the file is made (alone) or used (shared); its time is that of the last use

One record holds all columns of one row, its fields aligned, so that reading a row at random touches one or two cache
lines: a batch is one gather, and its columns are views of what was gathered. KEY is the digest of the view's content
(manifest and shards' checksums), so a stale thaw is never found under the name of a new one. A file is written under
another name, flushed, and renamed: it is there whole or not at all. Its checksum is compared when it is first opened
after it was written or the machine was started; a file that fails is thrown away and made again from the cache.
"""

from softcache.reader.memmap.file import ThawedFile
from softcache.reader.memmap.folder import MemmapSettings, ThawFolder, default_folder
from softcache.reader.memmap.layout import Record, ThawedPlan

__all__ = ["MemmapSettings", "Record", "ThawFolder", "ThawedFile", "ThawedPlan", "default_folder"]
