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
| `first` | 1 | log p of slot 0, in steps of step / 256, zigzag |
| `tail` | 1, or G | bits of float32: of the tail at T = 1, or at all of the grid |
| `tail_rest` | G - 1 | steps between the tail at the other temperatures and what is expected there, zigzag |
| `target` | 1 | steps by which the ground truth's log p lies below that of slot 0, zigzag; or bits of float32 |
| `moments` | 3 | bits of float16: entropy, mean and deviation of the logits |
| `support` | 1 | bits of float32 |
| `counts` | K | how often each was drawn |
| `threshold` | 1 | bits of float32 |
| `infinite` | - | one bit for each temperature of the grid, then one for the ground truth: whether it is -inf |
| `used`, `finite` | 1 | slots that are used, and those of them whose log p is above -inf; the others follow |

zigzag: 0, -1, 1, -2, … are 0, 1, 2, 3, …
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from softcache.cache.codecs.packed.prediction import tail_weights

__all__ = ["FIRST_SUBSTEPS", "MAX_NEG_LOG_PROB", "Field", "Layout", "layout_of"]

MAX_NEG_LOG_PROB = 65504.0
"""Nats below which finite numbers are not told apart: the lowest of float16."""

FIRST_SUBSTEPS = 256
"""Steps of `first` in one step."""


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
        add("first", 1, _bytes_for(2 * FIRST_SUBSTEPS * farthest))
    add("tail", 1 if codec.tail == "fixed" else grid, 4)
    if codec.tail == "fixed":
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
