"""Image datasets of Hugging Face: of the hub, of a folder that `save_to_disk` wrote, or of local files; also streamed.

Pictures stay as they are in the library's Arrow files, and are decoded when asked for, as those of any other source.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from softcache.data.sources.base import SOURCES
from softcache.data.sources.files import find_files
from softcache.data.sources.hub import (
    is_saved,
    load_arguments,
    loading_error,
    quiet_datasets,
    saved_split,
    stream_table,
)
from softcache.data.sources.images.base import Split
from softcache.data.sources.images.classes import check_same_numbers, find_classes, read_labels
from softcache.data.sources.images.pictures import PictureSettings, PictureSource
from softcache.data.sources.images.split_files import file_facts
from softcache.data.sources.splits import choose_samples
from softcache.errors import MissingExtraError, SourceError
from softcache.hashing.digests import digest_json

__all__ = ["HfImageSource", "HuggingFaceImages"]

KINDS = {".parquet": "parquet", ".arrow": "arrow"}
STREAM_VERSION = 1


@SOURCES.register("image/hf")
class HuggingFaceImages(PictureSettings):
    """A dataset of the hub, a folder of `save_to_disk`, or files that the datasets library reads.

    `label_column` holds whole numbers, with the names of a ClassLabel or as texts (`3`), or names. Keys are SPLIT/ROW, or
    those of `key_column`. `revision` is a commit, branch or tag of the hub.

    `streaming = true` reads a dataset that is too large for this machine: the first `max_images` of each split become a
    local table. `eval_share` of the images, chosen by a hash of their key, are held out where the dataset has no split of
    its own (`eval_split`).

    Attributes:
        path: name on the hub, folder or file.
        subset: the configuration of a dataset of the hub.
        train_split: name of the split that is labeled.
        image_column: column of the images.
    """

    name: str = "hf"
    path: str | None = None
    subset: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    key_column: str | None = None
    revision: str | None = None
    streaming: bool = False
    max_images: int | None = Field(None, ge=1)
    has_lists: ClassVar[bool] = False
    """Whether a picture has a list of classes."""
    eval_share: float = Field(0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        if self.streaming != (self.max_images is not None):
            raise ValueError(
                "source.streaming and source.max_images: the number of streamed images of a split; give both, or neither"
            )
        if self.eval_split == self.train_split:
            raise ValueError(
                f"source.eval_split: {self.eval_split!r} is what is trained on; give another split, or none to hold out "
                "source.eval_share of the images"
            )
        return self

    def pictures(self, split: Split) -> HfImageSource:
        table = _Table(self, self._split_name(split))
        train = table if self._split_name("train") == table.split else _Table(self, self._split_name("train"))
        where = f"source.path {self.path!r}, split {table.split!r}"
        check_same_numbers(table.class_names, train.class_names, where)
        given, order = self.class_names, self.class_order
        labels = train.labels
        if self.has_lists:
            labels = [label for found in labels for label in found]
        classes = find_classes(labels, given=given, order=order, known=train.class_names, where=where)
        share = self.eval_share if self.eval_split is None else None
        keys = table.keys()
        numbers = choose_samples(keys, split, eval_share=share, shuffle=False)[: self.max_samples(split)]
        chosen = [keys[number] for number in numbers.tolist()]
        if not chosen:
            raise SourceError(f"{where}: no images; check the split and source.eval_share")
        taken, hot = [table.labels[number] for number in numbers.tolist()], None
        if self.has_lists:
            hot, targets = classes.multi_hot(taken, chosen, where)
        else:
            targets = classes.targets(taken, chosen, where)
        return HfImageSource(
            f"{self.path}/{split}",
            chosen,
            targets,
            classes.names,
            np.stack([numbers, table.sizes()[numbers]], axis=1),
            table=table.images,
            location=f"{self.path} {table.split}",
            multi_hot=hot,
            order_is_guessed=classes.is_guessed,
        )

    def _split_name(self, split: Split) -> str:
        return self.eval_split if split == "eval" and self.eval_split is not None else self.train_split


class _Table:
    """A split of a dataset, with its pictures undecoded."""

    def __init__(self, settings: HuggingFaceImages, split: str) -> None:
        if settings.path is None:
            raise SourceError(
                f"source.path: missing; give a hub name, a folder, or files of {', '.join(KINDS)}"
            )
        self._settings, self.split = settings, split
        columns = [settings.image_column, settings.label_column, settings.key_column]
        self._columns = list(dict.fromkeys(filter(None, columns)))
        table = self._load()
        for name in self._columns:
            if name not in table.column_names:
                raise self._error(
                    f"no column {name!r}; it has {', '.join(table.column_names)}; set source.image_column, label_column or "
                    "key_column"
                )
        self._table = table.select_columns(self._columns)
        feature = table.features[settings.label_column]
        inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
        if (inner is not None) != settings.has_lists:
            found, wanted = ("lists", "multi_label") if inner is not None else ("single classes", "image")
            raise self._error(
                f'column {settings.label_column!r} has {found}; set source.modality = "{wanted}", or another label_column'
            )
        self.class_names: list[str] | None = getattr(feature if inner is None else inner, "names", None)

    def _load(self) -> Any:
        settings = self._settings
        assert settings.path is not None
        files = find_files(settings.path, settings, kinds=KINDS)
        if settings.revision is not None and files is not None:
            raise SourceError(
                f"source.revision: {settings.revision!r} of local files, which have none; drop it, or give a hub name as "
                "source.path"
            )
        digest = "" if files is None else digest_json(file_facts(files))
        arguments = load_arguments(settings, files, digest, KINDS)
        try:
            with quiet_datasets() as datasets:
                if files is not None and is_saved(files):
                    if settings.streaming:
                        raise SourceError(
                            f"source.streaming: {settings.path!r} is a folder of save_to_disk, which is memory-mapped; "
                            "drop it"
                        )
                    return saved_split(settings, files.root, self.split, datasets=datasets, of="images")
                if settings.streaming:
                    return self._stream(datasets, arguments, digest)
                return datasets.load_dataset(**arguments, split=self.split)
        except (MissingExtraError, SourceError):
            raise
        except Exception as error:
            raise loading_error(settings, self.split, error) from error

    def _stream(self, datasets: Any, arguments: Mapping[str, Any], digest: str) -> Any:
        settings, left = self._settings, self._settings.max_images or 0
        made_from = {
            "version": STREAM_VERSION,
            "path": digest or [settings.path, settings.subset, settings.revision],
            "split": self.split,
            "columns": self._columns,
            "images": settings.max_images,
        }

        def keep(table: pa.Table) -> tuple[pa.Table, int, bool]:
            nonlocal left
            table = table.slice(0, left)
            left -= len(table)
            return table, len(table), left == 0

        table, _ = stream_table(
            settings,
            arguments,
            datasets=datasets,
            split=self.split,
            columns=self._columns,
            made_from=made_from,
            keep=keep,
            bound=settings.max_images or 0,
            unit="images",
            typed=True,
        )
        return table

    @cached_property
    def labels(self) -> list[Any]:
        """The label of each row.

        Raises:
            SourceError: some have none, or are neither numbers nor texts.
        """
        name = self._settings.label_column
        labels = self._column(name).to_pylist()
        missing = [number for number, label in enumerate(labels) if label is None or label == -1]
        if missing:
            raise self._error(
                f"{len(missing):,} of {len(labels):,} rows have no label in column {name!r}, the first is row {missing[0]}; "
                "take a split that has them"
            )
        given = self._settings.class_names
        if not self._settings.has_lists:
            return read_labels(labels, given)
        flat = iter(read_labels([label for found in labels for label in found], given))
        return [[next(flat) for _ in found] for found in labels]

    def _column(self, name: str) -> pa.ChunkedArray:
        table = self._table.select_columns([name]).with_format("arrow")
        return table[:].column(name)

    def keys(self) -> list[str]:
        """Returns the key of each row."""
        column = self._settings.key_column
        if column is None:
            return [f"{self.split}/{number}" for number in range(len(self._table))]
        keys = self._column(column).to_pylist()
        for number, key in enumerate(keys):
            if not isinstance(key, str | int):
                raise self._error(
                    f"row {number}: key {key!r} in column {column!r} is neither text nor a whole number"
                )
        for key, count in Counter(keys).most_common(1):
            if count > 1:
                raise self._error(
                    f"the key {key!r} in column {column!r} comes {count} times; expected one of each row"
                )
        return list(map(str, keys))

    @cached_property
    def images(self) -> Any:
        """The column of pictures, undecoded, under the name image."""
        import datasets

        name = self._settings.image_column
        table, feature = self._table.select_columns([name]), self._table.features[name]
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        elif getattr(feature, "dtype", "") not in ("binary", "large_binary") and not (
            isinstance(feature, dict) and "bytes" in feature
        ):
            raise self._error(
                f"column {name!r} is of type {feature}; expected Image; set source.image_column"
            )
        return table if name == "image" else table.rename_column(name, "image")

    def sizes(self) -> np.ndarray:
        """Returns the bytes [N] int64 of each picture, without reading them."""
        sizes: list[np.ndarray] = []
        for table in self.images.with_format("arrow").iter(batch_size=4096):
            column = table.column("image").combine_chunks()
            content = column.field("bytes") if pa.types.is_struct(column.type) else column
            found = (
                pc.fill_null(pc.binary_length(content), -1).to_numpy(zero_copy_only=False).astype(np.int64)
            )
            for row in np.flatnonzero(found < 0).tolist():
                path = column[row].as_py().get("path") if pa.types.is_struct(column.type) else None
                if path is None or not Path(path).is_file():
                    number = sum(map(len, sizes)) + row
                    raise self._error(
                        f"row {number}: no bytes, and no file {path!r}; restore it, or leave the row out"
                    )
                found[row] = Path(path).stat().st_size
            sizes.append(found)
        return np.concatenate(sizes) if sizes else np.zeros(0, np.int64)

    def _error(self, trouble: str) -> SourceError:
        return SourceError(f"source.path {self._settings.path!r}, split {self.split!r}: {trouble}")


class HfImageSource(PictureSource):
    """Pictures in a table of the datasets library; `places` [N, 2] are row and size."""

    def __init__(self, *arguments: Any, table: Any, location: str, **options: Any) -> None:
        self._table, self._location = table, location
        super().__init__(*arguments, **options)

    def content_facts(self) -> Mapping[str, Any]:
        return {"file_sizes": hashlib.sha256(self.places[:, 1].astype("<i8").tobytes()).hexdigest()}

    def stamp(self) -> Any:
        return self._table._fingerprint

    @property
    def location(self) -> str:
        return self._location

    def place_name(self, sample: int) -> str:
        return f"{self._location}, {self._keys[sample]}"

    def file_bytes(self, sample: int) -> bytes:
        """Returns a picture as it is in its row, or in the file that its row names.

        Raises:
            SourceError: the file cannot be read.
        """
        found = self._table[int(self.places[sample, 0])]["image"]
        if isinstance(found, bytes):
            return found
        if found["bytes"] is not None:
            return bytes(found["bytes"])
        try:
            return Path(found["path"]).read_bytes()
        except OSError as error:
            raise self.read_error(sample, error) from error
