"""Images with masks: models of semantic segmentation, views that move masks too, mean intersection over union."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softcache.modalities.base import MODALITIES, Data, Modality, Score
from softcache.modalities.images import Images, check_no_text_tables

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["Segmentation"]


@MODALITIES.register("segmentation")
class Segmentation(Modality):
    """Images with a class for each pixel, a label row per cell of a grid."""

    name = "segmentation"
    kind = "cells"
    score = Score("miou", True, "mIoU", "eval_miou", 100, "{:.2f}")
    more_scores = (Score("accuracy", True, "pixel accuracy", "eval_accuracy", 100, "{:.2f}"),)
    unit = "; mean intersection over union, x 100"

    def open(self, config: RunConfig) -> Data:
        from softcache.modalities.segmentation.data import SegmentationData

        return SegmentationData(config)

    describe_views = Images.describe_views
    reads_class_map = reads_cell_side = True

    def check(self, config: RunConfig) -> None:
        from softcache.losses import LOSSES

        check_no_text_tables(config)
        if config.views.mixes:
            raise ValueError(
                "views.mixup_alpha, views.cutmix_alpha: a pixel of a mixed image is of two; for masks drop them"
            )
        kind, weights = LOSSES.get(config.loss.name), config.loss.weights
        if (kind.needs_target or kind.weighs_truth) and config.loss.highest_alpha > 0:
            raise ValueError(
                f"loss.name: {config.loss.name} reads the class of each row, and a pixel may have none; use a loss without "
                "it, such as forward_kl"
            )
        if weights is not None and weights.needs_truth:
            raise ValueError(
                f"loss.weights.by: {weights.by} reads the class of each row, and a pixel may have none; use "
                '"teacher_entropy", or drop the table'
            )
