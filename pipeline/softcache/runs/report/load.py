"""Finished runs, checked to be of one data set and one cache, and their students rebuilt from what the runs wrote.

A run's identity is in config.json (digests) and its settings in resolved.json. Two runs are reported together only if
their source, views or tokenizer, held-out split and cache have the same digests, and these are what is on the disk now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.cache.storage.base import is_bucket
from softcache.config.load import build_config
from softcache.config.run import RunConfig
from softcache.data.sources.base import Split
from softcache.errors import AlignmentError, IdentityError, RunError, SpecError
from softcache.modalities import Score, modality_of
from softcache.models.weight_files import load_weights
from softcache.reader.cache import Cache
from softcache.runs import Data, open_data, open_teacher
from softcache.runs.report.caches import describe_policy, find_caches
from softcache.runs.report.differences import describe_settings, differing_settings
from softcache.runtime.files import read_json
from softcache.student import StudentSettings
from softcache.student.bucket_sync import BucketSync, find_runs
from softcache.student.checkpoint import diff_settings, hold_run
from softcache.student.tasks import Task, TokenStudent
from softcache.teacher.base import Teacher

__all__ = ["Report", "Run", "match_samples", "open_report", "open_run"]

MAX_SETTINGS_IN_NAME = 4
DATA_IDENTITY_KEYS = ("source", "views", "evaluation", "tokenizer", "cross_documents")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: of the student and its labels; unique in a report.
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
    """Runs of one data set, opened and checked.

    Attributes:
        cache: None where it is not found; `missing` then has the reason. Of several, the one that keeps most.
        teacher: None where its weights are not found; `missing` then has the reason.
        unfinished: directories without results, left out.
        missing: "cache" or "teacher" -> why it is not there.
        caches: of all runs, the one that keeps most first.
    """

    runs: list[Run]
    data: Data
    cache: Cache | None
    teacher: Teacher | None
    unfinished: list[str | Path] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    caches: list[Cache] = field(default_factory=list)

    @property
    def config(self) -> RunConfig:
        return self.runs[0].config

    @property
    def score(self) -> Score:
        """What its students are compared by."""
        return modality_of(self.config).score

    def cache_of(self, run: Run) -> Cache | None:
        """Returns the cache that a run learnt from; None if it learnt from none, or it is not there."""
        return next((c for c in self.caches if c.manifest_sha256 == run.identity.get("cache")), None)

    def data_of(self, run: Run) -> Any:
        """Returns what a run's student reads: `data`, or its own where that is not what the teacher sees."""
        return self.data.student_data(run.config)

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


def open_report(paths: Sequence[str | Path], *, cache_url: str | Sequence[str] | None = None) -> Report:
    """Returns the opened runs with their shared data, caches and teacher.

    Args:
        paths: directories of runs, or folders of such directories; also URLs of a bucket, of which local copies are made.
        cache_url: where the cache is now, or the caches are; None: the location in the runs' config.

    Raises:
        RunError: a path holds no finished run, one that cannot be read, or of a modality without a report.
        IdentityError: the runs are of different data or caches, or what is there is not what they learnt from.
    """
    folders, unfinished = _folders(paths)
    read = [_read(folder) for folder in folders]
    _check_same_identity(read)
    data = open_data(read[0].config)
    if not modality_of(config := read[0].config).has_report:
        raise RunError(
            f"run {read[0].path}: of source.modality {config.source.modality!r}; expected students of images or texts, "
            "which the report is made for; compare others with `softcache train-students` and `softcache compare`"
        )
    for run in read:
        _check_same_data(run, data)
    missing: dict[str, str] = {}
    urls = [cache_url] if isinstance(cache_url, str) else list(cache_url or ())
    caches = find_caches(read, urls, missing)
    runs, cache = _rename_unique(read, caches), caches[0] if caches else None
    teacher = _teacher(runs[0].config, data, cache, missing)
    return Report(runs, data, cache, teacher, unfinished, missing, caches)


def _rename_unique(runs: list[Run], caches: list[Cache]) -> list[Run]:
    """Returns the runs with unique names: with the policy of the cache, of several, what else differs, or the directory."""
    if len(caches) > 1:
        kept = {cache.manifest_sha256: describe_policy(cache) for cache in caches}
        runs = [
            replace(run, name=f"{run.name[:-1]}, {kept[run.identity['cache']]})")
            if "cache" in run.identity
            else run
            for run in runs
        ]
    runs = _name_by_settings(runs)
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} {run.path.name}") if names.count(run.name) > 1 else run for run in runs
    ]


def _name_by_settings(runs: list[Run]) -> list[Run]:
    """Returns the runs, those of one name with the settings in which they differ."""
    named: dict[str, list[Run]] = {}
    for run in runs:
        named.setdefault(run.name, []).append(run)
    varying = {name: differing_settings(equal)[:MAX_SETTINGS_IN_NAME] for name, equal in named.items()}
    return [
        replace(run, name=f"{run.name[:-1]}, {what})")
        if (what := describe_settings(run, varying[run.name]))
        else run
        for run in runs
    ]


def open_run(path: str | Path, *, cache_url: str | None = None) -> Report:
    """Returns a report of one run.

    Raises:
        RunError: there are several runs, or what `open_report` raises.
        IdentityError: what is there is not what it learnt from.
    """
    folders, _ = _folders([path])
    if len(folders) != 1:
        raise RunError(f"run {path}: expected one run; found {len(folders)} in it; name one's own directory")
    return open_report(folders, cache_url=cache_url)


def _folders(paths: Sequence[str | Path]) -> tuple[list[Path], list[str | Path]]:
    """Returns the directories of finished runs, those of a bucket as local copies, and what is not finished."""
    found: list[Path] = []
    unfinished: list[str | Path] = []
    for given in paths:
        done, left = _fetched(str(given)) if is_bucket(str(given)) else _inside(Path(given))
        if not done and {Path(given), str(given).rstrip("/")} & {*left}:
            raise RunError(f"run {given}: not finished (no metrics.json); run its command again to finish it")
        if not done:
            raise RunError(
                f"run {given}: expected a run's directory (config.json, resolved.json, metrics.json), or a folder of "
                "such; found none; `softcache train-students --config FILE` makes them under runs/NAME/students"
            )
        found += done
        unfinished += left
    return list({path.resolve(): path for path in found}.values()), unfinished


def _inside(path: Path) -> tuple[list[Path], list[Path]]:
    there = [path] if (path / "config.json").exists() else [p.parent for p in path.glob("*/config.json")]
    done = [folder for folder in there if (folder / "metrics.json").exists()]
    return sorted(done), sorted(set(there) - set(done))


def _fetched(url: str) -> tuple[list[Path], list[str]]:
    done, left = find_runs(url)
    folders = []
    for place in done:
        mirror = BucketSync(place)
        with hold_run(mirror.folder, mirror):
            folders.append(mirror.folder)
    return folders, left


def _read(path: Path) -> Run:
    identity, resolved, metrics = (
        read_json(path / f"{name}.json", "restore it from a copy, or train it again", error=RunError)
        for name in ("config", "resolved", "metrics")
    )
    for table, name, key in ((identity, "config", "model"), (metrics, "metrics", "labels")):
        if not isinstance(table.get(key), str):
            raise RunError(
                f"run {path}: {name}.json: {key}: expected a text; found {table.get(key)!r}; restore it from a copy, or "
                "train it again"
            )
    resolved.pop("sweep", None)
    config = build_config(resolved, str(path / "resolved.json"))
    if identity.get("student_data") and not config.student.has_own_input:
        raise RunError(
            f"run {path}: its student has another tokenizer than the teacher, and their tokens cannot be compared one by "
            "one; neither report nor export is of such a student: name other runs"
        )
    student = config.student.model_copy(update={"context": identity.get("context")})
    name = f"{identity['model']} ({metrics['labels']}{_describe_input(student)})"
    return Run(path, name, config.model_copy(update={"student": student}), identity, metrics)


def _describe_input(student: StudentSettings) -> str:
    """Returns the student's input as a part of a run's name; empty where it is the teacher's."""
    source, views = student.source, student.views
    what = [] if source is None else [source.describe()]
    if views is not None:
        what += [f"size {views.size}"] * (views.size is not None) + ["grey"] * views.grey
    return f", reads {' '.join(what)}" if what else ""


def _check_same_identity(runs: list[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        differing = [
            name for name in DATA_IDENTITY_KEYS if run.identity.get(name) != first.identity.get(name)
        ]
        if differing:
            raise IdentityError(
                f"run {run.path}: of other data than {first.path} ({', '.join(differing)} differ); a report is of one data "
                "set: report this run apart"
            )


def _check_same_data(run: Run, data: Data) -> None:
    here: dict[str, Any] = data.identity()
    if run.config.student.has_own_input:
        here["student_data"] = data.student_data(run.config).identity()
    differing = diff_settings({name: run.identity.get(name) for name in here}, here)
    if differing:
        raise IdentityError(
            f"run {run.path}: its data changed since (then; now): {'; '.join(differing)}; restore the data"
        )


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


def match_samples(report: Report, run: Run, split: Split) -> np.ndarray | None:
    """Returns [N] int64, the student's sample for each of the teacher's samples of a split; -1: none. None: same data.

    Raises:
        RunError: the student's held-out samples are not the teacher's.
    """
    try:
        matches: np.ndarray | None = report.data_of(run).sample_matches(report.data, split)
    except AlignmentError as error:
        raise RunError(
            f"run {run.path}: its student's held-out samples cannot be matched with the teacher's: {error}"
        ) from error
    return matches
