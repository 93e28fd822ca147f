"""The on-disk format: manifest, samples, units and their markers, codecs, arrays, storage."""

from typing import TYPE_CHECKING

from softcache.runtime.exports import lazy_exports

__all__ = ["CODECS", "Codec", "Manifest"]

if TYPE_CHECKING:
    from softcache.cache.codecs import CODECS, Codec
    from softcache.cache.manifest import Manifest

__getattr__ = lazy_exports(  # storage alone needs no compiled codec
    __name__,
    {
        "CODECS": "softcache.cache.codecs",
        "Codec": "softcache.cache.codecs",
        "Manifest": "softcache.cache.manifest",
    },
)
