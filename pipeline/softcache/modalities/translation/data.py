"""A run on pairs of texts: encoder-decoder models as teachers and students, label rows per token of the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from softcache.data.sources.text.settings import Split
from softcache.data.sources.text.tokenizer import digest_tokenizer
from softcache.data.sources.translation.settings import TranslationSettings
from softcache.data.sources.translation.source import load_pair_tokenizer, load_pairs
from softcache.data.tokens import TokenData
from softcache.errors import IdentityError
from softcache.modalities.text.data import TokenSplits
from softcache.models.language import PairTokens, build_translation_model, tokenizer_of
from softcache.models.language.lora import trainable
from softcache.models.weights import select_device
from softcache.student.tasks import TranslationTask
from softcache.teacher.base import Teacher, TeacherSettings
from softcache.teacher.language import LanguageTeacher, load_language_teacher

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["TranslationData"]


class TranslationData(TokenSplits):
    """The training and held-out pairs of a config, tokenised."""

    def __init__(self, config: RunConfig) -> None:
        assert isinstance(config.source, TranslationSettings)
        self._settings = config.source
        self.train = TokenData(config.source.open("train"))
        self.evaluation = TokenData(config.source.open("eval"))
        self._tokenizer = load_pair_tokenizer(config.source)
        self.tokenizer = self._tokenizer.tokenizer
        pad, end = self._tokenizer.pad, self._tokenizer.end
        self.tokens = PairTokens(pad=pad, start=pad, end=end)
        self.max_tokens = config.source.max_tokens
        self._pairs: dict[str, Mapping[str, Any]] = {}

    def pairs_by_key(self, split: Split) -> Mapping[str, Any]:
        """Returns the pairs of a split by their keys, in order, without those that are too long."""
        if split not in self._pairs:
            data = self.train if split == "train" else self.evaluation
            pairs = {pair.key: pair for pair in load_pairs(self._settings, split).pairs}
            self._pairs[split] = {key: pairs[key] for key in list(data.source.keys())}
        return self._pairs[split]

    def decode(self, tokens: Sequence[Any]) -> list[str]:
        """Returns the texts of target sides."""
        return self._tokenizer.decode(tokens)

    def save_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer as transformers loads it."""
        self._tokenizer.save(folder)

    def teacher(self, config: RunConfig, settings: TeacherSettings) -> Teacher:
        """Returns the teacher with its weights, on the device and dtype of [capture]."""
        return load_language_teacher(
            settings,
            vocab_size=self.num_classes,
            seq_len=self.max_tokens + 1,  # the decoder is given the start token, too
            chunk_positions=config.capture.chunk_positions,
            cross_documents=False,
            device=select_device(config.capture.device),
            dtype=config.capture.dtype,
            build=partial(self._build, "teacher.model"),
        )

    def task(self, config: RunConfig, model: str, teacher: Teacher | None = None) -> TranslationTask:
        """Returns what a student of that spec learns; `teacher` labels its batches online."""
        assert teacher is None or isinstance(teacher, LanguageTeacher)

        def reference(key: str) -> tuple[str, str]:
            pair = self.pairs_by_key("eval")[key]
            return pair.language, pair.target

        return TranslationTask(
            lambda: trainable(
                self._build("student.model", model, vocab_size=self.num_classes, context=self.max_tokens + 1),
                model,
                config.student.lora,
            ),
            self.evaluation,
            config.loss,
            self.train.source.seq_len,
            save_tokenizer=self.save_tokenizer,
            teacher=teacher,
            tokens=self.tokens,
            max_tokens=self.max_tokens,
            decode=self.decode,
            references=reference,
            generate=config.generate,
        )

    def _build(self, key: str, spec: str, *, vocab_size: int, context: int) -> nn.Module:
        """Returns the model of a spec, if its own tokenizer is the one that made the tokens.

        Raises:
            SpecError: it cannot be built, or has no encoder and decoder.
            IdentityError: its tokenizer is another one.
        """
        tokenizer = tokenizer_of(spec)
        expected = self.train.source.tokenizer_digest
        if tokenizer is not None and (found := digest_tokenizer(tokenizer)) != expected:
            raise IdentityError(
                f"{key} {spec}: its tokenizer (digest {found[:12]}…, {len(tokenizer)} tokens) is not that of the source "
                f"(digest {expected[:12]}…, {vocab_size} tokens): a label of token i would be read as another token; set "
                "source.tokenizer to the model's"
            )
        return build_translation_model(spec, vocab_size=vocab_size, context=context, tokens=self.tokens)
