"""Train a student from the cache, and the same student on hard labels for comparison.

make train-student                        # embedded data; makes the cache if there is none
make train-student STUDENT=cnn            # another student, the same cache, no teacher loaded
softcache train-student --config configs/digits.toml --student timm:test_resnet
"""

import click

from softcache.modalities import modality_of

from .options import (
    cache_option,
    complete_file,
    config_options,
    json_option,
    log_option,
    print_json,
    print_table,
    track_option,
)

__all__ = ["train_student_command"]


@click.command("train-student")
@config_options
@cache_option
@track_option
@log_option
@json_option
@click.option(
    "--student", "model", metavar="SPEC", help="The architecture [default: student.model of the config]."
)
@click.option(
    "--out",
    metavar="DIR",
    shell_complete=complete_file,
    help="The run's directory, or its URL in a bucket [default: one under runs/NAME/students].",
)
@click.option(
    "--baseline/--no-baseline", default=True, show_default=True, help="Also train it on hard labels."
)
@click.option(
    "--allow-partial", is_flag=True, help="Train on what is there if units of the cache are missing."
)
def train_student_command(
    config_path: str,
    overrides: tuple[str, ...],
    url: str | None,
    track_with: str | None,
    model: str | None,
    out: str | None,
    baseline: bool,
    allow_partial: bool,
    as_json: bool,
) -> None:
    """Train one student from the cache; the teacher is not loaded.

    A run that was killed goes on from its last checkpoint (SIGINT and SIGTERM save one first); one that is
    finished is reported, not repeated.

    \b
    Example:
      softcache train-student --config configs/digits.toml --student cnn --set loss.temperature=2
    """
    from softcache.config.load import load_config
    from softcache.runs import open_data, open_labels, train_student
    from softcache.runs.tables import student_report, student_tables

    config = load_config(config_path, overrides)
    data = open_data(config)
    cache = open_labels(config, url)
    model = model or config.student.model
    cached = train_student(
        config,
        data,
        model=model,
        labels="cache",
        cache=cache,
        out=out,
        allow_partial=allow_partial,
        track_with=track_with,
    )
    hard = train_student(config, data, model=model, labels="ground_truth") if baseline else None
    if as_json:
        print_json(student_report(cache, [(cached, hard)]))
        return
    for table in student_tables(cache, [(cached, hard)], modality_of(config)):
        print_table(*table)
    click.echo(f"weights, metrics and config: {cached['out']}")
