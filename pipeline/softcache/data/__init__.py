"""What teacher and student see: sources, views of their samples, batches."""

from softcache.data.batch import Batch, Dataset
from softcache.data.sources.base import SOURCES, SourceSettings, open_source

__all__ = ["SOURCES", "Batch", "Dataset", "SourceSettings", "open_source"]
