"""What is checked of every record that comes from a cache, before anybody computes with it.

A checksum says that bytes are those that were written, not that who wrote them meant well. Compiled losses follow an
id to a logit without asking, and one NaN ends a training run, so ids and numbers are looked at once, when they are decoded:
7 microseconds for a chunk of 2,048 images, which takes some 700 to decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from softcache.cache.codecs.detection import CellCodec
from softcache.errors import LabelError

__all__ = ["check_stored"]

FLOATS = ("log_probs", "log_tail", "stats", "log_threshold")


def check_stored(codec: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Looks at a decoded record's arrays [P, ...], by name.

    Raises:
        LabelError: an id above V, an unused slot (id V) with a probability, more draws than were made, NaN or +inf; the
            first such row is named. Of cells as `CellCodec.check`.
    """
    if isinstance(codec, CellCodec):
        codec.check(arrays)
        return
    ids, most = arrays["ids"], codec.num_classes
    if not len(ids):
        return
    highest = int(ids.max())
    if highest > most:
        raise _fault("ids", ids, ids > most, f"0 to {most}")
    if highest == most:
        wrong = (ids == most) & (arrays["log_probs"] > -np.inf)
        if wrong.any():
            raise _fault("log_probs", arrays["log_probs"], wrong, "-inf in an unused slot")
    if "counts" in arrays and int(arrays["counts"].max()) > codec.sampling.draws:
        raise _fault(
            "counts", arrays["counts"], arrays["counts"] > codec.sampling.draws, "draws that were made"
        )
    for name in FLOATS:
        if name in arrays and _has_bad(arrays[name]):
            values = arrays[name]
            raise _fault(name, values, np.isnan(values) | (values == np.inf), "numbers below +inf")


def _has_bad(values: np.ndarray) -> bool:
    """Whether NaN or +inf is among floats."""
    if values.dtype == np.float16:  # as bits: NumPy compares half-precision numbers one at a time
        # The largest number without its sign bit's meaning is -inf, with it +inf; what lies beyond is NaN.
        return bool(values.view(np.uint16).max() > 0xFC00 or values.view(np.int16).max() >= 0x7C00)
    return not values.max(initial=-np.inf) < np.inf


def _fault(name: str, values: np.ndarray, wrong: np.ndarray, expected: str) -> LabelError:
    place = tuple(np.argwhere(wrong)[0])
    return LabelError(
        f"column {name}: {values[place]} in row {place[0]}; expected {expected}", position=int(place[0])
    )
