"""Images: classifiers as teachers and students, replayed views, accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softcache.modalities.base import MODALITIES, Data, Modality, Score

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["Images", "check_no_text_tables"]


@MODALITIES.register("image")
class Images(Modality):
    """Images, one label row per view of each."""

    name = "image"
    kind = "image"
    score = Score("accuracy", True, "accuracy", "eval_accuracy", 100, "{:.2f}%", "held-out accuracy")
    has_report = True
    reads_class_map = True
    reads_image_settings = True

    def open(self, config: RunConfig) -> Data:
        from softcache.modalities.images.data import ImageData

        return ImageData(config)

    def describe_views(self, num_views: int) -> str:
        return f", {num_views} view{'s' * (num_views > 1)}"

    def check(self, config: RunConfig) -> None:
        if config.labels.positions.policy != "all":
            raise ValueError(
                f"labels.positions: {config.labels.positions.policy!r} chooses among the positions of a text; an image has "
                "one row; drop the table"
            )
        check_no_text_tables(config)
        if config.views.mixes:
            _check_mixed(config)

    def models(self, config: RunConfig) -> tuple[str, ...]:
        source = config.student.source
        if source is None or source.modality == self.name:  # the default architectures read images
            return config.student.models
        return super().models(config)


def _check_mixed(config: RunConfig) -> None:
    """Raises ValueError where the loss reads one ground-truth class per image, and [views] mixes two."""
    from softcache.losses import LOSSES

    kind, weights = LOSSES.get(config.loss.name), config.loss.weights
    if (kind.needs_target or kind.weighs_truth) and config.loss.highest_alpha > 0:
        what = f"loss.name: {config.loss.name}"
    elif weights is not None and weights.needs_truth:
        what = f"loss.weights.by: {weights.by}"
    else:
        return
    raise ValueError(
        f"{what} reads the ground-truth class, and an image of [views] with mixup_alpha or cutmix_alpha has two; use a loss "
        'without it, such as forward_kl (weights: by = "teacher_entropy"), or drop the mixing'
    )


def check_no_text_tables(config: RunConfig) -> None:
    """Raises ValueError for settings of texts in a config of images, with boxes or without."""
    from softcache.models.language.generate import GenerateSettings

    if config.loss.compares_ranks:
        raise ValueError(
            f"loss.name: {config.loss.name} compares the vocabularies of language models; use forward_kl for images"
        )
    for key in ("tokenizer", "context"):
        if getattr(config.student, key) is not None:
            raise ValueError(
                f"student.{key}: of language models; a student of source.modality = {config.source.modality!r} reads no "
                "tokens; drop it"
            )
    if config.student.lora is not None:
        raise ValueError(
            f"student.lora: adapts language models; a student of source.modality = {config.source.modality!r} is trained "
            "whole; drop the table"
        )
    if config.train.target_metric is not None and config.train.target_metric > 1:
        raise ValueError(
            f"train.target_metric: an accuracy, less than or equal to 1; found {config.train.target_metric}"
        )
    if config.generate != GenerateSettings():  # a resolved config holds every table
        raise ValueError('generate: a table for pairs of texts (source.modality = "translation"); drop it')
