"""The nearest valid names to one that is not valid: what every error that refuses a name suggests."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["closest_matches", "did_you_mean"]


def closest_matches(name: str, known: Iterable[str], *, most: int = 3, cutoff: float = 0.6) -> list[str]:
    """Returns the names most like one, nearest first; empty where none is like it.

    Args:
        most: that are returned.
        cutoff: how like they have to be, from 0 (anything) to 1 (equal).

    Examples:
        >>> nearest("temprature", ["name", "temperature"])
        ['temperature']
    """
    return difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the question that an error ends with; empty where no name is near.

    Examples:
        >>> did_you_mean("parqet", ["zarr", "parquet"])
        'did you mean parquet?'
    """
    near = closest_matches(name, known)
    return f"did you mean {' or '.join(near)}?" if near else ""
