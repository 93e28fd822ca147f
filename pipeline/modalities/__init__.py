"""What a run does differently for images, images with boxes, texts and pairs of texts; `open_data` picks by the source."""

from pipeline.config import RunConfig
from pipeline.modalities.detections import DetectionData
from pipeline.modalities.images import ImageData
from pipeline.modalities.texts import TextData
from pipeline.modalities.translations import TranslationData
from pipeline.sources.boxes import DetectionSettings
from pipeline.sources.text import TextSettings
from pipeline.sources.translation_settings import TranslationSettings

__all__ = ["Data", "DetectionData", "open_data"]

Data = ImageData | TextData | DetectionData | TranslationData


def open_data(config: RunConfig) -> Data:
    """Returns the data of a config; files are opened, not copied."""
    if isinstance(config.source, DetectionSettings):
        return DetectionData(config)
    if isinstance(config.source, TranslationSettings):
        return TranslationData(config)
    return TextData(config) if isinstance(config.source, TextSettings) else ImageData(config)
