"""Images that have any number of classes: teachers and students with a sigmoid for each, mean average precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softcache.modalities.base import MODALITIES, Data, Score
from softcache.modalities.images import Images

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["MultiLabel"]


@MODALITIES.register("multi_label")
class MultiLabel(Images):
    """Images with independent classes, one label row per view of each; with one class, binary classification."""

    name = "multi_label"
    kind = "image"
    score = Score("map", True, "mAP", "eval_map", 100, "{:.2f}")
    more_scores = (Score("f1", True, "F1", "eval_f1", 100, "{:.2f}"),)
    unit = "; mean average precision over classes, x 100"
    has_report = False

    def open(self, config: RunConfig) -> Data:
        from softcache.modalities.multi_label.data import MultiLabelData

        return MultiLabelData(config)

    def check(self, config: RunConfig) -> None:
        from softcache.student.tasks import LossSettings

        super().check(config)
        default = LossSettings()
        for key in ("name", "tail", "standardize", "weights"):
            if getattr(config.loss, key) != getattr(default, key):
                raise ValueError(
                    f"loss.{key}: of one distribution over all classes; with a sigmoid for each the soft loss is their "
                    "binary KL; drop the key"
                )
