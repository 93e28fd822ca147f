"""What is drawn on a sample's image: the teacher's boxes and the true ones, or the classes of cells of a mask.

Boxes and pictures are of view 0, as the teacher saw it. Boxes need the config: the manifest names the teacher's grid by a
digest alone. Cells of a mask are drawn from the manifest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from softcache.labels import DetectionLabels
from softcache.reader.cache import Cache
from softcache.tools.browse.overview import NONE, is_background, top_classes
from softcache.tools.browse.samples import SourceSamples

__all__ = ["drawn_on_image"]

MIN_SCORE, MAX_OVERLAP, MAX_BOXES = 0.2, 0.5, 12
"""Of the boxes that are drawn, as a detector's own postprocessing chooses; of a sample whose scores are lower the first."""
MAX_SIDE = 128
"""Cells of a mask's side that are drawn; of a larger grid every n-th."""


def drawn_on_image(cache: Cache, source: SourceSamples, sample: int, stored: Any) -> dict[str, Any]:
    """Returns `boxes` and `true_boxes`, or `mask` and `true_mask` with `width`, `height` and the names of their classes.

    Args:
        stored: what `cache.read_stored([sample], 0)` returned.

    Raises:
        IdentityError: the config's detector has other cells than the labels.
    """
    seen = source.seen(sample)
    if isinstance(stored.labels, DetectionLabels):
        return {} if seen is None else _boxes(cache, source, stored.labels, seen)
    return _mask(cache, source, stored, seen)


def _boxes(cache: Cache, source: SourceSamples, labels: DetectionLabels, seen: Any) -> dict[str, Any]:
    height, width = seen.images.shape[-2:]
    size_4 = np.array([width, height, width, height])
    names = source.true_names()
    true = [
        [*_places(box, size_4), names[number], 1.0, number]
        for box, number in zip(seen.boxes[0].numpy(), seen.classes[0].tolist(), strict=True)
    ]
    if not {"boxes", "bins"} & labels.columns.keys():
        return {"true_boxes": true}
    import torch
    from torchvision.ops import batched_nms

    guess_P, score_P = (found[:, 0] for found in top_classes(labels.labels, 1))
    if (centerness_P := labels.columns.get("centerness")) is not None:  # as FCOS ranks its boxes
        score_P = np.sqrt(score_P / (1 + np.exp(-np.asarray(centerness_P, np.float64))))
    rows = np.flatnonzero((guess_P >= 0) & ~is_background(cache, guess_P))
    boxes = source.decode_boxes(cache, labels.take(rows))
    chosen = batched_nms(
        torch.from_numpy(boxes),
        torch.from_numpy(score_P[rows]).float(),
        torch.from_numpy(guess_P[rows]),
        MAX_OVERLAP,
    ).numpy()[:MAX_BOXES]
    chosen = chosen[(score_P[rows[chosen]] >= MIN_SCORE) | (np.arange(len(chosen)) == 0)]
    first = len(cache.manifest.class_names) > len(names)  # of a softmax class 0 is the background
    found = [
        [
            *_places(boxes[place], size_4),
            source.class_name(int(guess_P[rows[place]])),
            round(float(score_P[rows[place]]), 3),
            int(guess_P[rows[place]]) - first,
        ]
        for place in chosen
    ]
    return {"boxes": found, "true_boxes": true}


def _places(box_4: np.ndarray, size_4: np.ndarray) -> list[float]:
    """Returns left, top, right and bottom as shares of the image, cut at its edges."""
    return [round(float(x), 4) for x in np.clip(box_4 / size_4, 0, 1)]


def _mask(cache: Cache, source: SourceSamples, stored: Any, seen: Any) -> dict[str, Any]:
    grid = cache.manifest.identity["grid"].get("settings", {})
    if grid.keys() != {"height", "width"}:  # of another writer
        return {}
    height, width = grid["height"], grid["width"]
    guess_P = top_classes(stored.labels, 1)[0][:, 0]
    cells = np.full(height * width, NONE)
    cells[np.arange(len(guess_P)) if stored.positions is None else stored.positions] = guess_P
    step = -(-max(height, width) // MAX_SIDE)
    found = {"mask": cells.reshape(height, width)[::step, ::step]}
    if seen is not None and seen.targets.numel() == height * width:
        true_A = seen.targets.numpy().reshape(height, width)[::step, ::step]
        found["true_mask"] = np.where(true_A < cache.num_classes, true_A, NONE)
    used = np.unique(np.concatenate([part.ravel() for part in found.values()]))
    return {
        **{name: part.ravel().tolist() for name, part in found.items()},
        "height": found["mask"].shape[0],
        "width": found["mask"].shape[1],
        "names": {int(n): source.class_name(int(n)) for n in used if n >= 0},
    }
