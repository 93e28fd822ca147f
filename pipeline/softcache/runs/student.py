"""The students of a config, one run each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from softcache.config.run import RunConfig
from softcache.modalities import Data
from softcache.reader.cache import Cache
from softcache.runs.batches import cached_batches, hard_label_batches
from softcache.runs.cache import with_cached_labels
from softcache.runs.fit import run_training
from softcache.runs.rollouts import check_teacher_consistency
from softcache.teacher.base import Teacher

__all__ = ["train_student"]

LabelsFrom = Literal["cache", "ground_truth", "online"]


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
    on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Trains one student; returns its metrics, with `out` and `model` added.

    Args:
        model: the student's spec.
        labels: what it learns from; "cache" needs `cache`, "online" needs `teacher`.
        num_views: of the cache's views, use the first so many; None uses all, or where the student cannot replay them
            the plain one.
        out: the run's directory, a path or the URL of a bucket; None makes one under runs/ with a unique name.
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
        config = with_cached_labels(config, cache)
        if config.loss.reads_rollouts:
            check_teacher_consistency(config, cache.manifest.identity["teacher"], f"cache {cache.url}")
        num_views = (
            num_views
            or config.reader.num_views
            or (cache.num_views if data.replays_teacher_views(config) else 1)
        )
        feed = cached_batches(config, data, cache, num_views, allow_partial)
        identity = {"cache": cache.manifest_sha256, "num_views": num_views}
        if not cache.is_complete:
            identity["missing_units"] = cache.missing_units
    else:
        feed = hard_label_batches(config, data)
        if labels == "online":
            assert teacher is not None
            facts = teacher.identity()["teacher"]
            if config.loss.reads_rollouts:
                check_teacher_consistency(config, facts, f"teacher {teacher.spec}")
            named = {
                "spec": facts.pop("spec"),
                "weights": facts.pop("weights_digest"),
                "dtype": facts.pop("dtype"),
            }
            facts.pop("architecture", None)  # the spec has it
            identity = {"teacher": named | facts}
    if labels != "ground_truth":
        identity |= data.loss_identity(config)
    task = data.task(config, model, teacher if labels == "online" else None)
    return run_training(config, data, task, model, out, feed, identity=identity, on_epoch=on_epoch)
