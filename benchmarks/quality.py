"""What a student learns from a record, against the bytes of the record: the same student, loop and seeds from each.

    python -m benchmarks.quality --config configs/stdlib-lm.toml --record hard --record live \
        --record top_k:12 --record top_k:12:ignore --record sample:17 --record hybrid:4:8

A record is `hard`, `live`, `dense`, `top_k:K`, `top_p:P:K`, `sample:N` or `hybrid:K:N`, and for top_k at the end, if not
the bucket, what becomes of the tail. Caches of top_k are slimmed from the one of the largest K. The teacher is trained
first if the config has a recipe and its weights are missing. Results are added to OUT/results.jsonl one by one; a run that
is there already is not repeated, so several processes may share the seeds, and a killed one goes on.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import click

from softcache.config.run import RunConfig
from softcache.labels.sparsify import LabelSettings, label_settings
from softcache.modalities import Data
from softcache.reader.cache import Cache
from softcache.runs import capture_labels, make_teacher, open_data, open_teacher, train_student
from softcache.runtime.logging import log_info
from softcache.stages.options import config_options, print_table
from softcache.tools.shrink import ShrinkSettings, shrink_cache


def settings_of(record: str, largest: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the tables [labels] and [loss] of a record, the first as captured: with the largest K of all."""
    kind, *numbers = record.split(":")
    if kind == "top_k":
        return {"policy": kind, "k": largest}, {"tail": numbers[1]} if len(numbers) > 1 else {}
    names = {"top_p": ("p", "k"), "sample": ("num_samples",), "hybrid": ("k", "num_samples"), "dense": ()}
    if kind not in names or len(numbers) != len(names[kind]):
        raise click.BadParameter(
            f"{record!r}: see python -m benchmarks.quality --help", param_hint="--record"
        )
    given = {name: float(x) if name == "p" else int(x) for name, x in zip(names[kind], numbers, strict=True)}
    return {"policy": kind, **given}, {}


def make_cache(config: RunConfig, data: Data, record: str, out: Path, largest: int | None) -> Cache:
    labels, _ = settings_of(record, largest)
    name = record if labels["policy"] != "top_k" else f"top_k:{largest}"
    url = out / name.replace(":", "-")
    shared = config.labels.model_dump(include=set(LabelSettings.model_fields))
    run = config.model_copy(update={"labels": label_settings(**(shared | labels))})
    capture = run.capture.model_copy(update={"evaluate": False})
    cache, _ = capture_labels(
        run.model_copy(update={"capture": capture}), data, open_teacher(run, data), str(url)
    )
    if labels["policy"] == "top_k" and (k := int(record.split(":")[1])) != largest:
        cache = shrink_cache(cache, str(out / f"top_k-{k}"), ShrinkSettings(k=k))
    return cache


def bytes_per_row(cache: Cache) -> float:
    return sum(cache.bytes_by_column().values()) / cache.num_rows_done


@click.command()
@config_options
@click.option("--record", "records", multiple=True, required=True, help="A record; may be repeated.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds of the students.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/quality", show_default=True)
@click.option("--table", is_flag=True, help="Print the table of what is there, and run nothing.")
def main(config: RunConfig, records: tuple[str, ...], seeds: str, out: Path, table: bool) -> None:
    """Train the same student from several records; print its score against bytes per row."""
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    if not table:
        run_records(config, records, [int(x) for x in seeds.split(",")], out, results)
    print_results(results, records)


def run_records(
    config: RunConfig, records: tuple[str, ...], seeds: list[int], out: Path, results: Path
) -> None:
    """Trains the config's student from each record under each seed, what is not in `results` yet, and adds it there."""
    data = open_data(config)
    make_teacher(config, data)
    sizes = [int(record.split(":")[1]) for record in records if record.startswith("top_k:")]
    for seed in seeds:
        for record in records:
            if any(row["record"] == record and row["seed"] == seed for row in _read(results)):
                continue
            log_info(f"{record}, seed {seed}")
            how: dict[str, Any] = {"labels": "ground_truth"}
            labels, loss, size = {}, {}, None
            if record == "live":
                how = {"labels": "online", "teacher": open_teacher(config, data)}
            elif record != "hard":
                cache = make_cache(config, data, record, out, max(sizes, default=None))
                labels, loss = settings_of(record, cache.manifest.codec["k"])
                size = bytes_per_row(cache)
                how = {"labels": "cache", "cache": cache}
            shared = config.labels.model_dump(include=set(LabelSettings.model_fields))
            run = config.model_copy(
                update={
                    "labels": label_settings(**(shared | labels)) if labels else config.labels,
                    "train": config.train.model_copy(update={"seed": seed}),
                    "loss": type(config.loss).model_validate({**config.loss.model_dump(), **loss}),
                }
            )
            found = train_student(run, data, model=config.student.model, **how)
            row = {"record": record, "seed": seed, "bytes": size}
            row |= {name: found[name] for name in ("accuracy", "eval_loss")}
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def print_results(results: Path, records: tuple[str, ...]) -> None:
    """Prints a line per record: bytes, and mean and spread of the scores over the seeds."""
    rows, lines = _read(results), []
    for record in records:
        runs = [row for row in rows if row["record"] == record]
        if not runs:
            continue
        shown = [record, "" if runs[0]["bytes"] is None else f"{runs[0]['bytes']:.1f}"]
        for metric, digits in (("eval_loss", 3), ("accuracy", 4)):
            values = [row[metric] for row in runs]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            shown.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append((*shown, str(len(runs))))
    print_table("students", ("record", "bytes per row", "held-out loss", "accuracy", "seeds"), lines)


if __name__ == "__main__":
    main()
