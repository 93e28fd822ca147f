"""What a student is, and how it is trained: the tables [student] and [train]."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from softcache.data.pairing import PairingSettings
from softcache.data.sources.base import SourceSettings, source_table
from softcache.data.sources.images.encoded import student_source_class, student_source_classes
from softcache.data.transforms.student import StudentViewSettings
from softcache.settings import Settings

__all__ = ["StudentSettings", "TrainSettings"]


StudentSource = Annotated[
    SerializeAsAny[SourceSettings],
    source_table(student_source_class, student_source_classes),
]


class StudentSettings(Settings):
    """[student]: the architecture, and the ones that `softcache train-students` trains side by side.

    Text: `context` is what the student attends over, where that is less than source.seq_len; `tokenizer` is its own,
    where it has another one than the teacher (with loss.name = "uld").

    Images: `source` is what it reads where that is not what the teacher saw, `views` how it reduces the teacher's views,
    `pairing` which of its samples are the teacher's (`softcache.data.pairing`).
    """

    model: str = "mlp"
    context: int | None = Field(None, ge=2)
    tokenizer: str | None = None
    models: tuple[str, ...] = Field(("linear", "mlp", "cnn"), strict=False)
    source: StudentSource | None = None
    views: StudentViewSettings | None = None
    pairing: PairingSettings = PairingSettings()

    @property
    def has_own_input(self) -> bool:
        """Whether the student reads something else than the teacher saw."""
        return self.source is not None or self.views is not None

    @model_validator(mode="after")
    def _check_reads(self) -> StudentSettings:
        if self.views is not None and self.source is not None and self.source.modality != "image":
            raise ValueError(
                "views reduce images; a student of bytes reads files as they are; drop one of them"
            )
        if self.source is None and self.pairing != PairingSettings():
            raise ValueError("pairing joins a student.source with the source; there is none; drop it")
        return self


class TrainSettings(Settings):
    """[train]: the training loop. `labels` is what the student is trained on: a cache, ground truth, or an online teacher.

    `target_metric` ends the run when the accuracy (images) is at least, or the evaluation loss (text, nats) at most, this
    value. With many processes `batch_size` counts the samples of all of them, and a process that does not respond for
    `ddp_timeout_seconds` ends the run.
    """

    labels: Literal["cache", "ground_truth", "online"] = "cache"
    epochs: int = Field(20, ge=1)
    batch_size: int = Field(128, ge=1)
    eval_batch_size: int = Field(1024, ge=1)
    lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    warmup_share: float = Field(0.05, ge=0, le=1)
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu"] = "auto"
    precision: Literal["no", "bf16", "fp16"] = "no"
    accumulation_steps: int = Field(1, ge=1)
    clip_norm: float | None = Field(None, gt=0)
    checkpoint_steps: int | None = Field(None, ge=1)
    target_metric: float | None = Field(None, ge=0)
    ddp_timeout_seconds: float = Field(600, ge=1)

    @property
    def labels_id(self) -> str:
        """The name of `labels` in a run's files and folder: "hard" for ground truth, so that existing runs are found."""
        return "hard" if self.labels == "ground_truth" else self.labels

    def identity(self) -> dict[str, Any]:
        """Returns the settings that identify a run, by their names in the config.json of its folder.

        Those names are fixed: `target_metric` is `stop_at` there, and ground truth is "hard". `device`,
        `eval_batch_size` and `ddp_timeout_seconds` may differ in a rerun: they do not change the result.
        """
        train = self.model_dump(mode="json", exclude={"device", "eval_batch_size", "ddp_timeout_seconds"})
        stop_at = train.pop("target_metric")
        return train | {"labels": self.labels_id, "stop_at": stop_at}
