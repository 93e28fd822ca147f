"""Three ratios, each against a named baseline of the same run: capture, reading, training.

    make bench            or    python -m benchmarks.foundation [--json FILE]

1. capture: rows/s of the whole capture over rows/s of the bare teacher on the same views, nothing recorded;
2. reading: rows/s of block-shuffled reads from the cache over a gather of the same rows from np.memmap of the
   same values, uncompressed (the limit), and over unshuffled reads;
3. training: seconds per epoch from the cache and with the live teacher, over the same student on hard labels.

Rounds of all contenders are interleaved, so that a drift of the machine touches every one alike; the median is
printed with the smallest and largest.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import save_file

from pipeline.batches import ViewedSource
from pipeline.cache import Cache, open_cache
from pipeline.config import RunConfig
from pipeline.modalities import Data
from pipeline.models import build_model, parse_spec
from pipeline.progress import say
from pipeline.runs import capture_labels, open_data, open_teacher, train_student
from pipeline.shuffle import BlockShuffle
from pipeline.teacher import Teacher
from stages.options import print_table

COPIES = 40  # the digits, repeated, make a cache that is larger than one window


class Repeated:
    """The digits, many times over, under keys of their own: enough rows to time."""

    def __init__(self, source: Any, copies: int) -> None:
        self._source, self._size = source, len(source)
        self.name, self.digest = f"{source.name} x {copies}", f"{copies:064d}"
        self.num_classes, self.class_names, self._copies = source.num_classes, source.class_names, copies

    def __len__(self) -> int:
        return self._size * self._copies

    def key(self, sample: int) -> str:
        return f"{sample // self._size}/{self._source.key(sample % self._size)}"

    def keys(self) -> list[str]:
        return [self.key(sample) for sample in range(len(self))]

    def target(self, sample: int) -> int:
        return self._source.target(sample % self._size)

    def targets(self) -> np.ndarray:
        return np.tile(self._source.targets(), self._copies)

    def image(self, sample: int) -> torch.Tensor:
        return self._source.image(sample % self._size)


def measure(contenders: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Returns rows per second of each contender, one number per interleaved round."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            rows = run()
            rates[name].append(rows / (time.perf_counter() - started))
            say(f"round {number + 1}/{rounds} {name}: {rates[name][-1]:,.0f} rows/s")
    return rates


def ratios(rates: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Returns, for every contender, its rate and the ratio to the baseline of the same round."""
    out = {}
    for name, values in rates.items():
        of_round = [value / base for value, base in zip(values, rates[baseline], strict=True)]
        out[name] = {
            "rows_per_second": statistics.median(values),
            "ratio": statistics.median(of_round),
            "min": min(of_round),
            "max": max(of_round),
        }
    return out


# -- capture -----------------------------------------------------------------------------------------------


def bench_capture(config: RunConfig, data: Data, teacher: Teacher, rounds: int) -> dict[str, list[float]]:
    samples, size = len(data.train), config.capture.batch_size

    def bare() -> int:
        for start in range(0, samples, size):
            batch = data.train.load(range(start, min(start + size, samples)), 1, fingerprints=False)
            teacher.logits(batch.images)
        return samples

    def captured() -> int:
        with tempfile.TemporaryDirectory() as folder:
            capture_labels(config, data, teacher, f"{folder}/cache")
        return samples

    return measure({"teacher alone": bare, "capture": captured}, rounds)


# -- reading -----------------------------------------------------------------------------------------------


def bench_reading(cache: Cache, folder: str, rounds: int) -> dict[str, list[float]]:
    samples, size = np.arange(len(cache)), 256
    labels = cache.read(samples)
    paths = {}
    for name in ("ids", "log_probs", "log_tail", "target_log_prob", "stats"):
        values = np.ascontiguousarray(getattr(labels, name))
        paths[name] = (f"{folder}/{name}.raw", values.dtype, values.shape)
        values.tofile(paths[name][0])
    order = BlockShuffle(
        lambda view: samples,
        batch_size=size,
        view_of=lambda epoch: 0,
        block_samples=cache.manifest.plan.chunk_samples,
        window_blocks=16,
        seed=0,
    ).order(0)

    def gather() -> int:
        columns = [np.memmap(path, dtype, "r", shape=shape) for path, dtype, shape in paths.values()]
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            for column in columns:
                column[rows]
        return len(order)

    def read(order: np.ndarray) -> int:
        fresh = open_cache(cache.url, window_blocks=16, verify=False)
        for start in range(0, len(order), size):
            fresh.read(order[start : start + size])
        return len(order)

    return measure(
        {
            "memory map, shuffled": gather,
            "cache, block-shuffled": lambda: read(order),
            "cache, in order": lambda: read(samples),
        },
        rounds,
    )


# -- training ----------------------------------------------------------------------------------------------


def bench_training(
    config: RunConfig, data: Data, cache: Cache, teacher: Teacher, folder: str, rounds: int
) -> dict[str, list[float]]:
    number = iter(range(10**6))

    def run(**how: Any) -> int:
        train_student(config, data, model=config.student.model, out=f"{folder}/run{next(number)}", **how)
        return len(data.train) * config.train.epochs

    return measure(
        {
            "hard labels": lambda: run(labels="hard"),
            "cache": lambda: run(labels="cache", cache=cache),
            "live teacher": lambda: run(labels="online", teacher=teacher),
        },
        rounds,
    )


def config_of(teacher: str, folder: str, *, num_views: int) -> RunConfig:
    """A config of the digits with a randomly initialised teacher: its speed counts here, not its wisdom."""
    weights = Path(folder) / f"{parse_spec(teacher).name}.safetensors"
    if not weights.exists():
        model = build_model(teacher, num_classes=10, input_shape=(1, 8, 8))
        save_file(model.state_dict(), weights)
    return RunConfig.model_validate(
        {
            "name": "bench",
            "source": {"name": "digits"},
            "views": {"crop": "padded", "padding": 1, "mean": [0.305], "std": [0.376]},
            "teacher": {"model": teacher, "weights": str(weights)},
            "labels": {"k": 5, "num_views": num_views},
            "capture": {"evaluate": False},
            "student": {"model": "cnn?width=8"},
            "train": {"epochs": 1, "batch_size": 256},
        }
    )


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Interleaved rounds.")
@click.option("--json", "json_path", metavar="FILE", help="Also write the figures as JSON.")
def main(rounds: int, json_path: str | None) -> None:
    """Measure capture, reading and training against named baselines."""
    torch.manual_seed(0)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        slow = config_of("torchvision:resnet18", folder, num_views=1)
        data = open_data(slow)
        teacher = open_teacher(slow, data)
        results["capture"] = ratios(bench_capture(slow, data, teacher, rounds), "teacher alone")

        fast = config_of("linear", folder, num_views=1)
        many = copy(data)
        many.train = ViewedSource(Repeated(data.train.source, COPIES), data.train.views)  # type: ignore[arg-type]
        cache, _ = capture_labels(fast, many, open_teacher(fast, many), f"{folder}/many")
        results["reading"] = ratios(bench_reading(cache, folder, rounds), "memory map, shuffled")
        results["training"] = ratios(
            bench_training(fast, many, cache, teacher, folder, rounds), "hard labels"
        )
    for name, rows in results.items():
        cells = [
            (who, f"{row['rows_per_second']:,.0f}", *(f"{row[key]:.3f}" for key in ("ratio", "min", "max")))
            for who, row in rows.items()
        ]
        print_table(name, ("", "rows/s", "ratio", "min", "max"), cells)
    if json_path:
        Path(json_path).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
