"""Parquet files with encoded pictures, as Hugging Face's hub, Spark and pandas write them.

A row group can only be read as a whole, and students read rows in any order. So the rows are copied once into an Arrow file,
from which each is read alone, without a copy in memory:

    rows.arrow      key, label, size and bytes of each picture

It lies under `data_dir`, in images/DIGEST, is as large as the pictures, and is made anew when a file changes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from softcache.data.sources.base import SOURCES
from softcache.data.sources.build_cache import build_dir_path, build_folder
from softcache.data.sources.files import CorpusFiles
from softcache.data.sources.images.base import Split
from softcache.data.sources.images.classes import check_same_numbers, read_labels
from softcache.data.sources.images.pictures import PictureSource
from softcache.data.sources.images.split_files import SplitFiles, file_facts
from softcache.errors import SourceError
from softcache.runtime.files import parse_json
from softcache.runtime.logging import progress_bar

__all__ = ["ParquetImages", "RowSource", "class_names_of"]

VERSION, BATCH_ROWS = 1, 256


@SOURCES.register("image/parquet")
class ParquetImages(SplitFiles):
    """Parquet files; `image_column` has bytes, or a struct of `bytes` and `path` as the datasets library writes it.

    Keys are FILE/ROW, or those of `key_column`, which may be "path" of the struct. Labels are whole numbers, also as
    texts (`3`), or names; the names that the datasets library writes into a file are taken.

    Attributes:
        label_column: column of the classes.
    """

    name: str = "parquet"
    image_column: str = "image"
    label_column: str = "label"
    key_column: str | None = None

    def pictures(self, split: Split) -> RowSource:
        files = self.files(split, (".parquet",))
        folder, table = self._rows(files)
        where = f"source {files.given}"
        train, train_table = files, table
        if split == "eval" and self.eval_path is not None:
            train = self.files("train", (".parquet",))
            train_table = self._rows(train)[1]
        labels = read_labels(table.column("label").to_pylist(), self.class_names)
        known = class_names_of(_opened_parquet(train.paths[0]).schema_arrow.metadata, self.label_column)
        for path in dict.fromkeys([*train.paths, *files.paths]):
            here = class_names_of(_opened_parquet(path).schema_arrow.metadata, self.label_column)
            check_same_numbers(here, known, f"source {path}")
        classes = self.classes(
            read_labels(train_table.column("label").to_pylist(), self.class_names), where, known
        )
        keys = table.column("key").to_pylist()
        for key, count in Counter(keys).most_common(1):
            if count > 1:
                raise SourceError(
                    f"{where}: the key {key!r} comes {count} times; expected one of each row; name another "
                    "source.key_column, or none for FILE/ROW"
                )
        numbers = self.chosen(keys, split)
        keys = [keys[number] for number in numbers.tolist()]
        if not keys:
            raise SourceError(
                f"{where}: no rows of the {split} split; check source.path and source.eval_share"
            )
        targets = classes.targets([labels[number] for number in numbers.tolist()], keys, where)
        sizes = table.column("size").to_numpy()[numbers]
        places = np.stack([numbers, sizes], axis=1)
        return RowSource(
            f"parquet/{split}",
            keys,
            targets,
            classes.names,
            places,
            file=folder / "rows.arrow",
            facts=file_facts(files),
            order_is_guessed=classes.is_guessed,
        )

    def _rows(self, files: CorpusFiles) -> tuple[Path, pa.Table]:
        """Returns the folder of the rows, copied now if they were not before, and its table."""
        columns = [self.image_column, self.label_column, self.key_column]
        made_from = {"version": VERSION, "files": file_facts(files), "columns": columns}
        folder = build_dir_path(self, "images", made_from)
        if not (folder / "rows.arrow").is_file():
            with build_folder(folder, lambda made: (made / "rows.arrow").is_file()) as staged:
                self._copy(files, staged / "rows.arrow")
        return folder, _opened(folder / "rows.arrow")

    def _copy(self, files: CorpusFiles, target: Path) -> None:
        writer = schema = None
        total = sum(_opened_parquet(path).metadata.num_rows for path in files.paths)
        with progress_bar(f"copy {files.given}", total, "images") as advance:
            for path in files.paths:
                file, number = _opened_parquet(path), 0
                columns = self._columns(file.schema_arrow, path)
                for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                    table = self._table(batch, files.name(path), number)
                    schema = schema or table.schema
                    if table.schema != schema:
                        raise SourceError(
                            f"source {path}: labels of type {table.schema.field('label').type}; expected "
                            f"{schema.field('label').type} as in the files before; write them alike"
                        )
                    writer = writer or pa.ipc.new_file(str(target), schema)
                    writer.write_table(table)
                    number += len(batch)
                    advance(len(batch))
        if writer is None:
            raise SourceError(f"source.path {files.given!r}: files without rows; check source.path")
        writer.close()

    def _columns(self, schema: pa.Schema, path: Path) -> list[str]:
        """Returns the columns that are read; raises SourceError where one is missing or of another type."""
        wanted = [self.image_column, self.label_column]
        if self.key_column is not None and self.key_column in schema.names:
            wanted.append(self.key_column)
        missing = [name for name in wanted if name not in schema.names]
        if not missing:
            image = schema.field(self.image_column).type
            has_path = pa.types.is_struct(image) and "path" in {
                image.field(n).name for n in range(image.num_fields)
            }
            if self.key_column is not None and self.key_column not in schema.names:
                missing = [] if self.key_column == "path" and has_path else [self.key_column]
        if missing:
            raise SourceError(
                f"source {path}: no column {', '.join(missing)}; it has {', '.join(schema.names)}; set source.image_column, "
                "source.label_column or source.key_column"
            )
        return list(dict.fromkeys(wanted))

    def _table(self, batch: pa.RecordBatch, file: str, first: int) -> pa.Table:
        """Returns the rows of a batch in the columns of rows.arrow."""
        images, labels = batch.column(self.image_column), batch.column(self.label_column)
        paths = None
        if pa.types.is_struct(images.type):
            names = [images.type.field(number).name for number in range(images.type.num_fields)]
            if "bytes" not in names:
                raise self._type_error(file, images.type)
            paths = images.field(names.index("path")) if "path" in names else None
            images = images.field(names.index("bytes"))
        if not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
            raise self._type_error(file, batch.column(self.image_column).type)
        if images.null_count:
            row = first + images.is_valid().to_pylist().index(False)
            raise SourceError(
                f"source {file}, row {row}: no bytes in column {self.image_column!r}; expected an encoded picture in each "
                "row (the datasets library embeds files by Dataset.to_parquet)"
            )
        if pa.types.is_integer(labels.type) or pa.types.is_boolean(labels.type):
            labels = labels.cast(pa.int64())
        elif (
            pa.types.is_string(labels.type)
            or pa.types.is_large_string(labels.type)
            or pa.types.is_dictionary(labels.type)
        ):
            labels = labels.cast(pa.string())
        else:
            raise SourceError(
                f"source {file}: column {self.label_column!r} is of type {labels.type}; expected whole numbers, or texts"
            )
        if labels.null_count:
            row = first + labels.is_valid().to_pylist().index(False)
            raise SourceError(
                f"source {file}, row {row}: no label in column {self.label_column!r}; leave the row out"
            )
        if self.key_column is None:
            keys = pa.array([f"{file}/{first + row}" for row in range(len(batch))])
        elif self.key_column in batch.schema.names:
            keys = batch.column(self.key_column).cast(pa.string())
        else:
            keys = paths
        sizes = pc.binary_length(images).cast(pa.int64())
        columns = [keys, labels, sizes, images.cast(pa.large_binary())]
        return pa.table(columns, names=["key", "label", "size", "bytes"])

    def _type_error(self, file: str, found: pa.DataType) -> SourceError:
        return SourceError(
            f"source {file}: column {self.image_column!r} is of type {found}; expected binary, or a struct of bytes and "
            "path; set source.image_column"
        )


def _opened_parquet(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise SourceError(f"source {path}: {error}; expected a whole Parquet file; fetch it again") from error


def _opened(file: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()


def class_names_of(metadata: Mapping[bytes, bytes] | None, column: str) -> list[str] | None:
    """Returns the names of classes that the datasets library writes into the metadata of a schema; None where it did not."""
    try:
        features = parse_json((metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) else None


class RowSource(PictureSource):
    """Pictures in the rows of an Arrow file; `places` [N, 2] are row and size."""

    def __init__(self, *arguments: Any, file: Path, facts: Any, **options: Any) -> None:
        self._file, self._facts = file, facts
        self._table: Any = None
        super().__init__(*arguments, **options)

    def content_facts(self) -> Mapping[str, Any]:
        return {"file_sizes": hashlib.sha256(self.places[:, 1].astype("<i8").tobytes()).hexdigest()}

    def stamp(self) -> Any:
        return self._facts

    @property
    def location(self) -> str:
        return str(self._file)

    def place_name(self, sample: int) -> str:
        return f"{self.name}, {self._keys[sample]}"

    def file_bytes(self, sample: int) -> bytes:
        """Returns a picture as it is in its row."""
        if self._table is None:
            reader = pa.ipc.open_file(pa.memory_map(str(self._file)))
            batches = [
                reader.get_batch(number).column("bytes") for number in range(reader.num_record_batches)
            ]
            self._table = batches, np.cumsum([0, *map(len, batches)])
        batches, starts = self._table
        row = int(self.places[sample, 0])
        batch = int(np.searchsorted(starts, row, side="right")) - 1
        return bytes(batches[batch][row - int(starts[batch])].as_py())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None}
