"""What an object shows of itself: a few lines in a terminal, and the same as a table in a notebook.

What is shown may come from a cache of unknown origin, so it is text in both: characters that a terminal would obey are
written as escapes, and those that a browser would obey as entities.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

__all__ = ["Displayed", "Summary", "format_duration", "printable", "shorten_list"]

MAX_CHARACTERS = 200
"""Of one fact; a name in a foreign cache may be as long as it likes."""


class Summary(NamedTuple):
    """What an object shows.

    Attributes:
        title: its kind, and its size.
        facts: pairs of a name and a text, one per line.
    """

    title: str
    facts: Sequence[tuple[str, str]]


class Displayed(ABC):
    """An object with a `repr`, in notebooks as a table."""

    @abstractmethod
    def summarize(self) -> Summary:
        """Returns what is shown of the object; reads no more than is shown."""

    def __repr__(self) -> str:
        title, facts = self.summarize()
        width = max((len(name) for name, _ in facts), default=0)
        lines = [f"  {printable(name):{width}}  {printable(text)}" for name, text in facts]
        return "\n".join([printable(title), *lines])

    def _repr_html_(self) -> str:
        title, facts = self.summarize()
        rows = "".join(
            f'<tr><th style="text-align:left">{escape(printable(name))}</th>'
            f'<td style="text-align:left">{escape(printable(text))}</td></tr>'
            for name, text in facts
        )
        return f"<div><strong>{escape(printable(title))}</strong><table><tbody>{rows}</tbody></table></div>"


def printable(text: str) -> str:
    """Returns a text of at most `MAX_CHARACTERS` in which what no terminal prints as a character is escaped."""
    short = text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in short)


def shorten_list(names: Sequence[str] | Iterable[str], *, most: int = 5) -> str:
    """Returns the first names with commas between them, and an ellipsis where there are more."""
    first = list(names)[: most + 1]
    return ", ".join([*(name[:40] for name in first[:most]), *(["…"] if len(first) > most else [])])


def format_duration(seconds: float) -> str:
    """Returns a time as people read it, in its two largest units: 12.3 s, 3 min 20 s, 1 h 10 min, 2 d 3 h."""
    if round(seconds, 1) < 60:
        return f"{round(seconds, 1 if seconds >= 1 else 2):g} s"
    if round(seconds) < 3600:
        (whole, rest), large, small = divmod(round(seconds), 60), "min", "s"
    elif round(seconds / 60) < 24 * 60:
        (whole, rest), large, small = divmod(round(seconds / 60), 60), "h", "min"
    else:
        (whole, rest), large, small = divmod(round(seconds / 3600), 24), "d", "h"
    return f"{whole:,} {large} {rest} {small}" if rest else f"{whole:,} {large}"
