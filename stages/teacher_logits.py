"""Run the teacher once over the data and write its soft labels to a cache.

make teacher-logits                                     # embedded data, a minute on a CPU
softcache teacher-logits --config configs/digits.toml --set labels.k=5 --cache runs/k5
"""

import click

from pipeline.config import load_config
from pipeline.progress import say
from pipeline.runs import cache_is_ready, capture_labels, make_teacher, open_data, open_teacher
from stages.options import cache_option, config_options, log_option

__all__ = ["teacher_logits"]


@click.command()
@config_options
@cache_option
@log_option
@click.option(
    "--reuse", is_flag=True, help="Do nothing (not even load the teacher) if the cache is complete."
)
def teacher_logits(config_path: str, overrides: tuple[str, ...], url: str | None, reuse: bool) -> None:
    """Run the teacher once; write its soft labels to the cache.

    Kill it at any moment and run it again: it does what is missing and nothing else. A teacher whose weights
    are missing is trained first if the config has a [train_teacher] table.

    \b
    Example:
      softcache teacher-logits --config configs/digits.toml --set labels.num_views=8
    """
    config = load_config(config_path, overrides)
    url = url or config.cache_url
    data = open_data(config)
    if reuse and cache_is_ready(config, data, url):
        say(f"cache {url}: complete; the teacher is not loaded")
        return
    make_teacher(config, data)
    teacher = open_teacher(config, data)
    cache, report = capture_labels(config, data, teacher, url)
    plan = cache.manifest.plan
    num_bytes = sum(shard.num_bytes for marker in cache.markers.values() for shard in marker.shards)
    rows = sum(marker.num_rows for marker in cache.markers.values())
    click.echo(
        f"cache {url}: {plan.num_samples:,} samples x {plan.num_views} views, {rows:,} rows, "
        f"K={cache.manifest.codec['k']} of {cache.num_classes} classes, "
        f"{num_bytes:,} bytes ({num_bytes / rows:.1f} per row); "
        f"{report.units_done} units made now, {report.units_found} were there; {report.seconds:.1f} s"
    )
    if report.slowest is not None and report.seconds:
        seconds, slowest = report.seconds, report.slowest
        click.echo(
            f"made now: {report.rows / seconds:,.0f} rows/s, {report.num_bytes / seconds:,.0f} bytes/s; teacher busy "
            f"{min(1.0, report.teacher_seconds / (seconds * report.workers)):.0%} of the time; slowest unit "
            f"{slowest.unit}: {slowest.seconds:.1f} s"
        )
