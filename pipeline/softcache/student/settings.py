"""What a student is, and how it is trained: the tables [student] and [train]."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from softcache.data.pairing import PairingSettings
from softcache.data.sources.base import SourceSettings, source_table
from softcache.data.sources.images.encoded import student_source_class, student_source_classes
from softcache.data.transforms.student import StudentViewSettings
from softcache.models.language.lora import LoraSettings
from softcache.settings import Settings
from softcache.student.optimizers import OPTIMIZERS

__all__ = ["FsdpSettings", "StudentSettings", "TrainSettings", "drop_later_defaults"]

DEFAULT_DECAY_SHARE = 0.1


StudentSource = Annotated[
    SerializeAsAny[SourceSettings],
    source_table(student_source_class, student_source_classes),
]


class StudentSettings(Settings):
    """[student]: the architecture, and the ones that `softcache train-students` trains side by side.

    Text: `context` is what the student attends over, where that is less than source.seq_len; `tokenizer` is its own,
    where it has another one than the teacher (with loss.name = "uld"); `lora` trains adapters of a pretrained one.

    Images: `source` is what it reads where that is not what the teacher saw, `views` how it reduces the teacher's views,
    `pairing` which of its samples are the teacher's (`softcache.data.pairing`).

    Attributes:
        model: a spec, such as `cnn?width=8`, `timm:resnet18`, `hf:NAME_OR_PATH` or `package.module:factory`.
        models: the specs of `softcache train-students`.
    """

    model: str = "mlp"
    context: int | None = Field(None, ge=2)
    tokenizer: str | None = None
    lora: LoraSettings | None = None
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


class FsdpSettings(Settings):
    """[train.fsdp]: how a student is cut over processes; nothing here changes what it ends with.

    `blocks` are the classes of modules whose weights are gathered at once, one block at a time; empty: those that
    transformers names. With `reshard_after_forward` a block's weights are given up after its forward pass and gathered again
    for the backward pass.
    Each process builds the whole student before it is cut, at most `build_at_once` processes of a machine at a time.
    """

    blocks: tuple[str, ...] = Field((), strict=False)
    reshard_after_forward: bool = True
    build_at_once: int | None = Field(None, ge=1)


class TrainSettings(Settings):
    """[train]: the training loop. `labels` is what the student is trained on: a cache, ground truth, or an online teacher.

    `target_metric` ends the run when the accuracy (images) is at least, or the evaluation loss (text, nats) at most, this
    value. With many processes `batch_size` counts the samples of all of them, and a process that does not respond for
    `ddp_timeout_seconds` ends the run.

    `optimizer` is a name of `softcache.student.optimizers` or `package.module:factory`; `optimizer_args` are its further
    arguments. `weight_decay_exempt` takes norms, biases and embeddings out of the weight decay; None: of language models.

    After a linear warm-up over `warmup_share` of the steps, `schedule` lowers the learning rate to `min_lr_share` of `lr`:
    over all steps that are left (`cosine`, `linear`), or linearly over the last `decay_share` of all steps (0.1 where it is
    None; `warmup_stable_decay`).

    Every `log_every_steps` the loss since the last time, the learning rate and the throughput are logged. Every
    `eval_every_steps` the student is evaluated within the epoch, too; the best epoch is chosen among epochs.

    `compile` runs the student (of a language model what is below its head) through `torch.compile`.

    With `ema_decay` the running average of the weights (`softcache.student.averaging`) is what is scored and saved.

    Of images: `label_smoothing` is the share of the ground truth that goes to all classes alike, in the cross-entropy.
    `layer_decay` multiplies the learning rate once for each layer below the head (of timm's models). `image_sizes` are the
    heights that training images are resized to, in as many equal parts of the run; scores are of images as they are.
    `channels_last` stores weights and activations so that channels are next to one another.

    `parallel` is what several processes do: each holds the whole student (`ddp`), or a share of a language model (`fsdp`,
    with [train.fsdp]; `softcache.student.sharding`). There `precision = "bf16"` gathers weights in bfloat16, computes with
    those and sums gradients in float32.

    Attributes:
        epochs: passes over the training samples, each with one view.
        eval_batch_size: samples of a batch of the evaluation.
        weight_decay: decoupled where the optimizer has it so (AdamW).
        seed: of weights, order and dropout.
        device: "auto": the accelerator that is there.
        accumulation_steps: parts of a batch that are computed one after the other before a step.
        clip_norm: the largest norm of the gradient; none: it is left as it is.
        checkpoint_steps: steps between checkpoints within an epoch; none: one at the end of each epoch.
    """

    labels: Literal["cache", "ground_truth", "online"] = "cache"
    epochs: int = Field(20, ge=1)
    batch_size: int = Field(128, ge=1)
    eval_batch_size: int = Field(1024, ge=1)
    lr: float = Field(2e-3, gt=0)
    optimizer: str = "adamw"
    optimizer_args: dict[str, Any] = Field(default_factory=dict)
    weight_decay: float = Field(1e-4, ge=0)
    weight_decay_exempt: bool | None = None
    schedule: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = "cosine"
    warmup_share: float = Field(0.05, ge=0, le=1)
    min_lr_share: float = Field(0.0, ge=0, le=1)
    decay_share: float | None = Field(None, gt=0, le=1)
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu"] = "auto"
    precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = False
    ema_decay: float | None = Field(None, gt=0, lt=1)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    layer_decay: float | None = Field(None, gt=0, lt=1)
    image_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field((), strict=False)
    channels_last: bool = False
    accumulation_steps: int = Field(1, ge=1)
    clip_norm: float | None = Field(None, gt=0)
    checkpoint_steps: int | None = Field(None, ge=1)
    log_every_steps: int | None = Field(100, ge=1)
    eval_every_steps: int | None = Field(None, ge=1)
    target_metric: float | None = Field(None, ge=0)
    ddp_timeout_seconds: float = Field(600, ge=1)
    parallel: Literal["ddp", "fsdp"] = "ddp"
    fsdp: FsdpSettings | None = None

    @field_validator("optimizer")
    @classmethod
    def _check_optimizer(cls, name: str) -> str:
        OPTIMIZERS.get(name)
        return name

    @model_validator(mode="after")
    def _check_parallel(self) -> TrainSettings:
        if self.parallel == "ddp":
            if self.fsdp is not None:
                raise ValueError('fsdp: read by parallel = "fsdp"; found parallel = "ddp"; drop one of them')
            return self
        refused = {
            'precision = "fp16"': (self.precision == "fp16", 'use precision = "bf16"'),
            "compile": (self.compile, "it was never tried on a student that is cut; drop it"),
            "ema_decay": (
                self.ema_decay is not None,
                "a student that is cut has no copy that is averaged; drop it",
            ),
            'optimizer = "adamw_8bit"': (
                self.optimizer == "adamw_8bit",
                'its 8-bit blocks do not go through weights that are cut; use "adamw", whose states are cut, too',
            ),
        }
        for name, (found, advice) in refused.items():
            if found:
                raise ValueError(f'{name}: does not go with parallel = "fsdp"; {advice}')
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> TrainSettings:
        if self.decay_share is not None and self.schedule != "warmup_stable_decay":
            raise ValueError(
                f'decay_share: read by schedule = "warmup_stable_decay"; found schedule = "{self.schedule}", which has no '
                "part without decay; drop it"
            )
        if self.min_lr_share and self.schedule == "constant":
            raise ValueError(
                'min_lr_share: schedule = "constant" stays at lr; drop it, or choose another schedule'
            )
        if self.schedule == "warmup_stable_decay" and self.warmup_share + self._decay_share > 1:
            raise ValueError(
                f"decay_share: warm-up and decay are {self.warmup_share:g} and {self._decay_share:g} of the steps; expected "
                "at most 1 together; lower one"
            )
        if taken := sorted({"lr", "weight_decay", "params"} & set(self.optimizer_args)):
            raise ValueError(
                f"optimizer_args.{taken[0]}: not an argument here; set train.lr, train.weight_decay"
            )
        return self

    @property
    def _decay_share(self) -> float:
        return DEFAULT_DECAY_SHARE if self.decay_share is None else self.decay_share

    def lr_factor(self, step: int, num_steps: int) -> float:
        """Returns what `lr` is multiplied by at a step of so many, counted from 0."""
        warmup = max(1, round(self.warmup_share * num_steps))
        if step < warmup:
            return (step + 1) / warmup
        share = (step - warmup) / max(1, num_steps - warmup)
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "cosine":
            height = 0.5 * (1 + math.cos(math.pi * share))
        elif self.schedule == "linear":
            height = 1 - share
        else:
            decay = max(1, round(self._decay_share * num_steps))
            height = min(1.0, (num_steps - step) / decay)
        return self.min_lr_share + (1 - self.min_lr_share) * height

    def with_default_exemption(self, exempt: bool) -> TrainSettings:
        """Returns these settings with `weight_decay_exempt` as given where they leave it open."""
        if self.weight_decay_exempt is not None:
            return self
        return self.model_copy(update={"weight_decay_exempt": exempt})

    @property
    def image_keys(self) -> list[str]:
        """The keys that are set, of those that only students of images read."""
        return [key for key in IMAGE_SETTINGS if getattr(self, key) != type(self).model_fields[key].default]

    @property
    def labels_id(self) -> str:
        """The name of `labels` in a run's files and folder: "hard" for ground truth, so that existing runs are found."""
        return "hard" if self.labels == "ground_truth" else self.labels

    def identity(self) -> dict[str, Any]:
        """Returns the settings that identify a run, by their names in the config.json of its folder.

        Those names are fixed: `target_metric` is `stop_at` there, and ground truth is "hard". those of
        NON_IDENTITY_SETTINGS may differ in a rerun: they do not change the result. Keys that a run may be older than are
        there where they differ from what it did.
        """
        train = drop_later_defaults(self.model_dump(mode="json", exclude=NON_IDENTITY_SETTINGS))
        stop_at = train.pop("target_metric")
        return train | {"labels": self.labels_id, "stop_at": stop_at}


NON_IDENTITY_SETTINGS = {
    *("device", "eval_batch_size", "ddp_timeout_seconds", "log_every_steps", "eval_every_steps", "fsdp"),
}
"""Keys of [train] that do not change what a run ends with."""

IMAGE_SETTINGS = ("label_smoothing", "layer_decay", "image_sizes", "channels_last")
"""Keys of [train] that students of images read."""

LATER_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "optimizer": ("adamw",),
    "optimizer_args": ({},),
    "weight_decay_exempt": (None, False),
    "schedule": ("cosine",),
    "min_lr_share": (0.0,),
    "decay_share": (None, DEFAULT_DECAY_SHARE),
    "compile": (False,),
    "ema_decay": (None,),
    "label_smoothing": (0.0,),
    "layer_decay": (None,),
    "image_sizes": ((), []),
    "channels_last": (False,),
    "parallel": ("ddp",),
    "fsdp": (None,),
}
"""Keys of [train] that folders of runs may be older than, and the values with which a run is what it was before."""


def drop_later_defaults(train: dict[str, Any]) -> dict[str, Any]:
    """Returns a dumped [train] without the keys of LATER_DEFAULTS that change nothing, as older runs and sweeps have it."""
    exempt = train["weight_decay_exempt"] and train["weight_decay"] > 0
    train = train | {"weight_decay_exempt": exempt or None}
    return {key: value for key, value in train.items() if value not in LATER_DEFAULTS.get(key, ())}
