"""What images and images with boxes have in common: two splits seen through views, their sizes and identity."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcache.data.transforms import Views, ViewSettings
from softcache.errors import SpecError
from softcache.hashing.digests import digest_bytes
from softcache.modalities.base import Data
from softcache.modalities.images.views import is_trained_here, log_normalization, rgb_normalization
from softcache.models.image import Normalize
from softcache.models.spec import parse_spec
from softcache.models.weights import select_device
from softcache.teacher.base import TeacherSettings
from softcache.teacher.image import ImageTeacher, load_image_teacher

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["ImageSplits"]


class ImageSplits(Data):
    """Two splits of images, seen through views."""

    def __init__(self, settings: ViewSettings) -> None:
        self.views = Views(settings)

    @cached_property
    def input_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.load([0], 0, fingerprints=False).images.shape[1:]
        return channels, height, width

    def normalize(self) -> Normalize:
        """Returns a fresh module that makes model inputs of uint8 images."""
        return Normalize(self.views.settings.mean, self.views.settings.std)

    def load_teacher(
        self, config: RunConfig, settings: TeacherSettings, kind: type[ImageTeacher]
    ) -> ImageTeacher:
        """Returns a teacher of images with its weights, on the device and dtype of [capture]."""
        return load_image_teacher(
            settings,
            num_classes=self.num_classes,
            input_shape=self.input_shape,
            normalize=self.normalize(),
            rgb=rgb_normalization(config, self.views.settings) if self.input_shape[0] == 1 else None,
            class_names=self.train.source.class_names,
            order_is_guessed=getattr(self.train.source, "order_is_guessed", False)
            and not is_trained_here(settings.weights),
            device=select_device(config.capture.device),
            dtype=config.capture.dtype,
            kind=kind,
        )

    def model_identity(self, model: str) -> dict[str, Any]:
        """Returns the digest of the file that a student of timm starts from, where its spec names one.

        Raises:
            SpecError: there is no such file.
        """
        parsed = parse_spec(model)
        place = parsed.args.get("checkpoint_path") if parsed.family == "timm" else None
        if not place:
            return {}
        file = Path(str(place)).expanduser()
        if not file.is_file():
            raise SpecError(
                f"model {model!r}: checkpoint_path: no such file {file}; expected weights of a student"
            )
        return {"checkpoint": digest_bytes(file.read_bytes())}

    def note_start(self, model: str, task: Any) -> None:
        if isinstance(normalize := getattr(task, "normalize", None), Normalize):
            log_normalization(model, normalize)

    def fresh_views(self, config: RunConfig) -> bool:
        """Returns whether the student sees augmented views, which it does where it sees the teacher's."""
        return self.replays_teacher_views(config)

    def identity(self) -> dict[str, Any]:
        """Returns what distinguishes runs on this data from others."""
        return {
            "source": self.train.source.digest,
            "views": self.views.digest,
            "evaluation": self.evaluation.source.digest,
        }
