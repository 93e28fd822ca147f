"""softcache: run a teacher once, keep its soft labels, train any number of students from them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "BlockSampler",
    "Cache",
    "DistillTrainer",
    "SoftLabelDataset",
    "SoftLabelLoader",
    "SoftLabels",
    "ThawSettings",
    "__version__",
    "losses",
    "open_cache",
    "sparsify",
]

if TYPE_CHECKING:
    from pipeline import losses, sparsify
    from pipeline.cache import Cache, open_cache
    from pipeline.labels import SoftLabels
    from pipeline.loader import SoftLabelLoader
    from pipeline.reader import SoftLabelDataset
    from pipeline.samplers import BlockSampler
    from pipeline.thaw import ThawSettings
    from pipeline.trainer import DistillTrainer

_HOMES = {
    "BlockSampler": "pipeline.samplers",
    "Cache": "pipeline.cache",
    "DistillTrainer": "pipeline.trainer",
    "SoftLabelDataset": "pipeline.reader",
    "SoftLabelLoader": "pipeline.loader",
    "SoftLabels": "pipeline.labels",
    "ThawSettings": "pipeline.thaw",
    "losses": "pipeline.losses",
    "open_cache": "pipeline.cache",
    "sparsify": "pipeline.sparsify",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing the package stays cheap, and reading a cache needs no torch.
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    try:
        module = import_module(home)
    except ModuleNotFoundError as error:
        from pipeline.errors import missing_extra

        raise missing_extra(error, f"pipeline.{name}") from error
    return module if name in ("losses", "sparsify") else getattr(module, name)
