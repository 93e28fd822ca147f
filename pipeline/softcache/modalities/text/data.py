"""A run on text: causal language models as teachers and students, label rows per token, held-out loss."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from softcache.data.sources.text.saved_tokenizer import check_tokenizer_is_saved, save_with_tokenizer
from softcache.data.sources.text.settings import TextSettings
from softcache.data.sources.text.tokenizer import accept_tokenizer, load_tokenizer
from softcache.data.tokens import TokenData
from softcache.errors import ConfigError, IdentityError
from softcache.hashing.digests import digest_weights
from softcache.modalities.base import Data
from softcache.modalities.text.sampling import check_sampling
from softcache.models.language import build_language_model, tokenizer_of
from softcache.models.language.lora import trainable
from softcache.models.language.placement import WholeState
from softcache.models.weights import select_device
from softcache.reader.cache import Cache
from softcache.reader.paired import MatchedDocuments
from softcache.student.tasks import TokenTask
from softcache.teacher.base import Teacher, TeacherSettings
from softcache.teacher.engine_language import load_engine_teacher
from softcache.teacher.language import LanguageTeacher, load_language_teacher

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["TextData", "TokenSplits", "check_start"]


class TokenSplits(Data):
    """Two splits of tokens.

    Attributes:
        tokenizer: the transformers tokenizer that made them.
    """

    train: TokenData
    evaluation: TokenData
    tokenizer: Any

    @property
    def num_classes(self) -> int:
        return self.train.source.vocab_size

    def decode_tokens(self, *numbers: int) -> str:
        """Returns the text of tokens that follow one another."""
        return str(self.tokenizer.decode([int(number) for number in numbers]))

    def class_name(self, number: int) -> str:
        """Returns a token's text as reports show it, quoted where it has blanks around it or is not printable."""
        text = self.decode_tokens(number)
        return repr(text) if text.strip() != text or not text.isprintable() else text

    @cached_property
    def rows_of(self) -> np.ndarray:
        return self.train.source.num_rows()

    def identity(self) -> dict[str, Any]:
        """Returns what distinguishes runs on this data from others."""
        return {
            "source": self.train.source.digest,
            "tokenizer": self.train.source.tokenizer_digest,
            "evaluation": self.evaluation.source.digest,
        }


class TextData(TokenSplits):
    """The training and held-out splits of a config's text, tokenised."""

    def __init__(self, config: RunConfig) -> None:
        assert isinstance(config.source, TextSettings)
        self._settings = config.source
        across = config.source.cross_documents
        self.train = TokenData(config.source.open("train"), cross_documents=across)
        self.evaluation = TokenData(config.source.open("eval"), cross_documents=across)

    def identity(self) -> dict[str, Any]:
        """Returns what distinguishes runs on this data from others."""
        return super().identity() | {"cross_documents": self._settings.cross_documents}

    def student_data(self, config: RunConfig) -> TextData:
        """Returns the same text in the student's own tokens, where its tokenizer is another one."""
        name = config.student.tokenizer
        if not config.loss.compares_ranks:
            if name is not None:
                raise ConfigError(
                    f"student.tokenizer: {name!r} with loss.name = {config.loss.name!r}, which compares class by class; "
                    'set loss.name = "uld", or drop student.tokenizer'
                )
            return self
        if name is None:
            raise ConfigError(
                'student.tokenizer: missing; loss.name = "uld" is for a student with another tokenizer'
            )
        if self._settings.has_tokens:
            raise ConfigError(
                f"student.tokenizer: {name!r} with documents that are token ids of {self._settings.tokenizer!r}, which "
                'it cannot read; give texts as [source], or a student of this tokenizer with another loss.name than "uld"'
            )
        source = self._settings.model_copy(update={"tokenizer": name})
        return TextData(config.model_copy(update={"source": source}))

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self._settings)

    def train_dataset(self, config: RunConfig, cache: Cache) -> tuple[Any, np.ndarray | None]:
        """Returns the student's dataset of labeled samples, and which of them it has (None: all)."""
        labeled, chosen = super().train_dataset(config, cache)
        if not config.loss.compares_ranks:
            return labeled, chosen
        matched = MatchedDocuments(self.train, self.student_data(config).train, cache)
        return labeled.for_student(matched), matched.samples

    def save_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer of the text, and into the generation config of a model that is there its special tokens."""
        save_with_tokenizer(folder, load_tokenizer(self._settings), bos=self._settings.bos)

    def teacher(self, config: RunConfig, settings: TeacherSettings) -> Teacher:
        """Returns the teacher with its weights, on the device and dtype of [capture]."""
        self._check_tokenizer("teacher.model", settings.model)
        load = load_language_teacher if settings.engine.name == "transformers" else load_engine_teacher
        return load(
            settings,
            vocab_size=self.num_classes,
            seq_len=self._settings.seq_len,
            chunk_positions=config.capture.chunk_positions,
            cross_documents=self._settings.cross_documents,
            device=select_device(config.capture.device),
            dtype=config.capture.dtype,
        )

    def task(self, config: RunConfig, model: str, teacher: Teacher | None = None) -> TokenTask:
        """Returns what a student of that spec learns; `teacher` labels its batches online."""
        assert teacher is None or isinstance(teacher, LanguageTeacher)
        if (student := self.student_data(config)) is not self:
            if teacher is not None:
                raise ConfigError(
                    f'teacher {teacher.spec}: cannot label a student\'s batches online (train.labels = "online"), '
                    f"whose tokens are those of student.tokenizer {config.student.tokenizer!r}; train from a cache"
                )
            plain = config.student.model_copy(update={"tokenizer": None})
            task = student.task(
                config.model_copy(
                    update={"student": plain, "loss": config.loss.model_copy(update={"name": "forward_kl"})}
                ),
                model,
            )
            return replace(task, loss_settings=config.loss)
        self._check_tokenizer("student.model", model)
        if self._settings.bos != "auto":
            check_tokenizer_is_saved(self.tokenizer, self._settings.bos)
        context = min(config.student.context or self._settings.seq_len, self._settings.seq_len)

        def build() -> Any:
            student = build_language_model(model, vocab_size=self.num_classes, context=context)
            if config.loss.reads_rollouts:
                check_start(config.source, model, student)
                # Of a shorter context than the policy's, a student is another one in each window.
                if getattr(config.source, "manifest", None) is None and context == self._settings.seq_len:
                    check_sampling(self.train, config.loss, model, student)
            return trainable(student, model, config.student.lora)

        return TokenTask(
            build,
            self.evaluation,
            config.loss,
            context,
            self._settings.cross_documents,
            self.save_tokenizer,
            teacher,
        )

    def _check_tokenizer(self, key: str, spec: str) -> None:
        """Raises unless a pretrained model's own tokenizer is the one that made the tokens.

        Raises:
            IdentityError: it is another one.
        """
        tokenizer = tokenizer_of(spec)
        if tokenizer is not None:
            accept_tokenizer(tokenizer, self.train.source, of=f"{key} {spec}")


def check_start(source: Any, spec: str, student: Any) -> None:
    """Raises unless a student of rollouts starts as the policy that sampled them, where that is known.

    Raises:
        IdentityError: its weights are others.
    """
    manifest = getattr(source, "manifest", None)
    if manifest is None or source.other_policy:
        return
    policy, found = manifest["policy"], digest_weights(WholeState(student))
    if policy["weights_digest"] != found:
        raise IdentityError(
            f"source {source.path}: sampled by {policy['spec']}, weights {policy['weights_digest'][:12]}…; student {spec} "
            f"starts with weights {found[:12]}…, and would not sample these tokens; name that policy as student.model, "
            "sample rollouts of this student, or set source.other_policy = true to weigh them by importance"
        )
