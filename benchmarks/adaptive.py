"""Does it pay to move T and alpha, to learn T, to weigh rows? One student, one cache, many ways, many seeds.

    python -m benchmarks.adaptive --config configs/adaptive-digits.toml       # 400 images for the students, five seeds
    python -m benchmarks.adaptive --config configs/adaptive-digits.toml --way 'T = 4' --way 'weights: gap' --seeds 0,1

The teacher is trained on all images of the config's source, once; cache and students see the first `--train-samples`.
All ways read the same cache of all classes at whatever T they ask for. Beside mean and spread over the seeds the table
has the mean difference from the first way with the same seed, and its standard error: the seed decides more than the
way does. Results are added to OUT/results.jsonl one by one; what is there already is not repeated.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import click

from softcache.config.load import load_config
from softcache.config.run import RunConfig
from softcache.losses import LossSettings
from softcache.reader.cache import Cache
from softcache.runs import capture_labels, make_teacher, open_data, open_teacher, train_student
from softcache.runtime.logging import log_info
from softcache.stages.options import config_file_options, print_table

WAYS: dict[str, dict[str, Any]] = {
    "T = 4": {"temperature": 4.0},
    "T = 1": {"temperature": 1.0},
    "T linear, 4 to 1": {"temperature": 4.0, "temperature_schedule": {"kind": "linear", "end": 1.0}},
    "T linear, 1 to 4": {"temperature": 1.0, "temperature_schedule": {"kind": "linear", "end": 4.0}},
    "T cosine, 4 to 1": {"temperature": 4.0, "temperature_schedule": {"kind": "cosine", "end": 1.0}},
    "T down when the held-out loss stalls": {
        "temperature": 4.0,
        "temperature_schedule": {"kind": "stall", "end": 1.0, "patience": 3},
    },
    "alpha = 0.5": {"temperature": 4.0, "alpha": 0.5},
    "alpha linear, 0.9 to 0": {"temperature": 4.0, "alpha_schedule": {"kind": "linear", "end": 0.0}},
    "T learnt (CTKD), from 4": {"temperature": 4.0, "curriculum": {}},
    "standardised, base T = 2": {"temperature": 2.0, "standardize": True},
    "weights: teacher is certain": {"temperature": 4.0, "weights": {"by": "teacher_entropy"}},
    "weights: teacher is right": {"temperature": 4.0, "weights": {"by": "teacher_correctness"}},
    "weights: gap": {"temperature": 4.0, "weights": {"by": "gap"}},
}
HARD = "hard labels"


@click.command()
@config_file_options(default="configs/digits.toml")
@click.option("--way", "ways", multiple=True, help="A row of the table; may be repeated. Default: all.")
@click.option("--seeds", default="0,1,2,3,4", show_default=True, help="Seeds of the students.")
@click.option("--train-samples", default=400, show_default=True, help="Images that students see.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/adaptive", show_default=True)
@click.option("--table", is_flag=True, help="Print the table of what is there, and run nothing.")
def main(
    config_path: str,
    overrides: tuple[str, ...],
    ways: tuple[str, ...],
    seeds: str,
    train_samples: int,
    out: Path,
    table: bool,
) -> None:
    """Train one student in many ways from one cache; print accuracy and held-out loss."""
    chosen = ways or (*WAYS, HARD)
    unknown = [way for way in chosen if way not in WAYS and way != HARD]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r}; one of {', '.join([*WAYS, HARD])}", param_hint="--way")
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    if not table:
        whole = load_config(config_path, overrides)
        make_teacher(whole, open_data(whole))
        few = load_config(config_path, (*overrides, f"source.max_train_samples={train_samples}"))
        _run(few, chosen, [int(x) for x in seeds.split(",")], out, results)
    _print([row for row in _read(results) if row["way"] in chosen], chosen)


def _run(config: RunConfig, ways: tuple[str, ...], seeds: list[int], out: Path, results: Path) -> None:
    data = open_data(config)
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(out / "cache"))
    for seed in seeds:
        for way in ways:
            if any((row["way"], row["seed"]) == (way, seed) for row in _read(results)):
                continue
            log_info(f"{way}, seed {seed}")
            row = {"way": way, "seed": seed, **_train(config, data, cache, way, seed, out)}
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _train(config: RunConfig, data: Any, cache: Cache, way: str, seed: int, out: Path) -> dict[str, Any]:
    run = config.model_copy(
        update={
            "train": config.train.model_copy(update={"seed": seed}),
            "loss": LossSettings.model_validate({"alpha": 0.9, **WAYS.get(way, {})}),
        }
    )
    found = train_student(
        run,
        data,
        model=config.student.model,
        labels="ground_truth" if way == HARD else "cache",
        cache=cache,
        out=out / "students" / f"{re.sub('[^a-z0-9]+', '-', way.lower()).strip('-')}-{seed}",
    )
    return {name: found.get(name) for name in ("accuracy", "eval_loss", "temperature", "alpha")}


def _read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def _print(rows: list[dict[str, Any]], ways: tuple[str, ...]) -> None:
    found = {way: {row["seed"]: row for row in rows if row["way"] == way} for way in ways}
    first, lines = found[ways[0]], []
    for way, runs in found.items():
        if not runs:
            continue
        accuracies = [100 * row["accuracy"] for row in runs.values()]
        more = [100 * (runs[seed]["accuracy"] - first[seed]["accuracy"]) for seed in runs if seed in first]
        ends = [row["temperature"] for row in runs.values() if row["temperature"] is not None]
        lines.append(
            (
                way,
                _spread(accuracies, 2),
                "" if way == ways[0] or len(more) < 2 else _standard_error(more),
                _spread([row["eval_loss"] for row in runs.values()], 3),
                f"{statistics.mean(ends):.2f}" if ends else "",
                str(len(runs)),
            )
        )
    header = ("way", "accuracy, %", f"more than {ways[0]}", "held-out loss", "last T", "seeds")
    print_table("students", header, lines)


def _spread(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _standard_error(values: list[float]) -> str:
    return f"{statistics.mean(values):+.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


if __name__ == "__main__":
    main()
