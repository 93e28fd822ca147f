"""What a run does differently for images and for text; `open_data` picks by the config's source."""

from pipeline.config import RunConfig
from pipeline.modalities.images import ImageData
from pipeline.modalities.texts import TextData
from pipeline.sources.text import TextSettings

__all__ = ["Data", "open_data"]

Data = ImageData | TextData


def open_data(config: RunConfig) -> Data:
    """Returns the data of a config; files are opened, not copied."""
    return TextData(config) if isinstance(config.source, TextSettings) else ImageData(config)
