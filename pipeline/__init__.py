"""softcache: run a teacher once, keep its soft labels, train any number of students from them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "DistillTrainer",
    "SoftLabelDataset",
    "SoftLabels",
    "__version__",
    "losses",
    "open_cache",
    "sparsify",
]

if TYPE_CHECKING:
    from pipeline import losses, sparsify
    from pipeline.cache import Cache, open_cache
    from pipeline.labels import SoftLabels
    from pipeline.reader import SoftLabelDataset
    from pipeline.trainer import DistillTrainer

_HOMES = {
    "Cache": "pipeline.cache",
    "DistillTrainer": "pipeline.trainer",
    "SoftLabelDataset": "pipeline.reader",
    "SoftLabels": "pipeline.labels",
    "open_cache": "pipeline.cache",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing the package stays cheap, and reading a cache needs no torch.
    if name in ("losses", "sparsify"):
        return import_module(f"pipeline.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
