"""What a view does to boxes: the geometry of `view_ops`, for rectangles instead of pixels.

A box is (left, top, right, bottom) in pixels of its image, with exclusive right and bottom edges, so that a box
of whole numbers frames exactly image[top:bottom, left:right]. A view scales (an edge at x goes to x * W' / W),
moves and mirrors it; then it is cut at the image's edges. A box of which less than `MIN_VISIBLE` of the area is
left, erased pixels counted as gone, is dropped: it cannot be found.

Shape suffixes: `M` boxes.
"""

from __future__ import annotations

import numpy as np

__all__ = ["MIN_VISIBLE", "cut", "flipped", "scaled", "transform_boxes", "visible"]

MIN_VISIBLE = 0.25
"""The least share of a box's area that a view must show; a cache's rows depend on it, so it is in the cache's identity."""


def scaled(boxes_M4: np.ndarray, before: tuple[int, int], after: tuple[int, int]) -> np.ndarray:
    """Returns boxes of an image that is scaled from (height, width) `before` to `after`."""
    down, right = after[0] / before[0], after[1] / before[1]
    return boxes_M4 * np.array([right, down, right, down])


def transform_boxes(boxes_M4: np.ndarray, top: int, left: int) -> np.ndarray:
    """Returns boxes as seen from a window that begins at (top, left)."""
    return boxes_M4 - np.array([left, top, left, top])


def flipped(boxes_M4: np.ndarray, width: int) -> np.ndarray:
    """Returns boxes of an image that is mirrored left to right."""
    return np.stack([width - boxes_M4[:, 2], boxes_M4[:, 1], width - boxes_M4[:, 0], boxes_M4[:, 3]], axis=1)


def cut(boxes_M4: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns boxes cut at the edges of an image of (height, width)."""
    height, width = size
    return boxes_M4.clip(0, [width, height, width, height])


def visible(
    whole_M4: np.ndarray,
    boxes_M4: np.ndarray,
    size: tuple[int, int],
    erased: tuple[int, int, int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the boxes cut at the edges of an image, [M, 4], and which are visible enough to keep, bool [M].

    Args:
        whole_M4: as moved, reaching out of the image or not.
        boxes_M4: the same, of what earlier cuts have left.
        size: (height, width).
        erased: (top, left, height, width) of blanked pixels.
    """
    cut_M4 = cut(boxes_M4, size)
    area_M, left_M = _areas(whole_M4), _areas(cut_M4)
    if erased is not None:
        top, left, rows, columns = erased
        low, high = np.array([left, top, left, top]), np.array([left + columns, top + rows] * 2)
        left_M = left_M - _areas(cut_M4.clip(low, high))
    return cut_M4, (left_M > 0) & (left_M >= MIN_VISIBLE * area_M)


def _areas(boxes_M4: np.ndarray) -> np.ndarray:
    return (boxes_M4[:, 2] - boxes_M4[:, 0]) * (boxes_M4[:, 3] - boxes_M4[:, 1])
