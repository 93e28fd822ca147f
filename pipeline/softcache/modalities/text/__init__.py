"""Texts: causal language models, label rows per token, loss of the evaluation split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softcache.modalities.base import MODALITIES, Data, Modality, Score

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["Text"]


@MODALITIES.register("text")
class Text(Modality):
    """Texts, a label row per token.

    Attributes:
        generates: whether its students write texts, which are scored: the table [generate].
    """

    name = "text"
    kind = "tokens"
    score = Score(
        *("eval_loss", False, "held-out loss (nats)", "eval_loss", 1, "{:.4f}"),
        "held-out loss, nats per token",
    )
    more_scores = (Score("perplexity", False, "perplexity", "perplexity", 1, "{:.1f}"),)
    unit = "; held-out loss in nats per token"
    has_report = True
    imports_responses = True
    weight_decay_exempt = True
    runs_engines = True
    generates = False

    def open(self, config: RunConfig) -> Data:
        from softcache.modalities.text.data import TextData

        return TextData(config)

    def check(self, config: RunConfig) -> None:
        from softcache.data.transforms import ViewSettings
        from softcache.models.language.generate import GenerateSettings

        if config.views != ViewSettings():
            raise ValueError("views: a table for images; text has one view, the tokens; drop the table")
        if config.student.has_own_input:
            raise ValueError(
                "student.source and student.views: for students of images; a text of another tokenizer is "
                "student.tokenizer; drop the tables"
            )
        if config.labels.positions.policy == "cells":
            raise ValueError(
                'labels.positions: "cells" chooses among the cells of a detector; of a text use "all", "every", '
                '"random" or "entropy"'
            )
        if config.labels.num_views != 1:
            raise ValueError(f"labels.num_views: text has one view only; found {config.labels.num_views}")
        if (
            not self.generates and config.generate != GenerateSettings()
        ):  # a resolved config holds every table
            raise ValueError(
                'generate: a table for pairs of texts (source.modality = "translation"); drop it'
            )
