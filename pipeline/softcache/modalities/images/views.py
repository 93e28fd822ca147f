"""The [views] of a run on images: what the config gives, and else what the pretrained teacher was trained to see."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from softcache.data.transforms import Views, ViewSettings
from softcache.errors import ConfigError, SpecError
from softcache.models.image import Normalize
from softcache.models.preprocessing import is_pretrained, pretrained_views, takes_rgb
from softcache.models.spec import parse_spec
from softcache.models.torchvision_weights import published_weights
from softcache.models.weight_files import checkpoint_arguments
from softcache.runtime.files import read_json
from softcache.runtime.logging import log_info

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = [
    "check_channels",
    "check_replays",
    "is_trained_here",
    "log_normalization",
    "rgb_normalization",
    "views_of",
]

TRIED = 4
"""Samples on which a custom transform is tried twice."""


def views_of(config: RunConfig, image_CHW: torch.Tensor) -> ViewSettings:
    """Returns the views of a config, with the teacher's own preprocessing where the config leaves it open.

    That is what its weights come with, or what the run of softcache saw that trained them. A teacher that [train_teacher]
    trains from scratch has none: it sees images of [views]. What differs is logged.

    Args:
        image_CHW: the first of the source.

    Raises:
        ConfigError: the settings of the run that trained the weights cannot be read, or the size that weights of the user's
            own saw is not known, and the source's images are far smaller than those of the architecture's published ones.
    """
    settings, teacher = config.views, config.teacher
    if teacher is None:
        return settings
    given, parsed = settings.model_fields_set, parse_spec(teacher.model)
    is_own = is_trained_here(teacher.weights)
    if is_own:
        found = _trained_views(str(teacher.weights), settings)
    elif config.train_teacher is None:
        found = pretrained_views(parsed, given, teacher.weights)
    elif is_pretrained(parsed):
        found = pretrained_views(parsed, given)
    else:
        return settings
    for key in found.keys() & {"mean", "std"} if len(image_CHW) != 3 and not is_own else ():
        # Of other channels than those of RGB, the weights are sums or copies; `rgb_normalization` is of those that are not.
        found[key] = (float(np.mean(found[key])),)
    if teacher.weights is not None and not is_own and config.train_teacher is None:
        _check_size(teacher.model, teacher.weights, found.keys() - given, found.get("size"), image_CHW)
    if "interpolation" in found and found["interpolation"] not in ("bilinear", "bicubic"):
        log_info(
            f"views.interpolation: {teacher.model} was trained with {found.pop('interpolation')!r}, which views do not "
            f"have; {settings.interpolation} is used"
        )
    for key in sorted(given & found.keys()):
        if getattr(settings, key) != found[key]:
            log_info(
                f"views.{key}: {_shown(getattr(settings, key))} in the config, and {teacher.model} was trained with "
                f"{_shown(found[key])}; drop the key to let it see that"
            )
    filled = {key: value for key, value in found.items() if key not in given}
    if filled:
        as_what = f"as {teacher.model} was trained"
        if teacher.weights is not None and not is_own and config.train_teacher is None:
            as_what = (
                f"as {teacher.weights} says that it was trained, or {teacher.model} where it does not"
                if checkpoint_arguments(teacher.weights)
                else f"as the weights that {teacher.model} comes with were trained (set what yours saw otherwise)"
            )
        log_info(f"views: {as_what}: {', '.join(f'{key} {_shown(filled[key])}' for key in sorted(filled))}")
    return ViewSettings.model_validate(settings.model_dump(exclude_unset=True) | filled)


def _check_size(model: str, weights: str, left: Collection[str], size: Any, image_CHW: torch.Tensor) -> None:
    """Raises ConfigError where the size that a user's own weights saw is a guess that the source's images speak against."""
    if "size" not in left or checkpoint_arguments(weights) or published_weights(parse_spec(model), weights):
        return
    sides, longest = (size, size) if isinstance(size, int) else size, max(image_CHW.shape[1:])
    if min(sides) >= SMALL * longest:
        raise ConfigError(
            f"views.size: missing; the weights that {model} comes with saw {_shown(size)} pixels, the source's first image "
            f"has {' x '.join(str(side) for side in image_CHW.shape[1:])}, and {weights} does not say what it was trained "
            f"on; set views.size to that, such as {longest} or {_shown(size)} (and mean, std, eval_share to its own)"
        )


SMALL = 3
"""How many times larger than a source's images the images of published weights are, for others to have seen the source's."""


def rgb_normalization(
    config: RunConfig, settings: ViewSettings
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Returns mean and std of R, G and B that the weights of a teacher saw which is shown gray images in all three.

    None: it takes one channel, or was trained by softcache on these images. A key of [views] that is another number than the
    mean of the three, which a run keeps as its own, is what all of them are normalized by.
    """
    teacher = config.teacher
    if teacher is None or config.train_teacher is not None or is_trained_here(teacher.weights):
        return None
    parsed, given = parse_spec(teacher.model), config.views.model_fields_set
    if not takes_rgb(parsed, teacher.weights):
        return None
    found = pretrained_views(parsed, given, teacher.weights)
    mean, std = (
        tuple(found[key])
        if key in found and np.isclose(getattr(settings, key)[0], np.mean(found[key]))
        else getattr(settings, key) * 3
        for key in ("mean", "std")
    )
    return (mean, std) if len(mean) == len(std) == 3 else None


def _trained_views(weights: str, settings: ViewSettings) -> dict[str, Any]:
    """Returns the keys of the plain view in which the run that trained the weights differs from these settings."""
    path, ways_out = _run_of(weights), "train the teacher again, or move its weights to another folder"
    run = read_json(path, ways_out, error=ConfigError)
    stored = run.get("views")
    if (
        not stored or {"views", "source"} & (run.get("student") or {}).keys()
    ):  # a student that saw something else
        return {}
    try:
        then = ViewSettings.model_validate({key: stored[key] for key in PLAIN_KEYS if key in stored})
    except ValueError as error:
        raise ConfigError(f"{path}: views: {' '.join(str(error).split())[:200]}; {ways_out}") from error
    keys = PLAIN_KEYS if then.size is not None else ("size", "mean", "std")
    return {key: getattr(then, key) for key in keys if getattr(then, key) != getattr(settings, key)}


PLAIN_KEYS = ("size", "fit", "interpolation", "geometry", "eval_share", "mean", "std")
"""Keys of [views] that make the plain view."""


def is_trained_here(weights: str | None) -> bool:
    """Returns whether weights are in the folder of a training run of softcache's, made on its own [views]."""
    return weights is not None and _run_of(weights).is_file()


def _run_of(weights: str) -> Path:
    return Path(weights.partition("#")[0]).parent / "resolved.json"


def log_normalization(model: str, normalize: Normalize) -> None:
    """Logs that a model starts from weights which saw images normalized otherwise than it will see them."""
    parsed, channels = parse_spec(model), normalize.mean.numel()
    if not is_pretrained(parsed):
        return
    found = pretrained_views(parsed, set(PLAIN_KEYS))
    for key in found.keys() & {"mean", "std"}:
        seen, own = getattr(normalize, key).flatten(), torch.tensor(found[key])
        own = own.mean()[None] if channels == 1 else own
        if float((seen.cpu() - own).abs().max()) > 1e-3:
            log_info(
                f"model {model}: starts from weights whose images had the {key} {_shown(tuple(found[key]))}, and sees "
                f"{_shown(tuple(round(x, 4) for x in seen.tolist()))}; a student has its own in [student.views]"
            )


def _shown(value: Any) -> str:
    return (
        str(list(value))
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def check_channels(settings: ViewSettings, channels: int) -> None:
    """Raises ConfigError where mean and std are of another number of channels than the images have."""
    for name in ("mean", "std"):
        if (found := len(getattr(settings, name))) not in (1, channels):
            raise ConfigError(
                f"views.{name}: {found} numbers for images of {channels} channel{'s' * (channels > 1)}; expected 1 or "
                f"{channels}"
            )


def check_replays(views: Views, source: Any) -> None:
    """Tries a custom transform twice on a few samples.

    Raises:
        SpecError: it does not give the same pixels for the same seeds of the global generators, so that no student could
            see what the teacher saw; or floats on another scale than the plain view.
    """
    if views.settings.transform is None:
        return
    floats = []
    for sample in range(min(TRIED, len(source))):
        image, key = source.image(sample), source.key(sample)
        if sample == 0 and (shape := views.apply(image, key=key, view=0).shape) != (
            found := views.apply(image, key=key, view=1).shape
        ):
            log_info(
                f"views.transform {views.settings.transform!r}: returns images of {tuple(found)}, and the plain view is of "
                f"{tuple(shape)} (views.size: {views.settings.size}): teacher and student see both; set views.size to the "
                "size that the transform returns"
            )
        first, second = (views.apply(image, key=key, view=1) for _ in range(2))
        if first.shape != second.shape or not torch.equal(first, second):
            raise SpecError(
                f"views.transform {views.settings.transform!r}: two calls give other pixels of sample {key!r}, so a student "
                "could not see what the teacher saw; draw from the global generators of random, numpy or torch, which are "
                "seeded for each view, and not from one of its own, or seed that from them in each call (albumentations: "
                "set_random_seed)"
            )
        if first.is_floating_point():
            floats.append(first)
    if floats:
        _check_scale(views, floats)


def _check_scale(views: Views, floats: list[torch.Tensor]) -> None:
    """Checks that floats of a custom transform are normalized as the plain view is, whose pixels are by `mean` and `std`.

    Raises:
        SpecError: values beyond what mean and std give to black and white (with a tenth of that range more on each side, for
            noise), or none below 0 where they should be.
    """
    settings = views.settings
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (settings.mean, settings.std))
    black, white = float((-mean / std).min()), float(((1 - mean) / std).max())
    low, high = (min(float(image.min()) for image in floats), max(float(image.max()) for image in floats))
    slack = 0.1 * (white - black)
    looks_scaled = low >= 0 and high <= 1 and black < -slack
    if looks_scaled or low < black - slack or high > white + slack:
        raise SpecError(
            f"views.transform {settings.transform!r}: returns floats from {low:.3g} to {high:.3g}, taken as normalized; "
            f"views.mean and views.std give the plain view {black:.3g} (black) to {white:.3g} (white), and evaluation sees "
            "that; let the transform return uint8, which is normalized here, or end it with that mean and std"
        )
