"""Tables of paths and labels: CSV files, whose rows name image files in a folder."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from softcache.data.sources.base import SOURCES
from softcache.data.sources.images.base import Split
from softcache.data.sources.images.classes import numbers_or_texts
from softcache.data.sources.images.image_folder import ImageFolderSource
from softcache.data.sources.images.split_files import SplitFiles
from softcache.errors import SourceError

__all__ = ["CsvImages"]

KINDS = (".csv", ".tsv", ".txt")


@SOURCES.register("image/csv")
class CsvImages(SplitFiles):
    """CSV files with a path and a label in each row; keys are the paths, relative to `root` (the file's folder).

    Columns are named by the header; `header = false` counts them from 0. `delimiter` is by default a tab in .tsv files, else
    a comma. Labels that are whole numbers are the numbers of classes, others are their names.
    """

    name: str = "csv"
    root: str | None = None
    path_column: str | int = "path"
    label_column: str | int = "label"
    header: bool = True
    delimiter: str | None = None

    def pictures(self, split: Split) -> ImageFolderSource:
        paths, labels, root, where = self._read(split)
        train_labels = labels if split == "train" or self.eval_path is None else self._read("train")[1]
        classes = self.classes(numbers_or_texts(train_labels), where)
        for path, count in Counter(paths).most_common(1):
            if count > 1:
                raise SourceError(f"{where}: {path!r} comes {count} times; expected one row for each image")
        chosen = self.chosen(paths, split).tolist()
        keys, labels = [paths[row] for row in chosen], [labels[row] for row in chosen]
        if not keys:
            raise SourceError(
                f"{where}: no rows of the {split} split; check source.path and source.eval_share"
            )
        missing = [key for key in keys if not (root / key).is_file()]
        if missing:
            raise SourceError(
                f"{where}: {len(missing):,} of {len(keys):,} images are not in {root}: {', '.join(missing[:10])}"
                f"{', …' if len(missing) > 10 else ''}; set source.root to the folder that the paths are relative to"
            )
        files = list(zip(keys, classes.targets(labels, keys, where).tolist(), strict=True))
        return ImageFolderSource(
            f"csv/{split}", root, files, classes.names, order_is_guessed=classes.is_guessed
        )

    def _read(self, split: Split) -> tuple[list[str], list[str], Path, str]:
        """Returns paths and labels of all rows, the folder of the images, and the file's name for messages."""
        files = self.files(split, KINDS)
        root = files.root if self.root is None else Path(self.root).expanduser()
        paths: list[str] = []
        labels: list[str] = []
        for file in files.paths:
            delimiter = self.delimiter or ("\t" if file.suffix == ".tsv" else ",")
            try:
                with file.open(newline="", encoding="utf-8-sig") as stream:
                    rows = [row for row in csv.reader(stream, delimiter=delimiter) if row]
            except (OSError, ValueError, csv.Error, TypeError) as error:
                raise SourceError(
                    f"source {file}: {error}; expected rows divided by {delimiter!r}"
                ) from error
            names = rows.pop(0) if self.header and rows else []
            places = [self._place(key, names, file) for key in ("path_column", "label_column")]
            for number, row in enumerate(rows, 1 + self.header):
                if len(row) <= max(places):
                    raise SourceError(
                        f"source {file}, row {number}: {len(row)} columns; expected {max(places) + 1} or more, divided by "
                        f"{delimiter!r}; check source.delimiter"
                    )
            paths += [row[places[0]].strip() for row in rows]
            labels += [row[places[1]].strip() for row in rows]
        return paths, labels, root, f"source {files.given}"

    def _place(self, key: str, names: list[str], file: Path) -> int:
        column = getattr(self, key)
        if isinstance(column, int):
            return column
        names = [name.strip() for name in names]
        if column not in names:
            found = ", ".join(names) if self.header else "no header (source.header = false)"
            raise SourceError(
                f"source {file}: no column {column!r}; it has {found}; set source.{key} to a name, or a number from 0 on"
            )
        return names.index(column)
