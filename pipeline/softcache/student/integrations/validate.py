"""What every adapter asks of a cache before it trains from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from softcache.errors import ConfigError, IncompleteCacheError
from softcache.losses import LossSettings
from softcache.models.image import Normalize
from softcache.reader.cache import Cache
from softcache.reader.dataset import cached_views

if TYPE_CHECKING:
    from softcache.data.transforms import Views

__all__ = ["check_arguments", "check_cache", "check_images", "check_settled", "normalize_of"]

_MIXES = (
    "the teacher labeled no mixed image, and an average of targets is none; mixed views are the cache's "
    "(views.mixup, views.cutmix)"
)
_REPEATS = (
    "an epoch has one view of each sample, and repeats of it would show the same pixels, of fewer samples"
)
_PIXELS = "the pixels would not be those that the teacher labeled; the variety is that of the cache's views"
_LOSS = "it is of the loss whose place [loss] takes"
REFUSED_ARGUMENTS = {
    _MIXES: ("mixup", "cutmix", "cutmix_minmax", "mixup_alpha", "cutmix_alpha"),
    _REPEATS: ("aug_repeats", "epoch_repeats", "ra_sampler"),
    _PIXELS: ("aug_splits", "auto_augment", "random_erase"),
    _LOSS: ("bce_loss", "jsd_loss", "label_smoothing"),
}
"""Of timm's and torchvision's scripts, by the reason; off where they are None, false or 0."""


def check_images(cache: Cache, who: str) -> None:
    """Raises as `check_cache` unless the cache is a finished one of images, and LabelError where classes are independent."""
    check_cache(
        cache,
        "image",
        f"{who} is for images; for language models use softcache.student.integrations.huggingface.DistillTrainer, or "
        "`softcache train-student`",
    )
    cache.manifest.soft_codec(f"{who}, cache {cache.url}")


def check_cache(cache: Cache, kind: str, advice: str) -> None:
    """Raises unless the cache is a finished one of that kind.

    Raises:
        ConfigError: it is of another kind, with `advice`, or no cache.
        IncompleteCacheError: units are missing.
    """
    if not isinstance(cache, Cache):
        raise ConfigError(f"cache: expected one that is open; found {cache!r}; pass open_cache(URL)")
    if cache.manifest.kind != kind:
        raise ConfigError(f"cache {cache.url}: holds labels of kind {cache.manifest.kind!r}; {advice}")
    if not cache.is_complete:
        raise IncompleteCacheError(
            f"cache {cache.url}: {cache.describe_missing()}; rerun `softcache teacher-logits` to finish it"
        )


def check_settled(loss: LossSettings, who: str) -> None:
    """Raises where temperature or alpha are to change over a run, which a foreign loop does not pass on.

    Raises:
        ConfigError: a schedule or a curriculum is set.
    """
    if loss.adapts:
        raise ConfigError(
            f"{who}: loss has a schedule or a curriculum; expected a temperature and an alpha that stay; drop the tables, "
            "or use `softcache train-student`, whose loop moves them"
        )


def check_arguments(arguments: Any, who: str) -> None:
    """Raises where a script's arguments ask for what stored labels do not go with, or what would be ignored.

    Args:
        arguments: the namespace that timm's or torchvision's script parsed.

    Raises:
        ConfigError: one is set; it is named, with the reason.
    """
    for reason, names in REFUSED_ARGUMENTS.items():
        for name in names:
            if given := getattr(arguments, name, None):
                raise ConfigError(f"{who}: --{name.replace('_', '-')} {given}: {reason}; leave it out")


def normalize_of(cache: Cache, views: Views | None) -> Normalize:
    """Returns the normalisation that the teacher's pixels had; raises as `cached_views`."""
    settings = (views or cached_views(cache)).settings
    return Normalize(settings.mean, settings.std)
