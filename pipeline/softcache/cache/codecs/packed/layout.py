"""Where everything is in a packed record.

A record of R bytes is cut into *fields*; a field holds one whole number for each of its slots, little-endian, plane
by plane: first the lowest byte of every slot, then the next one of every slot. A plane that is hardly ever anything but
0 takes next to no space once it is compressed, so fields are as wide as the worst case wants.

| field | slots | what it holds |
|---|---|---|
| `ids` | K | whole bytes of the ids; what is left of the bits of V - 1 is in `ids_high` |
| `gaps` | K - 1 | how many steps a slot's log-probability lies below that of the slot before |
| `half` | K | with `values = "float16"`, in place of `gaps` and `first`: the bits of log p |
| `ids_high` | K | 1, 2, 4 or 8 bits each, packed: the first slot in the lowest bits of the first byte |
| `first` | 1 | log p of slot 0, in substeps, zigzag: of step / 256, or with `tail = "steps"` step / 16 |
| `tail` | 1, or G | bits of float32: of the tail at T = 1, or at all of the grid; or substeps below `first` ("steps") |
| `tail_rest` | G - 1 | steps between the tail at the other temperatures and what is expected there, zigzag |
| `target` | 1 | steps by which the ground truth's log p lies below that of slot 0, zigzag; or bits of float32 |
| `moments` | 3 | bits of float16: entropy, mean and deviation of the logits |
| `support` | 1 | bits of float32 |
| `counts` | K | how often each was drawn |
| `threshold` | 1 | bits of float32 |
| `infinite` | - | one bit for each temperature of the grid, then one for the ground truth: whether it is -inf |
| `used`, `finite` | 1 | slots that are used, and those of them whose log p is above -inf; the others follow |

zigzag: 0, -1, 1, -2, … are 0, 1, 2, 3, …

The tail is stored as the difference from what is expected at a temperature (`tail_weights`).

With beta = 1/T the tail F(beta) is smooth. Known beforehand are F(1), which is stored as it is; F(0), the log of the
number of dropped classes; and, where there are stats, F'(0), close to the mean of the logits. The grid is visited from
its highest temperature down; each time the polynomial through the nearest of what is known is taken at the next node.

A reader adds in another order than the writer, and a value's last bit may differ. What is expected next repeats such
a difference, on a long grid again and again (T = 1, 2, 4, …, 2^19: to 19 nats). So its growth is bounded: where it could
become more than `_LARGEST_REACH`-fold, the farthest nodes are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["MAX_NEG_LOG_PROB", "SUBSTEPS", "Field", "Layout", "layout_of", "tail_weights"]

MAX_NEG_LOG_PROB = 65504.0
"""Nats below which finite numbers are equal: the lowest of float16."""

SUBSTEPS = {"fixed": 256, "float32": 256, "steps": 16}
"""Parts of a step in which `first` is counted, by `tail`; "steps" counts the tail at T = 1 in them too."""


@dataclass(frozen=True)
class Field:
    """A part of a record.

    Attributes:
        start: its first byte.
        slots: numbers in it.
        width: bytes of each.
    """

    start: int
    slots: int
    width: int

    @property
    def stop(self) -> int:
        return self.start + self.slots * self.width


@dataclass(frozen=True)
class Layout:
    """The fields of a record by name, and its size R in bytes.

    Attributes:
        fields: those that the codec's parameters call for.
        high_bits: width of a slot of `ids_high`; 0 where there is none.
    """

    fields: dict[str, Field]
    high_bits: int
    num_bytes: int


def layout_of(codec: Any) -> Layout:
    """Returns the layout of a packed codec's records."""
    k, grid, fields, end = codec.k, len(codec.temperatures), {}, 0

    def add(name: str, slots: int, width: int) -> None:
        nonlocal end
        if slots and width:
            fields[name] = Field(end, slots, width)
            end = fields[name].stop

    id_bytes, left = divmod(max(1, (codec.num_classes - 1).bit_length()), 8)
    high_bits = next(bits for bits in (0, 1, 2, 4, 8) if bits >= left)
    add("ids", k, id_bytes)
    if codec.step is None:
        add("half", k, 2)
    else:
        farthest = int(MAX_NEG_LOG_PROB / codec.step) + 1
        add("gaps", k - 1, _bytes_for(farthest))
    add("ids_high", -(-k * high_bits // 8), 1)
    if codec.step is not None:
        add("first", 1, _bytes_for(2 * SUBSTEPS[codec.tail] * farthest))
    if codec.tail == "steps":
        add("tail", 1, _bytes_for(2 * SUBSTEPS[codec.tail] * farthest))
    else:
        add("tail", 1 if codec.tail == "fixed" else grid, 4)
    if codec.tail != "float32":
        # What is expected is a weighted sum of what is known, none of it farther than that.
        weights = np.abs(tail_weights(codec.temperatures, slope=codec.stats)).sum(axis=1)
        add("tail_rest", grid - 1, _bytes_for(int(2 * farthest * (1 + weights.max(initial=0.0)))))
    add("target", 1, 4 if codec.step is None else _bytes_for(2 * farthest))
    if codec.stats:
        add("moments", 3, 2)
        add("support", 1, 4)
    if codec.sampling is not None:
        if codec.sampling.replacement:
            add("counts", k, _bytes_for(codec.sampling.draws))
        else:
            add("threshold", 1, 4)
    add("infinite", -(-(grid + 1) // 8), 1)
    add("used", 1, _bytes_for(k))
    add("finite", 1, _bytes_for(k))
    return Layout(fields, high_bits, end)


def _bytes_for(largest: int) -> int:
    return max(1, -(-largest.bit_length() // 8))


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
