"""Train a student from the cache, and the same student on hard labels for comparison.

make train-student                        # embedded data; makes the cache if there is none
make train-student STUDENT=cnn            # another student, the same cache, no teacher loaded
softcache train-student --config configs/digits.toml --student timm:test_resnet
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from softcache.errors import ConfigError
from softcache.modalities import modality_of
from softcache.runtime.kernels import compile_kernels

from .options import (
    PATH,
    cache_option,
    config_options,
    json_option,
    log_option,
    print_json,
    print_table,
    student_option,
    track_option,
)

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["train_student_command"]


@click.command("train-student")
@config_options
@cache_option
@track_option
@log_option
@json_option
@student_option
@click.option(
    "--out",
    metavar="DIR",
    type=PATH,
    help="The run's directory, or its URL in a bucket [default: one under runs/NAME/students].",
)
@click.option("--baseline/--no-baseline", default=False, help="Also train it on hard labels, for comparison.")
@click.option("--allow-partial", is_flag=True, help="Train on the finished units if some are missing.")
def train_student_command(
    config: RunConfig,
    url: str | None,
    model: str | None,
    out: str | None,
    baseline: bool,
    allow_partial: bool,
    as_json: bool,
) -> None:
    """Train one student from the cache, without the teacher; by train.labels on ground truth or with an online teacher.

    A killed run goes on from its last checkpoint (SIGINT and SIGTERM save one first); a finished one is reported, not
    repeated.

    \b
    Example:
      softcache train-student --config configs/digits.toml --student cnn --set loss.temperature=2
    """
    compile_kernels()
    from softcache.runs import open_data, open_labels, train_student, with_cached_labels
    from softcache.runs.tables import student_advice, student_report, student_tables

    if config.train.labels != "cache":
        for option, given in (("--cache", url), ("--allow-partial", allow_partial)):
            if given:
                raise ConfigError(
                    f"{option}: train.labels = {config.train.labels!r} in the config, which reads no cache; drop one of them"
                )
        _train_without_cache(config, model or config.student.model, out, baseline=baseline, as_json=as_json)
        return
    cache = open_labels(config, url)
    config = with_cached_labels(config, cache)
    data = open_data(config)
    model = model or config.student.model
    cached = train_student(
        config,
        data,
        model=model,
        labels="cache",
        cache=cache,
        out=out,
        allow_partial=allow_partial,
    )
    hard = train_student(config, data, model=model, labels="ground_truth") if baseline else None
    if as_json:
        print_json(student_report(cache, [(cached, hard)], config.loss, modality_of(config)))
        return
    for table in student_tables(cache, [(cached, hard)], modality_of(config)):
        print_table(*table)
    if line := student_advice(config.loss, modality_of(config), cached, hard):
        click.echo(line)
    click.echo(f"weights, metrics and config: {cached['out']}")


def _train_without_cache(
    config: RunConfig, model: str, out: str | None, *, baseline: bool, as_json: bool
) -> None:
    from softcache.runs import open_data, open_teacher, train_student
    from softcache.runs.tables import without_history

    data, labels = open_data(config), config.train.labels
    teacher = open_teacher(config, data) if labels == "online" else None
    runs = {labels: train_student(config, data, model=model, labels=labels, teacher=teacher, out=out)}
    if baseline and labels != "ground_truth":
        runs["ground_truth"] = train_student(config, data, model=model, labels="ground_truth")
    if as_json:
        print_json({"model": model, "students": {name: without_history(run) for name, run in runs.items()}})
        return
    score = modality_of(config).score
    rows = [
        (model, name, f"{run['num_parameters']:,}", score.format(run[score.metric]), f"{run['seconds']:.1f}")
        for name, run in runs.items()
    ]
    print_table(
        f"students of {config.name}", ("student", "labels", "parameters", score.title, "seconds"), rows
    )
    click.echo(f"weights, metrics and config: {runs[labels]['out']}")
