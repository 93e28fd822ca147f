"""A smaller cache from a bigger one, as if it had been captured so: fewer classes, views or temperatures, another codec.

    for every finished unit of the original: check it, read it chunk by chunk, shrink its records, publish them

Classes that lose their slot move into the tail (`softcache.labels.truncate`), so a top-k cache gives the one of any
smaller k, and of any top-p. From a cache of every class in float32 those are drawn, too, with the seeds that a capture
would use. Everything else (targets, statistics, fingerprints, positions, the table of samples) is copied as it is, and
the manifest has the identity of a capture with these settings, so `softcache teacher-logits` goes on where this stopped.

How exact, against a capture by the same teacher on the same machine:

    ids, log_probs    of top_k and top_p: the same bits, if the original's values are float32, or float16 and stay so
                      (top_p of float16: but for rows whose mass is within 2^-11 log p of it)
    log_tail          to the rounding of float32 (1e-6 nats); of float16 to 2^-11 of the moved classes' log p, of a packed
                      original to its own step
    drawn classes     the same but for draws within the rounding of float32 (1e-7) of the border between two classes, and
                      of exact ones but for the order of classes whose log p is one number in float32
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError

from softcache import __version__
from softcache.cache.codecs import (
    COARSEST,
    FINEST,
    HIGHEST_LEVEL,
    OpenCodec,
    PackedCodec,
    SoftLabelCodec,
    Tail,
)
from softcache.cache.create import create_cache
from softcache.cache.manifest import Manifest, RaggedRows, Unit
from softcache.cache.repair import usable_units
from softcache.cache.storage.open import open_objects
from softcache.cache.units import (
    check_unit,
    claimed_units,
    fold_if_possible,
    open_index,
    open_store,
    publish_unit,
)
from softcache.errors import LabelError, SpecError, TemperatureError
from softcache.labels import ARRAYS, SoftLabels, concat
from softcache.labels.sparsify import POLICIES, LabelSettings
from softcache.reader.cache import Cache
from softcache.reader.open import open_cache
from softcache.runtime.logging import count_found
from softcache.settings import Settings

__all__ = ["ShrinkSettings", "can_lower_k", "shrink_cache", "shrink_manifest"]

IMPORTED = "imported"  # the policy of `softcache.tools.import_logprobs`
CHUNK_ELEMENTS = 2**21  # of the log-probabilities of all classes that are drawn from at once
POLICY_KEYS = {"k", "p", "num_samples", "proposal_temperature", "seed"}


class ShrinkSettings(Settings):
    """Settings in which the smaller cache differs from the original; None: the original's.

    Attributes:
        policy: of the smaller cache; `k`, `p`, `num_samples`, `proposal_temperature` and `seed` are its numbers, as in
            `[labels]`.
        temperatures: the grid; some of the original's.
        num_views: the first so many views.
        statistics: "none" leaves them out.
        codec: "open" with `values`, or "packed" with `step`, `tail` and `level`, as in `[capture]`.
        store: "zarr" or "parquet".
        chunk_rows: rows that are compressed together, of a cache whose samples have several; a divisor of its units' rows.
    """

    policy: str | None = None
    k: int | None = Field(None, ge=1)
    p: float | None = Field(None, gt=0, le=1)
    num_samples: int | None = Field(None, ge=1, le=65535)
    proposal_temperature: float | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    temperatures: tuple[float, ...] | None = None
    num_views: int | None = Field(None, ge=1)
    statistics: Literal["all", "none"] | None = None
    codec: Literal["open", "packed"] | None = None
    values: Literal["float16", "float32"] | None = None
    step: float | None = Field(None, ge=FINEST, le=COARSEST)
    tail: Tail | None = None
    level: int | None = Field(None, ge=1, le=HIGHEST_LEVEL)
    store: Literal["zarr", "parquet"] | None = None
    chunk_rows: int | None = Field(None, ge=1)


def can_lower_k(cache: Cache) -> bool:
    """Returns whether a smaller k is in the cache: the classes of a row are the likeliest ones, as many in each row."""
    policy, codec = cache.manifest.identity["labels"]["policy"], cache.manifest.build_codec()
    return policy in ("top_k", "dense", IMPORTED) and isinstance(codec, SoftLabelCodec)


def shrink_cache(
    cache: Cache,
    target_url: str,
    changes: ShrinkSettings,
    *,
    progress: Callable[[int], None] = lambda rows: None,
) -> Cache:
    """Returns the smaller cache at `target_url`; units of it that are finished already are kept.

    Every unit of the original is checked against its marker before it is read. Units that are missing in the original
    stay missing, for a later run of this or of `softcache teacher-logits`.

    Raises:
        LabelError: what is asked for is not in the original; what is.
        TemperatureError: a temperature whose tail was not stored.
        CorruptionError: a unit of the original is damaged.
        IdentityError: there is another cache at `target_url`.
    """
    origin_codec = cache.manifest.soft_codec(f"shrink, cache {cache.url}")
    manifest, labels = shrink_manifest(cache, changes)
    origin, source_objects = cache.manifest, open_objects(cache.url)
    objects = open_objects(target_url, create=True)
    manifest, digest = create_cache(objects, manifest, source_objects.get(origin.samples))
    reading, writing = open_store(origin, source_objects), open_store(manifest, objects)
    codec = manifest.soft_codec("shrink")
    own = {column.name for column in origin_codec.columns}
    index = open_index(objects, manifest, digest)
    finished = usable_units(index)
    count_found(progress, finished.num_rows)
    # Views that are left out have the highest numbers.
    wanted = cache.markers.is_finished[: manifest.plan.num_units]
    pending = np.flatnonzero(wanted & ~finished.is_finished).tolist()
    for unit in claimed_units(index, map(manifest.plan.unit, pending)):
        marker = cache.markers[unit.number]
        check_unit(source_objects, marker, reading)
        records: list[SoftLabels] = []
        others: list[dict[str, np.ndarray]] = []
        for part in _parts(unit, origin.plan.chunk_samples):
            columns = reading.read(unit, *part, rows=cache.rows.span(unit, *part))
            records.append(_shrink(cache, columns, labels))
            others.append({name: column for name, column in columns.items() if name not in own})
        joined = {name: np.concatenate([other[name] for other in others]) for name in others[0]}
        publish_unit(objects, writing, digest, unit, {**codec.encode(concat(records)), **joined})
        progress(marker.num_rows)
    fold_if_possible(index)
    return open_cache(target_url)


def _parts(unit: Unit, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, unit.stop)) for start in range(unit.start, unit.stop, size)]


# -- records -----------------------------------------------------------------------------------------------


def _shrink(cache: Cache, columns: dict[str, np.ndarray], target: LabelSettings | None) -> SoftLabels:
    """The smaller record of some samples; `target` None leaves the labels as they are."""
    codec = cache.manifest.soft_codec("shrink")
    labels = codec.decode(columns)
    codec.validate({name: array for name in ARRAYS if (array := getattr(labels, name)) is not None})
    if target is None:
        return labels
    if labels.sampling is not None:  # of drawn classes the grid alone can shrink
        places = [labels.temperatures.index(t) for t in target.temperatures]
        return replace(labels, log_tail=labels.log_tail[:, places], temperatures=target.temperatures)
    if target.sampling is None:
        return target.truncate(labels)
    counts = columns.get("num_rows", np.ones(len(labels), np.int64))
    positions = columns.get("position", np.zeros(len(labels), np.int64))
    seeds_P = target.row_seeds(columns["fingerprint"], counts, positions)
    assert seeds_P is not None
    rows = max(1, CHUNK_ELEMENTS // labels.num_classes)
    parts = [slice(start, start + rows) for start in range(0, max(1, len(labels)), rows)]
    return concat([_drawn(labels.take(part), target, seeds_P[part]) for part in parts])


def _drawn(labels: SoftLabels, target: LabelSettings, seeds_P: torch.Tensor) -> SoftLabels:
    """Draws from a record of every class; what was computed at capture is taken from there, bit for bit."""
    stored = labels.to_torch()
    shape = len(labels), labels.num_classes
    log_probs_PV = torch.full(shape, -torch.inf).scatter_(1, stored.ids.long(), stored.log_probs)
    record = target.apply(log_probs_PV, seeds_P=seeds_P, check=False)
    used_PK = record.ids < labels.num_classes
    log_probs_PK = log_probs_PV.gather(1, record.ids.where(used_PK, 0)).where(used_PK, -torch.inf)
    return replace(
        record,
        log_probs=log_probs_PK,
        target_log_prob=stored.target_log_prob,
        stats=stored.stats,
    ).to_numpy()


# -- the manifest ------------------------------------------------------------------------------------------


def shrink_manifest(cache: Cache, changes: ShrinkSettings) -> tuple[Manifest, LabelSettings | None]:
    """Returns the manifest of the smaller cache, and the labels that it has (None: those of the original).

    Raises:
        LabelError, TemperatureError: as `shrink_cache`.
    """
    origin = cache.manifest
    if (changes.num_views or 0) > origin.plan.num_views:
        raise LabelError(
            f"cache {cache.url}: {changes.num_views} views asked for, it has {origin.plan.num_views}; ask for fewer"
        )
    origin.soft_codec(f"shrink, cache {cache.url}")
    labels = _labels(cache, changes)
    _check_labels(cache, labels)
    built = _codec(cache, labels, changes)
    codec = built.to_dict()
    described = labels.identity(origin.num_classes)
    found = origin.identity["labels"]
    if found["policy"] == IMPORTED:
        described["policy"] = IMPORTED
    identity = origin.identity | {"labels": described, "codec": codec}
    if "views" in identity:
        identity["views"] = identity["views"] | {"num_views": labels.num_views}
    store = changes.store or origin.store
    manifest = origin.model_copy(
        update={
            "softcache_version": __version__,
            "identity": identity,
            "codec": codec,
            "plan": origin.plan.model_copy(update={"num_views": labels.num_views}),
            "store": store,
            "data": "labels.zarr" if store == "zarr" else "parquet",
            "slimmed_from": cache.manifest_sha256,
            "features": built.features,
            "rows": _rows(cache, changes),
        }
    )
    same_rows = {**described, "statistics": None} == {**found, "statistics": None}
    return manifest, None if same_rows else labels


def _rows(cache: Cache, changes: ShrinkSettings) -> RaggedRows | None:
    """Returns how the rows of the smaller cache lie in the arrays; units keep theirs, which the table of samples names."""
    rows, wanted = cache.manifest.rows, changes.chunk_rows
    if wanted is None:
        return rows
    if rows is None:
        raise LabelError(
            f"cache {cache.url}: its samples have one row each, in chunks of capture.chunk_samples = "
            f"{cache.manifest.plan.chunk_samples}; leave chunk_rows out"
        )
    if rows.shard_rows % wanted:
        raise LabelError(
            f"cache {cache.url}: chunks of {wanted:,} rows asked for; its units have {rows.shard_rows:,} rows, in chunks of "
            f"{rows.chunk_rows:,}; ask for a divisor of {rows.shard_rows:,}"
        )
    return rows.model_copy(update={"chunk_rows": wanted})


def _labels(cache: Cache, changes: ShrinkSettings) -> LabelSettings:
    """`[labels]` of the smaller cache: the original's, and what is asked for in its place."""
    origin = cache.manifest
    base = dict(origin.identity["labels"])
    if base["policy"] == IMPORTED:
        base["policy"] = "top_k"
    policy = changes.policy or ("top_k" if base["policy"] == "dense" and changes.k else base["policy"])
    asked = changes.model_dump(include=POLICY_KEYS, exclude_none=True)
    try:
        kind = POLICIES.get(policy, trusted=changes.policy is not None)
    except SpecError as error:
        raise LabelError(
            f"cache {cache.url}: policy {policy!r} in its manifest; expected one of {', '.join(POLICIES.names())}; "
            "upgrade softcache"
        ) from error
    reads = [name for name in kind.model_fields if name not in LabelSettings.model_fields]
    for name in sorted(set(asked) - set(reads)):
        raise LabelError(
            f"shrink: {name} is given, but policy {policy!r} reads {', '.join(reads) or 'no numbers'} only; leave it out, "
            "or give --policy"
        )
    kept = {key: value for key, value in kind.keys_of_identity(base).items() if key in kind.model_fields}
    settings = kept | {"policy": policy, "num_views": changes.num_views or origin.plan.num_views} | asked
    if changes.temperatures:
        settings["temperatures"] = changes.temperatures
    if changes.statistics:
        settings["statistics"] = changes.statistics
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        problem = error.errors()[0]
        raise LabelError(f"shrink: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error


def _check_labels(cache: Cache, target: LabelSettings) -> None:
    """Raises unless a capture with the target's settings would have kept nothing that the original has not."""
    codec, found = cache.manifest.soft_codec("shrink"), cache.manifest.identity["labels"]
    where, num_classes = f"cache {cache.url}: policy {found['policy']!r}, k {found['k']}", codec.num_classes
    slots, wanted = target.num_slots(num_classes), target.identity(num_classes)
    if slots > num_classes or (slots > codec.k and target.sampling is None):
        raise LabelError(
            f"{where}: {slots} slots asked for, of {num_classes} classes; ask for {codec.k} at most"
        )
    is_whole = found["policy"] in ("dense", "top_k") and codec.k == num_classes
    if not (is_whole or set(target.temperatures) <= set(codec.temperatures)):
        raise TemperatureError(
            f"{where}: its tail is stored at the temperatures {list(codec.temperatures)}; found "
            f"{list(target.temperatures)}; choose among them, or capture with others"
        )
    if target.statistics == "all" and not codec.stats and found["policy"] != IMPORTED:
        raise LabelError(f'{where}: it has no statistics; leave labels.statistics = "none", or capture again')
    others = {*wanted, *found} - {"temperatures", "statistics"}
    numbers = {name for name in others if wanted.get(name) != found.get(name)}
    if not numbers or (found["policy"] == IMPORTED and target.policy == "top_k"):
        return
    if codec.sampling is not None:
        raise LabelError(
            f"{where}: its classes were drawn at random, and other draws, or fewer, are not in it (asked for: other "
            f"{', '.join(sorted(numbers))}); shrink a cache of every class in float32, or capture again"
        )
    if target.sampling is not None and not (is_whole and _precision(codec) == "float32"):
        raise LabelError(
            f"{where}: policy {target.policy!r} draws from every class as it was computed; it needs a cache with "
            'labels.policy = "dense" and capture.codec.values = "float32"; make one, or capture with this policy'
        )
    if target.policy == "dense" and not is_whole:
        raise LabelError(f"{where}: not every class is in it; choose policy top_k or top_p")
    if found["policy"] == "top_p" and not getattr(target, "p", 2.0) <= found["p"]:
        raise LabelError(
            f"{where}: its rows end where p = {found['p']} is held; choose policy top_p with p of at most that"
        )
    if found["policy"] == IMPORTED:
        raise LabelError(f"{where}: imported labels keep their policy; give k alone")


def _codec(cache: Cache, labels: LabelSettings, changes: ShrinkSettings) -> SoftLabelCodec:
    """The codec of the smaller cache.

    Raises:
        LabelError: it would promise more than the original holds, or has no such number.
    """
    origin = cache.manifest.soft_codec("shrink")
    common: dict[str, Any] = {
        "num_classes": origin.num_classes,
        "k": labels.num_slots(origin.num_classes),
        "temperatures": labels.temperatures,
        "stats": origin.stats and labels.statistics == "all",
        "max_temperature": origin.max_temperature,
        "sampling": labels.sampling,
    }
    name = changes.codec or origin.name
    for unread in {"open": ("step", "tail", "level"), "packed": ("values",)}[name]:
        if getattr(changes, unread) is not None:
            raise LabelError(
                f"shrink: {unread} is given, but codec {name!r} does not read it; leave it out, or give --codec"
            )
    codec: SoftLabelCodec
    if name == "open":
        codec = OpenCodec(
            **common,
            values=changes.values or (origin.values if isinstance(origin, OpenCodec) else "float16"),
        )
    else:
        kept: dict[str, Any] = {}
        if isinstance(origin, PackedCodec):
            kept = {"step": origin.step, "tail": origin.tail, "level": origin.level}
        given = changes.model_dump(include={"step", "tail", "level"}, exclude_none=True)
        codec = PackedCodec(**common, **kept | given)
    found = f"cache {cache.url}: codec {_precision(origin)}"
    if isinstance(origin, PackedCodec) and _precision(origin) not in (_precision(codec), "float16"):
        raise LabelError(
            f"{found}: its rounded values cannot become {_precision(codec)}; leave codec, step and tail out"
        )
    if _precision(codec) == "float32" != _precision(origin):
        raise LabelError(
            f"{found}: float32 would promise digits that it has not; leave values out, or capture again"
        )
    return codec


def _precision(codec: SoftLabelCodec) -> str:
    """What log-probabilities are rounded to."""
    if isinstance(codec, OpenCodec):
        return codec.values
    if not isinstance(codec, PackedCodec):
        return f"as codec {codec.name}"
    return "float16" if codec.step is None else f"steps of {codec.step:g}, tail {codec.tail}"
