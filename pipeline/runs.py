"""From a config to the things that it names: teacher, cache, trained students, whatever the modality.

The stages (one command each) and the comparisons (many runs each) are written in terms of these.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pipeline.cache import Cache, open_cache
from pipeline.capture import CaptureReport, UnitMetrics, capture, evaluate_teacher
from pipeline.config import RunConfig
from pipeline.errors import ConfigError, IdentityError
from pipeline.estimate import Estimate, estimate_capture
from pipeline.feeds import cache_feed, hard_feed
from pipeline.fusion import fuse_caches
from pipeline.identity import digest_json
from pipeline.manifest import Manifest
from pipeline.mirror import RunMirror
from pipeline.modalities import Data, open_data
from pipeline.planning import create_cache, plan_manifest
from pipeline.process_group import join
from pipeline.progress import event, say, track
from pipeline.reader import check_alignment
from pipeline.stores.objects import Objects, is_bucket, open_objects
from pipeline.student import Feed, StudentSettings, train
from pipeline.tasks import Task
from pipeline.teacher import Teacher, TeacherSettings

__all__ = [
    "Data",
    "cache_is_ready",
    "capture_estimate",
    "capture_labels",
    "log_capture",
    "log_unit",
    "make_teacher",
    "open_data",
    "open_labels",
    "open_teacher",
    "prepare_cache",
    "score_in_words",
    "slug_of",
    "teacher_is_missing",
    "train_student",
    "train_teacher",
]

# What may be another in a rerun: it decides where and how, not what is learnt.
NOT_OF_A_RUN = {"device", "eval_batch_size", "process_timeout_seconds"}

FUSED_AS_SAID = {"num_views", "temperatures", "positions"}
"""What [labels] says of a fused cache as of those that it is made of."""

LabelsFrom = Literal["cache", "hard", "online"]


# -- the teacher -------------------------------------------------------------------------------------------


def _teacher_settings(config: RunConfig) -> TeacherSettings:
    if config.teacher is None:
        raise ConfigError(
            f"config {config.name}: table [teacher] is missing; it names the model that labels the data"
        )
    return config.teacher


def open_teacher(config: RunConfig, data: Data) -> Teacher:
    """Returns the config's teacher with its weights, on the device and dtype of [capture]."""
    return data.teacher(config, _teacher_settings(config))


def train_teacher(
    config: RunConfig, data: Data, *, track_with: str | None = None
) -> tuple[dict[str, Any], Path]:
    """Trains the teacher of a config on hard labels; returns its metrics and its weights file.

    Raises:
        ConfigError: there is no [train_teacher] table, or teacher.weights is not where this writes.
    """
    teacher = _teacher_settings(config)
    out = config.root / "teacher"
    weights = out / "model.safetensors"
    if config.train_teacher is None:
        raise ConfigError(
            f"config {config.name}: table [train_teacher] is missing; it says how to train {teacher.model}"
        )
    if teacher.weights is None or Path(teacher.weights) != weights:
        raise ConfigError(
            f"config {config.name}: teacher.weights is {teacher.weights!r}, but train-teacher writes {str(weights)!r}; "
            "set teacher.weights to that, or keep your own weights and skip train-teacher"
        )
    run = _as_teacher(config).model_copy(
        update={"train": config.train_teacher.model_copy(update={"labels": "hard"})}
    )
    task = data.task(run, teacher.model)
    metrics = _fit(
        run, data, task, teacher.model, out, hard_feed(run, data), identity={}, track_with=track_with
    )
    return metrics, weights


def _as_teacher(config: RunConfig) -> RunConfig:
    """Returns the config without what [student] and [loss] say of another reader than the teacher is."""
    plain = StudentSettings(model=config.student.model, models=config.student.models)
    loss = config.loss.model_copy(update={"name": "forward_kl"}) if config.loss.name == "uld" else config.loss
    return config.model_copy(update={"student": plain, "loss": loss})


def teacher_is_missing(config: RunConfig) -> bool:
    """Returns whether the teacher's weights file is missing and the config says how to make it."""
    weights = _teacher_settings(config).weights
    return config.train_teacher is not None and weights is not None and not Path(weights).exists()


def score_in_words(metrics: dict[str, Any]) -> str:
    """Returns the score of a run: its accuracy, or of detections the mean average precision."""
    if "map" in metrics:
        return f"mAP {metrics['map']:.4f} (mAP50 {metrics['map50']:.4f})"
    return f"accuracy {metrics['accuracy']:.4f}"


def make_teacher(config: RunConfig, data: Data) -> None:
    """Trains the teacher if its weights file is missing and the config says how."""
    teacher = _teacher_settings(config)
    if teacher_is_missing(config):
        say(f"teacher {teacher.model}: no weights at {teacher.weights} yet; training it once")
        metrics, _ = train_teacher(config, data)
        say(
            f"teacher {teacher.model}: {metrics['num_parameters']:,} parameters, {score_in_words(metrics)}, "
            f"loss {metrics['eval_loss']:.4f}"
        )


# -- the cache ---------------------------------------------------------------------------------------------


def cache_is_ready(config: RunConfig, data: Data, url: str) -> bool:
    """Returns whether the config's cache is there and complete; the teacher is not loaded for this.

    Raises:
        IdentityError, AlignmentError: there is a cache, but of something else.
    """
    if open_objects(url).size("manifest.json") is None:
        return False
    cache = open_cache(url)
    _check_said(config, cache)
    check_alignment(cache, data.train)
    return not cache.missing_units


def _check_said(config: RunConfig, cache: Cache) -> None:
    """Compares what the config says in so many words with what the cache is; defaults are not compared."""
    labels, found = config.labels, cache.manifest.identity
    said = {f"labels.{key}": getattr(labels, key) for key in labels.model_fields_set & labels.read_fields}
    there = {f"labels.{key}": value for key, value in found["labels"].items()}
    there["labels.num_views"] = cache.num_views
    there["labels.temperatures"] = tuple(there["labels.temperatures"])
    if "labels.positions" in said:
        said["labels.positions"] = labels.positions.identity()
        there.setdefault("labels.positions", {"policy": "all"})
    imported = found["labels"]["policy"] == "imported"
    if imported:
        said.pop("labels.policy", None)
    fused = "fusion" in found  # [labels] and [teacher] then say how one of several teachers labels
    if fused:
        said = {key: value for key, value in said.items() if key.split(".")[1] in FUSED_AS_SAID}
    if config.teacher is not None and not (imported or fused):
        said["teacher.model"], there["teacher.model"] = config.teacher.model, found["teacher"]["spec"]
    if "store" in config.capture.model_fields_set:
        said["capture.store"], there["capture.store"] = config.capture.store, cache.manifest.store
    differing = [
        f"{key}: {value!r} in the config, {there.get(key)!r} in the cache"
        for key, value in said.items()
        if value != there.get(key)
    ]
    if differing:
        raise IdentityError(
            f"cache {cache.url}: made with other settings:\n  "
            + "\n  ".join(sorted(differing))
            + "\ndrop the setting to use this cache, or give --cache another place to make a new one"
        )


def open_labels(config: RunConfig, url: str | None = None) -> Cache:
    """Returns the cache that students learn from; with a [fusion] table, made first of the caches that it names.

    The fused cache is kept beside the run's own, under a name that tells it from others, and made once: what it is made of
    is in its identity.

    Args:
        url: where the cache is, or with [fusion] is to be; None: a place under `runs/`.

    Raises:
        CacheNotFoundError, LabelError, AlignmentError, IncompleteCacheError: as `open_cache` and `fuse_caches`.
    """
    if config.fusion is None:
        return config.reader.open_cache(url or config.cache_url)
    fusion, caches = config.fusion, [open_cache(part) for part in config.fusion.caches]
    how = [fusion.rule, fusion.k, fusion.values, *(cache.manifest_sha256 for cache in caches)]
    url = url or str(config.root / f"fused-{fusion.rule}-{digest_json(how)[:8]}")
    with track(
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

    def report() -> Any:
        if not config.capture.evaluate:
            return manifest.teacher
        with track("teacher: evaluate", len(data.evaluation)) as advance:
            return evaluate_teacher(
                data.evaluation, teacher, batch_size=config.capture.batch_size, progress=advance
            )

    return objects, *create_cache(objects, manifest, samples, report=report)


def capture_labels(config: RunConfig, data: Data, teacher: Teacher, url: str) -> tuple[Cache, CaptureReport]:
    """Runs the teacher over what is not labelled yet; returns the complete cache and what was done."""
    objects, manifest, digest = prepare_cache(config, data, teacher, url)
    total = manifest.total_rows
    event("run_started", run="teacher-logits", cache=url, rows=total, units=manifest.plan.num_units)
    with track("teacher: label", total, "rows") as advance:
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

    Raises:
        ConfigError: the teacher has yet to be trained: its labels, and so their bytes, are not known.
        IdentityError: the cache there was made from something else.
    """
    if teacher_is_missing(config):
        raise ConfigError(
            f"config {config.name}: the teacher has no weights at {_teacher_settings(config).weights} yet, so what its "
            "labels take is not known; run `softcache train-teacher` with this config first"
        )
    return estimate_capture(
        open_objects(url),
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
    told = asdict(report) | {"slowest": report.slowest and report.slowest._asdict()}
    event("run_finished", run="teacher-logits", cache=url, **told)


# -- students ----------------------------------------------------------------------------------------------


def train_student(
    config: RunConfig,
    data: Data,
    *,
    model: str,
    labels: LabelsFrom,
    cache: Cache | None = None,
    teacher: Teacher | None = None,
    num_views: int | None = None,
    out: str | Path | None = None,
    allow_partial: bool = False,
    track_with: str | None = None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Trains one student; returns its metrics, with `out` and `model` added.

    Args:
        model: the student's spec.
        labels: what it learns from; "cache" needs `cache`, "online" needs `teacher`.
        num_views: of the cache's views, use the first so many; None uses all, or where the student cannot replay them
            the plain one.
        out: the run's directory, a path or the URL of a bucket; None makes one under runs/ whose name tells it apart.
        on_epoch: called with the metrics of every epoch, after its checkpoint; what it raises ends the run there, and
            a later one goes on.

    Raises:
        IncompleteCacheError: the cache has missing units, and `allow_partial` is off.
        AlignmentError, IdentityError: the cache is of something else.
    """
    config = config.model_copy(
        update={
            "train": config.train.model_copy(update={"labels": labels}),
            "student": config.student.model_copy(update={"model": model}),
        }
    )
    identity: dict[str, Any] = {}
    if labels == "cache":
        assert cache is not None
        _check_said(config, cache)
        num_views = num_views or config.reader.num_views or (cache.num_views if data.replays(config) else 1)
        feed = cache_feed(config, data, cache, num_views, allow_partial)
        identity = {"cache": cache.manifest_sha256, "num_views": num_views}
        if cache.missing_units:
            identity["missing_units"] = cache.missing_units
    else:
        feed = hard_feed(config, data)
        if labels == "online":
            assert teacher is not None
            identity = {
                "teacher": {"spec": teacher.spec, "weights": teacher.weights_digest, "dtype": teacher.dtype}
            }
    if labels != "hard":
        identity["loss"] = config.loss.identity()
        if data.train.kind == "cells":
            identity["cells"] = config.cells.model_dump()
    task = data.task(config, model, teacher if labels == "online" else None)
    return _fit(
        config, data, task, model, out, feed, identity=identity, track_with=track_with, on_epoch=on_epoch
    )


def _fit(
    config: RunConfig,
    data: Data,
    task: Task,
    model: str,
    out: str | Path | None,
    feed: Feed,
    *,
    identity: dict[str, Any],
    track_with: str | None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    otherwise = config.student.tokenizer or config.student.reads_otherwise
    described = {
        "model": model,
        **data.identity(),
        "student_data": data.of_student(config).identity() if otherwise else None,
        "context": config.student.context,
        "train": config.train.model_dump(mode="json", exclude=NOT_OF_A_RUN),
        "order": {"block_samples": feed.order.block_samples, "window_blocks": feed.order.window_blocks},
        **identity,
    }
    if out is None:
        out = (
            config.root / "students" / f"{slug_of(model)}-{config.train.labels}-{digest_json(described)[:8]}"
        )
    mirror = RunMirror(str(out)) if is_bucket(str(out)) else None
    folder = mirror.folder if mirror else Path(out)
    if mirror is not None:
        group = join(cpu=config.train.device == "cpu", timeout_seconds=config.train.process_timeout_seconds)
        with group.local_main_process_first():
            mirror.fetch()
    label, finished = f"train {model} ({config.train.labels})", (folder / "metrics.json").exists()
    follow: AbstractContextManager = nullcontext(lambda samples: None)
    if finished:
        say(f"{label}: {out} holds this run, finished; reporting it")
    else:
        follow = track(label, config.train.epochs * len(feed.dataset))
    name = {"run": f"train {model}", "labels": config.train.labels, "out": str(out)}
    event("run_started", **name, samples=len(feed.dataset), epochs=config.train.epochs)

    def told(row: dict[str, Any]) -> None:
        event("epoch", **name, **row)
        on_epoch(row)

    with follow as advance:
        metrics = train(
            task,
            feed,
            settings=config.train,
            out=folder,
            config=described,
            mirror=mirror,
            loss=None if config.train.labels == "hard" else config.loss,
            resolved=config.model_dump(mode="json") | {"student": _as_trained(config, model)},
            track=track_with,
            on_step=advance,
            on_epoch=told,
        )
    event("run_finished", **name, **{key: metrics[key] for key in metrics.keys() - {"history", *name}})
    return metrics | {"model": model, "out": str(out)}


def slug_of(model: str) -> str:
    """Returns a model's spec as a part of a directory's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", model).strip("-")


def _as_trained(config: RunConfig, model: str) -> dict[str, Any]:
    """Returns what a resolved config says of the student: its architecture, and what else it reads than the teacher."""
    student, said = config.student, {"context", "tokenizer"}
    if student.reads_otherwise:
        said |= {"source", "views", "pairing"}
    told = student.model_dump(mode="json", include=said)
    return {"model": model} | {key: value for key, value in told.items() if value is not None}
