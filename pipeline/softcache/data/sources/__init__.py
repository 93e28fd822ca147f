"""Random-access datasets with stable keys; `open_source` makes one from a config's [source] table."""

from softcache.data.sources.images.registry import Source, SourceSettings, open_source

__all__ = ["Source", "SourceSettings", "open_source"]
