"""What every adapter asks of a cache before it trains from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softcache.errors import ConfigError, IncompleteCacheError
from softcache.losses import LossSettings
from softcache.models.image import Normalize
from softcache.reader.cache import Cache
from softcache.reader.dataset import cached_views

if TYPE_CHECKING:
    from softcache.data.transforms import Views

__all__ = ["check_cache", "check_images", "check_settled", "normalize_of"]


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


def normalize_of(cache: Cache, views: Views | None) -> Normalize:
    """Returns the normalisation that the teacher's pixels had; raises as `cached_views`."""
    settings = (views or cached_views(cache)).settings
    return Normalize(settings.mean, settings.std)
