"""Pairs of texts: encoder-decoder models, label rows per token of the target."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softcache.modalities.base import MODALITIES, Data
from softcache.modalities.text import Text

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["Translation"]


@MODALITIES.register("translation")
class Translation(Text):
    """Pairs of texts, a label row per token of the target."""

    name = "translation"
    generates = True
    imports_responses = False
    runs_engines = False

    def open(self, config: RunConfig) -> Data:
        from softcache.modalities.translation.data import TranslationData

        return TranslationData(config)

    def check(self, config: RunConfig) -> None:
        super().check(config)
        for key in ("tokenizer", "context"):
            if getattr(config.student, key) is not None:
                raise ValueError(
                    f"student.{key}: not for pairs of texts: student and teacher read the same tokens; drop it"
                )
        if config.loss.compares_ranks:
            raise ValueError(
                f"loss.name: {config.loss.name} is for texts; pairs of texts have one tokenizer; use forward_kl"
            )
