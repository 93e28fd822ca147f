"""What a unit costs more on a Dask cluster than in a plain run, and how large units make that less than 1%.

    python -m benchmarks.scheduling [--quick] [--rounds N] [--json F] [--plot F]
    python -m benchmarks.scheduling --many-units 100000

Tiny units and a teacher that costs next to nothing (`linear` on 8 x 8 digits): what is left is handing out, claiming,
publishing and counting. Every contender makes a few units and many; the slope between them is the cost of one, without
what a run costs however few its units (starting, opening data and teacher, the manifest). Caches lie in memory (/dev/shm),
because waiting for a disk, the same for both, would drown the difference. One worker process against one plain process,
on this machine: both publish a unit during the labeling of the next. A network adds its round trips, which overlap: two
units are on a worker and two more are waiting.

The overhead of a unit is a constant; a unit of R rows takes a teacher of r rows/s R / r seconds. So it stays below 1% from
R = 100 r x overhead on.

In addition the peak memory of driver and worker as the rows of a cache grow tenfold, each in processes of its own.

With `--many-units` labels are simulated: a unit is done when it is asked for, and what is left is the scheduler: the memory
of the driver (in whose process Dask's scheduler runs) and units per second as they go by.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.capture import image_config, with_capture
from benchmarks.harness import Figure, draw, measure, save, show
from softcache.config.run import RunConfig
from softcache.runs import capture_labels, open_data, open_teacher
from softcache.runs.dask import capture_on_dask
from softcache.runs.dask.cluster import DaskCluster, LocalWorkers, open_client
from softcache.runs.dask.scheduler import Scheduler
from softcache.runs.dask.worker import Job, Outcome
from softcache.stages.options import print_table
from softcache.teacher.capture.plan import RAGGED_ROWS, ROWS
from softcache.teacher.capture.run import UnitMetrics

UNIT_ROWS = 4
TEACHER_ROWS = (100, 1_000, 10_000, 100_000)
SHARE = 0.01
GROWTH = (1, 10)
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def contenders(config: RunConfig, address: str, few: int, many: int) -> dict[str, Callable[[], int]]:
    """By name, a run of so many units; each returns how many it made."""
    data = open_data(config)
    teacher = open_teacher(config, data)

    def sized(units: int) -> RunConfig:
        source = config.source.model_copy(update={"max_train_samples": units * UNIT_ROWS})
        return config.model_copy(update={"source": source})

    def plain(units: int) -> int:
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            return capture_labels(sized(units), open_data(sized(units)), teacher, f"{folder}/cache")[
                1
            ].units_done

    def on_dask(units: int) -> int:
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            return capture_on_dask(sized(units), f"{folder}/cache", address, torch_threads=1).units_done

    return {
        f"{name}, {units}": lambda run=run, units=units: run(units)  # type: ignore[misc]
        for name, run in (("plain", plain), ("dask", on_dask))
        for units in (few, many)
    }


def rates_on(client: Any, few: int, many: int, *, rounds: int) -> dict[str, list[float]]:
    """Returns units per second of every contender and round, on the cluster of a client."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        config = image_config(folder, "linear", 8, many * UNIT_ROWS)
        config = with_capture(config, unit_samples=UNIT_ROWS, chunk_samples=UNIT_ROWS, batch_size=UNIT_ROWS)
        runs = contenders(config, client.scheduler.address, few, many)
        for run in runs.values():
            run()  # compiled code, the worker's imports
        return measure(runs, rounds)


def unit_seconds(rates: dict[str, list[float]], name: str, few: int, many: int) -> list[float]:
    """Returns seconds per unit of each round: the slope between a run of few and one of many units."""
    small, large = ([units / rate for rate in rates[f"{name}, {units}"]] for units in (few, many))
    return [(two - one) / (many - few) for one, two in zip(small, large, strict=True)]


def figures(rates: dict[str, list[float]], few: int, many: int) -> tuple[list[Figure], list[float]]:
    """Returns units per second of both roads, and what a unit costs more on Dask [seconds], round by round."""
    plain, dask = (unit_seconds(rates, name, few, many) for name in ("plain", "dask"))
    rows = []
    for name, seconds in (("plain", plain), ("dask, one worker", dask)):
        ratios = [base / one for base, one in zip(plain, seconds, strict=True)]
        rate = 1 / statistics.median(seconds)
        rows.append(Figure(name, rate, statistics.median(ratios), min(ratios), max(ratios)))
    return rows, [two - one for one, two in zip(plain, dask, strict=True)]


def needed_rows(overhead_seconds: float, rows_per_second: float) -> float:
    """Returns the rows that a unit needs for the overhead to stay below SHARE.

    >>> needed_rows(0.005, 1_000)
    500.0
    """
    return overhead_seconds * rows_per_second / SHARE


def peak_mb(growth: int, *, quick: bool) -> tuple[float, float]:
    """Returns the peak memory (MB) of a fresh driver and of its fresh worker, which capture so many times the rows."""
    how = [sys.executable, "-m", "benchmarks.scheduling", "--peak-of", str(growth)]
    done = subprocess.run([*how, *(["--quick"] if quick else [])], capture_output=True, text=True, check=True)
    driver, worker = done.stdout.split()[-2:]
    return float(driver), float(worker)


def own_peak_mb() -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def report_peak(growth: int, *, quick: bool) -> None:
    local = LocalWorkers(1, gpus=False, torch_threads=1)
    with (
        tempfile.TemporaryDirectory(dir=MEMORY) as folder,
        open_client("auto", local, dashboard=":0") as client,
    ):
        config = image_config(folder, "linear", 8, 64 if quick else None)
        size = 16 if quick else 256  # small units, so that there are more of them than are ever in flight
        config = with_capture(config, unit_samples=size, chunk_samples=size, batch_size=size)
        labels = config.labels.model_copy(update={"num_views": growth * (1 if quick else 8)})
        config = config.model_copy(update={"labels": labels})
        capture_on_dask(config, f"{folder}/cache", client.scheduler.address, torch_threads=1)
        (worker,) = client.run(own_peak_mb).values()
    click.echo(f"{own_peak_mb():.1f} {worker:.1f}")


def simulated(job: Job, unit: int, **how: Any) -> Outcome:
    """Returns what a worker does for a unit, at once."""
    return Outcome(unit, "worker", UnitMetrics(unit, 0, 4096, 1 << 20, 1.0, 1.0, 0))


def own_mb() -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024


def schedule_many(units: int, parts: int = 10) -> list[tuple[int, float, float]]:
    """Schedules so many simulated units; returns for each part how many are done, the driver's MB, and units/s."""
    from benchmarks import scheduling  # by its name: workers import it

    rows: list[tuple[int, float, float]] = []
    done, since = 0, time.perf_counter()

    def count(outcome: Outcome) -> None:
        nonlocal done, since
        done += 1
        if done % (units // parts) == 0:
            now = time.perf_counter()
            rows.append((done, own_mb(), units / parts / (now - since)))
            since = now

    with open_client("auto", LocalWorkers(1, gpus=False, torch_threads=1), dashboard=":0") as client:
        cluster = DaskCluster(client, Job("{}", "nowhere"), is_local=True, function=scheduling.simulated)
        cluster.result(cluster.submit(0, last=False, avoid=frozenset()))  # the worker's imports
        since = time.perf_counter()
        assert not Scheduler(cluster, range(units), count).run()
    return rows


def show_many(units: int) -> None:
    rows = [(f"{done:,}", f"{mb:,.0f}", f"{rate:,.0f}") for done, mb, rate in schedule_many(units)]
    print_table("simulated units through one scheduler", ("units done", "driver, MB", "units/s"), rows)


def show_memory(*, quick: bool) -> None:
    peaks = {growth: peak_mb(growth, quick=quick) for growth in GROWTH}
    rows = [(f"{growth} x", *(f"{mb:,.0f}" for mb in both)) for growth, both in peaks.items()]
    print_table("peak memory, MB", ("rows", "driver", "worker"), rows)


def show_sizes(overhead: float) -> None:
    rows = [
        (
            f"{rate:,}",
            f"{needed_rows(overhead, rate):,.0f}",
            *(f"{overhead * rate / unit:.3%}" for unit in (ROWS[0], RAGGED_ROWS[0])),
        )
        for rate in TEACHER_ROWS
    ]
    columns = ("teacher, rows/s", f"rows of a unit for {SHARE:.0%}", "of an image unit", "of a text unit")
    note = "the last two: the overhead's share of the teacher's time at the default sizes, 16,384 images and 131,072 tokens"
    print_table(f"overhead of a unit: {1e3 * overhead:.2f} ms", columns, rows, note=note)


@click.command()
@click.option("--quick", is_flag=True, help="Small sizes, to see that it runs.")
@click.option("--rounds", default=5, show_default=True, help="Interleaved rounds.")
@click.option("--json", "json_path", metavar="FILE", help="Also write the figures here.")
@click.option("--plot", "plot_path", metavar="FILE", help="Also draw them here, PNG or SVG.")
@click.option(
    "--many-units", type=click.IntRange(min=10), metavar="N", help="Schedule N simulated units instead."
)
@click.option("--peak-of", type=int, hidden=True)
def main(
    quick: bool,
    rounds: int,
    json_path: str | None,
    plot_path: str | None,
    many_units: int | None,
    peak_of: int | None,
) -> None:
    """Measure what a unit costs on a Dask cluster and what it costs in a plain run."""
    torch.set_num_threads(1)
    if peak_of is not None:
        report_peak(peak_of, quick=quick)
        return
    if many_units is not None:
        show_many(many_units)
        return
    few, many = (4, 12) if quick else (40, 340)
    with open_client("auto", LocalWorkers(1, gpus=False, torch_threads=1), dashboard=":0") as client:
        rates = rates_on(client, few, many, rounds=1 if quick else rounds)
    rows, overheads = figures(rates, few, many)
    title = f"units of {UNIT_ROWS} rows, published"
    show(title, rows, unit="units/s")
    overhead = max(0.0, statistics.median(overheads))
    click.echo(f"overhead per unit, ms, by round: {', '.join(f'{1e3 * one:.2f}' for one in overheads)}")
    show_sizes(overhead)
    show_memory(quick=quick)
    results: dict[str, Any] = {title: rows}
    if json_path:
        save(json_path, results)
    if plot_path:
        draw(plot_path, results)


if __name__ == "__main__":
    main()
