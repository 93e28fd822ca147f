"""What recording costs a teacher: the whole capture over the bare forward pass, and its memory as the data grow.

    python -m benchmarks.capture [--quick] [--gpt2] [--rounds N] [--json F] [--plot F]

*Teacher alone* loads exactly the batches of the capture, with their views and without fingerprints, and runs the
teacher on them in the same dtype; nothing is recorded. Everything else is `softcache teacher-logits` as it is: records
made, encoded, checksummed, flushed to the disk, marked. Images: the digits through a ResNet-18 (small: about 75
microseconds of teacher for a row), and enlarged to 32 x 32 pixels through a ResNet-18 of ten times that. Text: the teacher
of configs/stdlib-lm.toml (V = 4,096, K = 128, bfloat16) with random weights on the standard library's sources; with
`--gpt2` that alone with a teacher of GPT-2's width and depth, V = 32,768, which takes some minutes.

What a capture costs however few its rows (the manifest, the store's metadata, opening it) is in the ratios, and stands by
itself, too: seconds of a capture that finds everything done. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import click

from softcache.runtime.threads import share_cores

share_cores()  # before torch is imported, as the command does

import torch
from safetensors.torch import save_file

from benchmarks.harness import Figure, compare, draw, measure, save, show
from benchmarks.repeated import Repeated
from softcache.cache.codecs import OpenSettings, PackedSettings
from softcache.config.run import RunConfig
from softcache.data.images import ViewedSource
from softcache.modalities import Data
from softcache.models.image import build_model
from softcache.runs import capture_labels, open_data, open_teacher
from softcache.runtime.logging import log_info
from softcache.stages.options import print_table
from softcache.teacher.base import Teacher
from softcache.teacher.capture.plan import default_plan

STORES: dict[str, dict[str, Any]] = {
    "Zarr, open": {"store": "zarr", "codec": OpenSettings()},
    "Zarr, packed": {"store": "zarr", "codec": PackedSettings()},
    "Parquet, open": {"store": "parquet", "codec": OpenSettings()},
}
GROWTH = (1, 4, 16)
# Vocabulary and model of the texts' teacher.
QUICK = 300, "gpt2?width=16&depth=1&heads=2"
SMALL = 4096, "gpt2?width=256&depth=4&heads=4"
GPT2 = 32768, "gpt2?width=768&depth=12&heads=12"


# -- what is measured --------------------------------------------------------------------------------------


def image_config(folder: str, model: str, size: int, samples: int | None) -> RunConfig:
    """A config of the digits with a randomly initialised teacher: its speed counts here, not its wisdom."""
    weights = Path(folder) / f"images-{size}.safetensors"
    save_file(build_model(model, num_classes=10, input_shape=(1, size, size)).state_dict(), weights)
    views: dict[str, Any] = {"crop": "padded", "padding": 1, "mean": [0.305], "std": [0.376]}
    return RunConfig.model_validate(
        {
            "name": "bench",
            "source": {"name": "digits", **({"max_train_samples": samples} if samples else {})},
            "views": views | {"size": size, "eval_share": 1.0},
            "teacher": {"model": model, "weights": str(weights)},
            "labels": {"k": 5},
            "capture": {"evaluate": False, "device": "cpu"},
            "student": {"model": "cnn?width=8"},
        }
    )


def text_config(folder: str, samples: int, labels: dict[str, Any], vocab_size: int, model: str) -> RunConfig:
    """The text config of the repository with a tokenizer and a teacher of its own, whose weights are fresh."""
    from softcache.models.language import build_language_model

    weights = Path(folder) / "text.safetensors"
    if not weights.exists():
        built = build_language_model(model, vocab_size=vocab_size, context=256)
        save_file({name: value.clone() for name, value in built.state_dict().items()}, weights)
    return RunConfig.model_validate(
        {
            "name": "bench",
            "source": {
                "modality": "text",
                "name": "stdlib",
                "tokenizer": f"bpe?vocab_size={vocab_size}",
                "seq_len": 256,
                "packing": "packed",
                "max_train_samples": samples,
                "max_eval_samples": 8,
            },
            "teacher": {"model": model, "weights": str(weights)},
            "labels": labels,
            "capture": {"evaluate": False, "device": "cpu", "batch_size": 16, "dtype": "bfloat16"},
            "student": {"model": model},
        }
    )


def with_capture(config: RunConfig, **changed: Any) -> RunConfig:
    return config.model_copy(update={"capture": config.capture.model_copy(update=changed)})


def times_over(data: Data, copies: int) -> Data:
    many = copy(data)
    many.train = ViewedSource(Repeated(data.train.source, copies), data.train.views)  # type: ignore[arg-type]
    return many


def bare(config: RunConfig, data: Data, teacher: Teacher) -> int:
    """The teacher on the batches of a capture, its logits dropped; returns the number of rows."""
    plan, size, rows = default_plan(data.train, config.capture), config.capture.batch_size, 0
    with torch.inference_mode():
        for unit in plan.units():
            for start in range(unit.start, unit.stop, size):
                samples = range(start, min(start + size, unit.stop))
                batch = data.train.load(samples, unit.view, fingerprints=False)
                for logits_PV in teacher.chunks(batch):
                    rows += len(logits_PV)
    return rows


def contenders(config: RunConfig, data: Data, stores: dict[str, Any]) -> dict[str, Callable[[], int]]:
    teacher = open_teacher(config, data)

    def captured(how: dict[str, Any]) -> int:
        with tempfile.TemporaryDirectory() as folder:
            _, report = capture_labels(with_capture(config, **how), data, teacher, f"{folder}/cache")
        return report.rows

    runs: dict[str, Callable[[], int]] = {"teacher alone": lambda: bare(config, data, teacher)}
    return runs | {name: lambda how=how: captured(how) for name, how in stores.items()}  # type: ignore[misc]


def fixed_seconds(config: RunConfig, data: Data) -> dict[str, float]:
    """Seconds of what does not grow with the rows: digesting the teacher's weights, and a run that has nothing to do."""
    from softcache.hashing.digests import digest_weights

    teacher = open_teacher(config, data)
    started = time.perf_counter()
    digest_weights(teacher.model.state_dict())
    digested = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        capture_labels(config, data, teacher, f"{folder}/cache")
        started = time.perf_counter()
        capture_labels(config, data, teacher, f"{folder}/cache")
        return {"weights' digest": digested, "capture with nothing to do": time.perf_counter() - started}


def warm(config: RunConfig, data: Data) -> None:
    """One capture before the clock runs: compiled code is made or loaded once for each process."""
    with tempfile.TemporaryDirectory() as folder:
        capture_labels(config, data, open_teacher(config, data), f"{folder}/cache")


# -- memory ------------------------------------------------------------------------------------------------


def peak_mb(copies: int, *, quick: bool) -> float:
    """Returns the peak memory (MB) of a fresh process that captures so many copies of the digits."""
    how = [
        sys.executable,
        "-m",
        "benchmarks.capture",
        "--peak-of",
        str(copies),
        *(["--quick"] if quick else []),
    ]
    done = subprocess.run(how, capture_output=True, text=True, check=True, env=dict(os.environ))
    return float(done.stdout.split()[-1])


def _report_peak(copies: int, *, quick: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = image_config(folder, "linear", 8, 64 if quick else None)
        # Small units, so that there are more of them than the queue holds in the smallest of the three.
        config = with_capture(config, unit_samples=16 if quick else 256, batch_size=16 if quick else 256)
        data = times_over(open_data(config), copies if quick else 4 * copies)
        capture_labels(config, data, open_teacher(config, data), f"{folder}/cache")
    log_info(f"{copies} x: {len(data.train):,} samples")
    # Not ru_maxrss, which begins with what the parent had when it forked.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    click.echo(f"{int(status['VmHWM'].split()[0]) / 1024:.1f}")


# -- the command -------------------------------------------------------------------------------------------


def speeds(
    folder: str, rounds: int, *, quick: bool
) -> tuple[dict[str, list[Figure]], dict[str, dict[str, float]]]:
    results, fixed = {}, {}

    def run(title: str, config: RunConfig, data: Data, stores: dict[str, Any]) -> None:
        warm(config, data)
        results[title] = compare(measure(contenders(config, data, stores), rounds), "teacher alone")
        fixed[title] = fixed_seconds(config, data)

    small, large = ("cnn?width=4&stages=1",) * 2 if quick else ("torchvision:resnet18",) * 2
    config = image_config(folder, small, 8, 48 if quick else None)
    data = open_data(config)
    run(f"images: {small} on 8 x 8 pixels", config, data if quick else times_over(data, 8), STORES)
    config = image_config(folder, large, 32, 48 if quick else None)
    data = open_data(config)
    run(f"images: {large} on 32 x 32 pixels", config, data if quick else times_over(data, 4), STORES)

    samples, k, text = (6, 8, QUICK) if quick else (320, 128, SMALL)
    config = text_config(folder, samples, {"k": k}, *text)
    data = open_data(config)
    run(f"text: V = {text[0]:,}, top {k}", config, data, STORES)
    for policy in ("sample", "hybrid"):
        labels = {"policy": policy, "num_samples": 32, **({"k": 8} if policy == "hybrid" else {})}
        drawn = text_config(folder, samples, labels, *text)
        run(f"text: {policy}, 32 draws", drawn, data, {"Zarr, open": STORES["Zarr, open"]})
    return results, fixed


@click.command()
@click.option("--quick", is_flag=True, help="Sizes that take seconds and mean nothing: does it run?")
@click.option("--gpt2", is_flag=True, help="Texts alone, with a teacher of GPT-2's size.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Interleaved rounds.")
@click.option("--json", "json_path", metavar="FILE", help="Also write the figures as JSON.")
@click.option("--plot", "plot_path", metavar="FILE", help="Also draw them; PNG or SVG.")
@click.option("--peak-of", type=int, hidden=True, help="Capture so many copies and print the peak memory.")
def main(
    quick: bool, gpt2: bool, rounds: int, json_path: str | None, plot_path: str | None, peak_of: int | None
) -> None:
    """Measure what recording costs over the bare teacher, and its memory as the data grow."""
    torch.manual_seed(0)
    if peak_of is not None:
        _report_peak(peak_of, quick=quick)
        return
    with tempfile.TemporaryDirectory() as folder:
        if gpt2:
            config = text_config(folder, 320, {"k": 128}, *GPT2)
            runs = contenders(config, open_data(config), {"Zarr, open": STORES["Zarr, open"]})
            show("text: GPT-2, V = 32,768, top 128", compare(measure(runs, rounds), "teacher alone"))
            return
        results, fixed = speeds(folder, rounds, quick=quick)
    for title, figures in results.items():
        show(title, figures)
    rows = [(title, *(f"{value:.3f}" for value in seconds.values())) for title, seconds in fixed.items()]
    print_table("seconds for each run, whatever its rows", ("", *next(iter(fixed.values()))), rows)
    peaks = {copies: peak_mb(copies, quick=quick) for copies in GROWTH}
    print_table(
        "peak memory of a capture", ("samples", "MB"), [(f"{n} x", f"{mb:,.0f}") for n, mb in peaks.items()]
    )
    if json_path:
        # Memory as things per second of nothing: the ratio is what the smallest needs over this.
        memory = [
            Figure(f"{n} x", mb, peaks[1] / mb, peaks[1] / mb, peaks[1] / mb) for n, mb in peaks.items()
        ]
        save(json_path, results | {"peak memory, MB": memory})
    if plot_path:
        draw(plot_path, results)


if __name__ == "__main__":
    main()
