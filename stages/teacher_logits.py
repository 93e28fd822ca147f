"""Run the teacher once over the data and write its soft labels to a cache.

make teacher-logits                                     # embedded data, a minute on a CPU
softcache teacher-logits --config configs/digits.toml --set labels.k=5 --cache runs/k5
softcache teacher-logits --config configs/digits.toml --dask auto
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from softcache.errors import ConfigError
from softcache.reader.cache import Cache
from softcache.reader.open import open_cache
from softcache.runtime.display import format_duration
from softcache.runtime.kernels import compile_kernels
from softcache.runtime.logging import log_info

from .options import (
    cache_option,
    cache_report,
    config_options,
    json_option,
    log_option,
    print_json,
    print_table,
    track_option,
)

if TYPE_CHECKING:
    from softcache.config.run import RunConfig
    from softcache.teacher.capture.estimate import Estimate
    from softcache.teacher.capture.run import CaptureReport

__all__ = ["teacher_logits"]


@click.command()
@config_options
@cache_option
@track_option
@log_option
@json_option
@click.option(
    "--reuse", is_flag=True, help="Do nothing (not even load the teacher) if the cache is complete."
)
@click.option(
    "--dask",
    metavar="auto|ADDRESS",
    help="Label on many workers: processes of this machine (auto), or an existing cluster (tcp://host:8786).",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes of --dask auto [default: one per GPU, else per core].",
)
@click.option(
    "--stall-timeout",
    "stall_seconds",
    type=click.FloatRange(min=1),
    metavar="SECONDS",
    help="Restart a Dask worker whose unit makes no progress for so long "
    "[default: 10 times the median unit, at least 300].",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Write nothing; measure a few chunks, and estimate the bytes and time that are left.",
)
@click.option(
    "--price-per-hour",
    type=click.FloatRange(0),
    metavar="PRICE",
    help="Price of this machine, for the cost estimate of --dry-run.",
)
def teacher_logits(
    config: RunConfig,
    url: str | None,
    reuse: bool,
    dask: str | None,
    workers: int | None,
    stall_seconds: float | None,
    as_json: bool,
    dry_run: bool,
    price_per_hour: float | None,
) -> None:
    """Run the teacher once; write its soft labels to the cache.

    A rerun after a kill does what is missing and nothing else. A teacher whose weights
    are missing is trained first if the config has a [train_teacher] table.

    Of a corpus in parts, whose `cache` has a {part}, the parts are labeled one after
    the other, and the next one is tokenized meanwhile.

    \b
    Example:
      softcache teacher-logits --config configs/digits.toml --set labels.num_views=8
      softcache teacher-logits --config configs/digits.toml --dask auto
      softcache teacher-logits --config configs/digits.toml --dry-run --price-per-hour 2.5
    """
    compile_kernels()
    from softcache.runs import (
        cache_is_ready,
        capture_estimate,
        capture_labels,
        make_teacher,
        open_data,
        open_teacher,
    )

    config = config.model_copy(update={"cache": url or config.cache})
    if workers is not None and dask != "auto":
        raise ConfigError("--workers: is the number of processes of --dask auto; add --dask auto")
    if stall_seconds is not None and dask is None:
        raise ConfigError("--stall-timeout: is for workers of --dask; add --dask auto, or its address")
    if price_per_hour is not None and not dry_run:
        raise ConfigError("--price-per-hour: is for the cost estimate of --dry-run; add --dry-run")
    if len(config.parts()) > 1:
        on_dask = {"dask": dask, "workers": workers, "stall_seconds": stall_seconds}
        _label_parts(config, on_dask, reuse=reuse, dry_run=dry_run, as_json=as_json)
        return
    url = config.cache_url
    if dry_run:
        if dask is not None:
            raise ConfigError(
                "--dry-run: measures this process; leave out --dask, and divide the time by its workers"
            )
        estimate = capture_estimate(config, open_data(config), url)
        _print_estimate(url, estimate, price_per_hour, as_json)
        return
    if reuse and cache_is_ready(config, open_data(config), url):
        log_info(f"cache {url}: complete; the teacher is not loaded")
        if as_json:
            print_json(_report_table(open_cache(url), None))
        return
    if dask is not None:
        from softcache.runs.dask import capture_on_dask

        report = capture_on_dask(config, url, dask, workers=workers, stall_seconds=stall_seconds)
        cache = open_cache(url)
    else:
        data = open_data(config)
        make_teacher(config, data)
        cache, report = capture_labels(config, data, open_teacher(config, data), url)
    if as_json:
        print_json(_report_table(cache, report))
    else:
        _print_report(cache, url, report)


def _label_parts(
    config: RunConfig, on_dask: dict[str, Any], *, reuse: bool, dry_run: bool, as_json: bool
) -> None:
    from softcache.runs.parts import capture_parts

    if dry_run:
        raise ConfigError("--dry-run: measures one cache; choose a part with --set source.part=0")
    reports = []
    for url, cache, report in capture_parts(config, reuse=reuse, **on_dask):
        if as_json:
            reports.append(_report_table(cache, report))
        elif report is None:
            log_info(f"cache {url}: complete")
        else:
            _print_report(cache, url, report)
    if as_json:
        print_json({"parts": reports})


def _report_table(cache: Cache, report: CaptureReport | None) -> dict[str, Any]:
    if report is None:
        return cache_report(cache) | {"made_now": None}
    slowest = report.slowest and report.slowest._asdict()
    return cache_report(cache) | {"made_now": asdict(report) | {"slowest": slowest}}


def _print_report(cache: Cache, url: str, report: CaptureReport) -> None:
    plan = cache.manifest.plan
    num_bytes = sum(cache.bytes_by_column().values())
    rows = cache.num_rows_done
    click.echo(
        f"cache {url}: {plan.num_samples:,} samples x {plan.num_views} views, {rows:,} rows, "
        f"K={cache.manifest.codec['k']} of {cache.num_classes} classes, "
        f"{num_bytes:,} bytes ({num_bytes / rows:.1f} per row); "
        f"{report.units_done} units made now, {report.units_found} found; {format_duration(report.seconds)}"
    )
    if report.slowest is not None and report.seconds:
        seconds, slowest = report.seconds, report.slowest
        click.echo(
            f"made now: {report.rows / seconds:,.0f} rows/s, {report.num_bytes / seconds:,.0f} bytes/s; teacher busy "
            f"{min(1.0, report.teacher_seconds / (seconds * report.workers)):.0%} of the time; slowest unit "
            f"{slowest.unit}: {format_duration(slowest.seconds)}"
        )


def _print_estimate(url: str, estimate: Estimate, price_per_hour: float | None, as_json: bool) -> None:
    cost = None if price_per_hour is None else price_per_hour * estimate.seconds / 3600
    if as_json:
        print_json({"cache": url, **asdict(estimate), "price_per_hour": price_per_hour, "cost": cost})
        return
    rows = [
        ("units", f"{estimate.units:,}", f"{estimate.units_done:,}", f"{estimate.units_left:,}"),
        ("rows", f"{estimate.rows:,}", f"{estimate.rows_done:,}", f"{estimate.rows_left:,}"),
        ("bytes", f"{estimate.num_bytes:,}", f"{estimate.num_bytes_done:,}", f"{estimate.num_bytes_left:,}"),
        ("time", "", "", format_duration(estimate.seconds)),
    ]
    if cost is not None:
        rows.append(("cost", "", "", f"{cost:,.2f}"))
    print_table(f"dry run: {url}", ("", "total", "done", "left (estimate)"), rows)
    if estimate.rows_per_second is not None:
        click.echo(
            f"from {estimate.measured_chunks} chunks: {estimate.bytes_per_row:.1f} bytes per row, "
            f"{estimate.rows_per_second:,.0f} rows/s; {format_duration(estimate.evaluate_seconds)} to score the teacher; "
            "nothing was written"
        )
