"""One run of the training loop: its directory, its identity, its metrics."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from softcache.cache.storage.base import is_bucket
from softcache.config.run import RunConfig
from softcache.errors import RunError
from softcache.hashing.digests import digest_json
from softcache.modalities import Data, modality_of
from softcache.runtime.logging import Advance, event, log_format, log_info, progress_bar, sparkline
from softcache.student import TrainBatches, train
from softcache.student.bucket_sync import BucketSync
from softcache.student.tasks import Task

__all__ = ["run_training", "slugify"]


def run_training(
    config: RunConfig,
    data: Data,
    task: Task,
    model: str,
    out: str | Path | None,
    feed: TrainBatches,
    *,
    identity: dict[str, Any],
    on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    settings = config.train.with_default_exemption(modality_of(config).weight_decay_exempt)
    otherwise = config.student.tokenizer or config.student.has_own_input
    described = {
        "model": model,
        **data.model_identity(model),
        **data.identity(),
        "student_data": data.student_data(config).identity() if otherwise else None,
        "context": config.student.context,
        "train": settings.identity(),
        "order": {"block_samples": feed.order.block_samples, "window_blocks": feed.order.window_blocks},
        **identity,
    }
    if config.student.lora is not None:
        described["lora"] = config.student.lora.model_dump(mode="json")
    if out is None:
        out = (
            config.root
            / "students"
            / f"{slugify(model)}-{config.train.labels_id}-{digest_json(described)[:8]}"
        )
    mirror = BucketSync(str(out)) if is_bucket(str(out)) else None
    if mirror is None and "://" in str(out):
        raise RunError(
            f"run {out}: expected a folder, or s3://, gs:// or az:// of a bucket; give --out one of these"
        )
    folder = mirror.folder if mirror else Path(out)
    label = f"train {model} ({config.train.labels})"
    finished = mirror.is_finished if mirror else (folder / "metrics.json").exists()
    follow: AbstractContextManager[Advance] = nullcontext(Advance(label, 0, "samples"))
    if finished:
        log_info(f"{label}: {out} holds this run, finished; reporting it")
    else:
        data.note_start(model, task)
        follow = progress_bar(label, config.train.epochs * len(feed.dataset))
    name = {"run": f"train {model}", "labels": config.train.labels, "out": str(out)}
    views = getattr(data, "views", None)
    resolved = (
        config.model_dump(mode="json")
        | {"train": settings.model_dump(mode="json"), "student": _as_trained(config, model)}
        # The views as they are, with what the config leaves to the teacher or to the kind of data.
        | ({"views": views.settings.model_dump(mode="json")} if views else {})
    )
    event("run_started", **name, samples=len(feed.dataset), epochs=config.train.epochs, config=resolved)
    losses: list[float] = []

    def log_step(kind: str, row: dict[str, Any]) -> None:
        event(kind, **name, **row)
        if kind == "step":
            losses.append(row["loss"])
            samples, rows = row["samples_per_second"], row["rows_per_second"]
            more = "" if rows == samples else f", {rows:,.0f} rows/s"
            advance.note(
                f"loss {row['loss']:.4g} {sparkline(losses)} lr {row['lr']:.3g}{more}",
                f"step {row['step']:,}, loss {row['loss']:.4f}, lr {row['lr']:.3g}, {samples:,.0f} samples/s{more}",
            )
        elif log_format() == "text":
            scores = ", ".join(
                f"{key} {value:.4f}" for key, value in row.items() if key not in ("epoch", "step")
            )
            log_info(f"{label}: step {row['step']:,}, {scores}")

    def log_epoch(row: dict[str, Any]) -> None:
        event("epoch", **name, **row)
        on_epoch(row)

    with follow as advance:
        metrics = train(
            task,
            feed,
            settings=settings,
            out=folder,
            config=described,
            mirror=mirror,
            loss=None if config.train.labels == "ground_truth" else config.loss,
            resolved=resolved,
            on_step=advance,
            on_log=log_step,
            on_epoch=log_epoch,
        )
    event("run_finished", **name, **{key: metrics[key] for key in metrics.keys() - {"history", *name}})
    return metrics | {"model": model, "out": str(out)}


def slugify(model: str) -> str:
    """Returns a model's spec as a part of a directory's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", model).strip("-")


def _as_trained(config: RunConfig, model: str) -> dict[str, Any]:
    """Returns the student part of a resolved config: its architecture, and the inputs that differ from the teacher's."""
    student, keys = config.student, {"context", "tokenizer", "lora"}
    if student.has_own_input:
        keys |= {"source", "views", "pairing"}
    student_settings = student.model_dump(mode="json", include=keys)
    return {"model": model} | {key: value for key, value in student_settings.items() if value is not None}
