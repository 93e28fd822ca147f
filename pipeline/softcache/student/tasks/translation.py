"""Translation: the loss of a text's tokens, and at the end chrF and BLEU of what the student writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from softcache.errors import MissingExtraError, SpecError
from softcache.models.language import PairTokens, split
from softcache.models.language.generate import GenerateSettings, translate
from softcache.student.tasks.base import shard_batches
from softcache.student.tasks.inference import TokenServing
from softcache.student.tasks.language_modeling import TokenTask
from softcache.student.tasks.token_student import TokenStudent

__all__ = ["TranslationTask", "corpus_scores"]


@dataclass(frozen=True)
class TranslationTask(TokenTask):
    """Next-token prediction on the target side, and a search at the end.

    Attributes:
        tokens: of the tokenizer.
        max_tokens: of a target, its end included.
        decode: gives texts of tokens.
        references: (language, text) of a held-out sample's key.
        generate: how to search.
    """

    tokens: PairTokens = field(default_factory=lambda: PairTokens(0, 0, 1))
    max_tokens: int = 64
    decode: Callable[[Sequence[Any]], list[str]] = lambda tokens: []
    references: Callable[[str], tuple[str, str]] = lambda key: ("", "")
    generate: GenerateSettings = field(default_factory=GenerateSettings)

    @torch.no_grad()
    def finish(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Returns chrF and BLEU per language, of what all processes wrote together."""
        if not self.generate.score_beams:
            return {}
        student = accelerator.unwrap_model(model)
        assert isinstance(student, TokenStudent)
        mine = [number for share in shard_batches(len(self.evaluation), 64, accelerator) for number in share]
        found = translate(
            student.model.eval(),
            split(student.model),
            self.evaluation,
            np.array(mine, np.int64),
            tokens=self.tokens,
            max_tokens=self.max_tokens,
            beams=self.generate.score_beams,
            length_penalty=self.generate.length_penalty,
            batch_size=self.generate.batch_size,
        )
        translations = []
        for number, text in zip(mine, self.decode([one.tokens for one in found]), strict=True):
            language, reference = self.references(self.evaluation.source.key(number))
            translations.append((language, text, reference))
        return corpus_scores(gather_object(translations) if accelerator.num_processes > 1 else translations)

    def serve(self, model: nn.Module) -> TokenServing:
        """Refuses: a search is no graph, and what one writes is not compared by logits.

        Raises:
            SpecError: always.
        """
        raise SpecError(
            "export: a translation model writes by a search, which exported files are not compared by; expected "
            "a classifier or a causal language model; use the run's hf/ folder"
        )


def corpus_scores(translations: Iterable[tuple[str, str, str]]) -> dict[str, float]:
    """Returns `chrf_LANG` and `bleu_LANG` (0 to 100) of each language, and their means over languages, `chrf` and `bleu`.

    Args:
        translations: (language, hypothesis, reference) of each pair.

    Raises:
        MissingExtraError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise MissingExtraError(
            f"chrF and BLEU need sacrebleu ({error}); pip install 'softcache[translation]', or set generate.score_beams = 0"
        ) from error
    by_language: dict[str, tuple[list[str], list[str]]] = {}
    for language, text, reference in translations:
        texts, references = by_language.setdefault(language, ([], []))
        texts.append(text)
        references.append(reference)
    scores: dict[str, float] = {}
    for name, metric in (("chrf", CHRF()), ("bleu", BLEU())):
        values = {
            language: metric.corpus_score(texts, [references]).score
            for language, (texts, references) in sorted(by_language.items())
        }
        scores[name] = sum(values.values()) / max(1, len(values))
        scores |= {f"{name}_{language}": value for language, value in values.items() if language}
    return scores
