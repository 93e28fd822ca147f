"""The cache of a config: made, joined, or found to be of something else."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from softcache.cache.create import create_cache
from softcache.cache.manifest import Manifest
from softcache.cache.storage.base import Objects
from softcache.cache.storage.open import open_objects
from softcache.config.run import RunConfig
from softcache.errors import ConfigError, IdentityError, ManifestError
from softcache.hashing.digests import digest_json
from softcache.labels.sparsify import POLICIES, LabelSettings
from softcache.modalities import Data
from softcache.models.spec import is_same_origin
from softcache.reader.alignment import check_alignment
from softcache.reader.cache import Cache
from softcache.reader.open import open_cache
from softcache.runs.teacher import open_teacher, teacher_is_missing, teacher_settings, untrained_teacher
from softcache.runtime.launcher import check_launcher
from softcache.runtime.logging import event, log_info, progress_bar
from softcache.teacher.base import Teacher
from softcache.teacher.capture.estimate import Estimate, estimate_capture
from softcache.teacher.capture.plan import plan_manifest
from softcache.teacher.capture.run import CaptureReport, UnitMetrics, capture, evaluate_teacher
from softcache.teacher.capture.shared import shared_objects
from softcache.teacher.capture.trial import try_teacher
from softcache.tools.fuse import fuse_caches

__all__ = [
    "cache_is_ready",
    "capture_estimate",
    "capture_labels",
    "check_config_matches_cache",
    "log_capture",
    "log_unit",
    "open_labels",
    "prepare_cache",
    "with_cached_labels",
]

FUSED_CACHE_SETTINGS = {"num_views", "temperatures", "positions"}
"""[labels] keys that must match for a fused cache."""

PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
"""What accelerate calls the dtypes of a capture."""


def cache_is_ready(config: RunConfig, data: Data, url: str) -> bool:
    """Returns whether the config's cache is there and complete; the teacher is not loaded for this.

    Raises:
        IdentityError, AlignmentError: there is a cache, but of something else.
    """
    if open_objects(url).size("manifest.json") is None:
        return False
    cache = open_cache(url)
    check_config_matches_cache(config, cache)
    check_alignment(cache, data.train)
    return cache.is_complete


def check_config_matches_cache(config: RunConfig, cache: Cache) -> None:
    """Checks explicitly set config keys against the manifest; defaults are not compared.

    Raises:
        IdentityError: a key has another value in the cache.
    """
    if differing := _differences(config, cache):
        raise _other_settings(cache, differing)


def with_cached_labels(config: RunConfig, cache: Cache) -> RunConfig:
    """Returns a student's config with the [labels] that its cache was made with.

    [labels] and capture.store of a file describe a capture, so they need not be those of the cache. A policy that is not
    one of softcache's (of imported labels, or the user's own) stays as the config has it.

    Raises:
        IdentityError: a key that the config insists on (`RunConfig.insists_on`), or the teacher, is another in the cache.
        ConfigError: the loss cannot be computed from the cache's labels.
    """
    differing = _differences(config, cache)
    contradicting = {
        key: d for key, d in differing.items() if key == "teacher.model" or config.insists_on(key)
    }
    if contradicting:
        raise _other_settings(cache, contradicting)
    if taken := ", ".join(
        f"{key} = {there!r} ({here!r} in the config)"
        for key, (here, there) in sorted(differing.items())
        if key.startswith("labels.")
    ):
        log_info(f"cache {cache.url}: was made with {taken}; the student takes what is there")
    config = config.model_copy(update={"labels": _cached_labels(config, cache)})
    try:
        config.check_loss()
    except ValueError as error:
        raise ConfigError(f"cache {cache.url}: {error}") from error
    return config


def _cached_labels(config: RunConfig, cache: Cache) -> LabelSettings:
    found = cache.manifest.identity["labels"]
    known = POLICIES.get(found["policy"]) if found["policy"] in POLICIES else None
    if known is None or "fusion" in cache.manifest.identity:
        return config.labels.model_copy(update={"num_views": cache.num_views})
    keys = known.keys_of_identity(found) | {"num_views": cache.num_views}
    keys["positions"] = config.labels.positions.model_copy(update=found.get("positions", {"policy": "all"}))
    if not keys["temperatures"]:  # of independent classes, whose labels have no grid
        del keys["temperatures"]
    try:
        return known.model_validate({key: value for key, value in keys.items() if key in known.model_fields})
    except ValidationError as error:
        raise ManifestError(f"cache {cache.url}: identity.labels cannot be read: {error}") from error


def _differences(config: RunConfig, cache: Cache) -> dict[str, tuple[Any, Any]]:
    """Returns the explicitly set keys whose values differ, with the config's value and the cache's."""
    labels, found = config.labels, cache.manifest.identity
    given = {f"labels.{key}": getattr(labels, key) for key in labels.model_fields_set}
    there = {f"labels.{key}": value for key, value in labels.keys_of_identity(found["labels"]).items()}
    there["labels.num_views"] = cache.num_views
    if "labels.positions" in given:
        given["labels.positions"] = labels.positions.identity()
        there.setdefault("labels.positions", {"policy": "all"})
    imported = found["labels"]["policy"] == "imported"
    if imported:
        given.pop("labels.policy", None)
    fused = "fusion" in found  # [labels] and [teacher] are then of one of several teachers
    if fused:
        given = {key: value for key, value in given.items() if key.split(".")[1] in FUSED_CACHE_SETTINGS}
    named, spec = config.teacher, found["teacher"]["spec"]
    if named is not None and not (imported or fused) and not is_same_origin(named.model, spec):
        given["teacher.model"], there["teacher.model"] = named.model, spec
    if "store" in config.capture.model_fields_set:
        given["capture.store"], there["capture.store"] = config.capture.store, cache.manifest.store
    return {key: (value, there.get(key)) for key, value in given.items() if value != there.get(key)}


def _other_settings(cache: Cache, differing: dict[str, tuple[Any, Any]]) -> IdentityError:
    lines = [
        f"{key}: {here!r} in the config, {there!r} in the cache" for key, (here, there) in differing.items()
    ]
    return IdentityError(
        f"cache {cache.url}: made with other settings:\n  "
        + "\n  ".join(sorted(lines))
        + "\ndrop the setting to use this cache, or give --cache another place to make a new one"
    )


def open_labels(config: RunConfig, url: str | None = None) -> Cache:
    """Returns the cache that students learn from; with a [fusion] table, made first of the caches that it names.

    The fused cache is kept next to the run's own, under a name of its own, and made once: what it is made of
    is in its identity.

    Args:
        url: where the cache is, or with [fusion] is to be; None: a place under `runs/`.

    Raises:
        CacheNotFoundError, LabelError, AlignmentError, IncompleteCacheError: as `open_cache` and `fuse_caches`.
    """
    if config.fusion is None:
        return config.reader.open_cache(url or config.cache_places)
    fusion, caches = config.fusion, [open_cache(part) for part in config.fusion.caches]
    how = [fusion.rule, fusion.k, fusion.values, *(cache.manifest_sha256 for cache in caches)]
    url = url or str(config.root / f"fused-{fusion.rule}-{digest_json(how)[:8]}")
    with progress_bar(
        f"fuse {len(caches)} caches ({fusion.rule})", caches[0].manifest.total_rows, "rows"
    ) as advance:
        fuse_caches(caches, url, fusion, progress=advance)
    return config.reader.open_cache(url)


def prepare_cache(config: RunConfig, data: Data, teacher: Teacher, url: str) -> tuple[Objects, Manifest, str]:
    """Creates the config's cache, or joins the one that is there; returns its manifest and the manifest's sha256.

    Raises:
        IdentityError: the cache there was made from something else.
    """
    objects = open_objects(url, create=True)
    manifest, samples = plan_manifest(data.train, teacher, config.labels, config.capture)
    checks_order = config.teacher is None or config.teacher.check_class_order
    if not checks_order:
        manifest = manifest.model_copy(update={"extensions": {"softcache.class_order": "not checked"}})

    def report() -> Any:
        log_trial(teacher, data, batch_size=config.capture.batch_size, check_order=checks_order)
        if not config.capture.evaluate:
            return manifest.teacher
        with progress_bar("teacher: evaluate", len(data.evaluation)) as advance:
            return evaluate_teacher(
                data.evaluation, teacher, batch_size=config.capture.batch_size, progress=advance
            )

    def shared() -> dict[str, bytes]:
        return shared_objects(teacher, data.train, config.labels, batch_size=config.capture.batch_size)

    return objects, *create_cache(objects, manifest, samples, report=report, shared=shared)


def log_trial(teacher: Teacher, data: Data, *, batch_size: int, check_order: bool = True) -> None:
    """Logs how well the teacher predicts a few rows, and calls out one that only guesses.

    Raises:
        LabelError, ConfigError: as `try_teacher`.
    """
    found = try_teacher(
        teacher, data.train, num_classes=data.num_classes, batch_size=batch_size, check_order=check_order
    )
    if found is None:
        return
    score = teacher.describe_score(found.accuracy, found.perplexity)
    event(
        "teacher_scored",
        rows=found.rows,
        accuracy=found.accuracy,
        loss=found.loss if math.isfinite(found.loss) else None,
    )
    log_info(f"teacher {teacher.spec}: {score} on {found.rows:,} rows")
    if found.is_guessing:
        log_info(
            f"teacher {teacher.spec}: no better than a guess among {found.num_classes:,} classes; its labels teach "
            "nothing: check its weights, the order of its classes, and what it reads (preprocessing; tokenizer, "
            "source.bos, chat template)"
        )


def capture_labels(config: RunConfig, data: Data, teacher: Teacher, url: str) -> tuple[Cache, CaptureReport]:
    """Runs the teacher over what is not labeled yet; returns the complete cache and what was done.

    Of a teacher that is cut over processes, the first one does that, and the others run their share of the model.

    Raises:
        ConfigError: `accelerate launch` was asked for what a capture does not do.
    """
    check_launcher(
        "teacher-logits",
        {
            "mixed_precision": (PRECISION[config.capture.dtype], "set capture.dtype"),
            "dynamo_backend": ("no", "a teacher is not compiled"),
            **dict.fromkeys(
                ("use_fsdp", "use_deepspeed", "use_megatron_lm", "use_parallelism_config"),
                ("no", "cut a teacher by tp_plan=auto in its spec"),
            ),
        },
    )
    group = getattr(teacher, "group", None)
    if group is None:
        return _capture_labels(config, data, teacher, url)
    if not group.is_first:
        teacher.follow()  # type: ignore[attr-defined]
        return open_cache(url), CaptureReport()
    with group.lead():
        return _capture_labels(config, data, teacher, url)


def _capture_labels(config: RunConfig, data: Data, teacher: Teacher, url: str) -> tuple[Cache, CaptureReport]:
    objects, manifest, digest = prepare_cache(config, data, teacher, url)
    total = manifest.total_rows
    units, settings = manifest.plan.num_units, config.model_dump(mode="json")
    event("run_started", run="teacher-logits", cache=url, rows=total, units=units, config=settings)
    with progress_bar("teacher: label", total, "rows") as advance:
        done = capture(
            objects,
            manifest,
            digest,
            data=data.train,
            teacher=teacher,
            labels=config.labels,
            settings=config.capture,
            progress=advance,
            on_unit=log_unit,
        )
    log_capture(url, done)
    return open_cache(url), done


def capture_estimate(config: RunConfig, data: Data, url: str) -> Estimate:
    """Returns what `capture_labels` would do at `url` and take for it; writes nothing there.

    A teacher that [train_teacher] has yet to train is measured untrained.

    Raises:
        ConfigError: the cache is there, and the weights of its teacher are not.
        IdentityError: the cache there was made from something else.
    """
    objects = open_objects(url)
    if not teacher_is_missing(config):
        return _capture_estimate(config, data, objects)
    weights = teacher_settings(config).weights
    if objects.size("manifest.json") is not None:
        raise ConfigError(
            f"config {config.name}: there is a cache at {url}, and no weights of the teacher that labels the rest of it "
            f"at {weights}; put them there again, or choose another --cache"
        )
    log_info(
        f"teacher {teacher_settings(config).model}: no weights at {weights} yet; measured untrained: bytes are a rough "
        "estimate (untrained labels compress better), and the time is without its training"
    )
    with untrained_teacher(config, data) as untrained:
        return _capture_estimate(untrained, data, objects)


def _capture_estimate(config: RunConfig, data: Data, objects: Objects) -> Estimate:
    return estimate_capture(
        objects,
        data=data.train,
        evaluation=data.evaluation,
        teacher=open_teacher(config, data),
        labels=config.labels,
        settings=config.capture,
    )


def log_unit(unit: UnitMetrics, **more: Any) -> None:
    """Logs a unit that was published, as an event."""
    seconds = max(unit.seconds, 1e-9)
    event(
        "unit_done",
        unit=unit.unit,
        view=unit.view,
        rows=unit.rows,
        bytes=unit.num_bytes,
        seconds=round(unit.seconds, 6),
        rows_per_second=round(unit.rows / seconds, 3),
        bytes_per_second=round(unit.num_bytes / seconds, 3),
        teacher_share=round(min(1.0, unit.teacher_seconds / seconds), 4),
        queue_depth=unit.queue_depth,
        **more,
    )


def log_capture(url: str, report: CaptureReport) -> None:
    """Logs the end of a capture, as an event."""
    fields = asdict(report) | {"slowest": report.slowest and report.slowest._asdict()}
    event("run_finished", run="teacher-logits", cache=url, **fields)
