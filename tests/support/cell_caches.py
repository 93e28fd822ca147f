"""Small real caches of a detector's cells, and their teacher's answers, computed slowly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from softcache.config.load import build_config
from softcache.config.run import RunConfig
from softcache.models.detection.build import build_detector
from softcache.reader.cache import Cache
from softcache.runs import Data, capture_labels, open_data, open_teacher
from tests.support.tables import merged

SPEC = "fcos?width=8&depth=0&convs=1"
NUM_SAMPLES, TOP, K = 20, 12, 3


def weights(folder: Path, spec: str = SPEC, seed: int = 0, channels: int = 1) -> str:
    """Writes the weights of a fresh detector whose answers differ from cell to cell; returns their path."""
    torch.manual_seed(seed)
    model = build_detector(spec, num_classes=10, input_shape=(channels, 64, 64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head" in name and parameter.ndim > 1:
                parameter.mul_(6.0)  # else every cell has the prior's probability
    path = folder / f"{spec.partition('?')[0]}-{seed}-{channels}.safetensors"
    save_file(model.state_dict(), path)
    return str(path)


def cells_config(folder: Path, spec: str = SPEC, **tables: Any) -> RunConfig:
    """Scenes with a detector that was never trained; tables are merged key by key."""
    base: dict[str, Any] = {
        "name": "cells",
        "source": {"modality": "detection", "name": "scenes", "train_scenes": NUM_SAMPLES, "eval_scenes": 8},
        "views": {"crop": "padded", "padding": 4, "flip": 0.5, "mean": [0.2], "std": [0.22]},
        "teacher": {"model": spec},
        "labels": {"k": K, "num_views": 2, "positions": {"policy": "cells", "top": TOP}},
        "capture": {
            "unit_samples": 8,
            "chunk_samples": 4,
            "batch_size": 3,
            "device": "cpu",
            "evaluate": False,
        },
        "student": {"model": spec},
        "loss": {"temperature": 2, "alpha": 0.5},
        "train": {"epochs": 1, "batch_size": 5, "device": "cpu"},
        "reader": {"memmap": "never"},
    }
    if tables.get("source", {}).get("name", "scenes") != "scenes":
        base["source"] = {"modality": "detection"}
    base = merged(base, tables)
    base["teacher"].setdefault("weights", weights(folder, base["teacher"]["model"]))
    return build_config(base, "test")


def make_cells(folder: Path, name: str = "cache", **tables: Any) -> tuple[RunConfig, Data, Cache]:
    """Returns (config, data, cache) of a freshly captured cache."""
    config = cells_config(folder, **tables)
    data = open_data(config)
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(folder / name))
    return config, data, cache


def expected_rows(config: RunConfig, data: Any, sample: int, view: int) -> dict[str, np.ndarray]:
    """The teacher's answer for one image at its kept cells, worked out cell by cell in float64."""
    teacher = open_teacher(config, data)
    batch = data.train.load([sample], view)
    with torch.no_grad():
        found, _ = teacher.model(data.normalize()(batch.images))
        (truth,) = teacher.model.cells_of(found, batch.targets, (64, 64))
    logits_AV = found.class_logits[0].double().numpy()
    softmax = teacher.distribution == "categorical"
    if softmax:
        logits_AV = logits_AV - np.log(np.exp(logits_AV).sum(1, keepdims=True))
    scores = [max(row[1:] if softmax else row) for row in logits_AV]
    others = sorted(set(range(len(scores))) - set(truth.tolist()), key=lambda cell: (-scores[cell], cell))
    cells = (sorted(truth.tolist()) + others)[:TOP]
    order = [sorted(range(logits_AV.shape[1]), key=lambda v: (-logits_AV[cell, v], v)) for cell in cells]
    result = {
        "cells": np.array(cells),
        "ids": np.array([row[:K] for row in order]),
        "logits": np.array([logits_AV[cell, row[:K]] for cell, row in zip(cells, order, strict=True)]),
        "bound": np.array([logits_AV[cell, row[K]] for cell, row in zip(cells, order, strict=True)]),
        "dropped": np.array([logits_AV[cell, row[K:]] for cell, row in zip(cells, order, strict=True)]),
        "boxes": found.boxes[0][cells].numpy(),
    }
    if found.centerness is not None:
        result["centerness"] = found.centerness[0][cells].numpy()
    return result
