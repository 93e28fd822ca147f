"""Checks that a cache was made from a source, and attachment of labels to the rows of a batch."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache as cache_result
from typing import Any

import numpy as np

from softcache.cache.kinds import FOREIGN
from softcache.data.batch import Dataset
from softcache.errors import AlignmentError
from softcache.reader.cache import Cache, CachedBatch
from softcache.runtime.logging import log_info

__all__ = ["attach_labels", "check_alignment", "foreign_parts"]


def check_alignment(cache: Cache, data: Dataset) -> None:
    """Raises unless the cache was made from this very source, seen through these very views.

    Raises:
        AlignmentError: keys, order, ground truth, contents, transform or tokenizer differ; the first sample at
            fault is named.
    """
    identity, where = cache.manifest.identity, f"cache {cache.url}"
    if cache.manifest.kind != data.kind:
        raise AlignmentError(
            f"{where}: holds labels of kind {cache.manifest.kind!r}, the source is of kind {data.kind!r}; "
            "give --cache the one that was made from this source"
        )
    foreign = foreign_parts(cache)
    for part, here in data.identity(cache.num_views).items():
        if part not in foreign and identity[part]["digest"] != here["digest"]:
            raise AlignmentError(
                f"{where}: {_PARTS[part][0]} ({_part_difference(identity[part], here, _PARTS[part][1])}); restore the "
                f"[{_PARTS[part][1]}] table{' and the [teacher]' * (part == 'views')} of the config that made it, or "
                "rebuild the cache"
            )
    if "source" in foreign:
        difference = _table_difference(cache, data)
    else:
        is_same = identity["source"]["digest"] == data.source.digest
        difference = None if is_same else _source_difference(cache, data)
    if difference is not None:
        raise AlignmentError(
            f"{where}: {difference}; train on the dataset that was labeled, or rebuild the cache"
        )
    if foreign:
        _log_foreign(cache.url, ", ".join(foreign))


def foreign_parts(cache: Cache) -> list[str]:
    """Returns the parts of a cache's identity whose digests softcache cannot derive."""
    digests = {name: part.get("digest") for name, part in cache.manifest.identity.items()}
    return [
        name for name, digest in digests.items() if isinstance(digest, str) and digest.startswith(FOREIGN)
    ]


@cache_result
def _log_foreign(url: str, parts: str) -> None:
    """Logs, once for a cache, what stands in for digests that cannot be compared."""
    log_info(
        f"cache {url}: digests of another writer ({parts}) are not compared; samples are joined by key, ground truth, "
        "rows and order, and every one is compared by its fingerprint"
    )


_PARTS = {
    "views": ("its views were made by another transform", "views"),
    "boxes": ("its boxes were left out by another rule", "views"),
    "masks": ("its masks were made by another rule", "views"),
    "grid": ("its rows are the cells of another grid", "labels.positions"),
    "tokenizer": ("its tokens were made by another tokenizer", "source"),
    "attention": ("its teacher attended otherwise", "source"),
}


def _part_difference(there: dict[str, Any], here: dict[str, Any], table: str) -> str:
    """Returns each setting that differs, or where they are the same the digests."""
    then, now = there.get("settings", {}), here.get("settings", {})
    # Through JSON, as the manifest has been.
    now = json.loads(json.dumps(now))
    differing = [
        f"{table}.{key}: {_value(then, key)} there, {_value(now, key)} here"
        for key in sorted(then | now)
        if then.get(key) != now.get(key)
    ]
    return "; ".join(differing) or f"{there['digest'][:17]} there, {here['digest'][:17]} here"


def _value(settings: dict[str, Any], key: str) -> str:
    return (
        repr(settings[key]) if key in settings else "its default"
    )  # keys that came later are left out where they are


def _table_difference(cache: Cache, data: Dataset) -> str | None:
    """Returns how keys, order, ground truth or rows differ, naming the first sample at fault; None if they do not."""
    table, source = cache.samples_table(), data.source
    keys = source.keys()
    lost, new = sorted(set(table.keys) - set(keys)), sorted(set(keys) - set(table.keys))
    changes = [f"{key!r} is gone" for key in lost[:1]] + [f"{key!r} is new" for key in new[:1]]
    if len(table.keys) != len(source):
        found = f"{len(table.keys)} samples were labeled, the source has {len(source)} ({', '.join(changes)})"
        if all(
            one == other for one, other in zip(table.keys, keys, strict=False)
        ):  # the beginning of one is the other
            found += f"; if the capture took the first ones, set source.max_train_samples = {len(table.keys)}"
        return found
    for sample, (there, here) in enumerate(zip(table.keys, keys, strict=True)):
        if there != here:
            why = ", ".join(changes) or "the order changed"
            return f"sample {sample} was {there!r} when labeled and is {here!r} now ({why})"
    for column, now in ({} if cache.skips_positions else data.sample_columns()).items():
        then, fact = getattr(table, column), {"num_rows": "rows", "targets": "ground truth"}[column]
        if column == "targets" and not len(then):
            continue  # a table without ground truth
        for sample in np.flatnonzero(then != now)[:1]:
            return f"sample {keys[sample]!r} had {fact} {then[sample]} when labeled and has {now[sample]} now"
    return None


def _source_difference(cache: Cache, data: Dataset) -> str:
    """Returns what changed, naming the first sample at fault; reads the data only on this path."""
    source = data.source
    keys = source.keys()
    left_out, unreadable = (
        set(cache.manifest.identity["source"].get("unreadable", ())),
        set(getattr(source, "unreadable", ())),
    )
    if left_out != unreadable:
        return _unreadable_difference(sorted(left_out - unreadable), sorted(unreadable - left_out))
    if (difference := _table_difference(cache, data)) is not None:
        return difference
    for samples in np.array_split(cache.samples_in(0), max(1, len(source) // 256)):
        stored = cache.read_rows(samples, 0)[1]
        changed = np.flatnonzero(data.load(samples, 0).fingerprints != stored)
        if len(changed):
            return f"the contents of sample {keys[samples[changed[0]]]!r} changed since it was labeled"
    if not cache.is_complete:
        return (
            f"the contents of source {source.name} changed since it was labeled (in samples not finished yet)"
        )
    if data.uncompared:
        return f"the {data.uncompared} of source {source.name} changed since it was labeled; keys and pixels are the same"
    return (
        f"source {source.name} is another one than was labeled, though keys, ground truth and contents of its samples are "
        "the same (files that were written anew with other sizes, or what else its digest covers)"
    )


def _unreadable_difference(repaired: list[str], broken: list[str]) -> str:
    """Returns how the unreadable samples that were left out differ from those that are now (source.skip_unreadable)."""
    changes = [
        f"{len(keys):,} samples {what}, such as {keys[0]!r}"
        for keys, what in (
            (repaired, "were left out as unreadable when labeled and are in the source now"),
            (broken, "were labeled and are left out as unreadable now"),
        )
        if keys
    ]
    return f"source.skip_unreadable: {'; '.join(changes)}"


def attach_labels(batch: Any, stored: CachedBatch, cache: Cache, data: Dataset) -> Any:
    """Returns the batch with its labels, each at the row of its own position.

    Raises:
        AlignmentError: the samples do not have the rows that were labeled; the first sample at fault is named.
    """
    if batch.num_rows != len(stored.labels) and not cache.skips_positions:
        raise AlignmentError(
            f"cache {cache.url}: {len(stored.labels)} rows of labels for {batch.num_rows} rows of samples "
            f"{batch.samples[:8].tolist()}…, view {batch.view}; the source changed since the cache was made"
        )
    labels = stored.labels.to_torch()
    if stored.positions is None:
        return replace(batch, labels=labels)
    import torch

    rows_Q = batch.rows_at(stored.positions, stored.counts)
    for place in np.flatnonzero(rows_Q < 0)[:1]:
        sample = int(np.repeat(batch.samples, stored.counts)[place])
        raise AlignmentError(
            f"cache {cache.url}: sample {data.source.key(sample)!r} has a label for position "
            f"{int(stored.positions[place])}, where the source has nothing to predict, or a label already; the source "
            "changed since the cache was made; restore it, or rebuild the cache"
        )
    if len(rows_Q) < batch.num_rows:
        batch = replace(batch, labeled=torch.from_numpy(rows_Q), label_counts=stored.counts)
    return replace(batch, labels=labels)
