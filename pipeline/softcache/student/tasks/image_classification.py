"""Classification, of images or of their bytes: cross-entropy and the soft loss on logits, accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import nn

from softcache.data.batch import Dataset
from softcache.data.images import ImageBatch
from softcache.errors import SpecError
from softcache.labels.sparsify import dense
from softcache.losses import LossMix, LossSettings, cross_entropy, distillation_loss, row_weights
from softcache.models.image import explain_shapes
from softcache.student.tasks.base import OnlineTeacher, PlainTask, RowMeans, shard_batches
from softcache.student.tasks.inference import ByteServing, ImageServing

__all__ = ["ByteTask", "ImageTask"]


@dataclass(frozen=True)
class ImageTask(PlainTask):
    """Classification of images, or of what else a student reads of them.

    Attributes:
        build_model: makes the student.
        normalize: makes model inputs of a batch's images.
        num_classes: V.
        teacher: labels each batch during training (`labels = "online"`); None otherwise.
        label_smoothing: of the cross-entropy with the ground truth.
    """

    build_model: Callable[[], nn.Module]
    evaluation: Dataset
    normalize: nn.Module
    num_classes: int
    loss_settings: LossSettings
    teacher: OnlineTeacher | None = None
    label_smoothing: float = 0.0

    metric = "accuracy"
    larger_is_better = True

    def loss(
        self,
        model: nn.Module,
        batch: ImageBatch,
        *,
        label_share: float | None = None,
        mix: LossMix | None = None,
        size: int | None = None,
    ) -> torch.Tensor:
        labels, how = batch.labels, self.loss_settings
        if self.teacher is not None:
            seen = batch if batch.seen is None else replace(batch, images=batch.seen)
            labels = dense(torch.cat(list(self.teacher.chunks(seen)))).to_torch(batch.images.device)
        temperature, alpha = mix or (how.temperature, how.alpha)
        logits_PV, weights_P = self.logits(model, batch.images, size=size), None
        if how.weights is not None and labels is not None:
            weights_P = row_weights(
                how.weights,
                labels,
                batch.targets,
                student_log_probs_P=-cross_entropy(logits_PV.detach(), batch.targets),
                num_student_classes=self.num_classes,
            )
        return distillation_loss(
            logits_PV,
            labels,
            batch.targets,
            temperature=temperature,
            alpha=alpha if labels is not None else 0.0,
            loss=how.loss,
            soft_weights=weights_P,
            label_smoothing=self.label_smoothing,
        )

    def logits(self, model: nn.Module, images_BCHW: torch.Tensor, *, size: int | None = None) -> torch.Tensor:
        """Returns a student's logits [B, V] of uint8 images.

        Args:
            size: the height that they are resized to, with the width in proportion (bilinear, antialiased); None: as is.

        Raises:
            SpecError: it returns something else.
        """
        inputs = self.normalize.to(images_BCHW.device)(images_BCHW)
        if size is not None and size != inputs.shape[-2]:
            width = max(1, round(size * inputs.shape[-1] / inputs.shape[-2]))
            inputs = nn.functional.interpolate(inputs, (size, width), mode="bilinear", antialias=True)
        with explain_shapes(inputs):
            logits = model(inputs)
        expected = (len(images_BCHW), self.num_classes)
        if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != expected:
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            way_out = f"pass --student with {self.num_classes} outputs, or rebuild the cache for its classes"
            if any(name.startswith("aux_logits") for name in getattr(logits, "_fields", ())):
                way_out = "leave out its auxiliary heads: add aux_logits=false to its spec"
            raise SpecError(
                f"student: expected logits of shape {expected} (batch, classes of the labels); found {found}; {way_out}"
            )
        return logits

    @torch.no_grad()
    def evaluate(self, model: nn.Module, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
        device = accelerator.device
        # Not through DistributedDataParallel, whose ranks would have to call it equally often.
        model = accelerator.unwrap_model(model)
        means = RowMeans(accelerator)
        for samples in shard_batches(len(self.evaluation), batch_size, accelerator):
            batch = self.evaluation.load(samples, 0, fingerprints=False).to(device)
            logits_PV = self.logits(model, batch.images).float()
            means.update(logits_PV.argmax(-1) == batch.targets, cross_entropy(logits_PV, batch.targets))
        accuracy, loss = means.compute(2)
        return {"accuracy": accuracy, "eval_loss": loss}

    def serve(self, model: nn.Module) -> ImageServing:
        """Returns a student or teacher of this task as a function of images; the model is moved to the CPU."""
        shape = self.evaluation.load([0], 0, fingerprints=False).images.shape[1:]
        return ImageServing(model, self.normalize, tuple(shape))


@dataclass(frozen=True)
class ByteTask(ImageTask):
    """Classification of files.

    Attributes:
        max_bytes: the longest file of both splits.
    """

    max_bytes: int = 1

    def serve(self, model: nn.Module) -> ByteServing:
        """Returns a student of this task as a function of padded bytes; the model is moved to the CPU."""
        return ByteServing(model, self.normalize, self.max_bytes)
