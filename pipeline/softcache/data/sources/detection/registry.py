"""Images with boxes by name: `scenes` and `coco`; see `DetectionSettings`."""

from __future__ import annotations

from softcache.data.sources.detection.base import BoxSource, DetectionSettings
from softcache.data.sources.detection.coco import open_coco
from softcache.data.sources.detection.synthetic import open_scenes
from softcache.data.sources.images.base import Split

__all__ = ["open_detection"]


def open_detection(settings: DetectionSettings, *, split: Split) -> BoxSource:
    """Returns a split of the images with boxes that the settings name.

    Raises:
        SourceError: files are missing, or are not what they should be.
    """
    return open_scenes(settings, split) if settings.name == "scenes" else open_coco(settings, split)
