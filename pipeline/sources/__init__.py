"""Random-access datasets with stable keys; `open_source` makes one from a config's [source] table."""

from pipeline.sources.vision import Source, SourceSettings, open_source

__all__ = ["Source", "SourceSettings", "open_source"]
