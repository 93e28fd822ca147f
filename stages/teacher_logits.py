"""Run the teacher once over the data and write its soft labels to a cache.

make teacher-logits                                     # embedded data, a minute on a CPU
softcache teacher-logits --config configs/digits.toml --set labels.k=5 --cache runs/k5
softcache teacher-logits --config configs/digits.toml --dask auto
"""

from dataclasses import asdict

import click

from pipeline.cache import Cache, open_cache
from pipeline.capture import CaptureReport
from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.progress import say
from pipeline.runs import cache_is_ready, capture_labels, make_teacher, open_data, open_teacher
from stages.options import cache_option, config_options, json_option, log_option, print_json
from stages.rows import cache_report

__all__ = ["teacher_logits"]


@click.command()
@config_options
@cache_option
@log_option
@json_option
@click.option(
    "--reuse", is_flag=True, help="Do nothing (not even load the teacher) if the cache is complete."
)
@click.option(
    "--dask",
    metavar="auto|ADDRESS",
    help="Label on many workers: processes of this machine (auto), or a cluster that is there (tcp://host:8786).",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes of --dask auto [default: one per GPU, else per core].",
)
def teacher_logits(
    config_path: str,
    overrides: tuple[str, ...],
    url: str | None,
    reuse: bool,
    dask: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Run the teacher once; write its soft labels to the cache.

    Kill it at any moment and run it again: it does what is missing and nothing else. A teacher whose weights
    are missing is trained first if the config has a [train_teacher] table.

    \b
    Example:
      softcache teacher-logits --config configs/digits.toml --set labels.num_views=8
      softcache teacher-logits --config configs/digits.toml --dask auto
    """
    config = load_config(config_path, overrides)
    url = url or config.cache_url
    if workers is not None and dask != "auto":
        raise ConfigError("--workers: says how many processes --dask auto starts; give that, too")
    if reuse and cache_is_ready(config, open_data(config), url):
        say(f"cache {url}: complete; the teacher is not loaded")
        if as_json:
            print_json(cache_report(open_cache(url)) | {"made_now": None})
        return
    if dask is not None:
        from pipeline.parallel import capture_on_dask

        report = capture_on_dask(config, url, dask, workers=workers)
        cache = open_cache(url)
    else:
        data = open_data(config)
        make_teacher(config, data)
        cache, report = capture_labels(config, data, open_teacher(config, data), url)
    if as_json:
        slowest = report.slowest and report.slowest._asdict()
        print_json(cache_report(cache) | {"made_now": asdict(report) | {"slowest": slowest}})
    else:
        _tell(cache, url, report)


def _tell(cache: Cache, url: str, report: CaptureReport) -> None:
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
