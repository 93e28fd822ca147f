"""The classes of a dataset of images: their names, and their order.

A label of the data is a whole number or a text. Texts, such as the names of folders, are numbered in the order that the
settings or the data give; where neither does, they are sorted. Two rules are common: torchvision and Hugging Face sort
them as texts, timm by the numbers in them (class2 before class10) and without regard to case.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from softcache.errors import SourceError

__all__ = [
    "ClassOrder",
    "Classes",
    "alike_hint",
    "check_same_numbers",
    "find_classes",
    "numbers_or_texts",
    "read_labels",
    "sort_names",
    "sorted_places",
    "whole_numbers",
]

ClassOrder = Literal["lexicographic", "natural"]
MAX_SHOWN = 10


@dataclass(frozen=True)
class Classes:
    """Classes in the order of their numbers.

    Attributes:
        names: [V], as tables show them.
        labels: [V], what the data call them.
        is_guessed: the order is that of sorted names, and the two rules of sorting differ.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    is_guessed: bool = False

    def targets(self, labels: Sequence[Any] | np.ndarray, keys: Sequence[str], where: str) -> np.ndarray:
        """Returns the class [N] int64 of each label.

        Raises:
            SourceError: some are of no class; how many, and the first of them.
        """
        numbers = {label: number for number, label in enumerate(self.labels)}
        targets = np.array([numbers.get(str(label), -1) for label in labels], np.int64)
        wrong = np.flatnonzero(targets < 0)
        if len(wrong):
            known = Counter(str(labels[sample]) for sample in wrong.tolist())
            shown = ", ".join(f"{label!r} ({count:,})" for label, count in known.most_common(MAX_SHOWN))
            raise SourceError(
                f"{where}: {len(wrong):,} samples have a label of no class, the first is {keys[wrong[0]]!r}: {shown}; "
                f"classes are {_some(self.labels)}; correct the labels, or give all classes as source.class_names"
                f"{alike_hint(known, self.labels)}"
            )
        return targets

    def multi_hot(
        self, labels: Sequence[Sequence[Any]], keys: Sequence[str], where: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns [N, V] uint8, 1 for each class of a sample, and how many there are, [N] int64.

        Raises:
            SourceError: as `targets`, or a sample has a class twice.
        """
        counts = np.array([len(found) for found in labels], np.int64)
        rows = np.repeat(np.arange(len(labels)), counts)
        flat = [label for found in labels for label in found]
        columns = self.targets(flat, [keys[row] for row in rows.tolist()], where)
        hot = np.zeros((len(labels), len(self.names)), np.uint8)
        np.add.at(hot, (rows, columns), 1)
        twice = np.argwhere(hot > 1)
        if len(twice):
            raise SourceError(
                f"{where}: sample {keys[twice[0, 0]]!r} has the class {self.names[twice[0, 1]]!r} twice; expected each once"
            )
        return hot, counts


def alike_hint(these: Iterable[str], those: Iterable[str]) -> str:
    """Returns words on a name of `these` and another of `those` that look the same; nothing where there are none.

    >>> alike_hint(["cafe\\u0301"], ["caf\\xe9", "the"])
    " ('cafe\\\\u0301' and 'caf\\\\xe9' look alike and are of other characters: composed letters, or spaces)"
    """
    by_look = {_look(name): name for name in those}
    for name in these:
        if by_look.get(_look(name), name) != name:
            return (
                f" ({name!a} and {by_look[_look(name)]!a} look alike and are of other characters: composed "
                "letters, or spaces)"
            )
    return ""


def _look(name: str) -> str:
    """Returns a name with composed letters and single spaces, without marks that are not shown, as of byte order."""
    shown = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
    return " ".join(unicodedata.normalize("NFC", shown).split())


def sort_names(names: Iterable[str], order: ClassOrder | None) -> tuple[list[str], bool]:
    """Returns names in an order, by default as texts, and whether that is a guess: the other one differs.

    >>> sort_names(["b10", "b9"], None)
    (['b10', 'b9'], True)
    >>> sort_names(["b10", "b9"], "natural")
    (['b9', 'b10'], False)
    """
    names = list(names)
    as_texts, by_numbers = sorted(names), sorted(sorted(names), key=_natural_key)
    return (by_numbers if order == "natural" else as_texts), order is None and as_texts != by_numbers


def sorted_places(names: Sequence[str]) -> list[list[int]]:
    """Returns the place of each name among them sorted as texts, and as timm sorts them; nothing where a name comes twice.

    >>> sorted_places(["b9", "b10", "a"])
    [[2, 1, 0], [1, 2, 0]]
    """
    places: list[list[int]] = []
    if len(set(names)) < len(names):
        return places
    for order in ("lexicographic", "natural"):
        by_name = {name: place for place, name in enumerate(sort_names(names, order)[0])}
        places.append([by_name[name] for name in names])
    return places


def _natural_key(name: str) -> list[Any]:
    """As in timm.utils.natural_key."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def find_classes(
    labels: Sequence[Any] | np.ndarray,
    *,
    given: str | Sequence[str] | None,
    order: ClassOrder | None,
    known: Sequence[str] | None = None,
    where: str,
) -> Classes:
    """Returns the classes of a dataset.

    Args:
        labels: of its training samples (or, of folders, their names); whole numbers, or texts.
        given: `source.class_names`.
        order: `source.class_order`.
        known: the names that the data give their numbers.

    Raises:
        SourceError: labels are of neither kind, or of both; a file of names is none; an order is given for what has one; two
            names look the same.
    """
    found = _find(labels, given=given, order=order, known=known, where=where)
    if hint := alike_hint(found.labels, found.labels):
        raise SourceError(
            f"{where}: {len(found.labels)} classes, two of which look like one{hint}; write both alike, or merge them"
        )
    return found


def _find(
    labels: Sequence[Any] | np.ndarray,
    *,
    given: str | Sequence[str] | None,
    order: ClassOrder | None,
    known: Sequence[str] | None,
    where: str,
) -> Classes:
    labels = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    if not labels:
        raise SourceError(f"{where}: no rows of the training split; expected an image and its class in each")
    kinds = {type(label).__name__ for label in labels}
    if kinds not in ({"int"}, {"str"}):
        raise SourceError(f"{where}: labels of the types {', '.join(sorted(kinds))}; expected int, or str")
    is_whole = kinds == {"int"}
    if given is not None:
        return _given(given, is_whole=is_whole)
    if "" in labels:
        raise SourceError(
            f"{where}: {labels.count('')} of {len(labels):,} samples have an empty label; expected a class of each; "
            "leave out what has none"
        )
    if order is not None and (is_whole or known is not None):
        has = "labels are numbers" if is_whole else "the data name their classes in an order"
        raise SourceError(f"source.class_order: {order!r}, and {has}; drop it")
    if is_whole:
        largest, smallest = max(labels), min(labels)
        if smallest < 0:
            raise SourceError(
                f"{where}: the label {smallest}; expected classes from 0 on; leave out what has no label"
            )
        names = list(known) if known is not None else [str(number) for number in range(int(largest) + 1)]
        if len(names) <= largest:
            raise SourceError(
                f"{where}: the label {largest}, and names of {len(names)} classes; expected one each"
            )
        return Classes(tuple(names), tuple(str(number) for number in range(len(names))))
    if known is not None:
        return Classes(tuple(known), tuple(known))
    sorted_names, is_guessed = sort_names(set(labels), order)
    return Classes(tuple(sorted_names), tuple(sorted_names), is_guessed)


def check_same_numbers(here: Sequence[str] | None, train: Sequence[str] | None, where: str) -> None:
    """Checks that data whose labels are numbers number their classes as the training data do.

    Args:
        here, train: the names that each gives its numbers; None: none.

    Raises:
        SourceError: they do not, and a number would be read as another class.
    """
    if here is None or train is None or list(here) == list(train):
        return
    number = next((n for n, pair in enumerate(zip(here, train, strict=False)) if pair[0] != pair[1]), None)
    how = (
        f"{len(here)} classes, and {len(train)}"
        if number is None
        else f"class {number} is {here[number]!r}, and {train[number]!r}"
    )
    raise SourceError(
        f"{where}: its numbers are of other classes than those of the training data: {how} there; give both the same "
        "ClassLabel (Dataset.cast_column)"
    )


def read_labels(labels: Sequence[Any], given: str | Sequence[str] | None) -> list[Any]:
    """Returns labels in which whole numbers that are written as texts are numbers, as in every source but folders.

    Args:
        labels: whole numbers, or texts (`whole_numbers`, `numbers_or_texts`); others stay as they are.
        given: `source.class_names`.

    Raises:
        SourceError: a file of names is none.

    >>> read_labels(["3", "10.0"], None), read_labels([3, 10], None), read_labels(["3", "cat"], None)
    ([3, 10], [3, 10], ['3', 'cat'])
    """
    if not all(isinstance(label, str) for label in labels):
        return list(labels)
    as_whole = whole_numbers(set(labels), given)
    return numbers_or_texts([as_whole[label] for label in labels])


def numbers_or_texts(labels: Sequence[str]) -> list[int] | list[str]:
    """Returns labels as whole numbers, where all of them are; -1 is one, which is no class.

    >>> numbers_or_texts(["3", "10"]), numbers_or_texts(["3", "010"]), numbers_or_texts(["3", "-1"])
    ([3, 10], ['3', '010'], [3, -1])
    """
    if all(label.removeprefix("-").isdecimal() and str(int(label)) == label for label in labels):
        return [int(label) for label in labels]
    return list(labels)


def whole_numbers(labels: Collection[str], given: str | Sequence[str] | None) -> dict[str, str]:
    """Returns `3` for `3.0`, as pandas writes whole numbers of a column with gaps, where all labels are such numbers.

    Args:
        given: `source.class_names`; where labels are among them as they are, they stay.

    Raises:
        SourceError: a file of names is none.

    >>> whole_numbers(["3.0", "10.0", ""], None), whole_numbers(["1.0", "1.5"], None)
    ({'3.0': '3', '10.0': '10', '': ''}, {'1.0': '1.0', '1.5': '1.5'})
    """
    found = {label: re.sub(r"\.0+$", "", label) for label in labels}
    is_whole = all(re.fullmatch(r"(-?(0|[1-9]\d*))?", number) for number in found.values())
    if not is_whole or (given is not None and {*_given(given, is_whole=False).labels} & found.keys()):
        return {label: label for label in found}
    return found


def _given(given: str | Sequence[str], *, is_whole: bool) -> Classes:
    """Returns the classes of `source.class_names`.

    Raises:
        SourceError: its file is not there or of another form, or a name comes twice.
    """
    what = "source.class_names" + (f" {given}" if isinstance(given, str) else "")
    found = _read_names(given, what) if isinstance(given, str) else list(given)
    if isinstance(found, dict) and found and all(type(number) is int for number in found.values()):
        if sorted(found.values()) != list(range(len(found))):
            raise SourceError(f"{what}: expected the numbers 0 to {len(found) - 1}, one of each class")
        found = sorted(found, key=found.__getitem__)
    pairs: list[tuple[str, Any]] = []
    if isinstance(found, list):
        pairs = [(str(number) if is_whole else name, name) for number, name in enumerate(found)]
    elif isinstance(found, dict):
        pairs = list(found.items())
    if not pairs or not all(isinstance(name, str) for _, name in pairs):
        raise SourceError(f"{what}: expected {_FORMS}; found {type(found).__name__}")
    for label, count in Counter(label for label, _ in pairs).items():
        if count > 1:
            raise SourceError(f"{what}: {label!r} comes twice; expected one line for each class")
    return Classes(tuple(name for _, name in pairs), tuple(label for label, _ in pairs))


def _read_names(path: str, what: str) -> Any:
    try:
        text = Path(path).expanduser().read_text("utf-8-sig")
        return (
            json.loads(text)
            if path.endswith(".json")
            else [x.strip() for x in text.splitlines() if x.strip()]
        )
    except (OSError, ValueError) as error:
        raise SourceError(f"{what}: {error}; expected {_FORMS}") from error


_FORMS = (
    "a text file with a name on each line, or a JSON file: a list of names in order, an object from labels to "
    "names in order, or an object from names to numbers"
)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_SHOWN]) + (
        f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    )
