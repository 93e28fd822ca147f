"""Train several architectures from one cache and print one table.

make train-students
softcache train-students --config configs/digits.toml --student mlp --student timm:test_vit?img_size=8&patch_size=2
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from softcache.modalities import modality_of

from .options import (
    cache_option,
    check_reads_cache,
    config_options,
    json_option,
    print_json,
    print_table,
    track_option,
)

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["train_students"]


@click.command("train-students")
@config_options
@cache_option
@track_option
@json_option
@click.option(
    "--student",
    "models",
    multiple=True,
    metavar="SPEC",
    help="An architecture; may be given several times [default: student.models of the config].",
)
def train_students(config: RunConfig, url: str | None, models: tuple[str, ...], as_json: bool) -> None:
    """Train many students from one cache, best first in the table.

    \b
    Example:
      softcache train-students --config configs/digits.toml
    """
    from softcache.runs import open_data, open_labels, train_student, with_cached_labels
    from softcache.runs.tables import student_advice, student_report, student_tables

    check_reads_cache(config)
    cache = open_labels(config, url)
    config = with_cached_labels(config, cache)
    data = open_data(config)
    results = []
    for model in models or modality_of(config).models(config):
        cached = train_student(config, data, model=model, labels="cache", cache=cache)
        results.append((cached, train_student(config, data, model=model, labels="ground_truth")))
    score = modality_of(config).score
    results.sort(key=lambda pair: score.order(pair[0][score.metric]))
    if as_json:
        print_json(student_report(cache, results, config.loss, modality_of(config)))
        return
    for table in student_tables(cache, results, modality_of(config)):
        print_table(*table)
    for cached, hard in results:
        if line := student_advice(config.loss, modality_of(config), cached, hard):
            click.echo(f"{cached['model']}: {line}")
