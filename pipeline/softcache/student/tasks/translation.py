"""Translation: the loss of a text's tokens, and at the end chrF and BLEU of what the student writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from softcache.errors import SpecError
from softcache.models.language import PairTokens, split
from softcache.models.language.generate import translate
from softcache.models.language.generate_settings import GenerateSettings
from softcache.student.tasks.base import shard_batches
from softcache.student.tasks.inference import TokenServing
from softcache.student.tasks.language_modeling import TokenTask
from softcache.student.tasks.token_student import TokenStudent
from softcache.student.tasks.translation_scores import corpus_scores

__all__ = ["TranslationTask"]


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
        said = []
        for number, text in zip(mine, self.decode([one.tokens for one in found]), strict=True):
            language, reference = self.references(self.evaluation.source.key(number))
            said.append((language, text, reference))
        return corpus_scores(gather_object(said) if accelerator.num_processes > 1 else said)

    def serve(self, model: nn.Module) -> TokenServing:
        """Refuses: a search is no graph, and what one writes is not compared by logits.

        Raises:
            SpecError: always.
        """
        raise SpecError(
            "export: a translation model writes by a search, which exported files are not compared by; expected "
            "a classifier or a causal language model; use the run's hf/ folder"
        )
