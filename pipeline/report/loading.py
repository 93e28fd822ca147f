"""Finished runs, checked to be of one data set and one cache, and their students rebuilt from what the runs wrote.

A run says what it is in config.json (digests) and every setting in resolved.json. Two runs are reported together only if
their source, views or tokenizer, held-out split and cache have the same digests, and these are what is on the disk now.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.cache import Cache, open_cache
from pipeline.checkpoints import differences
from pipeline.config import RunConfig, build_config
from pipeline.errors import CacheNotFoundError, IdentityError, RunError, SpecError
from pipeline.models import load_weights
from pipeline.runs import Data, open_data, open_teacher
from pipeline.tasks import Task, TokenStudent
from pipeline.teacher import Teacher

__all__ = ["Report", "Run", "open_report", "open_run"]

OF_THE_DATA = ("source", "views", "evaluation", "tokenizer", "cross_documents")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: of the student and of what it learnt from; unique in a report.
        identity: config.json.
        metrics: metrics.json.
    """

    path: Path
    name: str
    config: RunConfig
    identity: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def model(self) -> str:
        return str(self.identity["model"])

    @property
    def labels(self) -> str:
        return str(self.metrics["labels"])


@dataclass(frozen=True)
class Report:
    """Everything that a page is made of, opened and compared.

    Attributes:
        cache: None where it is not there; `missing` then says so.
        teacher: None where its weights are not there; `missing` then says so.
        unfinished: directories without results, left out.
        missing: "cache" or "teacher" -> why it is not there.
    """

    runs: list[Run]
    data: Data
    cache: Cache | None
    teacher: Teacher | None
    unfinished: list[Path] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> RunConfig:
        return self.runs[0].config

    @property
    def is_text(self) -> bool:
        return self.data.train.kind == "tokens"

    def student(self, run: Run) -> tuple[Task, torch.nn.Module]:
        """Returns a run's task and its student, on the CPU, with the weights of the run's end.

        Raises:
            RunError: its weights are not there, or do not fit.
        """
        task = self.data.task(run.config, run.model)
        model = task.build().eval()
        bare = model.model if isinstance(model, TokenStudent) else model
        try:
            load_weights(bare, run.path / "model.safetensors")
        except SpecError as error:
            raise RunError(
                f"run {run.path}: its student cannot be rebuilt ({error}); restore the run from a copy, or train it again"
            ) from error
        return task, model


def open_report(paths: Sequence[str | Path], *, cache_url: str | None = None) -> Report:
    """Returns what the runs are of, once they are known to be of the same.

    Args:
        paths: directories of runs, or folders of such directories.
        cache_url: where the cache is now; None: where the runs' config says.

    Raises:
        RunError: a path holds no finished run, one that cannot be read, or detectors.
        IdentityError: the runs are of different data or caches, or what is there is not what they learnt from.
    """
    folders, unfinished = _folders([Path(path) for path in paths])
    read = [_read(folder) for folder in folders]
    names = [run.name for run in read]
    runs = [
        replace(run, name=f"{run.name} {run.path.name}") if names.count(run.name) > 1 else run for run in read
    ]
    _check_alike(runs)
    data = open_data(runs[0].config)
    if data.train.kind == "cells":
        raise RunError(
            f"run {runs[0].path}: of a detector; expected students of images or texts, which the report is made for; "
            "compare detectors with `softcache students` and `softcache compare`"
        )
    _check_same_data(runs[0], data)
    missing: dict[str, str] = {}
    cache = _cache(runs, cache_url, missing)
    return Report(runs, data, cache, _teacher(runs[0].config, data, cache, missing), unfinished, missing)


def open_run(path: str | Path, *, cache_url: str | None = None) -> Report:
    """Returns what one run is of: `open_report` of it alone.

    Raises:
        RunError: there are several runs, or what `open_report` raises.
        IdentityError: what is there is not what it learnt from.
    """
    folders, _ = _folders([Path(path)])
    if len(folders) != 1:
        raise RunError(f"run {path}: expected one run; found {len(folders)} in it; name one's own directory")
    return open_report(folders, cache_url=cache_url)


def _folders(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    found: list[Path] = []
    unfinished: list[Path] = []
    for path in paths:
        if (path / "config.json").exists():
            if not (path / "metrics.json").exists():
                raise RunError(
                    f"run {path}: not finished (no metrics.json); run its command again to finish it"
                )
            found.append(path)
            continue
        inside = sorted(child.parent for child in path.glob("*/config.json"))
        done = [child for child in inside if (child / "metrics.json").exists()]
        if not done:
            raise RunError(
                f"run {path}: expected a run's directory (config.json, resolved.json, metrics.json), or a folder of "
                "such; found none; runs are under runs/NAME/students"
            )
        found += done
        unfinished += [child for child in inside if child not in done]
    return list(dict.fromkeys(found)), unfinished


def _read(path: Path) -> Run:
    try:
        identity, resolved, metrics = (
            json.loads((path / f"{name}.json").read_text()) for name in ("config", "resolved", "metrics")
        )
    except (OSError, ValueError) as error:
        raise RunError(
            f"run {path}: cannot be read: {error}; restore it from a copy, or train it again"
        ) from error
    if resolved["source"].get("modality") == "text":
        resolved.pop("views", None)
    resolved.pop("sweep", None)
    config = build_config(resolved, str(path / "resolved.json"))
    if identity.get("student_data"):
        other = (
            "has another tokenizer than the teacher, and their tokens"
            if config.student.tokenizer
            else ("reads something else than the teacher (student.source, student.views), and their inputs")
        )
        raise RunError(
            f"run {path}: its student {other} cannot be compared one by one; neither report nor export is of such a "
            "student: name other runs"
        )
    student = config.student.model_copy(update={"context": identity.get("context")})
    name = f"{identity['model']} ({metrics['labels']})"
    return Run(path, name, config.model_copy(update={"student": student}), identity, metrics)


def _check_alike(runs: list[Run]) -> None:
    first = runs[0]
    cached = next((run for run in runs if "cache" in run.identity), None)
    for run in runs[1:]:
        differing = [name for name in OF_THE_DATA if run.identity.get(name) != first.identity.get(name)]
        if (
            cached is not None
            and run.identity.get("cache", cached.identity["cache"]) != cached.identity["cache"]
        ):
            differing.append("cache")
        if differing:
            raise IdentityError(
                f"run {run.path}: of other data than {first.path} ({', '.join(differing)} differ); a report is of one data "
                "set and one cache: report this run apart"
            )


def _check_same_data(run: Run, data: Data) -> None:
    here = data.identity()
    differing = differences({name: run.identity.get(name) for name in here}, here)
    if differing:
        raise IdentityError(
            f"run {run.path}: its data changed since (then; now): {'; '.join(differing)}; restore the data"
        )


def _cache(runs: list[Run], url: str | None, missing: dict[str, str]) -> Cache | None:
    cached = next((run for run in runs if "cache" in run.identity), None)
    config = (cached or runs[0]).config
    tried = [url] if url else [config.cache_url, *map(str, sorted(config.root.glob("fused-*")))]
    found: list[Cache] = []
    for place in tried:
        try:
            found.append(open_cache(place))
        except CacheNotFoundError:
            if url:
                raise
    for cache in found:
        if cached is None or cache.manifest_sha256 == cached.identity["cache"]:
            there, here = cache.manifest.identity["source"].get("digest"), runs[0].identity["source"]
            if there != here:
                raise IdentityError(
                    f"cache {cache.url}: of other data than run {runs[0].path} (source {str(there)[:12]}… there, "
                    f"{here[:12]}… in the run); give --cache the cache of these runs"
                )
            return cache
    if found:
        assert cached is not None
        raise IdentityError(
            f"run {cached.path}: learnt from another cache than {found[0].url} (manifest {cached.identity['cache'][:12]}… "
            f"in the run, {found[0].manifest_sha256[:12]}… there); give --cache the cache of these runs"
        )
    missing["cache"] = f"there is no cache at {tried[0]}; give --cache where it is"
    return None


def _teacher(config: RunConfig, data: Data, cache: Cache | None, missing: dict[str, str]) -> Teacher | None:
    if config.teacher is None:
        missing["teacher"] = "the runs' config names no teacher"
        return None
    weights = config.teacher.weights
    if weights is not None and not Path(weights).is_file():
        missing["teacher"] = f"the teacher's weights are not at {weights}"
        return None
    teacher = open_teacher(config, data)
    if cache is not None:
        there = cache.manifest.identity["teacher"].get("weights_digest")
        if there != teacher.weights_digest:
            missing["teacher"] = (
                f"the weights of {teacher.spec} here are not those that made the cache {cache.url}"
            )
            return None
    return teacher
