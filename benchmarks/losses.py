"""One table of the losses: students of each, from one truncated cache of images and one of text.

    python -m benchmarks.losses

Images: 1,501 digits, K = 3 of 10 classes, T = 2. Text: the standard library's source, a teacher and students of
transformers' architectures, K = 32 of 1,024 tokens, T = 1. alpha = 0.9 throughout; its parameters are the
defaults, but the head of `tail_decoupled_kl`, which is below K. Results are kept in OUT, one line each, and not made again.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np

from softcache.config.load import build_config
from softcache.config.run import RunConfig
from softcache.losses import LOSSES
from softcache.modalities import modality_of
from softcache.runs import capture_labels, make_teacher, open_data, open_teacher, train_student
from softcache.runtime.logging import log_info

TAILS = ("uniform", "ignore", "renormalize")


def tables_of(kind: str, out: Path) -> dict[str, Any]:
    """Returns the config of a kind of data, without [loss]."""
    weights = str(out / kind / "teacher.safetensors")
    if kind == "images":
        return {
            "name": "losses-images", "source": {"name": "digits"},
            "teacher": {"model": "cnn?width=16", "weights": weights},
            "labels": {"policy": "top_k", "k": 3}, "student": {"model": "cnn?width=4"},
            "train": {"epochs": 10, "batch_size": 64, "lr": 3e-3},
            "train_teacher": {"epochs": 10, "batch_size": 64, "lr": 3e-3},
        }  # fmt: skip
    return {
        "name": "losses-text",
        "source": {
            "modality": "text", "name": "stdlib", "tokenizer": "bpe?vocab_size=1024", "seq_len": 64,
            "max_train_samples": 800, "max_eval_samples": 100, "data_dir": str(out / "data"),
        },
        "teacher": {"model": "gpt2?width=96&depth=2&heads=4", "weights": weights},
        "labels": {"policy": "top_k", "k": 32},
        "student": {"model": "llama?width=32&depth=1&heads=2"},
        "train": {"epochs": 1, "batch_size": 16, "lr": 3e-3, "eval_batch_size": 50},
        "train_teacher": {"epochs": 4, "batch_size": 16, "lr": 3e-3, "eval_batch_size": 50},
    }  # fmt: skip


def losses_of(kind: str) -> dict[str, dict[str, Any]]:
    """Returns the tables [loss] that are compared, by the name of their row."""
    names = [name for name, spec in LOSSES.items() if spec.formula is not None]
    found: dict[str, dict[str, Any]] = {"hard labels": {}}
    for name in names:
        found[name] = {"name": name, "temperature": 2.0 if kind == "images" else 1.0, "alpha": 0.9}
    found["tail_decoupled_kl"]["head"] = 2 if kind == "images" else 10
    for tail in TAILS:
        found[f"forward_kl, {tail}"] = found["forward_kl"] | {"tail": tail}
    return found


@click.command()
@click.option("--kind", "kinds", multiple=True, default=("images", "text"), show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="runs/losses", show_default=True)
def main(kinds: tuple[str, ...], seeds: str, out: Path) -> None:
    """Train a student with each loss and seed from one cache; print the scores."""
    for kind in kinds:
        (out / kind).mkdir(parents=True, exist_ok=True)
        results = run_kind(kind, [int(seed) for seed in seeds.split(",")], out)
        click.echo(f"{kind}: {results.pop('teacher', [''])[0]}")
        for name, values in sorted(results.items(), key=lambda item: -np.mean(item[1])):
            std = np.std(values, ddof=min(1, len(values) - 1))
            click.echo(
                f"  {name:28} {np.mean(values):8.4f} ± {std:.4f}   {', '.join(f'{x:.4f}' for x in values)}"
            )


def run_kind(kind: str, seeds: list[int], out: Path) -> dict[str, list[Any]]:
    """Trains what is missing; returns the scores of each row, and the teacher's."""
    path = out / kind / "results.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    tables = tables_of(kind, out)
    config = build_config(tables, "benchmarks.losses")
    data = open_data(config)
    train_missing_teacher(config, data, out / kind)
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(out / kind / "cache"))
    metric = modality_of(config).score.metric
    found: dict[str, list[Any]] = {}
    for seed, (name, table) in product(seeds, losses_of(kind).items()):
        row = next((row for row in done if (row["loss"], row["seed"]) == (name, seed)), None)
        if row is None:
            train = {**tables["train"], "seed": seed}
            chosen = build_config({**tables, "loss": table, "train": train}, "benchmarks.losses")
            labels: Any = "ground_truth" if name == "hard labels" else "cache"
            folder = out / kind / "students" / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            how = {"labels": labels, "cache": cache if labels == "cache" else None, "out": folder}
            metrics = train_student(chosen, data, model=chosen.student.model, **how)
            row = {"loss": name, "seed": seed, "score": metrics["history"][-1][metric]}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            log_info(json.dumps(row))
        found.setdefault(name, []).append(row["score"])
    found["teacher"] = [f"teacher {cache.manifest.teacher}, {metric}"]
    return found


def train_missing_teacher(config: RunConfig, data: Any, folder: Path) -> None:
    """Trains the teacher where FOLDER/teacher.safetensors is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "teacher.safetensors"
    if weights.exists():
        return
    as_run = config.model_copy(
        update={
            "teacher": config.teacher
            and config.teacher.model_copy(update={"weights": str(config.root / "teacher/model.safetensors")})
        }
    )
    make_teacher(as_run, data)
    weights.write_bytes((config.root / "teacher/model.safetensors").read_bytes())


if __name__ == "__main__":
    main()
