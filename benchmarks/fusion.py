"""What a student of three fused teachers learns, and how far fused top-k caches are from fused whole distributions.

    python -m benchmarks.fusion                     # students: hard labels, each teacher, every rule; 5 seeds
    python -m benchmarks.fusion --weak              # the same, one of the teachers much worse than the others
    python -m benchmarks.fusion --estimates         # K against the error of what is estimated, at T = 1, 2, 4

The teachers of the config's source differ in architecture and seed; they are trained and their caches made, in OUT, if
they are missing. All students have the same loop and seeds. Results are added to OUT/students.jsonl (or weak.jsonl) one by
one; a run that is there already is not repeated. The tables in docs/fusion.md are what this prints.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from softcache.cache.codecs import OpenSettings
from softcache.config.run import RunConfig
from softcache.labels import SoftLabels, truncate_labels
from softcache.labels.sparsify import LabelSettings, dense, label_settings
from softcache.modalities import Data
from softcache.reader.cache import Cache
from softcache.runs import capture_labels, make_teacher, open_data, open_teacher, train_student
from softcache.runtime.logging import log_info
from softcache.stages.options import config_options, print_table
from softcache.tools.fuse import RULES, FusionSettings, Rule, fuse_caches, fused_labels
from softcache.tools.shrink import ShrinkSettings, shrink_cache

TEACHERS = {  # name: (model, seed)
    "cnn": ("cnn?width=64&stages=2", 0),
    "narrow": ("cnn?width=32&stages=2", 1),
    "deep": ("cnn?width=32&stages=3", 2),
    "mlp": ("mlp?width=256", 3),
}
ALIKE, ONE_WEAK = ("cnn", "narrow", "deep"), ("cnn", "narrow", "mlp")
TEMPERATURES = (1.0, 2.0, 4.0)
SYNTHETIC = {"teachers alike": 0.3, "teachers apart": 1.0}
NUM_ROWS, NUM_CLASSES, SCALE = 500, 1000, 3.0


@click.command(context_settings={"default_map": {"config_path": "configs/digits-fusion.toml"}})
@config_options
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="Students of each kind.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/fusion", show_default=True)
@click.option("--weak", is_flag=True, help="With a weak teacher in the place of the third.")
@click.option("--estimates", is_flag=True, help="Measure the estimates instead of students.")
def main(config: RunConfig, seeds: int, out: Path, weak: bool, estimates: bool) -> None:
    """Students of several teachers at once, against those of one, and of none."""
    data = open_data(config)
    out.mkdir(parents=True, exist_ok=True)
    names, results = (ONE_WEAK, "weak") if weak else (ALIKE, "students")
    caches = {name: _teacher_cache(config, data, name, out) for name in names}
    if estimates:
        _print_estimates(list(caches.values()))
        return
    for name, cache in caches.items():
        log_info(f"teacher {name}: accuracy {cache.manifest.teacher.eval_accuracy}")
    _run(config, data, caches, seeds, out, out / f"{results}.jsonl")
    _print_students(caches, _read(out / f"{results}.jsonl"))


def _teacher_cache(config: RunConfig, data: Data, name: str, out: Path) -> Cache:
    """Returns the cache of every class in float32 of one of the teachers, made if it is missing."""
    assert config.teacher is not None
    assert config.train_teacher is not None
    model, seed = TEACHERS[name]
    run = config.model_copy(update={"name": f"{config.name}-{name}"})
    teacher = {"model": model, "weights": str(run.root / "teacher" / "model.safetensors")}
    run = run.model_copy(
        update={
            "teacher": config.teacher.model_copy(update=teacher),
            "train_teacher": config.train_teacher.model_copy(update={"seed": seed}),
            "labels": label_settings(
                "dense", **config.labels.model_dump(include=LabelSettings.model_fields.keys() - {"policy"})
            ),
            "capture": config.capture.model_copy(update={"codec": OpenSettings(values="float32")}),
        }
    )
    make_teacher(run, data)
    return capture_labels(run, data, open_teacher(run, data), str(out / f"{name}-dense"))[0]


# -- students ----------------------------------------------------------------------------------------------


def _run(
    config: RunConfig, data: Data, caches: dict[str, Cache], seeds: int, out: Path, results: Path
) -> None:
    k = config.labels.k
    cut = {
        name: shrink_cache(cache, str(out / f"{name}-{k}"), ShrinkSettings(k=k, values="float16"))
        for name, cache in caches.items()
    }
    kinds: dict[str, Cache | None] = {"hard labels": None} | {f"teacher {name}": c for name, c in cut.items()}
    for rule in RULES:
        settings = FusionSettings.model_construct(
            rule=rule,
            k=None,
            values="float16",
            allow_weak_teachers=True,  # measured all the same
        )
        kinds[f"fused, {rule}"] = fuse_caches(
            list(cut.values()), str(out / f"{results.stem}-{rule}"), settings
        )
    for seed in range(seeds):
        for kind, cache in kinds.items():
            if any((row["kind"], row["seed"]) == (kind, seed) for row in _read(results)):
                continue
            run = config.model_copy(
                update={
                    "teacher": None,
                    "labels": type(config.labels)(),
                    "train": config.train.model_copy(update={"seed": seed}),
                }
            )
            found = train_student(
                run,
                data,
                model=config.student.model,
                labels="ground_truth" if cache is None else "cache",
                cache=None if cache is None else config.reader.open_cache(cache.url),
            )
            row = {"kind": kind, "seed": seed, "accuracy": found["accuracy"], "eval_loss": found["eval_loss"]}
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _print_students(caches: dict[str, Cache], rows: Sequence[dict[str, Any]]) -> None:
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        shown, name = [kind], kind.removeprefix("teacher ")
        report = caches[name].manifest.teacher if name in caches else None
        shown.append("" if report is None else f"{100 * (report.eval_accuracy or 0):.2f}%")
        for metric, scale, digits in (("accuracy", 100, 2), ("eval_loss", 1, 4)):
            values = [scale * row[metric] for row in rows if row["kind"] == kind]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            shown.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append((*shown, str(len(values))))
    print_table(
        "students", ("learns from", "teacher itself", "accuracy (%)", "held-out loss", "seeds"), lines
    )


# -- estimates ---------------------------------------------------------------------------------------------


def _print_estimates(caches: Sequence[Cache]) -> None:
    digits = [cache.read(np.arange(len(cache))) for cache in caches]
    lines = list(_measured("digits", digits, caches[0].samples_table().targets, (2, 3, 5)))
    for name, apart in SYNTHETIC.items():
        draw = torch.Generator().manual_seed(0)
        common = torch.randn(NUM_ROWS, NUM_CLASSES, generator=draw) * SCALE
        logits = [common + apart * SCALE * torch.randn(NUM_ROWS, NUM_CLASSES, generator=draw) for _ in caches]
        targets = logits[0].argmax(1)
        whole = [dense(z, targets_P=targets).to_numpy() for z in logits]
        lines += _measured(f"{NUM_CLASSES} classes, {name}", whole, targets.numpy(), (4, 16, 64))
    columns = [f"T={t:g}: KL, class, tail" for t in TEMPERATURES]
    print_table(
        "fused top-k against fused whole distributions",
        ("labels", "rule", "K", *columns),
        lines,
        note="KL: mean, nats, kept classes and tail. class, tail: worst absolute error of a kept class, of the tail's mass.",
    )


def _measured(
    name: str, whole: Sequence[SoftLabels], targets: np.ndarray, sizes: Sequence[int]
) -> Iterator[tuple[str, ...]]:
    rules: tuple[Rule, ...] = ("mean", "entropy", "confidence", "geometric")  # "best" estimates nothing
    for rule in rules:
        truth = fused_labels(whole, rule, whole[0].num_classes)
        for k in sizes:
            cut = [truncate_labels(record, k) for record in whole]
            found = fused_labels(cut, rule, k, targets=targets)
            cells = [", ".join(f"{x:.0e}" for x in errors_at(found, truth, t)) for t in TEMPERATURES]
            yield name, rule, str(k), *cells


def errors_at(found: SoftLabels, truth: SoftLabels, T: float) -> tuple[float, float, float]:
    """Returns mean KL(truth || found) over the kept classes and the tail (nats), and the
    worst absolute errors of a kept class and of the tail's mass, at T.

    Args:
        truth: of every class.
    """
    here, there = found.at_temperature(T), truth.at_temperature(T)
    p_PV = np.zeros((len(truth), truth.num_classes + 1))
    np.put_along_axis(p_PV, truth.ids.astype(np.int64), np.exp(there.log_probs.astype(np.float64)), axis=1)
    p_PK = np.take_along_axis(p_PV, found.ids.astype(np.int64), axis=1)
    q_PK, rest_P = np.exp(here.log_probs.astype(np.float64)), np.exp(here.log_tail.astype(np.float64))
    p_PB = np.concatenate([p_PK, np.maximum(1.0 - p_PK.sum(axis=1, keepdims=True), 0.0)], axis=1)
    q_PB = np.concatenate([q_PK, rest_P[:, None]], axis=1)
    both = (p_PB > 1e-12) & (q_PB > 0)
    kl_PB = np.where(both, p_PB * np.log(np.where(both, p_PB, 1.0) / np.where(both, q_PB, 1.0)), 0.0)
    error_PB = np.abs(p_PB - q_PB)
    return (
        max(0.0, float(kl_PB.sum(axis=1).mean())),
        float(error_PB[:, :-1].max()),
        float(error_PB[:, -1].max()),
    )


if __name__ == "__main__":
    main()
