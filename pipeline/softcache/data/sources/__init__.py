"""Random-access datasets with stable keys; `open_source` makes one from a config's [source] table."""

from softcache.data.sources.base import SOURCES, SourceSettings, open_source, source_settings

__all__ = ["SOURCES", "SourceSettings", "open_source", "source_settings"]
