"""What a run does differently for images, images with boxes, texts and pairs of texts; `open_data` picks by the source."""

from softcache.config.run import RunConfig
from softcache.data.sources.detection.base import DetectionSettings
from softcache.data.sources.text.source import TextSettings
from softcache.data.sources.translation.settings import TranslationSettings
from softcache.modalities.detection.data import DetectionData
from softcache.modalities.images.data import ImageData
from softcache.modalities.text.data import TextData
from softcache.modalities.translation.data import TranslationData

__all__ = ["Data", "DetectionData", "open_data"]

Data = ImageData | TextData | DetectionData | TranslationData


def open_data(config: RunConfig) -> Data:
    """Returns the data of a config; files are opened, not copied."""
    if isinstance(config.source, DetectionSettings):
        return DetectionData(config)
    if isinstance(config.source, TranslationSettings):
        return TranslationData(config)
    return TextData(config) if isinstance(config.source, TextSettings) else ImageData(config)
