"""Creates a cache, or joins the one that is there.

A cache is created once: the first writer of `manifest.json` wins, and every later run, whether it captures, imports or
converts, must have the identity of the cache that it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from softcache.cache.manifest import MAX_MANIFEST_BYTES, Manifest, TeacherReport, diff_manifests
from softcache.cache.shared import put_shared
from softcache.cache.storage.base import Objects
from softcache.cache.units import open_store
from softcache.errors import IdentityError, StorageError
from softcache.hashing.digests import digest_bytes

__all__ = ["create_cache", "join_cache"]

MANIFEST = "manifest.json"


def create_cache(
    objects: Objects,
    manifest: Manifest,
    samples: bytes,
    *,
    report: Callable[[], TeacherReport] | None = None,
    shared: Callable[[], Mapping[str, bytes]] | None = None,
) -> tuple[Manifest, str]:
    """Creates the cache, or joins the one that is there; returns its manifest and the manifest's sha256.

    The first writer of `manifest.json` wins; every other run compares itself with what it finds.

    Args:
        report: called only if there is no cache yet; measures the teacher for the manifest's report.
        shared: called only if there is no cache yet; returns the objects that all rows share, by name.

    Raises:
        IdentityError: the cache there was made from something else; each field that differs is named.
        StorageError: there is no cache, but labels of one that was.
    """
    if objects.size(MANIFEST) is None:
        _check_no_remains(objects, manifest)
        if report is not None:
            manifest = manifest.model_copy(update={"teacher": report()})
        if shared is not None and (contents := shared()):
            manifest = manifest.model_copy(update={"objects": put_shared(objects, contents)})
        manifest = _put_samples(objects, manifest, samples)
        objects.put_if_absent(MANIFEST, manifest.to_bytes())
    found, digest = _joined(objects, manifest)
    open_store(found, objects).create()
    return found, digest


def join_cache(objects: Objects, manifest: Manifest) -> tuple[Manifest, str] | None:
    """Returns the manifest of the cache that is there and its sha256, None where there is none; writes nothing.

    Raises:
        IdentityError: the cache there was made from something else; each field that differs is named.
    """
    return None if objects.size(MANIFEST) is None else _joined(objects, manifest)


def _check_no_remains(objects: Objects, manifest: Manifest) -> None:
    """Raises StorageError if labels lie there without a manifest: other tools would read them as this cache's."""
    found = objects.list(manifest.data)
    if found and objects.size(MANIFEST) is None:  # or another run has just created the cache
        raise StorageError(
            f"cache {objects.url}: expected no labels where there is no {MANIFEST}; found {found[0]}"
            f"{f' and {len(found) - 1:,} more' if len(found) > 1 else ''}, of a cache whose {MANIFEST} was removed: restore "
            f"it from a copy, remove {manifest.data}/ and units/, or choose another place"
        )


def _joined(objects: Objects, manifest: Manifest) -> tuple[Manifest, str]:
    stored = objects.get(MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
    found = Manifest.parse(stored, where=f"cache {objects.url}")
    differing = diff_manifests(manifest, found)
    if differing:
        raise IdentityError(
            f"cache {objects.url}: made from something else than this run (this run; there):\n  "
            + "\n  ".join(differing)
            + "\nGive this run another --cache, or remove the old one if it is not needed"
        )
    return found, digest_bytes(stored)


def _put_samples(objects: Objects, manifest: Manifest, samples: bytes) -> Manifest:
    """Writes the table of samples; returns the manifest that names it.

    Another run may have crashed between its table and its manifest, or may be about to write the latter: its table stays,
    and this one gets another name.
    """
    if objects.put_if_absent(manifest.samples, samples):
        return manifest
    if objects.size(manifest.samples) == len(samples) and objects.get(manifest.samples) == samples:
        return manifest
    named = f"samples-{manifest.samples_sha256[:16]}.parquet"
    objects.put_if_absent(named, samples)
    return manifest.model_copy(update={"samples": named})
