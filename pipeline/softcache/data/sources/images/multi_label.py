"""Sources of images that have any number of classes, none included; with one class, of a yes or no.

    csv               a column of several names (`cat|dog`), or a column of 0 and 1 for each class
    hf                a column of sequences of ClassLabel, numbers or names
    imagefolder       folders of classes: each image has one, and the others are absent
    MODULE:FACTORY    a function of the user's, whose source has `multi_hot` [N, V], 0 or 1 for each class

A source of several classes is a `Source` with `multi_hot`; its `targets` are how many classes each image has.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from softcache.data.sources.base import SOURCES
from softcache.data.sources.images.base import Source, Split
from softcache.data.sources.images.classes import Classes, numbers_or_texts, whole_numbers
from softcache.data.sources.images.custom import CustomImages, Subset, call_factory, check_source
from softcache.data.sources.images.hugging_face import HuggingFaceImages
from softcache.data.sources.images.image_folder import ImageFolder, ImageFolderSource
from softcache.data.sources.images.path_table import CsvImages
from softcache.data.sources.images.pictures import PictureSource
from softcache.errors import SourceError

__all__ = ["CustomMultiLabel", "MultiLabelCsv", "MultiLabelFolder", "MultiLabelHuggingFace"]

Columns = Annotated[
    tuple[str, ...], BeforeValidator(lambda names: tuple(names) if isinstance(names, list) else names)
]


@SOURCES.register("multi_label/csv")
class MultiLabelCsv(CsvImages):
    """CSV files with the classes of each image: several in `label_column`, divided by `separator`; or `label_columns`, the
    names of columns with 0 or 1 (true or false, yes or no), which are the classes."""

    modality: Literal["multi_label"] = "multi_label"  # type: ignore[assignment]
    separator: str = Field("|", min_length=1)
    label_columns: Columns | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.label_columns is not None:
            for key in ("class_names", "class_order"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"source.{key}: source.label_columns are the names of classes, in order; drop it"
                    )
        return self

    def pictures(self, split: Split) -> ImageFolderSource:
        wanted = self.label_columns or (self.label_column,)
        paths, columns, root, where = self.rows(split, wanted)
        chosen = self.chosen_paths(paths, root, split, where)
        keys = [paths[row] for row in chosen]
        if self.label_columns is not None:
            classes = Classes(self.label_columns, self.label_columns)
            found = [columns[row] for row in chosen]
            hot = np.array(
                [
                    [self._truth(cell, key, where) for cell in row]
                    for row, key in zip(found, keys, strict=True)
                ]
            )
            hot, counts = hot.astype(np.uint8), hot.sum(1)
        else:
            labels = self._names(columns)
            train = labels
            if split == "eval" and self.eval_path is not None:
                train = self._names(self.rows("train", wanted)[1])
            classes = self.classes(numbers_or_texts([name for names in train for name in names]), where)
            hot, counts = classes.multi_hot([labels[row] for row in chosen], keys, where)
        files = list(zip(keys, counts.tolist(), strict=True))
        return ImageFolderSource(
            f"csv/{split}", root, files, classes.names, order_is_guessed=classes.is_guessed, multi_hot=hot
        )

    def _names(self, columns: list[list[str]]) -> list[list[str]]:
        found = [
            [name for part in cell.split(self.separator) if (name := part.strip())] for (cell,) in columns
        ]
        as_whole = whole_numbers([name for names in found for name in names], self.class_names)
        return [[as_whole[name] for name in names] for names in found]

    @staticmethod
    def _truth(cell: str, key: str, where: str) -> int:
        if (truth := TRUTHS.get(cell.lower())) is None:
            raise SourceError(
                f"{where}: {cell!r} of {key!r} in source.label_columns; expected 0 or 1, true or false, yes or no"
            )
        return truth


TRUTHS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "no": 0, "yes": 1, "": 0}


@SOURCES.register("multi_label/custom")
class CustomMultiLabel(CustomImages):
    """A function of the user's that returns a `Source` with `multi_hot`, which is checked here."""

    modality: Literal["multi_label"] = "multi_label"  # type: ignore[assignment]

    def open(self, split: Split) -> Source:
        source: Any = call_factory(self.name, split)
        check_source(source, self.name, split, ("multi_hot",), of="Source of several classes")
        hot, expected = np.asarray(source.multi_hot), (len(source), source.num_classes)
        if hot.shape != expected or not np.isin(hot, (0, 1)).all():
            raise SourceError(
                f"source {source.name}: multi_hot of shape {hot.shape}; expected {expected} (samples, classes) of 0 and 1"
            )
        limit = self.max_samples(split)
        return source if limit is None else Subset(source, limit)


@SOURCES.register("multi_label/hf")
class MultiLabelHuggingFace(HuggingFaceImages):
    """Datasets of Hugging Face whose `label_column` is a sequence of ClassLabel, numbers or names."""

    modality: Literal["multi_label"] = "multi_label"  # type: ignore[assignment]
    has_lists = True


@SOURCES.register("multi_label/imagefolder")
class MultiLabelFolder(ImageFolder):
    """Folders of image files, one folder per class: for teachers with a sigmoid for each class."""

    modality: Literal["multi_label"] = "multi_label"  # type: ignore[assignment]

    def pictures(self, split: Split) -> Any:
        source: PictureSource = super().pictures(split)
        source.multi_hot = np.eye(source.num_classes, dtype=np.uint8)[source.targets()]
        source._set_digest()
        return source
