"""From a config to a measured, exported student: teacher, cache, student, ONNX, torch.export and int8.

make distill                                                   # embedded data, about a minute on two cores
make distill CONFIG=configs/sweep-digits.toml SEARCH=1          # the best of a sweep
softcache distill --config configs/digits.toml --out exported
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from softcache.errors import ConfigError, RunError
from softcache.modalities import modality_of
from softcache.reader.cache import Cache
from softcache.runtime.files import read_json, replace_file, to_json
from softcache.runtime.logging import log_info

from .export import export_and_print, export_options
from .options import LOCAL, cache_option, check_reads_cache, config_options, log_option, student_option

if TYPE_CHECKING:
    from softcache.config.run import RunConfig
    from softcache.runs import Data
    from softcache.runs.export import ExportSettings

__all__ = ["distill"]


@click.command("distill")
@config_options
@cache_option
@log_option
@student_option
@click.option("--sweep", is_flag=True, help="Search the student's settings first, and take the best.")
@click.option(
    "--out",
    metavar="DIR",
    type=LOCAL,
    help="Where the files go [default: runs/NAME/export/RUN].",
)
@export_options
def distill(
    config: RunConfig,
    url: str | None,
    model: str | None,
    sweep: bool,
    out: str | None,
    settings: ExportSettings,
    max_drop: float,
    as_json: bool,
) -> None:
    """Run all stages: teacher if there is none, cache, student, export, int8, and a verified table.

    Each step keeps what is finished: a killed run goes on, and a finished one is reported.

    \b
    Example:
      softcache distill --config configs/digits.toml
      softcache distill --config configs/sweep-digits.toml --sweep --max-drop 0.5
    """
    from softcache.runs import open_data, open_labels
    from softcache.runs.export import load_onnxruntime

    check_reads_cache(config)
    load_onnxruntime()
    if config.teacher is None:
        raise ConfigError(
            f"config {config.name}: table [teacher] is missing; distill begins with a teacher; to export a finished "
            "student, use softcache export RUN"
        )
    if sweep and model:
        raise ConfigError("--student: --sweep chooses the student; give one of the two")
    if config.student.tokenizer is not None:
        raise ConfigError(
            f"student.tokenizer: {config.student.tokenizer!r}: a student with another tokenizer than its teacher's is not "
            "exported with it; use softcache train-student, whose run has an hf/ folder"
        )
    data = open_data(config)
    task = data.task(config, model or config.student.model)
    task.serve(task.build())  # refuses what cannot be exported before anything is trained
    url = url or config.cache_url
    if config.fusion is None:
        _make_cache(config, data, url)
    cache = open_labels(config, url)
    made = _searched(config, cache) if sweep else _trained(config, data, cache, model or config.student.model)
    export_and_print(
        made.run,
        out or str(config.root / "export" / made.name),
        settings,
        url=made.cache.url,
        cost=_cost(config, cache) | made.cost,
        max_drop=max_drop,
        as_json=as_json,
    )


class _Made(NamedTuple):
    """A finished student: the directory of its run, what it is called, its cache, and what it cost."""

    run: Path
    name: str
    cache: Cache
    cost: dict[str, Any]


def _trained(config: RunConfig, data: Data, cache: Cache, model: str) -> _Made:
    from softcache.runs import train_student

    metrics = train_student(config, data, model=model, labels="cache", cache=cache)
    run = Path(metrics["out"])
    return _Made(run, run.name, cache, {"student_training_seconds": metrics["seconds"]})


def _searched(config: RunConfig, cache: Cache) -> _Made:
    """Sweeps, and takes the best trial's own run: nothing is trained twice."""
    from softcache.runs import slugify
    from softcache.runs.sweep import run_sweep
    from softcache.runs.sweep.results import best_trial, ranked_trials, write_best

    sweep = run_sweep(config, cache.url, config.root / "sweep", trials=config.sweep.trials, workers=1)
    best, written = best_trial(sweep), write_best(sweep)
    assert best.place is not None, "a finished trial has a run"
    results = [result for result in ranked_trials(sweep) if result.state in ("complete", "pruned")]
    score = f"{sweep.bench.metric} {modality_of(config).score.format(best.value)}"
    log_info(
        f"sweep: {len(results)} trials; the best is trial {best.number}, {score}; as a config: {written}"
    )
    cost = {
        "student_training_seconds": best.seconds,
        "sweep_trials": len(results),
        "sweep_seconds": sum(result.seconds for result in results),
    }
    slug = slugify(best.params.get("student", config.student.model))
    name = f"{slug}-sweep-{Path(best.place).name}"
    return _Made(sweep.bench.path / best.place, name, sweep.bench.cache_of(best.params), cost)


def _make_cache(config: RunConfig, data: Data, url: str) -> None:
    """Fills the cache, and records how long that took in the run."""
    from softcache.runs import cache_is_ready, capture_labels, make_teacher, open_teacher

    if cache_is_ready(config, data, url):
        log_info(f"cache {url}: complete; the teacher is not loaded for it")
        return
    make_teacher(config, data)
    began = time.monotonic()
    cache, report = capture_labels(config, data, open_teacher(config, data), url)
    log_info(f"cache {url}: {report.units_done} units made now, {report.units_found} found")
    earlier = _capture_seconds(config, cache)
    # Units of a run that was killed took time that was not recorded; the total is then not known.
    known = report.units_found == 0 or earlier is not None
    seconds = (earlier or 0.0) + time.monotonic() - began if known else None
    file = config.root / "distill-capture.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, to_json({"cache": cache.manifest_sha256, "seconds": seconds}))


def _capture_seconds(config: RunConfig, cache: Cache) -> float | None:
    file = config.root / "distill-capture.json"
    if not file.exists():
        return None
    recorded = read_json(file, "remove it: the time of the capture is then not known", error=RunError)
    return recorded.get("seconds") if recorded.get("cache") == cache.manifest_sha256 else None


def _cost(config: RunConfig, cache: Cache) -> dict[str, Any]:
    """What the labels cost; None where it was not measured here."""
    metrics, trained = config.root / "teacher" / "metrics.json", None
    if metrics.is_file():
        trained = read_json(metrics, "train the teacher again", error=RunError)["seconds"]
    return {
        "teacher_passes": cache.num_views,
        "teacher_training_seconds": trained,
        "teacher_pass_seconds": _capture_seconds(config, cache),
    }
