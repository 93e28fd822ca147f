"""Everything of one sample that the page shows, as JSON: its image or text, and the teacher's likeliest classes."""

from __future__ import annotations

from typing import Any

import numpy as np

from softcache.errors import SoftcacheError
from softcache.labels import DetectionLabels, SoftLabels
from softcache.reader.cache import Cache
from softcache.tools.browse.drawn import drawn_on_image
from softcache.tools.browse.overview import MAX_VIEWS, row_entropies, top_classes
from softcache.tools.browse.samples import SourceSamples, group_tokens

__all__ = ["MAX_TOKENS", "describe_sample"]

TOP = 5
MAX_TOKENS = 256
"""Tokens of a sample that are sent at once."""
CELLS_SHOWN = 10


def describe_sample(cache: Cache, source: SourceSamples, sample: int, first: int = 0) -> dict[str, Any]:
    """Returns what is shown of a sample.

    Args:
        first: the token from which on a text is shown.
    """
    if cache.manifest.kind == "tokens":
        return _text(cache, source, sample, first)
    has_cells = cache.manifest.kind == "cells"
    picture, why = source.picture(sample, as_seen=has_cells)
    shown: dict[str, Any] = {"sample": sample, "picture": picture, "why": why, "truth": source.truth(sample)}
    if has_cells:
        return shown | _cells(cache, source, sample)
    return shown | {"views": _views(cache, source, sample)}


def _views(cache: Cache, source: SourceSamples, sample: int) -> list[dict[str, Any]]:
    found = []
    for view in range(min(cache.num_views, MAX_VIEWS)):
        plan = cache.manifest.plan
        if (
            view
            and not cache.markers.is_finished[plan.locate(view, sample).number]
            and sample not in cache.samples_in(view)
        ):
            continue
        (row,) = _rows(source, cache.read([sample], view))
        found.append({"view": f"view {view}"} | row)
    return found


def _rows(source: SourceSamples, labels: Any) -> list[dict[str, Any]]:
    """Returns of each row the entropy (`h`), the likeliest classes (`top`: name, probability) and the rest (`tail`)."""
    ids_PK, p_PK = top_classes(labels, TOP)
    entropy_P = row_entropies(labels)
    is_soft = isinstance(labels, SoftLabels)
    return [
        {
            "h": round(float(entropy), 4),
            "top": [
                [source.class_name(number), round(p, 5)]
                for number, p in zip(ids, ps, strict=True)
                if number >= 0
            ],
            "tail": round(max(0.0, 1 - sum(ps)), 5) if is_soft else None,
        }
        for ids, ps, entropy in zip(ids_PK.tolist(), p_PK.tolist(), entropy_P, strict=True)
    ]


def _cells(cache: Cache, source: SourceSamples, sample: int) -> dict[str, Any]:
    """Returns the surest rows of a detector, or those of a mask with the highest entropy, by their cell in the teacher's
    grid; and what is drawn on the image."""
    stored = cache.read_stored([sample], 0)
    labels: Any = stored.labels
    if isinstance(labels, DetectionLabels):
        order_P, cells_P, which = -top_classes(labels.labels, 1)[1][:, 0], labels.cells, "surest"
        labels = labels.labels
    else:
        order_P, cells_P, which = -row_entropies(labels), stored.positions, "least certain"
        cells_P = np.arange(len(labels)) if cells_P is None else cells_P
    chosen = np.argsort(order_P, kind="stable")[:CELLS_SHOWN]
    rows = zip(cells_P[chosen].tolist(), _rows(source, labels.take(chosen)), strict=True)
    view = {
        "view": f"{len(labels):,} cells; the {which}",
        "cells": [{"view": f"cell {cell}"} | row for cell, row in rows],
    }
    try:
        return {"views": [view], "drawn": drawn_on_image(cache, source, sample, stored)}
    except (SoftcacheError, ImportError, OSError) as error:
        return {"views": [view], "drawn": {}, "why": f"its boxes cannot be drawn: {error}"}


def _text(cache: Cache, source: SourceSamples, sample: int, first: int) -> dict[str, Any]:
    """Returns a text piece by piece, each with the rows of the teacher that predict its tokens."""
    stored = cache.read_stored([sample], 0)
    positions = np.arange(len(stored.labels)) if stored.positions is None else stored.positions
    tokens = source.tokens(sample)
    # The row at a position predicts the token after it.
    total = len(tokens) if tokens is not None else int(positions.max()) + 2 if len(positions) else 0
    last = min(first + MAX_TOKENS, total)
    chosen = np.flatnonzero((positions + 1 >= first) & (positions + 1 < last))
    labels = stored.labels.take(chosen)
    rows = _rows(source, labels)
    if labels.target_log_prob is not None:
        for row, log_prob in zip(rows, np.asarray(labels.target_log_prob, np.float64), strict=True):
            row["p"] = round(float(np.exp(min(log_prob, 0.0))), 5)
    by_token = dict(zip((positions[chosen] + 1).tolist(), rows, strict=True))
    if tokens is None:  # what the teacher would write stands for the text
        pieces = [
            [f"{row['top'][0][0] if row['top'] else '?'}  ", [row | {"at": at}]]
            for at, row in by_token.items()
        ]
    else:
        numbers = tokens[first:last].tolist()
        pieces = [
            [text, [by_token[first + at] | {"at": first + at} for at in places if first + at in by_token]]
            for text, places in group_tokens(source.decode, numbers)
        ]
    return {"sample": sample, "next": last, "total": total, "pieces": pieces}
