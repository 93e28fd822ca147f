"""The features of the format that a manifest may name, which a reader must know to read the cache rightly."""

from __future__ import annotations

from collections.abc import Iterable

from softcache.errors import ManifestError

__all__ = ["FEATURES", "check_features"]

FEATURES: dict[str, str] = {
    "array_codecs": "chunks of Zarr arrays are coded as each zarr.json gives, and not as the manifest implies",
    "tail_steps": "packed records hold the tail at T = 1 in steps, and the first log-probability in coarser ones",
    "vectors": "columns are vectors, some of them the bits of narrow floats, and rows share objects of the cache",
}
"""What each adds to version 1, which has everything else that caches use. A feature is never changed, only added."""


def check_features(features: Iterable[str], *, where: str) -> None:
    """Raises unless every feature is known.

    Raises:
        ManifestError: one is not; it is named.
    """
    for name in features:
        if name not in FEATURES:
            raise ManifestError(
                f"{where}: uses the feature {name!r}, which this softcache does not know (it knows {', '.join(FEATURES)}); "
                "its numbers would be misread; upgrade softcache, or read it with the program that wrote it"
            )
