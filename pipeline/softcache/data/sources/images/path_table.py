"""Tables of paths and labels: CSV files, whose rows name image files in a folder."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from softcache.data.sources.base import SOURCES
from softcache.data.sources.images.base import Split
from softcache.data.sources.images.classes import read_labels
from softcache.data.sources.images.image_folder import ImageFolderSource
from softcache.data.sources.images.split_files import SplitFiles
from softcache.errors import SourceError

__all__ = ["CsvImages"]

KINDS = (".csv", ".tsv", ".txt")


@SOURCES.register("image/csv")
class CsvImages(SplitFiles):
    """CSV files with a path and a label in each row; keys are the paths, relative to `root` (the file's folder).

    Columns are named by the header; `header = false` counts them from 0. `delimiter` is by default a tab in .tsv files, else
    a comma. Labels that are whole numbers (`3`, or `3.0` as pandas writes it) are the numbers of classes, others are their
    names.

    Attributes:
        path_column, label_column: columns of the table.
    """

    name: str = "csv"
    root: str | None = None
    path_column: str | int = "path"
    label_column: str | int = "label"
    header: bool = True
    delimiter: str | None = None

    def pictures(self, split: Split) -> ImageFolderSource:
        paths, columns, root, where = self.rows(split, (self.label_column,))
        labels = read_labels([label for (label,) in columns], self.class_names)
        train_labels = labels
        if split == "eval" and self.eval_path is not None:
            columns = self.rows("train", (self.label_column,))[1]
            train_labels = read_labels([label for (label,) in columns], self.class_names)
        classes = self.classes(train_labels, where)
        chosen = self.chosen_paths(paths, root, split, where)
        keys = [paths[row] for row in chosen]
        targets = classes.targets([labels[row] for row in chosen], keys, where)
        return ImageFolderSource(
            f"csv/{split}",
            root,
            list(zip(keys, targets.tolist(), strict=True)),
            classes.names,
            order_is_guessed=classes.is_guessed,
        )

    def chosen_paths(self, paths: list[str], root: Path, split: Split, where: str) -> list[int]:
        """Returns the rows of a split, in order.

        Raises:
            SourceError: there are none, a path comes twice, or files are not there.
        """
        names = [os.path.normpath(root / path) for path in paths]
        for name, count in Counter(names).most_common(1):
            if count > 1:
                rows = ", ".join(
                    sorted({repr(path) for path, of in zip(paths, names, strict=True) if of == name})
                )
                raise SourceError(f"{where}: {rows} comes {count} times; expected one row for each image")
        chosen: list[int] = self.chosen(paths, split).tolist()
        if not chosen:
            raise SourceError(
                f"{where}: no rows of the {split} split; check source.path and source.eval_share"
            )
        missing = [paths[row] for row in chosen if not (root / paths[row]).is_file()]
        if missing:
            raise SourceError(
                f"{where}: {len(missing):,} of {len(chosen):,} images are not in {root}: {', '.join(missing[:10])}"
                f"{', …' if len(missing) > 10 else ''}; set source.root to the folder that the paths are relative to"
            )
        return chosen

    def rows(
        self, split: Split, columns: Sequence[str | int]
    ) -> tuple[list[str], list[list[str]], Path, str]:
        """Returns paths and other columns of all rows, the folder of the images, and the file's name for messages."""
        files = self.files(split, KINDS)
        root = files.root if self.root is None else Path(self.root).expanduser()
        paths: list[str] = []
        others: list[list[str]] = []
        for file in files.paths:
            delimiter = self.delimiter or ("\t" if file.suffix == ".tsv" else ",")
            try:
                with file.open(newline="", encoding="utf-8-sig") as stream:
                    rows = [row for row in csv.reader(stream, delimiter=delimiter, strict=True) if row]
            except (OSError, ValueError, csv.Error, TypeError) as error:
                raise SourceError(
                    f"source {file}: {error}; expected UTF-8, rows divided by {delimiter!r}, and quotes that are closed"
                ) from error
            names = [name.strip() for name in rows.pop(0)] if self.header and rows else []
            places = [self._place(column, names, file) for column in (self.path_column, *columns)]
            if names[places[0] : places[0] + 1] and (root / names[places[0]]).is_file():
                raise SourceError(
                    f"source {file}, row 1: {names[places[0]]!r} is an image, and the row was read as the header; set "
                    "source.header = false"
                )
            for number, row in enumerate(rows, 1 + self.header):
                if len(row) <= max(places):
                    raise SourceError(
                        f"source {file}, row {number}: {len(row)} columns; expected {max(places) + 1} or more, divided by "
                        f"{delimiter!r}; check source.delimiter"
                    )
                if broken := next((row[place] for place in places if "\n" in row[place].strip()), ""):
                    raise SourceError(
                        f"source {file}, row {number}: {broken[:80]!r} goes over several lines; expected a path and a label "
                        "on each; close the quotes that are open there"
                    )
            paths += [row[places[0]].strip() for row in rows]
            others += [[row[place].strip() for place in places[1:]] for row in rows]
        return paths, others, root, f"source {files.given}"

    def _place(self, column: str | int, names: list[str], file: Path) -> int:
        key = "path_column" if column == self.path_column else "label_column"
        if isinstance(column, int):
            if column < 0:
                raise SourceError(f"source.{key}: {column}; expected a name, or a number from 0 on")
            return column
        if names.count(column) > 1:
            raise SourceError(
                f"source {file}: {names.count(column)} columns {column!r}; set source.{key} to the number of one, from 0 on"
            )
        if column not in names:
            found = ", ".join(names) if self.header else "no header (source.header = false)"
            other = (
                "" if len(names) > 1 or not self.header else ", or source.delimiter to what divides columns"
            )
            raise SourceError(
                f"source {file}: no column {column!r}; it has {found or 'none'}; set source.{key} to a name, or a number "
                f"from 0 on{other}{', or source.header = false where there is none' if self.header else ''}"
            )
        return names.index(column)
