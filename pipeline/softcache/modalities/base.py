"""What a modality is: images, texts, images with boxes, pairs of texts, or the user's own.

A modality is a subclass of `Modality`, which names the kind of its labels and the score of its students, and a subclass
of `Data`, which opens the two splits and makes teachers and tasks. `source.modality` finds it by its registered name, as
`package.module:Audio` of the user's own, or by an entry point of the group `softcache.modalities`. The first class needs no
torch: commands ask it for the score alone. What needs torch is imported by `open`.

    @MODALITIES.register("audio")
    class Audio(Modality):
        name, kind, score = "audio", "image", Score(...)

        def open(self, config): return AudioData(config)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, get_args

import numpy as np

from softcache.errors import ConfigError
from softcache.labels import LabelKind
from softcache.runtime.registry import Registry

if TYPE_CHECKING:
    from softcache.config.run import RunConfig
    from softcache.data.sources.base import SourceSettings, Split
    from softcache.reader.cache import Cache
    from softcache.teacher.base import Teacher, TeacherSettings

__all__ = [
    "MODALITIES",
    "Data",
    "Modality",
    "Score",
    "modality_of",
    "percent",
]


class Score(NamedTuple):
    """What runs from a cache are compared by.

    Attributes:
        metric: its name in a run's metrics.
        larger_is_better: whether a larger value is the better one.
        title: its name in tables.
        of_teacher: its name in the manifest's report of the teacher.
        scale: tables show the score and its standard deviation times this.
        form: the format string of the scaled value.
        axis: its name on the axes of a report.
    """

    metric: str
    larger_is_better: bool
    title: str
    of_teacher: str
    scale: float
    form: str
    axis: str = ""

    def format(self, value: float | None) -> str:
        """Returns a value as tables show it.

        >>> Score("accuracy", True, "accuracy", "eval_accuracy", 100, "{:.2f}%").format(0.98765)
        '98.77%'
        """
        return "-" if value is None or value != value else self.form.format(self.scale * value)

    def order(self, value: float | None) -> tuple[bool, float]:
        """Returns what sorts values, the best first; those of which there are none, None and NaN, last.

        >>> sorted([0.2, float("nan"), 0.7], key=Score("accuracy", True, "accuracy", "eval_accuracy", 100, "{:.2f}%").order)
        [0.7, 0.2, nan]
        """
        if value is None or value != value:
            return True, 0.0
        return False, -value if self.larger_is_better else value

    def format_std(self, value: float | None) -> str:
        """Returns a standard deviation as tables show it, in points where values are percentages."""
        return "-" if value is None else f"{self.scale * value:.4f}"

    @property
    def std_title(self) -> str:
        return "std" if self.scale == 1 else "std (points)"


def percent(share: float | None) -> str:
    """Returns a share as tables show it.

    >>> percent(0.98765)
    '98.77%'
    """
    return "-" if share is None else f"{100 * share:.2f}%"


class Data(ABC):
    """The two splits of a run's data, and the teachers and students that are made for them.

    A subclass sets `train` and `evaluation` and defines `teacher` and `task`; the rest is for students that read what the
    teacher saw, with one label row per sample.

    Attributes:
        train, evaluation: a `softcache.data.batch.Dataset` each.
    """

    train: Any
    evaluation: Any

    @property
    def rows_of(self) -> np.ndarray | None:
        """[N] label rows of each training sample; None where every sample has the same number."""
        return None

    @property
    def num_classes(self) -> int:
        return int(self.train.source.num_classes)

    def identity(self) -> dict[str, Any]:
        """Returns what distinguishes runs on this data from others."""
        return {"source": self.train.source.digest, "evaluation": self.evaluation.source.digest}

    def loss_identity(self, config: RunConfig) -> dict[str, Any]:
        """Returns what distinguishes runs with this loss on soft labels from others."""
        return {"loss": config.loss.identity()}

    def model_identity(self, model: str) -> dict[str, Any]:
        """Returns what distinguishes students of a spec beyond the spec: files that it names."""
        return {}

    def student_data(self, config: RunConfig) -> Any:
        """Returns what the student reads: this, or its own source or tokens.

        Raises:
            ConfigError: the config has the student read something else, which this data has no pairing for.
        """
        if config.student.has_own_input:
            raise ConfigError(
                "student.source and student.views: for students of images; a student of source.modality = "
                f"{config.source.modality!r} reads what the teacher saw; drop the tables"
            )
        return self

    def replays_teacher_views(self, config: RunConfig) -> bool:
        """Returns whether the student sees every view that the teacher saw; else it has its plain view only."""
        return True

    def note_start(self, model: str, task: Any) -> None:  # noqa: B027
        """Logs what should be known before a model is trained on these data."""

    def fresh_views(self, config: RunConfig) -> bool:
        """Returns whether a student without a cache sees another view in every epoch."""
        return False

    def train_dataset(self, config: RunConfig, cache: Cache) -> tuple[Any, np.ndarray | None]:
        """Returns the student's dataset of labeled samples, and the numbers of those that it has (None: all)."""
        from softcache.reader.dataset import SoftLabelDataset

        return SoftLabelDataset(self.train, cache, **config.reader.fingerprint_checks), None

    def check_student(self, model: str, cache: Cache) -> None:  # noqa: B027  # most students can
        """Raises IdentityError where a student of that spec cannot have the cache's labels."""

    def class_name(self, number: int) -> str:
        """Returns the name of a class as reports show it."""
        return str(self.train.source.class_names[number])

    def sample_matches(self, teacher: Data, split: Split) -> np.ndarray | None:
        """Returns [N] int64, the sample here for each of the teacher's samples of a split; -1: none. None: the same samples.

        Raises:
            AlignmentError: samples match no other, or several.
        """
        return None

    def unlabeled_dataset(self, config: RunConfig) -> Any:
        """Returns the student's samples without labels."""
        return self.student_data(config).train

    @abstractmethod
    def teacher(self, config: RunConfig, settings: TeacherSettings) -> Teacher:
        """Returns the teacher with its weights, on the device and dtype of [capture]."""

    @abstractmethod
    def task(self, config: RunConfig, model: str, teacher: Teacher | None = None) -> Any:
        """Returns the task of a student of that spec; `teacher` labels its batches online."""


class Modality(ABC):
    """One kind of data; stateless. A subclass defines `kind`, `score` and `open`.

    Attributes:
        name: the first part of the names of its sources, `NAME/SOURCE`.
        kind: of its caches' labels, in the manifest: "image" for one row per sample, "tokens" for a row per token,
            "cells" for a row per kept anchor, or per cell of a mask.
        score: what its students are compared by.
        unit: what the title of a table of students adds; "" for nothing.
        more_scores: further columns of that table.
        has_report: whether `softcache report` and `export` show its students.
        imports_responses: whether `softcache import` makes labels of a server's answers to its samples.
        weight_decay_exempt: whether norms, biases and embeddings of its students have no weight decay where
            train.weight_decay_exempt does not give it.
        runs_engines: whether a serving engine can run its teachers (`teacher.engine`).
        reads_image_settings: whether [train] may have the keys of image classifiers.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[LabelKind]
    score: ClassVar[Score]
    unit: ClassVar[str] = ""
    more_scores: ClassVar[tuple[Score, ...]] = ()
    has_report: ClassVar[bool] = False
    imports_responses: ClassVar[bool] = False
    weight_decay_exempt: ClassVar[bool] = False
    runs_engines: ClassVar[bool] = False
    reads_image_settings: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        kind, score = getattr(cls, "kind", None), getattr(cls, "score", None)
        if kind not in get_args(LabelKind) or not isinstance(score, Score) or cls.open is Modality.open:
            raise ConfigError(
                f"modality {cls.__module__}:{cls.__qualname__}: expected kind ({', '.join(get_args(LabelKind))}), score (a "
                f"softcache.modalities.Score) and a method open; found kind {kind!r}, score {score!r}"
                f"{' and no open' if cls.open is Modality.open else ''}"
            )

    def source_class(self, name: str) -> type[SourceSettings]:
        """Returns the settings class of the source of that name."""
        from softcache.data.sources.base import source_class

        return source_class(self.name, name)

    @abstractmethod
    def open(self, config: RunConfig) -> Data:
        """Returns the data of a config; files are opened, not copied."""

    def describe_views(self, num_views: int) -> str:
        """Returns what the name of a cache's row in a table has for so many views."""
        return ""

    reads_class_map = False
    """Whether its teachers may have other outputs than the source has classes: `teacher.class_map`."""
    reads_cell_side = False
    """Whether its rows are cells of so many pixels: `labels.positions.stride`."""

    def check(self, config: RunConfig) -> None:  # noqa: B027  # not every modality has something to check
        """Checks the tables of a config against each other.

        Raises:
            ValueError: two of them do not go together; the message names the key.
        """

    def models(self, config: RunConfig) -> tuple[str, ...]:
        """Returns the students that `softcache students` trains: student.models where the config has it."""
        student = config.student
        return student.models if "models" in student.model_fields_set else (student.model,)


MODALITIES: Registry[type[Modality]] = Registry(
    "modality",
    package="softcache.modalities",
    group="softcache.modalities",
    error=ConfigError,
    subclass_of=Modality,
)


def modality_of(config: RunConfig) -> Modality:
    """Returns the modality of a config's source."""
    return MODALITIES.get(config.source.modality)()
