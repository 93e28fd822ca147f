"""How soon a student reaches an accuracy from the cache, and how soon with the online teacher: the second part of
`python -m benchmarks.epochs`.

Both are whole runs of `softcache train-student` with the same config, seeds and goal (`train.target_metric`), so they
evaluate and save as often. Making the cache counts apart. In addition, the number of students after which it has paid:

    seconds of the capture / (seconds of a run with the teacher - seconds of a run from the cache)

The teacher is the config's; it is trained first where its weights are missing, and counts on neither side.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

from benchmarks.harness import Figure
from softcache.config.load import load_config
from softcache.config.run import RunConfig
from softcache.modalities import Data
from softcache.runs import capture_labels, make_teacher, open_data, open_teacher, train_student
from softcache.runtime.logging import log_info
from softcache.stages.options import print_table

__all__ = ["bench"]

ONLINE, CACHE = "online teacher", "cache"


def bench(path: str, folder: str, *, goal: float, seeds: int, quick: bool) -> dict[str, list[Figure]]:
    """Returns the figures of both contenders: seconds to the goal over those with the online teacher."""
    config = load_config(path, [f"train.target_metric={goal}"])
    if quick:
        config = _small(config, folder)
    config = config.model_copy(
        update={"reader": config.reader.model_copy(update={"memmap_dir": f"{folder}/memmaps-too"})}
    )
    data = open_data(config)
    make_teacher(config, data)
    teacher = open_teacher(config, data)
    started = time.perf_counter()
    made, _ = capture_labels(config, data, teacher, f"{folder}/to-accuracy")
    captured = time.perf_counter() - started
    cache = config.reader.open_cache(made.url)
    runs: dict[str, list[dict[str, Any]]] = {ONLINE: [], CACHE: []}
    for seed in range(seeds):
        for name, how in (
            (ONLINE, {"labels": "online", "teacher": teacher}),
            (CACHE, {"labels": "cache", "cache": cache}),
        ):
            runs[name].append(_run(config, data, seed, f"{folder}/{name.split()[0]}-{seed}", how))
            log_info(
                f"seed {seed} {name}: {runs[name][-1]['seconds']:.1f} s, {runs[name][-1]['epochs']} epochs"
            )
    return {f"{config.name}: seconds to {goal:g}, over the online teacher's": _figures(runs, captured, goal)}


def _run(config: RunConfig, data: Data, seed: int, out: str, how: dict[str, Any]) -> dict[str, Any]:
    config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
    return train_student(config, data, model=config.student.model, out=out, **how)


def _figures(runs: dict[str, list[dict[str, Any]]], captured: float, goal: float) -> list[Figure]:
    seconds = {name: [run["seconds"] for run in of] for name, of in runs.items()}
    figures, cells = [], []
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds[ONLINE], strict=True)]
        epochs = [run["epochs"] for run in runs[name]]
        reached = sum(_reached(run, goal) for run in runs[name])
        figures.append(
            Figure(
                name,
                statistics.median(1 / value for value in values),
                statistics.median(ratios),
                min(ratios),
                max(ratios),
            )
        )
        cells.append(
            (
                name,
                f"{statistics.median(values):.2f}",
                f"{figures[-1].ratio:.2f}",
                f"{min(ratios):.2f}",
                f"{max(ratios):.2f}",
                f"{statistics.median(epochs):g}",
                f"{reached} of {len(values)}",
            )
        )
    print_table(
        "time to the goal", ("", "seconds", "ratio", "min", "max", "epochs", "reached the goal"), cells
    )
    saved = statistics.median(seconds[ONLINE]) - statistics.median(seconds[CACHE])
    students = "never" if saved <= 0 else f"after {math.ceil(captured / saved)} student(s)"
    print_table(
        "what the cache costs and when it has paid",
        ("capture, seconds", "saved by a student, seconds", "has paid"),
        [(f"{captured:.2f}", f"{saved:.2f}", students)],
    )
    return figures


def _reached(run: dict[str, Any], goal: float) -> bool:
    last = run["history"][-1]
    return last["accuracy"] >= goal if "perplexity" not in last else last["eval_loss"] <= goal


def _small(config: RunConfig, folder: str) -> RunConfig:
    """A few samples and one epoch, with a teacher of random weights: only to see that it runs."""
    from pathlib import Path

    from safetensors.torch import save_file

    from softcache.models.image import build_model

    weights = Path(folder) / "small.safetensors"
    save_file(build_model("linear", num_classes=10, input_shape=(1, 8, 8)).state_dict(), weights)
    assert config.teacher is not None
    return config.model_copy(
        update={
            "source": config.source.model_copy(update={"max_train_samples": 120, "max_eval_samples": 40}),
            "teacher": config.teacher.model_copy(update={"model": "linear", "weights": str(weights)}),
            "train_teacher": None,
            "train": config.train.model_copy(update={"epochs": 1}),
        }
    )
