"""One TOML file per run into strict, frozen tables; every table is owned by the part that it configures.

    config = load_config("configs/digits.toml", ["loss.temperature=2", "student.model=cnn"])

An unknown, missing, mistyped or out-of-range key is refused by its dotted name, with what is allowed.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, model_validator

from softcache.config.sweep import SweepSettings
from softcache.data.sources import SourceSettings
from softcache.data.sources.detection.base import DetectionSettings
from softcache.data.sources.images.encoded import BytesSettings
from softcache.data.sources.text.settings import TextSettings
from softcache.data.sources.translation.settings import TranslationSettings
from softcache.data.transforms import ViewSettings
from softcache.errors import ConfigError
from softcache.labels.sparsify import AnyLabelSettings, TopK
from softcache.losses import LOSSES, AnyLoss
from softcache.losses.detection import CellLossSettings
from softcache.models.language.generate import GenerateSettings
from softcache.reader.settings import ReaderSettings
from softcache.runtime.suggest import did_you_mean
from softcache.settings import Settings
from softcache.student import StudentSettings, TrainSettings
from softcache.student.tasks import LossSettings
from softcache.teacher.base import TeacherSettings
from softcache.teacher.capture.plan import CaptureSettings
from softcache.tools.fuse import FusionSettings

__all__ = ["RunConfig", "build_config", "load_config"]


def _modality(source: Any) -> str:
    return str(source.get("modality", "image") if isinstance(source, dict) else source.modality)


AnySource = Annotated[
    Annotated[SourceSettings, Tag("image")]
    | Annotated[TextSettings, Tag("text")]
    | Annotated[DetectionSettings, Tag("detection")]
    | Annotated[TranslationSettings, Tag("translation")],
    Discriminator(_modality),
]


class RunConfig(Settings):
    """A whole run: what is labelled, by whom, how it is kept, and what is trained on it.

    `name` names the folder under `runs/` (default: the file's stem); `cache` is where the cache is, if not in that
    folder; `train_teacher` says how `softcache train-teacher` makes the teacher where the user has none.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    cache: str | None = Field(None, min_length=1)
    source: AnySource
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
    sweep: SweepSettings = SweepSettings()

    @model_validator(mode="after")
    def _check_modality(self) -> Self:
        if isinstance(self.source, TextSettings | TranslationSettings):
            if self.views != ViewSettings():
                raise ValueError("views: a table for images; text has one view, the tokens; drop the table")
            if self.student.has_own_input:
                raise ValueError(
                    "student.source and student.views: for students of images; a text of another tokenizer is "
                    "student.tokenizer; drop the tables"
                )
            if self.labels.positions.policy == "cells":
                raise ValueError(
                    'labels.positions: "cells" chooses among the cells of a detector; of a text use "all", "every", '
                    '"random" or "entropy"'
                )
            if self.labels.num_views != 1:
                raise ValueError(f"labels.num_views: text has one view only; found {self.labels.num_views}")
        elif self.labels.positions.policy != "all" and not isinstance(self.source, DetectionSettings):
            raise ValueError(
                f"labels.positions: {self.labels.positions.policy!r} chooses among the positions of a text; an image has "
                "one row; drop the table"
            )
        elif self.loss.name == "uld":
            raise ValueError(
                "loss.name: uld compares the vocabularies of language models; use forward_kl for images"
            )
        elif self.train.target_metric is not None and self.train.target_metric > 1:
            raise ValueError(
                f"train.target_metric: an accuracy, less than or equal to 1; found {self.train.target_metric}"
            )
        return self

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if not isinstance(self.source, TranslationSettings):
            if self.generate != GenerateSettings():  # a resolved config holds every table
                raise ValueError(
                    'generate: a table for pairs of texts (source.modality = "translation"); drop it'
                )
            return self
        for key in ("tokenizer", "context"):
            if getattr(self.student, key) is not None:
                raise ValueError(
                    f"student.{key}: not for pairs of texts: student and teacher read the same tokens; drop it"
                )
        if self.loss.name == "uld":
            raise ValueError("loss.name: uld is for texts; pairs of texts have one tokenizer; use forward_kl")
        return self

    @model_validator(mode="after")
    def _check_boxes(self) -> Self:
        if not isinstance(self.source, DetectionSettings):
            return self
        fixed = LossSettings()
        for key in ("name", "tail", "standardize", "weights"):
            if getattr(self.loss, key) != getattr(fixed, key):
                raise ValueError(
                    f"loss.{key}: for images and texts; the soft loss of a detector is set by the table [detection_loss]; "
                    "drop the key"
                )
        return self

    @model_validator(mode="after")
    def _check_drawn(self) -> Self:
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
        return self.cache or str(self.root / "cache")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the config of a TOML file with `a.b=v` overrides applied.

    An override's value is read as TOML (`3`, `0.5`, `true`, `["a", "b"]`), or else taken as a string.

    Raises:
        ConfigError: the file is missing or no TOML, or a key is unknown, missing, mistyped or out of range.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"config {path}: cannot be read: {error.strerror}; see configs/ for examples"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: not valid TOML: {error}") from error
    for override in overrides:
        _apply(tables, override)
    tables.setdefault("name", path.stem)
    return build_config(tables, str(path))


def build_config(tables: dict[str, Any], where: str) -> RunConfig:
    """Returns the config that tables describe; `where` is what errors call it.

    Raises:
        ConfigError: a key is unknown, missing, mistyped or out of range.
    """
    try:
        return RunConfig.model_validate(tables)
    except ValidationError as error:
        lines = "\n  ".join(_explain(problem) for problem in error.errors())
        raise ConfigError(f"config {where}:\n  {lines}") from error


def _apply(tables: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"--set {override!r}: expected table.key=value, e.g. --set loss.temperature=2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, key = dotted.split(".")
    for parent in parents:
        tables = tables.setdefault(parent, {})
        if not isinstance(tables, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} is a value, not a table")
    tables[key] = value


def _explain(problem: Any) -> str:
    """One readable line for one of pydantic's errors."""
    loc = problem["loc"]
    # A source's kind is no key of its own.
    dotted = ".".join(
        str(part) for n, part in enumerate(loc) if not (n and part in _SOURCES and loc[n - 1] == "source")
    )
    if problem["type"] == "extra_forbidden":
        known = _keys_of(problem["loc"][:-1])
        hint = did_you_mean(str(problem["loc"][-1]), known) or f"known keys: {', '.join(known)}"
        return f"{dotted}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{dotted}: missing; it has no default"
    if problem["type"] == "value_error" and not loc:  # of the config as a whole: the message names the key
        return str(problem["ctx"]["error"])
    told = f"{dotted}: {problem['msg'].lower()}; found {problem['input']!r}"
    choices = re.findall(r"'([^']*)'", problem.get("ctx", {}).get("expected", ""))
    if problem["type"] == "literal_error" and (hint := did_you_mean(str(problem["input"]), choices)):
        return f"{told}; {hint}"
    return told


def _keys_of(parents: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for parent in parents:
        if parent in _SOURCES and model in _SOURCES.values():
            model = _SOURCES[parent]
            continue
        inside = _parts_of(model.model_fields[parent].annotation)
        model = next(kind for kind in inside if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)


def _parts_of(annotation: Any) -> list[Any]:
    """Returns an annotation and all that it is made of."""
    return [annotation] + [part for inner in getattr(annotation, "__args__", ()) for part in _parts_of(inner)]


_SOURCES: dict[Any, type[BaseModel]] = {
    "image": SourceSettings,
    "text": TextSettings,
    "bytes": BytesSettings,
    "detection": DetectionSettings,
    "translation": TranslationSettings,
}
