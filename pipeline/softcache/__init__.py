"""softcache: run a teacher once, keep its soft labels, train any number of students from them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    "losses",
    "open_cache",
    "sparsify",
]

if TYPE_CHECKING:
    from softcache import losses
    from softcache.labels import SoftLabels, sparsify
    from softcache.reader.cache import Cache, open_cache
    from softcache.reader.dataset import SoftLabelDataset
    from softcache.reader.loader import SoftLabelLoader
    from softcache.reader.memmap import MemmapSettings
    from softcache.reader.sampler import BlockSampler
    from softcache.student.integrations.huggingface import DistillTrainer

_HOMES = {
    "BlockSampler": "softcache.reader.sampler",
    "Cache": "softcache.reader.cache",
    "DistillTrainer": "softcache.student.integrations.huggingface",
    "SoftLabelDataset": "softcache.reader.dataset",
    "SoftLabelLoader": "softcache.reader.loader",
    "SoftLabels": "softcache.labels",
    "MemmapSettings": "softcache.reader.memmap",
    "losses": "softcache.losses",
    "open_cache": "softcache.reader.cache",
    "sparsify": "softcache.labels.sparsify",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing the package stays cheap, and reading a cache needs no torch.
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'softcache' has no attribute {name!r}")
    try:
        module = import_module(home)
    except ModuleNotFoundError as error:
        from softcache.errors import missing_extra

        raise missing_extra(error, f"softcache.{name}") from error
    return module if name in ("losses", "sparsify") else getattr(module, name)
