"""What a student of images reads where that is not what the teacher saw: a reduced view, other images, or their bytes.

A student that reads the very images that were labeled replays the teacher's views, reduced, and view v has the label of
view v. Any other sees its plain view only, with the teacher's answer about the plain view; with `reader.num_views` it has
the answers about so many views in turn, whose mean it then learns.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from softcache.data.batch import Dataset
from softcache.data.bytes import ByteData
from softcache.data.images import ViewedSource
from softcache.data.pairing import pair_sources
from softcache.data.sources.base import Split
from softcache.data.sources.images.encoded import BytesSettings
from softcache.data.sources.images.pictures import PictureSource
from softcache.data.transforms.student import StudentViews, StudentViewSettings
from softcache.errors import ConfigError
from softcache.modalities.base import Data
from softcache.models.image import Normalize, build_model
from softcache.reader.dataset import SoftLabelDataset
from softcache.reader.paired import MatchedImages, OnlinePairedDataset
from softcache.runtime.logging import log_info
from softcache.student.tasks import ByteTask, ImageTask
from softcache.teacher.image import ImageTeacher

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["StudentImages"]


class StudentImages:
    """The training and evaluation splits of a student's own source, paired with what was labeled.

    Attributes:
        train: numbered as in the student's source.
        evaluation: the same of its held-out split.
        replays: whether its view v is the teacher's view v.
        pairing: of its training samples with the teacher's.

    Raises (from the constructor):
        SpecError, SourceError: the source cannot be read.
        AlignmentError: the samples are not paired one by one.
    """

    rows_of = None  # one label row per sample

    def __init__(self, config: RunConfig, teacher: ViewedSource) -> None:
        settings = config.student.source or config.source
        self._teacher, self._pairing_settings = teacher, config.student.pairing
        self.train: Dataset
        self.evaluation: Dataset
        if isinstance(settings, BytesSettings):
            self.train = ByteData(settings.open("train"))
            self.evaluation = ByteData(settings.open("eval"))
            self._identity: dict[str, Any] = {}
            self._normalization = None
        else:
            how, seen = config.student.views or StudentViewSettings(), teacher.views
            views = StudentViews(seen, how)
            self.train = ViewedSource(settings.open("train"), views)  # type: ignore[arg-type]
            self.evaluation = ViewedSource(settings.open("eval"), views)  # type: ignore[arg-type]
            self._identity = {"views": views.digest}
            self._normalization = how.normalization(seen)
        self._is_own = config.student.source is not None
        self.replays = self._normalization is not None and _are_same(teacher.source, self.train.source)
        self.pairing = pair_sources(teacher.source, self.train.source, config.student.pairing)
        if self.pairing.num_missing:
            log_info(
                f"student.pairing: {self.pairing.num_missing:,} of {len(teacher):,} labeled samples match none of "
                f"student.source {self.train.source.name} and are not trained on (subset = true)"
            )

    @property
    def num_classes(self) -> int:
        return self.train.source.num_classes

    @cached_property
    def input_shape(self) -> tuple[int, ...]:
        if isinstance(self.train, ByteData):
            return (max(int(data.source.lengths.max()) for data in (self.train, self.evaluation)),)
        return tuple(self.train.load([0], 0, fingerprints=False).images.shape[1:])

    def identity(self) -> dict[str, Any]:
        """Returns the identity of the data of a run."""
        return {
            "source": self.train.source.digest,
            "evaluation": self.evaluation.source.digest,
            "pairing": self.pairing.digest,
            "subset": self._pairing_settings.subset,
            "replays": self.replays,
            **self._identity,
            **self._contents,
        }

    @cached_property
    def _contents(self) -> dict[str, str]:
        """Of folders of its own, whose digest is of sizes and which no fingerprint covers; reads every file once."""
        splits = {"train": self.train, "evaluation": self.evaluation} if self._is_own else {}
        return {
            f"{split}_files": data.source.contents_digest()
            for split, data in splits.items()
            if isinstance(data.source, PictureSource)
        }

    def train_dataset(self, labeled: SoftLabelDataset) -> tuple[Any, Any]:
        """Returns the dataset of labeled samples, and which of the cache's it has (None: all)."""
        matched = labeled.for_student(MatchedImages(self.train, self.pairing, replays=self.replays))
        return matched, self.pairing.samples if self.pairing.num_missing else None

    def sample_matches(self, teacher: Data, split: Split) -> np.ndarray:
        """Returns [N] int64, the sample here for each of the teacher's samples of a split; -1: none.

        The run's pairing for the training split; held-out samples are paired by the same rule, and may lack a match.

        Raises:
            AlignmentError: the held-out samples are not the teacher's.
        """
        if split == "train":
            return self.pairing.student_of
        rule = self._pairing_settings.model_copy(update={"subset": True})
        return pair_sources(teacher.evaluation.source, self.evaluation.source, rule).student_of

    def with_teacher_images(self) -> OnlinePairedDataset:
        """Returns the training samples, each with what an online teacher sees of it."""
        return OnlinePairedDataset(self._teacher, self.train, self.pairing)

    def task(self, config: RunConfig, model: str, teacher: ImageTeacher | None) -> ImageTask:
        """Returns what a student of that spec learns; `teacher` labels its batches online."""
        build = partial(build_model, model, num_classes=self.num_classes, input_shape=self.input_shape)
        settings = self.num_classes, config.loss, teacher, config.train.label_smoothing
        if self._normalization is None:
            for key in ("image_sizes", "channels_last"):
                if key in config.train.image_keys:
                    raise ConfigError(
                        f"train.{key}: of a student that reads images; this one reads the bytes of files; drop it"
                    )
            return ByteTask(build, self.evaluation, _Whole(), *settings, max_bytes=self.input_shape[0])
        return ImageTask(build, self.evaluation, Normalize(*self._normalization), *settings)


def _are_same(one: Any, other: Any) -> bool:
    """Whether two sources have the same images; a folder's digest is of sizes, so copies of one are read."""
    if one.digest != other.digest:
        return False
    if isinstance(one, PictureSource) and isinstance(other, PictureSource) and one.location != other.location:
        return one.contents_digest() == other.contents_digest()
    return True


class _Whole(nn.Module):
    """Bytes as the whole numbers that an embedding takes."""

    def forward(self, bytes_BL: Any) -> Any:
        return bytes_BL.long()
