"""Images with boxes by name: `scenes` and `coco`; see `DetectionSettings`."""

from __future__ import annotations

from pipeline.sources.boxes import BoxSource, DetectionSettings
from pipeline.sources.coco import open_coco
from pipeline.sources.image_source import Split
from pipeline.sources.scenes import open_scenes

__all__ = ["open_detection"]


def open_detection(settings: DetectionSettings, *, split: Split) -> BoxSource:
    """Returns a split of the images with boxes that the settings name.

    Raises:
        SourceError: files are missing, or are not what they should be.
    """
    return open_scenes(settings, split) if settings.name == "scenes" else open_coco(settings, split)
