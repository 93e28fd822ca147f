"""Images with boxes: detectors, views that move boxes too, mean average precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softcache.modalities.base import MODALITIES, Data, Modality, Score
from softcache.modalities.images import Images, check_no_text_tables

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["Detection"]


@MODALITIES.register("detection")
class Detection(Modality):
    """Images with boxes, a label row per kept anchor of each view."""

    name = "detection"
    kind = "cells"
    score = Score("map", True, "mAP", "eval_map", 100, "{:.1f}")
    more_scores = (Score("map50", True, "mAP50", "eval_map50", 100, "{:.1f}"),)
    unit = "; mean average precision, x 100"

    def open(self, config: RunConfig) -> Data:
        from softcache.modalities.detection.data import DetectionData

        return DetectionData(config)

    describe_views = Images.describe_views
    reads_class_map = True

    def check(self, config: RunConfig) -> None:
        from softcache.student.tasks import LossSettings

        check_no_text_tables(config)
        if config.views.mixes:
            raise ValueError(
                "views.mixup_alpha, views.cutmix_alpha: mix two images, and boxes of both would be covered in part or seen "
                "through; for a detector drop them"
            )
        default = LossSettings()
        for key in ("name", "tail", "standardize", "weights"):
            if getattr(config.loss, key) != getattr(default, key):
                raise ValueError(
                    f"loss.{key}: for images and texts; the soft loss of a detector is set by the table [detection_loss]; "
                    "drop the key"
                )
