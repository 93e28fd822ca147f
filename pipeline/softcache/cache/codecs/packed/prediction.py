"""What the tail is expected to be at a temperature, before its own number is read.

With beta = 1/T the tail F(beta) is smooth. Known beforehand are F(1), which is stored as it is; F(0), the log of the
number of dropped classes; and, where there are stats, F'(0), close to the mean of the logits. The grid is visited from
its highest temperature down; each time the polynomial through the nearest of what is known is taken at the next node.

A reader adds in another order than the writer, and a value's last bit may differ. What is expected next repeats such
a difference, on a long grid again and again (T = 1, 2, 4, …, 2^19: to 19 nats). So its growth is bounded: where it could
become more than `_LARGEST_REACH`-fold, the farthest nodes are left out.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

__all__ = ["tail_weights"]

_MAX_NODES = 4  # measured: more of them repeat the rounding of their neighbours and gain nothing
_LARGEST_REACH = 2.0**30  # times float64's rounding it is float32's; the default grid has 4921


@lru_cache(maxsize=64)
def tail_weights(temperatures: tuple[float, ...], *, slope: bool) -> np.ndarray:
    """Returns the weights [G - 1, G + 2] float64 of what is known in what is expected.

    Row i is for the i-th temperature to be visited, G - 1 - i. Columns: F(0), F'(0), then F at the grid; of nodes that
    are not known yet, or not used, the weight is 0.

    Args:
        slope: whether F'(0) is known.
    """
    places = np.array([0.0, 0.0, *(1.0 / np.asarray(temperatures))])
    size = len(temperatures)
    out = np.zeros((size - 1, size + 2))
    reach = np.ones(size + 2)  # how many times the rounding of one number may stand in each, at most
    for row, column in enumerate(range(size + 1, 2, -1)):
        known = [0, *([1] if slope else []), 2, *range(size + 1, column, -1)]
        chosen = sorted(known, key=lambda other: abs(places[other] - places[column]))[:_MAX_NODES]
        while True:
            with np.errstate(all="ignore"):
                weights = _weights(places, chosen, places[column])
                reach[column] = 1.0 + np.abs(weights) @ reach[chosen]
            if len(chosen) == 1 or reach[column] <= _LARGEST_REACH:
                break
            chosen.pop()
        out[row, chosen] = weights
    return out


def _weights(places: np.ndarray, chosen: list[int], beta: float) -> np.ndarray:
    """Lagrange's polynomials of the chosen columns at beta; with F'(0), which is only chosen behind F(0), Hermite's."""
    slope = 1 in chosen
    nodes = [column for column in chosen if column != 1]
    weights = {}
    for column in nodes:
        others = [places[other] for other in nodes if other != column]
        weights[column] = np.prod([(beta - other) / (places[column] - other) for other in others])
        if slope and column:
            weights[column] *= beta / places[column]
        elif slope:
            weights[1] = beta * weights[0]
            weights[0] *= 1.0 + beta * sum(1.0 / other for other in others)
    return np.array([weights[column] for column in chosen])
