"""Memory-mapped views: a view of a cache, decoded once into a local file that every process of the machine maps.

    FOLDER/KEY.thaw   magic | header (JSON) | zeros up to 4096 | records | fingerprints (where samples have many rows)
    FOLDER/KEY.use    locked while the file is written (exclusive) or mapped (shared); its time is that of the last use

One record holds all columns of one row, its fields aligned, so that reading a row at random touches one or two cache
lines: a batch is one gather, and its columns are views of what was gathered. KEY is the digest of the view's content
(manifest and shards' checksums), so a stale file never has the name of a current one. A file is written under a
temporary name, flushed, and renamed, so it is complete or absent. Its checksum is compared when it is first opened after
it was written or the machine was started; a file that fails is deleted and created again from the cache.
"""

from softcache.reader.memmap.file import MemmapFile
from softcache.reader.memmap.folder import MemmapFolder, MemmapSettings, default_folder
from softcache.reader.memmap.layout import MemmapPlan, Record

__all__ = ["MemmapFile", "MemmapFolder", "MemmapPlan", "MemmapSettings", "Record", "default_folder"]
