"""From a config to a measured, exported student: teacher, cache, student, ONNX, torch.export and int8.

make distill                                                   # embedded data, about a minute on two cores
make distill CONFIG=configs/stdlib-lm.toml SEARCH=1
softcache distill --config configs/digits.toml --out exported
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from pipeline.cache import Cache
from pipeline.config import RunConfig, load_config
from pipeline.errors import ConfigError, RunError
from pipeline.export import ExportSettings, load_onnxruntime
from pipeline.progress import say
from pipeline.runs import (
    cache_is_ready,
    capture_labels,
    make_teacher,
    open_data,
    open_labels,
    open_teacher,
    train_student,
)
from pipeline.stores.objects import is_bucket
from stages.export import export_and_tell, export_options
from stages.options import cache_option, config_options, log_option

__all__ = ["distill"]


@click.command("distill")
@config_options
@cache_option
@log_option
@click.option(
    "--student", "model", metavar="SPEC", help="The architecture [default: student.model of the config]."
)
@click.option("--sweep", is_flag=True, help="Search the student's settings first, and take the best.")
@click.option("--out", metavar="DIR", help="Where the files go [default: runs/NAME/export/RUN].")
@export_options
def distill(
    config_path: str,
    overrides: tuple[str, ...],
    url: str | None,
    model: str | None,
    sweep: bool,
    out: str | None,
    settings: ExportSettings,
    max_drop: float,
    as_json: bool,
) -> None:
    """Do everything: teacher if there is none, cache, student, export, int8, and a verified table.

    Each step keeps what is finished: a run that was killed goes on, and one that is done is reported.

    \b
    Example:
      softcache distill --config configs/digits.toml
      softcache distill --config configs/sweep-digits.toml --sweep --max-drop 0.5
    """
    load_onnxruntime()
    config = load_config(config_path, overrides)
    if config.teacher is None:
        raise ConfigError(
            f"config {config.name}: table [teacher] is missing; distill begins with a teacher; to export a student that "
            "is there, use softcache export RUN"
        )
    if sweep and model:
        raise ConfigError("--student: --sweep chooses the student; give one of the two")
    if is_bucket(out or ""):
        raise RunError(f"export {out}: files are exported into a folder; give --out a local one")
    url = url or config.cache_url
    if config.fusion is None:
        _make_cache(config, url)
    if sweep:
        config, url = _swept(config, url), None  # the best trial names its own cache
    data, cache = open_data(config), open_labels(config, url)
    trained = train_student(config, data, model=model or config.student.model, labels="cache", cache=cache)
    path = Path(trained["out"])
    cost = _cost(config, cache, trained)
    export_and_tell(
        path,
        out or str(config.root / "export" / path.name),
        settings,
        url=cache.url,
        cost=cost,
        max_drop=max_drop,
        as_json=as_json,
    )


def _make_cache(config: RunConfig, url: str) -> None:
    """Fills the cache, and keeps how long that took beside the run."""
    data = open_data(config)
    if cache_is_ready(config, data, url):
        say(f"cache {url}: complete; the teacher is not loaded for it")
        return
    make_teacher(config, data)
    began = time.monotonic()
    cache, report = capture_labels(config, data, open_teacher(config, data), url)
    say(f"cache {url}: {report.units_done} units made now, {report.units_found} were there")
    told = _capture_seconds(config, cache)
    # Units of a run that was killed took time that nobody wrote down; the total is then not known.
    known = report.units_found == 0 or told is not None
    seconds = (told or 0.0) + time.monotonic() - began if known else None
    file = config.root / "distill-capture.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_suffix(".new")
    staged.write_text(json.dumps({"cache": cache.manifest_sha256, "seconds": seconds}) + "\n")
    staged.replace(file)


def _capture_seconds(config: RunConfig, cache: Cache) -> float | None:
    try:
        told = json.loads((config.root / "distill-capture.json").read_text())
    except (OSError, ValueError):
        return None
    return told.get("seconds") if told.get("cache") == cache.manifest_sha256 else None


def _swept(config: RunConfig, url: str) -> RunConfig:
    from pipeline.sweep import run_sweep
    from pipeline.sweep.results import write_best

    found = run_sweep(config, url, config.root / "sweep", trials=config.sweep.trials, workers=1)
    best = write_best(found)
    say(f"sweep: {config.sweep.trials} trials; the best one is {best}")
    return load_config(best)


def _cost(config: RunConfig, cache: Cache, trained: dict[str, Any]) -> dict[str, Any]:
    """What the student cost; None where it was not measured here."""
    metrics = config.root / "teacher" / "metrics.json"
    return {
        "teacher_passes": cache.num_views,
        "teacher_training_seconds": json.loads(metrics.read_text())["seconds"] if metrics.is_file() else None,
        "teacher_pass_seconds": _capture_seconds(config, cache),
        "student_training_seconds": trained["seconds"],
    }
