"""The tables of a run, strict and frozen; every table belongs to the package that it configures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, PrivateAttr, SerializeAsAny, model_validator

from softcache.config.sweep import SweepSettings
from softcache.data.sources.base import SourceSettings, built_in_sources, source_table
from softcache.data.transforms import ViewSettings
from softcache.errors import ConfigError
from softcache.labels.sparsify import AnyLabelSettings, TopK
from softcache.losses import LOSSES, AnyLoss
from softcache.losses.detection import CellLossSettings
from softcache.modalities.base import MODALITIES, modality_of
from softcache.models.language.generate import GenerateSettings
from softcache.models.language.sample import RolloutSettings
from softcache.reader.parts import is_pattern
from softcache.reader.settings import ReaderSettings
from softcache.settings import Settings
from softcache.student import StudentSettings, TrainSettings
from softcache.student.tasks import LossSettings
from softcache.teacher.base import TeacherSettings
from softcache.teacher.capture.plan import CaptureSettings
from softcache.tools.fuse import FusionSettings

__all__ = ["RunConfig"]


def _source_class(modality: str, name: str) -> type[SourceSettings]:
    return MODALITIES.get(modality)().source_class(name)


class RunConfig(Settings):
    """A whole run: what is labeled, by whom, how it is kept, and what is trained on it.

    Attributes:
        name: of the folder under `runs/`; without it the file's stem.
        cache: where the cache is, if not in that folder; for students it may be a list or a pattern of several, which are
            read as one. Of a corpus in parts it has the {part}, for teachers, too.
        source: which data.
        views: what the teacher sees of an image.
        teacher: what labels the data; not needed to train from a cache.
        labels: what is kept of each row of logits.
        capture: how the teacher is run and how its labels are laid out.
        student: the architecture.
        loss: what the student minimizes.
        detection_loss: the same, of object detectors.
        train: the training loop of a student.
        train_teacher: the same, of `softcache train-teacher`, for users without a teacher.
        reader: how a student reads the cache.
        fusion: how `softcache fuse` makes one cache of several teachers.
        generate: how sequences are searched.
        rollouts: how responses are sampled from a policy.
        sweep: the search of `softcache sweep`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    cache: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] | None = None
    source: Annotated[SerializeAsAny[SourceSettings], source_table(_source_class, built_in_sources)]
    views: ViewSettings = ViewSettings()
    teacher: TeacherSettings | None = None
    train_teacher: TrainSettings | None = None
    labels: AnyLabelSettings = TopK()
    capture: CaptureSettings = CaptureSettings()
    student: StudentSettings = StudentSettings()
    loss: AnyLoss = LossSettings()
    detection_loss: CellLossSettings = CellLossSettings()
    train: TrainSettings = TrainSettings()
    reader: ReaderSettings = ReaderSettings()
    fusion: FusionSettings | None = None
    generate: GenerateSettings = GenerateSettings()
    rollouts: RolloutSettings = RolloutSettings()
    sweep: SweepSettings = SweepSettings()

    _overrides: frozenset[str] | None = PrivateAttr(None)

    @property
    def overrides(self) -> frozenset[str] | None:
        """The keys that were set over those of a file (`--set`); None where the config was read from no file."""
        return self._overrides

    def with_overrides(self, overrides: Iterable[str] | None) -> Self:
        """Returns the config with other `overrides`."""
        config = self.model_copy()
        config._overrides = None if overrides is None else frozenset(overrides)
        return config

    def insists_on(self, key: str) -> bool:
        """Whether a set key of [labels] or [capture] is asked of a cache that is there already.

        A file describes a capture, and its students may have another cache; what is set for one run, or in a config that
        was read from no file, is asked of that run.
        """
        set_keys = [f"{name}." for name in self._overrides or ()]
        wanted = f"{key}."
        return self._overrides is None or any(k.startswith(wanted) or wanted.startswith(k) for k in set_keys)

    @model_validator(mode="after")
    def _check_modality(self) -> Self:
        modality = modality_of(self)
        modality.check(self)
        engine = "transformers" if self.teacher is None else self.teacher.engine.name
        if engine != "transformers" and not modality.runs_engines:
            raise ValueError(
                f"teacher.engine: {engine!r} runs causal language models; found source.modality = "
                f"{self.source.modality!r}; drop it"
            )
        for table, train in (("train", self.train), ("train_teacher", self.train_teacher)):
            if train is not None and not modality.reads_image_settings and (found := train.image_keys):
                raise ValueError(
                    f"{table}.{found[0]}: of image classifiers; found source.modality = {self.source.modality!r}; drop it"
                )
        if (
            self.teacher is not None
            and self.teacher.test_time_augmentation
            and not modality.reads_image_settings
        ):
            raise ValueError(
                f"teacher.test_time_augmentation: of image classifiers; found source.modality = {modality.name!r}; drop it"
            )
        if self.labels.positions.stride is not None and not modality.reads_cell_side:
            raise ValueError(
                f"labels.positions.stride: of images with masks; found source.modality = {modality.name!r}; drop it"
            )
        if self.teacher is not None and not modality.reads_class_map:
            for key in self.teacher.model_dump(
                include={"class_map", "check_class_order"}, exclude_defaults=True
            ):
                raise ValueError(
                    f"teacher.{key}: of models of images; source.modality = {modality.name!r} has none; drop it"
                )
        return self

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        self.check_loss()
        return self

    def check_loss(self) -> None:
        """Raises ValueError where the loss cannot be computed from labels as [labels] describes them."""
        if (
            self.labels.sampling is not None
            and self.loss.highest_alpha > 0
            and not LOSSES.get(self.loss.name).linear
        ):
            able = ", ".join(sorted(name for name, kind in LOSSES.items() if kind.linear))
            raise ValueError(
                f"loss.name: {self.loss.name} cannot be estimated from classes drawn at random (labels.policy = "
                f'"{self.labels.policy}"); use one of {able}, or a policy that draws none'
            )

    @model_validator(mode="after")
    def _check_states(self) -> Self:
        if self.labels.of_states and (fault := self.loss.state_fault()) is not None:
            raise ValueError(f'loss.{fault} (labels.policy = "hidden")')
        return self

    @model_validator(mode="after")
    def _check_rollouts(self) -> Self:
        if self.loss.reads_rollouts and not self.source.has_rollouts:
            raise ValueError(
                f"loss.name: {self.loss.name} is of tokens that a policy sampled; found source.name = {self.source.name!r}; "
                'use source.name = "rollouts", or another loss'
            )
        return self

    @model_validator(mode="after")
    def _check_curriculum(self) -> Self:
        if self.loss.curriculum is not None and self.train.precision == "fp16":
            raise ValueError(
                'loss.curriculum: learns the temperature by the loss\'s gradient, which train.precision = "fp16" scales '
                'and now and then drops; use "bf16" or "no"'
            )
        return self

    @property
    def root(self) -> Path:
        return Path("runs") / self.name

    @property
    def cache_url(self) -> str:
        """Where the cache is.

        Raises:
            ConfigError: there are several places, and one is expected.
        """
        found = self.cache_places
        if isinstance(found, list) or is_pattern(found):
            what = (
                f"a list of {len(found)} places"
                if isinstance(found, list)
                else f"{found}, a pattern of places"
            )
            raise ConfigError(
                f"cache: {what}, which students read as one; expected one here: give --cache"
                + (" and source.part" if self.source.part_numbers else "")
            )
        return found

    @property
    def cache_places(self) -> str | list[str]:
        """Where students read: one place, or several or a pattern of them, which are read as one.

        Raises:
            ConfigError: there is a {part} in it, but the source has no parts.
        """
        found = self.cache or str(self.root / "cache")
        if not isinstance(found, str) or "{part" not in found:
            return found
        if not (numbers := self.source.part_numbers):
            raise ConfigError(
                f"cache: {found} is of a corpus in parts; source.name is {self.source.name!r}: drop the {{part}}"
            )
        try:
            places = [found.format(part=number) for number in numbers]
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"cache: {found}: {error!r}; expected {{part}} or {{part:03d}}, and {{{{ for a brace"
            ) from error
        return places if len(places) > 1 else places[0]

    def parts(self) -> list[RunConfig]:
        """Returns the config of each part of a corpus whose caches have a {part} in their place; else this one alone."""
        if not isinstance(self.cache, str) or "{part" not in self.cache:
            return [self]
        return [
            self.model_copy(update={"source": self.source.model_copy(update={"part": number})})
            for number in self.source.part_numbers
        ]
