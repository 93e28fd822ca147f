"""softcache: run a teacher once, keep its soft labels, train any number of students from them."""

from typing import TYPE_CHECKING

from softcache.runtime.exports import lazy_exports

__version__ = "0.1.0"

__all__ = [
    "BlockSampler",
    "Cache",
    "DistillTrainer",
    "MemmapSettings",
    "SoftLabelDataset",
    "SoftLabelLoader",
    "SoftLabels",
    "__version__",
    "browse",
    "losses",
    "open_cache",
    "sparsify",
]

if TYPE_CHECKING:
    from softcache import losses
    from softcache.labels import SoftLabels, sparsify
    from softcache.reader.cache import Cache
    from softcache.reader.dataset import SoftLabelDataset
    from softcache.reader.loader import SoftLabelLoader
    from softcache.reader.memmap import MemmapSettings
    from softcache.reader.open import open_cache
    from softcache.reader.sampler import BlockSampler
    from softcache.student.integrations.huggingface import DistillTrainer
    from softcache.tools.browse.browser import browse

_HOMES = {
    "BlockSampler": "softcache.reader.sampler",
    "Cache": "softcache.reader.cache",
    "DistillTrainer": "softcache.student.integrations.huggingface",
    "MemmapSettings": "softcache.reader.memmap",
    "SoftLabelDataset": "softcache.reader.dataset",
    "SoftLabelLoader": "softcache.reader.loader",
    "SoftLabels": "softcache.labels",
    "browse": "softcache.tools.browse.browser",
    "losses": "softcache.losses",
    "open_cache": "softcache.reader.open",
    "sparsify": "softcache.labels.sparsify",
}

__getattr__ = lazy_exports(__name__, _HOMES)
