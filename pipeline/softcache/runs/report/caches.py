"""The caches of the runs of a report.

One, as a rule. Several, where students of smaller caches are compared with those of the whole one (`softcache shrink`, a
sweep over K): they must be of one teacher's labels of the same views, and differ in which of them they keep, and how.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from softcache.errors import CacheNotFoundError, IdentityError
from softcache.reader.cache import Cache
from softcache.reader.open import open_cache

if TYPE_CHECKING:
    from softcache.runs.report.load import Run

__all__ = ["describe_policy", "find_caches"]

LABEL_POLICY_KEYS = ("labels", "codec")


def find_caches(runs: Sequence[Run], urls: Sequence[str], missing: dict[str, str]) -> list[Cache]:
    """Returns the caches of the runs, the one that keeps most classes first; if none is found, adds the reason to `missing`.

    Args:
        urls: where they are; none: the config's location, `fused-*` next to it, and the folders of sweeps.

    Raises:
        CacheNotFoundError: there is none at a place that was given.
        IdentityError: a run learnt from none of them, or they are not of the same teacher and data.
    """
    wanted = {run.identity["cache"]: run for run in runs if "cache" in run.identity}
    found = _opened(runs, urls)
    if not found:
        place = urls[0] if urls else next(iter(wanted.values()), runs[0]).config.cache_places
        missing["cache"] = f"there is no cache at {place}; give --cache where it is"
        return []
    if not wanted:
        _check_source(runs[0], found[0])
        return _with_classes(found[:1], missing)
    of_digest = {cache.manifest_sha256: cache for cache in reversed(found)}
    for digest, run in wanted.items():
        if digest not in of_digest:
            raise IdentityError(
                f"run {run.path}: learnt from another cache than {found[0].url} (manifest {digest[:12]}… in the run, "
                f"{found[0].manifest_sha256[:12]}… there); give --cache the cache of these runs, once for each of several"
            )
    caches = [of_digest[digest] for digest in wanted]
    for cache in caches:
        _check_source(runs[0], cache)
        _check_same_teacher(caches[0], cache)
    caches = _with_classes(caches, missing)
    return sorted(caches, key=lambda cache: -int(cache.manifest.identity["labels"]["k"]))


def _with_classes(caches: list[Cache], missing: dict[str, str]) -> list[Cache]:
    """Returns the caches that hold classes, which the sections about labels are of; of none adds the reason to `missing`."""
    kept = [cache for cache in caches if cache.manifest.codec["name"] != "vectors"]
    if not kept:
        missing["cache"] = f"cache {caches[0].url} holds hidden states, and no classes to show"
    return kept


def describe_policy(cache: Cache) -> str:
    """Returns what a cache keeps of a row: K, and where it is not the likeliest classes, by which policy."""
    labels = cache.manifest.identity["labels"]
    return f"K = {labels['k']}" if labels["policy"] == "top_k" else f"{labels['policy']}, K = {labels['k']}"


def _opened(runs: Sequence[Run], urls: Sequence[str]) -> list[Cache]:
    tried: list[str | tuple[str, ...]] = list(urls)
    if not tried:
        for config in {run.config.root: run.config for run in runs}.values():
            smaller = sorted(config.root.glob("sweep*/caches/*"))
            places = config.cache_places
            tried.append(tuple(places) if isinstance(places, list) else places)
            tried += [*map(str, sorted(config.root.glob("fused-*"))), *map(str, smaller)]
    found: list[Cache] = []
    for place in dict.fromkeys(tried):
        try:
            found.append(open_cache(place))
        except CacheNotFoundError:
            if urls:
                raise
    return found


def _check_source(run: Run, cache: Cache) -> None:
    there, here = cache.manifest.identity["source"].get("digest"), run.identity["source"]
    if there != here:
        raise IdentityError(
            f"cache {cache.url}: of other data than run {run.path} (source {str(there)[:12]}… there, {here[:12]}… in the "
            "run); give --cache the cache of these runs"
        )


def _check_same_teacher(one: Cache, other: Cache) -> None:
    here, there = one.manifest.identity, other.manifest.identity
    parts = (here.keys() | there.keys()) - {*LABEL_POLICY_KEYS}
    differing = sorted(part for part in parts if here.get(part) != there.get(part))
    if one.num_views != other.num_views:
        differing.append("num_views")
    if differing:
        raise IdentityError(
            f"cache {other.url}: not of the labels of {one.url} ({', '.join(differing)} differ); a report is of one "
            "teacher's labels of one data set, kept whole or in part: report these runs apart"
        )
