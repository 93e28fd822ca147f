"""What a block shuffle costs in training, on the worst data for it: sorted by class, so that a block is one class.

    python -m benchmarks.shuffle_quality --config configs/digits.toml
    python -m benchmarks.shuffle_quality --config configs/fashion-mnist.toml --block 1024 --seeds 3 \
        --set source.root=/usr/share/datasets/fashion-mnist

The same student, on hard labels, from the same samples in different orders: windows of so many blocks, all blocks (a full
shuffle), and no shuffle. Printed with the accuracy: the number of different classes in a batch, on average, over
that of a full shuffle's batches. Real datasets lie between this and a random order, in which any window is a full shuffle.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from accelerate import PartialState

from benchmarks.harness import machine
from softcache.config.run import RunConfig
from softcache.data.images import ViewedSource
from softcache.data.sources.images.base import InMemorySource
from softcache.modalities import Data
from softcache.reader.dataset import HardLabelDataset
from softcache.reader.order import BlockShuffle
from softcache.runs import open_data
from softcache.runtime.logging import log_info
from softcache.stages.options import config_options, print_table
from softcache.student import TrainBatches, train

WINDOWS: dict[str, int | None] = {
    "no shuffle": 0,
    "1 block": 1,
    "4 blocks": 4,
    "16 blocks": 16,
    "all blocks": None,
}


class InOrder(BlockShuffle):
    """The samples as they are stored."""

    def _new_order(self, epoch: int) -> Any:
        order = super()._new_order(epoch)
        order.part(0, len(order._order))
        order._order.sort()
        return order


def sorted_by_class(data: Data) -> ViewedSource:
    """Returns the training split with its samples class after class, seen through the same views."""
    source, views = data.train.source, data.train.views
    order = np.argsort(source.targets(), kind="stable")
    keys = source.keys()
    images = torch.stack([source.image(int(sample)) for sample in order])
    sorted_source = InMemorySource(
        f"{source.name}, sorted",
        images,
        source.targets()[order],
        [keys[n] for n in order],
        source.class_names,
    )
    return ViewedSource(sorted_source, views)


def order_of(window: int | None, num_samples: int, *, block: int, batch_size: int, seed: int) -> BlockShuffle:
    everything = np.arange(num_samples)
    kind = InOrder if window == 0 else BlockShuffle
    return kind(
        lambda view: everything,
        batch_size=batch_size,
        view_of=lambda epoch: epoch,
        block_samples=block,
        window_blocks=window or None,
        seed=seed,
    )


def classes_per_batch(order: BlockShuffle, targets: np.ndarray) -> float:
    """Returns the mean number of different classes in a batch of the first epoch."""
    return statistics.mean(len(np.unique(targets[request.samples])) for request in order)


def accuracy_of(
    config: RunConfig, data: Data, dataset: HardLabelDataset, order: BlockShuffle, seed: int
) -> float:
    settings = config.train.model_copy(update={"labels": "ground_truth", "seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        task = data.task(config, config.student.model)
        found = train(task, TrainBatches(dataset, order), settings=settings, out=f"{folder}/run", config={})
    return float(found["accuracy"])


def measure(config: RunConfig, block: int, seeds: int) -> list[dict[str, Any]]:
    """Returns a row per window: the accuracies of all seeds, and the classes of a batch over a full shuffle's."""
    PartialState(cpu=config.train.device == "cpu")
    data = open_data(config)
    view = sorted_by_class(data)
    dataset, targets = HardLabelDataset(view), view.source.targets()
    rows: list[dict[str, Any]] = [
        {"window": name, "blocks": -(-len(view) // block), "accuracy": [], "classes": []} for name in WINDOWS
    ]
    for seed in range(seeds):
        for row, window in zip(rows, WINDOWS.values(), strict=True):
            order = order_of(window, len(view), block=block, batch_size=config.train.batch_size, seed=seed)
            row["classes"].append(classes_per_batch(order, targets))
            row["accuracy"].append(accuracy_of(config, data, dataset, order, seed))
            log_info(f"seed {seed}, {row['window']}: {row['accuracy'][-1]:.4f}")
    for row in rows:
        row["classes"] = statistics.mean(row["classes"])
    for row in rows:
        row["of_full_shuffle"] = row["classes"] / rows[-1]["classes"]
    return rows


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    spread = f" ± {100 * statistics.stdev(row['accuracy']):.2f}" if len(row["accuracy"]) > 1 else ""
    return (
        row["window"],
        f"{row['classes']:.2f}",
        f"{row['of_full_shuffle']:.2f}",
        f"{100 * statistics.mean(row['accuracy']):.2f}%{spread}",
    )


@click.command()
@config_options
@click.option("--block", default=32, show_default=True, type=click.IntRange(1), help="Samples of a block.")
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="Runs of each window.")
@click.option("--json", "json_path", metavar="FILE", help="Also write the figures as JSON.")
def main(config: RunConfig, block: int, seeds: int, json_path: str | None) -> None:
    """Train the same student on sorted data in orders of different windows."""
    rows = measure(config, block, seeds)
    title = f"{config.source.name} sorted by class, {rows[0]['blocks']} blocks of {block}, {seeds} seeds"
    print_table(
        title, ("window", "classes per batch", "over full shuffle", "accuracy"), [_cells(row) for row in rows]
    )
    if json_path:
        Path(json_path).write_text(json.dumps({"machine": machine(), "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
