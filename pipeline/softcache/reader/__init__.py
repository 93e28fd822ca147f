"""The reading half: a cache opened, joined with its source, in an order, as batches."""

from typing import TYPE_CHECKING

from softcache.runtime.exports import lazy_exports

__all__ = ["BlockSampler", "Cache", "SoftLabelDataset", "SoftLabelLoader", "open_cache"]

if TYPE_CHECKING:
    from softcache.reader.cache import Cache
    from softcache.reader.dataset import SoftLabelDataset
    from softcache.reader.loader import SoftLabelLoader
    from softcache.reader.open import open_cache
    from softcache.reader.sampler import BlockSampler

__getattr__ = lazy_exports(  # reading a cache imports no torch
    __name__,
    {
        "BlockSampler": "softcache.reader.sampler",
        "Cache": "softcache.reader.cache",
        "SoftLabelDataset": "softcache.reader.dataset",
        "SoftLabelLoader": "softcache.reader.loader",
        "open_cache": "softcache.reader.open",
    },
)
