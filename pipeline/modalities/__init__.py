"""What a run does differently for images, for text and for images with boxes; `open_data` picks by the config's source."""

from pipeline.config import RunConfig
from pipeline.modalities.detections import DetectionData
from pipeline.modalities.images import ImageData
from pipeline.modalities.texts import TextData
from pipeline.sources.boxes import DetectionSettings
from pipeline.sources.text import TextSettings

__all__ = ["Data", "open_data"]

Data = ImageData | TextData | DetectionData


def open_data(config: RunConfig) -> Data:
    """Returns the data of a config; files are opened, not copied."""
    if isinstance(config.source, DetectionSettings):
        return DetectionData(config)
    return TextData(config) if isinstance(config.source, TextSettings) else ImageData(config)
