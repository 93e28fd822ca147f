"""A frozen image classifier as a teacher."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from softcache.data.images import ImageBatch
from softcache.errors import ConfigError, LabelError
from softcache.hashing.digests import digest_json
from softcache.models.hugging_face import hf_scheme, is_multi_label, num_hf_outputs
from softcache.models.image import GrayAsRgb, Normalize, build_model, is_about_shapes
from softcache.models.preprocessing import is_pretrained
from softcache.models.spec import ModelSpec, parse_spec
from softcache.models.timm_config import timm_config
from softcache.models.weight_files import load_weights
from softcache.runtime.linear import linear_float32
from softcache.teacher.base import Dtype, Teacher, TeacherSettings
from softcache.teacher.class_map import check_class_order, output_names, read_class_map

__all__ = ["ImageTeacher", "check_repeatable", "load_image_teacher"]


class ImageTeacher(Teacher):
    """A classifier of images, with its normalisation.

    Attributes:
        has_sigmoids: whether its outputs are independent of each other.
        build: makes the model of a spec.
    """

    has_sigmoids: ClassVar[bool] = False
    has_named_outputs = True
    build: ClassVar[Callable[..., nn.Module]] = staticmethod(build_model)

    def __init__(
        self,
        model: nn.Module,
        *,
        normalize: nn.Module,
        class_map: tuple[int, ...] | None = None,
        num_outputs: int | None = None,
        flips: bool = False,
        **common: Any,
    ) -> None:
        """
        Args:
            class_map: the output of each class; None: they are the same.
            num_outputs: of the model; None: as many as classes.
            flips: whether the probabilities are the mean of those of an image and of its mirror image.
        """
        super().__init__(model, **common)
        self._normalize = normalize.to(self.device)
        self._class_map, self._num_outputs = class_map, num_outputs or self.num_classes
        self._flips = flips
        self._outputs_V = None if class_map is None else torch.tensor(class_map, device=self.device)
        if self.dtype != "float32":
            _keep_accumulator(self.model, self._num_outputs)

    def identity(self) -> dict[str, dict[str, Any]]:
        found = super().identity()
        if self._class_map is not None:
            found["teacher"]["class_map"] = digest_json(list(self._class_map))
        if self._flips:
            found["teacher"]["test_time_augmentation"] = "flip"
        return found

    @torch.inference_mode()
    def chunks(self, batch: ImageBatch) -> Iterator[torch.Tensor]:
        yield self.logits(batch.images)

    @torch.inference_mode()
    def logits(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Returns float32 logits [B, V] on the teacher's device.

        Raises:
            LabelError: the model returns something else than [B, V].
        """
        images = self._normalize(images_BCHW.to(self.device, non_blocking=True))
        logits_BV = self._logits(images)
        return self.mean_logits(logits_BV, self._logits(images.flip(-1))) if self._flips else logits_BV

    def mean_logits(self, one_BV: torch.Tensor, other_BV: torch.Tensor) -> torch.Tensor:
        """Returns logits of the mean of two distributions: log((p + q) / 2)."""
        return torch.logaddexp(one_BV.log_softmax(-1), other_BV.log_softmax(-1)) - math.log(2)

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        try:
            with self.autocast():
                found = self.model(images)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            way_out = f"raised at {frame.filename}:{frame.lineno}; the model has to take such a batch"
            if is_about_shapes(error):
                way_out = "check views.size and views.transform"
            elif self.dtype != "float32" and self.dtype in str(error).lower().replace("half", "float16"):
                way_out = f'it does not run in {self.dtype}; set capture.dtype = "float32"'
            raise LabelError(
                f"teacher {self.spec}: images of {tuple(images.shape)} (batch, channels, height, width): "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; {way_out}"
            ) from error
        logits = self._checked(found, images)
        return logits.float() if self._outputs_V is None else logits[:, self._outputs_V].float()

    def _checked(self, logits: Any, images: torch.Tensor) -> torch.Tensor:
        """Returns what the model gave for images, whose shape is that of logits.

        Raises:
            LabelError: it is not.
        """
        expected = (len(images), self._num_outputs)
        if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != expected:
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise LabelError(
                f"teacher {self.spec}: expected logits of shape {expected} (batch, classes); found {found}; "
                "the teacher's head must have one output per class of the source, or teacher.class_map choose among them"
            )
        return logits


def _keep_accumulator(model: nn.Module, num_classes: int) -> None:
    """Lets the linear layers that return logits keep the float32 sums that autocast would round to half precision; a 1x1
    convolution is one of every pixel."""
    for module in model.modules():
        if type(module) is nn.Linear and module.out_features == num_classes:
            module.forward = partial(_linear, module)  # type: ignore[method-assign]
        if (
            type(module) is nn.Conv2d
            and (module.out_channels, module.kernel_size, module.groups) == (num_classes, (1, 1), 1)
            and (module.stride, module.padding) == ((1, 1), (0, 0))
        ):
            module.forward = partial(_pointwise, module)  # type: ignore[method-assign]


def _linear(module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    flat_PV = linear_float32(inputs.flatten(0, -2), module.weight, module.bias)
    return flat_PV.view(*inputs.shape[:-1], -1)


def _pointwise(module: nn.Conv2d, inputs: torch.Tensor) -> torch.Tensor:
    flat_PV = linear_float32(inputs.movedim(1, -1).flatten(0, -2), module.weight.flatten(1), module.bias)
    return flat_PV.view(len(inputs), *inputs.shape[2:], -1).movedim(-1, 1)


def load_image_teacher(
    settings: TeacherSettings,
    *,
    num_classes: int,
    input_shape: tuple[int, int, int],
    normalize: nn.Module,
    rgb: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    class_names: Sequence[str] = (),
    order_is_guessed: bool = False,
    device: torch.device,
    dtype: Dtype,
    kind: type[ImageTeacher] = ImageTeacher,
) -> ImageTeacher:
    """Returns the teacher of a config, its weights loaded.

    Args:
        rgb: mean and std of the three channels that its weights saw, in which it is shown gray images; None: it takes images
            as they are.
        class_names: [V] of the source.
        order_is_guessed: the source has sorted its classes by name, and the teacher was not trained on it by softcache.
        kind: what its outputs are.

    Raises:
        ConfigError: no weights are named, for a model that would otherwise be random; its pretrained head has other classes;
            `teacher.class_map` does not fit.
        SpecError: the model or its weights cannot be loaded.
    """
    parsed, scheme = parse_spec(settings.model), hf_scheme(parse_spec(settings.model))
    input_shape = input_shape if rgb is None else (3, *input_shape[1:])
    has_file = parsed.family == "timm" and bool(parsed.args.get("checkpoint_path"))
    pretrained = is_pretrained(parsed) or (parsed.family == "factory" and not scheme)
    if settings.weights is None and not pretrained:
        raise ConfigError(
            f"teacher.weights: missing, and {settings.model} would be random; give a weights file "
            "(safetensors or a state dict), or a pretrained model such as timm:NAME?pretrained=true"
        )
    if scheme == "hf-zero-shot":
        for key in ("class_map", "weights"):
            if getattr(settings, key) is not None:
                raise ConfigError(
                    f"teacher.{key}: {settings.model} makes an output of each class name with the weights of its folder; "
                    "drop it"
                )
    if settings.class_map is None and settings.weights is None and not has_file:
        _check_pretrained_head(parsed, num_classes)
    if is_multi_label(parsed) not in (None, kind.has_sigmoids):
        found, wanted = (
            ("a sigmoid for each class", "multi_label") if not kind.has_sigmoids else ("a softmax", "image")
        )
        raise ConfigError(
            f"teacher.model: {settings.model} was trained with {found} (problem_type in its config.json); set "
            f'source.modality = "{wanted}"'
        )
    build = partial(
        kind.build,
        settings.model,
        num_classes=None if settings.class_map else num_classes,
        input_shape=input_shape,
        class_names=class_names,
    )
    model = build()
    if settings.weights is not None:
        load_weights(model, settings.weights)
    elif not scheme:  # transformers reports missing weights
        check_repeatable(model, build(), settings.model)
    num_outputs, class_map = num_classes, None
    if settings.class_map is None and scheme != "hf-zero-shot":
        is_known = settings.weights is None or parsed.family == "torchvision"
        names = output_names(model, parsed, settings.weights) if is_known else []
        names = names if len(names) == num_classes == len(class_names) else []
        check_class_order(class_names, names, spec=settings.model, order_is_guessed=order_is_guessed)
    if settings.class_map is not None:
        with torch.inference_mode():
            num_outputs = model.eval()(torch.zeros(1, *input_shape)).shape[1]
        class_map = read_class_map(
            settings.class_map,
            class_names,
            num_outputs=num_outputs,
            names=output_names(model, parsed, settings.weights),
            spec=settings.model,
        )
    if rgb is not None:
        assert isinstance(normalize, Normalize)
        model = GrayAsRgb(model, normalize, *rgb)
    return kind(
        model,
        spec=settings.model,
        num_classes=num_classes,
        normalize=normalize,
        device=device,
        dtype=dtype,
        class_map=class_map,
        num_outputs=num_outputs,
        flips=settings.test_time_augmentation == "flip",
    )


def _check_pretrained_head(parsed: ModelSpec, num_classes: int) -> None:
    """Checks that a pretrained head has so many classes; for another number, libraries make a random one, silently.

    Raises:
        ConfigError: it would.
    """
    if hf_scheme(parsed):
        found, spec, library = num_hf_outputs(parsed), parsed.name, "transformers"
    elif parsed.family == "timm":
        found, spec, library = (timm_config(parsed) or {}).get("num_classes"), f"timm:{parsed.name}", "timm"
    else:
        return
    if found is not None and found != num_classes:
        raise ConfigError(
            f"teacher.model: the pretrained head of {spec} has {found:,} classes, the source has "
            f"{num_classes:,}: {library} would make a random head for them; set teacher.class_map (which outputs are its "
            "classes), or teacher.weights to a file with a head of that size"
        )


def check_repeatable(model: nn.Module, again: nn.Module, spec: str) -> None:
    """Checks that a teacher without a weights file has the same weights each time it is built.

    Raises:
        ConfigError: some are random.
    """
    one, other = model.state_dict(), again.state_dict()
    random = [name for name, value in one.items() if not torch.equal(value, other[name])]
    if random:
        raise ConfigError(
            f"teacher.model: {spec} has other weights each time it is built ({len(random)} of {len(one)} tensors, such as "
            f"{random[0]}): they are random, not pretrained; set teacher.weights to a file, or mend the factory"
        )
