"""The plan of a cache, before a row of it is made: how its source is cut, and its manifest.

A unit of work is a range of samples of one view; a chunk is a part of it that is decoded together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import numpy as np
from pydantic import Field, ValidationError

from softcache import __version__
from softcache.cache.codecs import CODECS, AnyCodecSettings, CellCodec, Codec, OpenSettings
from softcache.cache.manifest import Manifest, Plan, TeacherReport
from softcache.cache.samples import RowIndex, encode_samples
from softcache.data.batch import Dataset as Data
from softcache.errors import ConfigError, LabelError
from softcache.hashing.digests import digest_bytes
from softcache.labels.sparsify import LabelSettings
from softcache.settings import Settings
from softcache.teacher.base import Dtype, Teacher
from softcache.teacher.detection import DenseTeacher

__all__ = ["CaptureSettings", "default_plan", "plan_manifest"]

ROWS = {"image": (16384, 2048), "tokens": (131072, 8192), "cells": (131072, 8192)}
"""Rows of a unit and of a chunk, by kind, where the settings do not say."""
CHUNK_ROWS = 2048
"""Rows of tokens, or of cells, that are compressed together."""


class CaptureSettings(Settings):
    """[capture]: how the teacher is run and how its labels are laid out.

    Without `unit_samples` and `chunk_samples` a unit has about 131,072 rows of tokens or cells, or 16,384 images, and a
    chunk (what is decoded together) about 8,192 rows of tokens or cells, or 2,048 images. `chunk_positions` bounds the
    logits that a language model's head gives at once: chunk_positions x V x 4 bytes, and about five times that while
    they are made into labels.

    `codec` is a table with the settings of the codec that its `name` gives: "open" has plain columns, with
    log-probabilities of dtype `values`; "packed" takes half to 70% of it on disk: log-probabilities to half a `step`
    (nats), and so the tail, but at T = 1 or with `tail` "float32". A bare name stands for the table.
    """

    batch_size: int = Field(256, ge=1)
    unit_samples: int | None = Field(None, ge=1)
    chunk_samples: int | None = Field(None, ge=1)
    chunk_positions: int | None = Field(None, ge=1)
    device: str = "auto"
    dtype: Dtype = "float32"
    store: Literal["zarr", "parquet"] = "zarr"
    codec: AnyCodecSettings = OpenSettings()
    workers: int = Field(0, ge=0)
    queue_units: int = Field(2, ge=1)
    evaluate: bool = True


def plan_manifest(
    data: Data, teacher: Teacher, labels: LabelSettings, settings: CaptureSettings
) -> tuple[Manifest, bytes]:
    """Returns the manifest of a cache and the bytes of its sample table.

    Raises:
        LabelError: K is larger than V, or more cells are to be kept than there are.
        ConfigError: positions are to be chosen of what has none, cells are to be kept in a way that there is not, or units
            are larger than readers take.
    """
    source, num_classes = data.source, teacher.num_classes
    k = labels.num_slots(num_classes)
    if k > num_classes:
        raise LabelError(
            f"labels.k: {k} is more than the {num_classes} classes of source {source.name}; "
            f'choose k <= {num_classes}, or policy = "dense"'
        )
    num_rows = _num_rows(data, labels)
    plan = default_plan(data, settings, num_views=labels.num_views)
    label_identity = labels.identity(num_classes)
    class_names = () if data.kind == "tokens" else tuple(source.class_names)
    of_kind: dict[str, Any] = {}
    codec: Codec
    if data.kind == "cells":
        dense = cast(DenseTeacher, teacher)
        codec = _cell_codec(dense, k, labels, settings)
        label_identity["temperatures"] = list(codec.temperatures)
        of_kind["grid"] = {"digest": dense.grid, "num_cells": dense.num_cells}
        class_names = ("background",) * (num_classes - len(class_names)) + class_names
    else:
        codec = _codec(num_classes, k, labels, settings)
    if num_rows is None:
        rows, samples = None, encode_samples(source.keys(), source.targets())
    else:
        index = RowIndex(plan, num_rows)
        rows = index.geometry(CHUNK_ROWS)
        samples = encode_samples(source.keys(), None, num_rows, index.first_rows(rows))
    manifest = _built(
        softcache_version=__version__,
        kind=data.kind,
        identity={
            "teacher": {
                "spec": teacher.spec,
                "weights_digest": teacher.weights_digest,
                "dtype": teacher.dtype,
            },
            "source": {"name": source.name, "digest": source.digest, "num_samples": len(data)},
            **data.identity(labels.num_views),
            **of_kind,
            "labels": label_identity,
            "codec": codec.to_dict(),
        },
        num_classes=num_classes,
        class_names=class_names,
        codec=codec.to_dict(),
        plan=plan,
        rows=rows,
        store=settings.store,
        data="labels.zarr" if settings.store == "zarr" else "parquet",
        samples_sha256=digest_bytes(samples),
        teacher=TeacherReport(num_parameters=teacher.num_parameters),
    )
    return manifest, samples


def _built(**fields: Any) -> Manifest:
    """Returns the manifest of these fields.

    Raises:
        ConfigError: readers would refuse it; what of it.
    """
    try:
        return Manifest(**fields)
    except ValidationError as error:
        raise ConfigError(f"capture: no cache can be made so: {error.errors()[0]['msg']}") from error


def _num_rows(data: Data, labels: LabelSettings) -> np.ndarray | None:
    """Returns how many label rows each sample has, [N] int64; None where it is one each.

    Raises:
        ConfigError: positions are to be chosen in a way that is none of this kind of data.
    """
    policy, name = labels.positions.policy, data.source.name
    if data.kind == "cells":
        if policy != "cells":
            raise ConfigError(
                f"labels.positions: {policy!r}, but of the images of source {name} a detector's cells are kept; expected "
                'policy = "cells", with top = the number of cells of each image'
            )
        return labels.positions.counts(np.ones(len(data), np.int64))
    if policy == "cells":
        raise ConfigError(
            f"labels.positions: 'cells' are a detector's, and source {name} has no boxes; "
            + ("drop the table" if data.kind == "image" else 'choose "all", "every", "random" or "entropy"')
        )
    if data.kind == "tokens":
        return labels.positions.counts(data.source.num_rows())
    if policy != "all":
        raise ConfigError(
            f"labels.positions: {policy!r}, but samples of source {name} are images, with one row each; drop the table"
        )
    return None


def _cell_codec(teacher: DenseTeacher, k: int, labels: LabelSettings, settings: CaptureSettings) -> CellCodec:
    """Returns the codec of a detector's cells.

    Raises:
        ConfigError: a policy, codec or temperature that there is not for cells.
        LabelError: more cells are to be kept than the grid has.
    """
    if not labels.labels_detections:
        raise ConfigError(
            f'labels.policy: {labels.policy!r}; of a detector\'s cells "top_k" or "dense" is kept; choose one of them'
        )
    if not CODECS.get(settings.codec.name).captures_detections:
        raise ConfigError(
            f'capture.codec: {settings.codec.name!r}; a detector\'s cells are kept as plain columns; set codec = "open"'
        )
    coins = teacher.distribution == "bernoulli"
    if coins and "temperatures" in labels.model_fields_set:
        raise ConfigError(
            f"labels.temperatures: the head of teacher {teacher.spec} is sigmoids, one for each class, with no tail whose "
            "mass were to be kept at temperatures; drop the setting: any temperature is served"
        )
    if labels.positions.top > teacher.num_cells:
        raise LabelError(
            f"labels.positions.top: {labels.positions.top} is more than the {teacher.num_cells} cells that teacher "
            f"{teacher.spec} has for an image; lower it"
        )
    return CellCodec(
        num_classes=teacher.num_classes,
        k=k,
        distribution=teacher.distribution,
        num_cells=teacher.num_cells,
        head_columns=tuple(sorted(teacher.columns.items())),
        temperatures=() if coins else labels.temperatures,
        **settings.codec.parameters(),
    )


def _codec(num_classes: int, k: int, labels: LabelSettings, settings: CaptureSettings) -> Codec:
    kind = CODECS.get(settings.codec.name)
    if "image" not in kind.kinds:
        raise ConfigError(
            f"capture.codec: {settings.codec.name!r} is of a detector's labels; choose open or packed"
        )
    make: Callable[..., Codec] = kind
    return make(
        num_classes=num_classes,
        k=k,
        temperatures=labels.temperatures,
        sampling=labels.sampling,
        **settings.codec.parameters(),
    )


def default_plan(data: Data, settings: CaptureSettings, *, num_views: int = 1) -> Plan:
    """Returns how a source is cut: a unit is a whole number of chunks, and neither is larger than the source."""
    mean_rows = 1.0
    if data.kind == "tokens":
        mean_rows = data.source.num_rows().mean()
    elif data.kind == "cells":
        mean_rows = cast(Any, data).rows_per_sample
    unit, chunk = (max(1, round(rows / mean_rows)) for rows in ROWS[data.kind])
    unit = min(settings.unit_samples or max(unit, settings.chunk_samples or 1), len(data))
    chunk = min(settings.chunk_samples or chunk, unit)
    return Plan(
        num_samples=len(data),
        num_views=num_views,
        unit_samples=chunk * max(1, unit // chunk),
        chunk_samples=chunk,
    )
