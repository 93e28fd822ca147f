"""A frozen image classifier as a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from softcache.data.images import ImageBatch
from softcache.errors import ConfigError, LabelError
from softcache.models.image import Normalize, build_model
from softcache.models.spec import parse_spec
from softcache.models.weights import load_weights
from softcache.runtime.linear import linear_float32
from softcache.teacher.base import Dtype, Teacher, TeacherSettings

__all__ = ["ImageTeacher", "load_image_teacher"]


class ImageTeacher(Teacher):
    """A classifier of images, with its normalisation."""

    def __init__(self, model: nn.Module, *, normalize: Normalize, **common: Any) -> None:
        super().__init__(model, **common)
        self._normalize = normalize.to(self.device)
        if self.dtype != "float32":
            _keep_accumulator(self.model, self.num_classes)

    @torch.inference_mode()
    def chunks(self, batch: ImageBatch) -> Iterator[torch.Tensor]:
        yield self.logits(batch.images)

    @torch.inference_mode()
    def logits(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Returns float32 logits [B, V] on the teacher's device.

        Raises:
            LabelError: the model returns something else than [B, V].
        """
        images = images_BCHW.to(self.device, non_blocking=True)
        with self.autocast():
            logits = self.model(self._normalize(images))
        expected = (len(images), self.num_classes)
        if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != expected:
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise LabelError(
                f"teacher {self.spec}: expected logits of shape {expected} (batch, classes); found {found}; "
                "the teacher's head must have one output per class of the source"
            )
        return logits.float()


def _keep_accumulator(model: nn.Module, num_classes: int) -> None:
    """Lets the linear layers that return logits keep the float32 sums that autocast would round to half precision."""
    for module in model.modules():
        if type(module) is nn.Linear and module.out_features == num_classes:
            module.forward = partial(_linear, module)  # type: ignore[method-assign]


def _linear(module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    flat_PV = linear_float32(inputs.flatten(0, -2), module.weight, module.bias)
    return flat_PV.view(*inputs.shape[:-1], -1)


def load_image_teacher(
    settings: TeacherSettings,
    *,
    num_classes: int,
    input_shape: tuple[int, int, int],
    normalize: Normalize,
    device: torch.device,
    dtype: Dtype,
) -> ImageTeacher:
    """Returns the teacher of a config, its weights loaded.

    Raises:
        ConfigError: no weights are named, for a model that would otherwise be random.
        SpecError: the model or its weights cannot be loaded.
    """
    parsed = parse_spec(settings.model)
    pretrained = parsed.args.get("pretrained") or parsed.args.get("weights") or parsed.family == "factory"
    if settings.weights is None and not pretrained:
        raise ConfigError(
            f"teacher.weights: missing, and {settings.model} would be random; give a weights file "
            "(safetensors or a state dict), or a pretrained model such as timm:NAME?pretrained=true"
        )
    model = build_model(settings.model, num_classes=num_classes, input_shape=input_shape)
    if settings.weights is not None:
        load_weights(model, settings.weights)
    return ImageTeacher(
        model, spec=settings.model, num_classes=num_classes, normalize=normalize, device=device, dtype=dtype
    )
