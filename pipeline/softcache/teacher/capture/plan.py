"""The plan of a cache, before a row of it is made: how its source is cut, and its manifest.

A unit of work is a range of samples of one view; a chunk is a part of it that is decoded together.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from softcache import __version__
from softcache.cache.codecs import AnyCodecSettings, OpenSettings
from softcache.cache.manifest import Manifest, Plan, TeacherReport
from softcache.cache.row_index import RowIndex
from softcache.cache.samples import encode_samples
from softcache.data.batch import Dataset as Data
from softcache.errors import ConfigError, LabelError
from softcache.hashing.digests import digest_bytes
from softcache.labels.sparsify import LabelSettings
from softcache.settings import Settings
from softcache.teacher.base import Dtype, TeacherFacts

__all__ = ["CaptureSettings", "default_plan", "num_slots", "plan_manifest"]

ROWS, RAGGED_ROWS = (16384, 2048), (131072, 8192)
"""Rows of a unit and of a chunk where the settings do not say; of samples with one row each, and with several."""
WIDE_BYTES = (2**28, 2**24)
"""Of a unit and of a chunk of hidden states, at most, where the settings do not say."""
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

    Attributes:
        batch_size: samples of a forward pass of the teacher.
        device: "auto", "cpu", "cuda", "cuda:1" and so on.
        dtype: of autocast; records are computed in float32 or better in any case.
        chunk_rows: rows of tokens, or of cells, that are compressed together, 2,048 by default. Of 8,192, codec packed with
            level 16 takes 2% fewer bytes, and what reads single rows decodes four times as many.
        store: of the cache.
        workers: processes that load samples; 0: a thread.
        queue_units: units that wait to be written while the next one is labeled.
        evaluate: score the teacher on samples with a ground truth first, and warn of one that guesses.
    """

    batch_size: int = Field(256, ge=1)
    unit_samples: int | None = Field(None, ge=1)
    chunk_samples: int | None = Field(None, ge=1)
    chunk_positions: int | None = Field(None, ge=1)
    chunk_rows: int | None = Field(None, ge=1)
    device: str = "auto"
    dtype: Dtype = "float32"
    store: Literal["zarr", "parquet"] = "zarr"
    codec: AnyCodecSettings = OpenSettings()
    workers: int = Field(0, ge=0)
    queue_units: int = Field(2, ge=1)
    evaluate: bool = True


def num_slots(labels: LabelSettings, num_classes: int, source: str) -> int:
    """Returns K, the slots of a row.

    Raises:
        LabelError: there are fewer classes.
    """
    k = labels.num_slots(num_classes)
    if k > num_classes:
        raise LabelError(
            f"labels.k: {k} is more than the {num_classes} classes of source {source}; "
            f'choose k <= {num_classes}, or policy = "dense"'
        )
    return k


def plan_manifest(
    data: Data, teacher: TeacherFacts, labels: LabelSettings, settings: CaptureSettings
) -> tuple[Manifest, bytes]:
    """Returns the manifest of a cache and the bytes of its sample table.

    Raises:
        LabelError: K is larger than V, or more cells are to be kept than there are.
        ConfigError: positions are to be chosen of what has none, cells are to be kept in a way that there is not, units
            are larger than readers take, or `chunk_rows` is set for samples of one row each.
    """
    source, num_classes = data.source, teacher.num_classes
    k = num_slots(labels, num_classes, source.name)
    num_rows = data.label_rows(labels.positions)
    codec = teacher.codec(k, labels, settings.codec)
    row_bytes = codec.row_bytes if labels.of_states else 0
    plan = default_plan(data, settings, num_views=labels.num_views, row_bytes=row_bytes)
    if num_rows is None and settings.chunk_rows is not None:
        raise ConfigError(
            f"capture.chunk_rows = {settings.chunk_rows}: samples of source {source.name} have one row each; set "
            "capture.chunk_samples"
        )
    if num_rows is None:
        rows, samples = None, encode_samples(source.keys(), data.sample_columns().get("targets"))
    else:
        index = RowIndex(plan, num_rows)
        rows = index.geometry(settings.chunk_rows or CHUNK_ROWS)
        samples = encode_samples(source.keys(), None, num_rows, index.first_rows(rows))
    manifest = _built(
        softcache_version=__version__,
        kind=data.kind,
        identity={
            **teacher.identity(),
            "source": _source_identity(source, len(data)),
            **data.identity(labels.num_views),
            **({"head": teacher.head_identity} if labels.of_states else {}),
            "labels": labels.identity(num_classes) | {"temperatures": list(codec.temperatures)},
            "codec": codec.to_dict(),
        },
        num_classes=num_classes,
        class_names=teacher.class_names(data.class_names),
        codec=codec.to_dict(),
        plan=plan,
        rows=rows,
        store=settings.store,
        data="labels.zarr" if settings.store == "zarr" else "parquet",
        samples_sha256=digest_bytes(samples),
        features=codec.features,
        teacher=TeacherReport(num_parameters=teacher.num_parameters),
    )
    return manifest, samples


def _source_identity(source: Any, num_samples: int) -> dict[str, Any]:
    """Returns what names a source; with the keys of unreadable samples that it leaves out, where there are any."""
    identity = {"name": source.name, "digest": source.digest, "num_samples": num_samples}
    left_out = getattr(source, "unreadable", ())
    return identity | {"unreadable": list(left_out)} if left_out else identity


def _built(**fields: Any) -> Manifest:
    """Returns the manifest of these fields.

    Raises:
        ConfigError: readers would refuse it; what of it.
    """
    try:
        return Manifest(**fields)
    except ValidationError as error:
        raise ConfigError(f"capture: no cache can be made so: {error.errors()[0]['msg']}") from error


def default_plan(data: Data, settings: CaptureSettings, *, num_views: int = 1, row_bytes: int = 0) -> Plan:
    """Returns how a source is cut: a unit is a whole number of chunks, and neither is larger than the source.

    Args:
        row_bytes: of a row that is wide, before compression; units and chunks then have no more bytes than `WIDE_BYTES`.
    """
    most = np.array(RAGGED_ROWS if data.is_ragged else ROWS)
    if row_bytes:
        most = np.minimum(most, np.array(WIDE_BYTES) // row_bytes)
    unit, chunk = (max(1, round(rows / data.mean_rows)) for rows in most.tolist())
    unit = min(settings.unit_samples or max(unit, settings.chunk_samples or 1), len(data))
    chunk = min(settings.chunk_samples or chunk, unit)
    return Plan(
        num_samples=len(data),
        num_views=num_views,
        unit_samples=chunk * max(1, unit // chunk),
        chunk_samples=chunk,
    )
