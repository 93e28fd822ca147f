"""The nearest valid names to one that is not valid: what every error that refuses a name suggests."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = ["closest_matches", "did_you_mean"]

WORD_CUTOFF = 0.75
"""How like a word of a name has to be: words are short, and much is like them."""


def closest_matches(name: str, known: Iterable[str], *, most: int = 3, cutoff: float = 0.6) -> list[str]:
    """Returns the names most like one, nearest first; empty where none is like it.

    Where no whole name is like it, those of which a word is.

    Args:
        most: that are returned.
        cutoff: how like they have to be, from 0 (anything) to 1 (equal).

    Examples:
        >>> closest_matches("temprature", ["name", "temperature"])
        ['temperature']
        >>> closest_matches("kll", ["cross_entropy", "forward_kl"])
        ['forward_kl']
    """
    known = list(known)
    if near := difflib.get_close_matches(name, known, n=most, cutoff=cutoff):
        return near
    words = {word: set(re.findall(r"[^\W_]+", word)) for word in known}
    like = difflib.get_close_matches(name, set().union(*words.values()), n=most, cutoff=WORD_CUTOFF)
    return [one for one in known if words[one] & set(like)][:most]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the question that an error ends with; empty where no name is near.

    Examples:
        >>> did_you_mean("parqet", ["zarr", "parquet"])
        'did you mean parquet?'
    """
    near = closest_matches(name, known)
    return f"did you mean {' or '.join(near)}?" if near else ""
