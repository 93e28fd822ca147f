"""What a student's training costs from the cache, over the same student on hard labels; and with its online teacher.

    python -m benchmarks.epochs [--quick] [--rounds N] [--case WORDS] [--json F] [--plot F]

1. time of training steps over that of hard labels: 1.02 is the goal. A round is a few steps of one epoch of each contender
   in turn, on the same samples of the same augmented view, with the same optimizer; setting up, evaluating and saving
   are not in it. "hard labels, again" is a second run of the baseline: how far it is from 1 is the noise. Students are a
   tiny and a mid-size one: images (the digits many times over, 8x8; Fashion-MNIST, 28x28, where /usr/share/datasets or
   --fashion-mnist has it) and text (the standard library's sources, fused loss, K = 128 of 4,096). The labels come from
   teachers of random weights: the content of a label does not change its cost. The cache is memory-mapped.
2. time to an accuracy (`benchmarks.break_even`): whole runs that end at `train.target_metric`, from the cache and online.

T = 1 and 4 are on the labels' grid of temperatures; T = 3 is not, so that the tail is interpolated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from benchmarks import break_even
from benchmarks.harness import Figure, draw, measure, save
from benchmarks.repeated import Repeated
from softcache.config.run import RunConfig
from softcache.data.images import ViewedSource
from softcache.modalities import Data
from softcache.models.image import build_model
from softcache.reader.cache import Cache
from softcache.runs import capture_labels, open_data, open_teacher
from softcache.runs.batches import cached_batches, hard_label_batches
from softcache.runtime.logging import log_info
from softcache.stages.options import print_table
from softcache.student.loop import Trainer

TEMPERATURES = (1.0, 4.0, 3.0)
FASHION = "/usr/share/datasets/fashion-mnist"
BASELINE = "hard labels"


# -- cases -------------------------------------------------------------------------------------------------


def image_case(folder: str, source: dict[str, Any], shape: tuple[int, int, int]) -> RunConfig:
    weights = Path(folder) / f"linear-{shape[1]}.safetensors"
    save_file(build_model("linear", num_classes=10, input_shape=shape).state_dict(), weights)
    return RunConfig.model_validate(
        {
            "name": "bench",
            "source": source,
            "views": {"crop": "padded", "padding": 1, "flip": 0.5, "mean": [0.3], "std": [0.37]},
            "teacher": {"model": "linear", "weights": str(weights)},
            "labels": {"k": 5, "num_views": 2},
            "capture": {"evaluate": False, "device": "cpu"},
            "loss": {"alpha": 0.9},
            "train": {"epochs": 2, "batch_size": 256, "device": "cpu"},
            "reader": {"memmap_dir": f"{folder}/memmaps"},
        }
    )


def text_case(folder: str, *, samples: int, vocab_size: int, k: int) -> RunConfig:
    from softcache.models.language import build_language_model

    weights, model = Path(folder) / "language.safetensors", "gpt2?width=64&depth=1&heads=2"
    built = build_language_model(model, vocab_size=vocab_size, context=256)
    save_file({name: value.clone() for name, value in built.state_dict().items()}, weights)
    return RunConfig.model_validate(
        {
            "name": "bench",
            "source": {
                "modality": "text",
                "name": "stdlib",
                "tokenizer": f"bpe?vocab_size={vocab_size}",
                "max_train_samples": samples,
                "max_eval_samples": 4,
            },
            "teacher": {"model": model, "weights": str(weights)},
            "labels": {"k": k},
            "capture": {"evaluate": False, "device": "cpu", "batch_size": 16},
            "loss": {"alpha": 0.9},
            "train": {"epochs": 2, "batch_size": 16, "device": "cpu", "clip_norm": 1.0},
            "reader": {"memmap_dir": f"{folder}/memmaps"},
        }
    )


# name: (config, copies of the data, {student: steps of a round})
Cases = dict[str, tuple[RunConfig, int, dict[str, int]]]


def cases(folder: str, fashion: str, *, quick: bool) -> Cases:
    digits: dict[str, Any] = {"name": "digits"}
    if quick:
        few = image_case(folder, digits | {"max_train_samples": 300}, (1, 8, 8))
        text = text_case(folder, samples=32, vocab_size=300, k=8)
        return {
            "images, 8x8": (few, 2, {"cnn?width=4": 1}),
            "text": (text, 1, {"gpt2?width=16&depth=1&heads=2": 1}),
        }
    tiny, mid = "cnn?width=8", "torchvision:resnet18"
    out: Cases = {"images, 8x8": (image_case(folder, digits, (1, 8, 8)), 40, {tiny: 20, mid: 2})}
    if Path(fashion).is_dir():
        source = {"name": "fashion-mnist", "root": fashion, "data_dir": f"{folder}/data"}
        config = image_case(folder, source | {"max_train_samples": 12_800}, (1, 28, 28))
        out["images, 28x28"] = (config, 1, {tiny: 5, mid: 1})
    else:
        log_info(f"epochs: no Fashion-MNIST at {fashion}; its case is left out")
    students = {"gpt2?width=96&depth=2&heads=4": 1, "gpt2?width=256&depth=4&heads=4": 1}
    out["text"] = (text_case(folder, samples=320, vocab_size=4096, k=128), 1, students)
    return out


# -- the steps of an epoch ---------------------------------------------------------------------------------


def stepper(loop: Any, epoch: int) -> Callable[[int], int]:
    """Returns a function that trains for so many steps of an epoch, over and over, and returns the samples seen."""

    def forever() -> Iterator[int]:
        while True:
            loop.feed.order.load_state_dict(loop.feed.order.state_dict() | {"epoch": epoch, "step": 0})
            yield from loop.epoch()

    steps = forever()
    return lambda count: sum(next(steps) for _ in range(count))


def contenders(
    config: RunConfig, data: Data, cache: Cache, student: str, steps: int
) -> dict[str, Callable[[], int]]:
    """Training on hard labels (twice) and from the cache, so many steps a call."""
    epoch = config.labels.num_views - 1  # of images, that of an augmented view

    def training(labels: str, **loss: float) -> Callable[[], int]:
        how = config.model_copy(
            update={
                "train": config.train.model_copy(update={"labels": labels}),
                "loss": config.loss.model_copy(update=loss),
            }
        )
        torch.manual_seed(0)
        feed = (
            hard_label_batches(how, data)
            if labels == "ground_truth"
            else cached_batches(how, data, cache, cache.num_views, False)
        )
        step = stepper(Trainer(Accelerator(cpu=True), data.task(how, student), feed, how.train), epoch)
        step(2)  # compiled code is loaded, the optimizer's state is made
        return lambda: step(steps)

    runs = {BASELINE: training("ground_truth"), f"{BASELINE}, again": training("ground_truth")}
    return runs | {f"cache, T = {T:g}": training("cache", temperature=T) for T in TEMPERATURES}


def over_baseline(rates: dict[str, list[float]]) -> list[Figure]:
    """Times over that of the baseline in the same round: above 1 is slower."""
    figures = []
    for name, values in rates.items():
        times = [base / value for value, base in zip(values, rates[BASELINE], strict=True)]
        figures.append(
            Figure(name, float(np.median(values)), float(np.median(times)), min(times), max(times))
        )
    return figures


def middle_half(rates: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """The quartiles of those times: the largest of many short rounds measures the machine, not the contender."""
    out = {}
    for name, values in rates.items():
        times = [base / value for value, base in zip(values, rates[BASELINE], strict=True)]
        low, high = np.quantile(times, [0.25, 0.75])
        out[name] = (float(low), float(high))
    return out


def repeated_case(config: RunConfig, copies: int, place: str) -> tuple[Data, Cache]:
    """Returns a case's data, so many times over, and a cache of them."""
    data = open_data(config)
    if copies > 1:
        data = copy(data)
        data.train = ViewedSource(Repeated(data.train.source, copies), data.train.views)  # type: ignore
    return data, capture_labels(config, data, open_teacher(config, data), place)[0]


def bench_steps(title: str, case: tuple[RunConfig, int, dict[str, int]], folder: str, rounds: int) -> dict:
    config, copies, students = case
    data, made = repeated_case(config, copies, f"{folder}/{title.replace(' ', '-').replace(',', '')}")
    results = {}
    for student, steps in students.items():
        cache = config.reader.open_cache(made.url)
        rates = measure(contenders(config, data, cache, student, steps), rounds)
        figures, quartiles = over_baseline(rates), middle_half(rates)
        name = f"{title}: {student}, time of steps"
        cells = [
            (
                f.name,
                f"{f.per_second:,.0f}",
                f"{1e6 / f.per_second:,.1f}",
                f"{f.ratio:.3f}",
                *(f"{x:.3f}" for x in quartiles[f.name]),
            )
            for f in figures
        ]
        print_table(name, ("", "samples/s", "microseconds", "over hard labels", "25%", "75%"), cells)
        results[name] = figures
    return results


@click.command()
@click.option("--quick", is_flag=True, help="Sizes that take seconds and mean nothing: does it run?")
@click.option(
    "--rounds", default=40, show_default=True, type=click.IntRange(1), help="Rounds of a few steps."
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Whole runs of part 2.")
@click.option("--config", "path", default="configs/digits.toml", show_default=True, help="Of part 2.")
@click.option("--goal", default=0.97, show_default=True, help="Of part 2: accuracy (text: held-out loss).")
@click.option("--fashion-mnist", default=FASHION, show_default=True, metavar="DIR", help="Its idx files.")
@click.option("--case", "only", metavar="WORDS", help='Only cases whose name has this; "accuracy" is part 2.')
@click.option("--json", "json_path", metavar="FILE", help="Also write the figures as JSON.")
@click.option("--plot", "plot_path", metavar="FILE", help="Also draw them; PNG or SVG.")
def main(
    quick: bool,
    rounds: int,
    seeds: int,
    path: str,
    goal: float,
    fashion_mnist: str,
    only: str | None,
    json_path: str | None,
    plot_path: str | None,
) -> None:
    """Measure training from the cache against hard labels and against the online teacher."""
    torch.manual_seed(0)
    results: dict[str, list[Figure]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, case in cases(folder, fashion_mnist, quick=quick).items():
            if only is None or only in title:
                results |= bench_steps(title, case, folder, 2 if quick else rounds)
        if only is None or only in "accuracy":
            results |= break_even.bench(path, folder, goal=goal, seeds=1 if quick else seeds, quick=quick)
    if json_path:
        save(json_path, results)
    if plot_path:
        draw(plot_path, results)


if __name__ == "__main__":
    main()
