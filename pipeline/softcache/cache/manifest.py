"""What a cache is: `manifest.json`, written first and never changed, and one marker per finished unit.

Both are JSON and untrusted input: every field is validated, sizes are bounded before anything is allocated,
and paths must stay inside of the cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from softcache.cache.codecs import Codec, SoftLabelCodec, codec_from_dict
from softcache.cache.features import check_features
from softcache.cache.kinds import check_kind
from softcache.errors import LabelError, ManifestError
from softcache.labels import LabelKind

__all__ = [
    "FORMAT_VERSION",
    "Count",
    "Digest",
    "Document",
    "Manifest",
    "Plan",
    "RaggedRows",
    "Shard",
    "SharedObject",
    "TeacherReport",
    "Unit",
    "UnitMarker",
    "claim_path",
    "diff_manifests",
    "marker_path",
    "owner_of",
]

FORMAT_VERSION = 1
MAX_UNITS = 10_000_000
MAX_UNIT_ROWS, MAX_UNIT_BYTES, MAX_CHUNK_BYTES = 2**28, 2**36, 2**34
"""What a writer holds in memory and a reader decodes at once, before compression."""
MAX_STATE_WIDTH = 2**17
"""Of a teacher's hidden state, before coordinates are taken of it."""
EXTENSION_NAME = r"^[A-Za-z0-9._-]{1,128}$"
MAX_MANIFEST_BYTES, MAX_MARKER_BYTES = 2**26, 2**20


def _inside(path: str) -> str:
    """A relative, normalised path that stays inside of the cache."""
    parts = path.split("/")
    if not re.fullmatch(r"[A-Za-z0-9._/-]+", path) or any(part in ("", ".", "..") for part in parts):
        raise ValueError("must be a relative path inside of the cache, without '..'")
    return path


Path = Annotated[str, AfterValidator(_inside)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**48)]
Size = Annotated[int, Field(ge=1, le=2**40)]
Self = TypeVar("Self", bound="Document")


class Document(BaseModel):
    """A JSON document of a cache: strict, frozen, without unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def to_bytes(self) -> bytes:
        """Returns canonical JSON: sorted keys, two spaces, a final newline."""
        return (json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def parse(cls: type[Self], data: bytes, *, where: str) -> Self:
        """Returns the validated document.

        Raises:
            ManifestError: it is not JSON, of another version, or a field is wrong; `where` and field are named.
        """
        try:
            # JSON mode: lists are tuples there; every other type stays strict.
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise cls._fault(data, error, where) from error

    @staticmethod
    def _fault(data: bytes, error: ValidationError, where: str) -> ManifestError:
        """Returns what is wrong with a document that was refused, the most telling first."""
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as not_json:
            again = "read it again, in case a bucket's answer was cut short, or " if "://" in where else ""
            return ManifestError(f"{where}: not JSON: {not_json}; {again}restore it from a copy")
        version = (
            content.get("format_version", FORMAT_VERSION) if isinstance(content, dict) else FORMAT_VERSION
        )
        if version != FORMAT_VERSION:
            return ManifestError(
                f"{where}: format_version {version!r}; this softcache reads {FORMAT_VERSION}; upgrade softcache"
            )
        features = content.get("features") if isinstance(content, dict) else None
        if isinstance(features, list) and all(isinstance(name, str) for name in features):
            try:  # what is unknown besides may belong to them
                check_features(features, where=where)
            except ManifestError as unknown:
                return unknown
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        return ManifestError(
            f"{where}: {field or 'document'}: {problem['msg']}; found {str(problem['input'])[:80]!r}"
        )


class Unit(NamedTuple):
    """A range of samples of one view: one task, one shard object per column, one marker."""

    number: int
    view: int
    start: int
    stop: int


class Plan(Document):
    """How samples and views are cut into units; units are numbered view by view.

    Attributes:
        num_samples: N.
        num_views: of every sample.
        unit_samples: samples of a unit (the last of a view may have fewer); a multiple of `chunk_samples`.
        chunk_samples: samples that are compressed together.
    """

    num_samples: Size
    num_views: Annotated[int, Field(ge=1, le=2**32 - 1)]
    unit_samples: Size
    chunk_samples: Size

    @model_validator(mode="after")
    def _check(self) -> Plan:
        if self.unit_samples % self.chunk_samples:
            raise ValueError("unit_samples must be a multiple of chunk_samples")
        if self.num_units > MAX_UNITS:
            raise ValueError(f"more than {MAX_UNITS:,} units; make units larger")
        return self

    @property
    def units_per_view(self) -> int:
        return -(-self.num_samples // self.unit_samples)

    @property
    def num_units(self) -> int:
        return self.units_per_view * self.num_views

    def unit(self, number: int) -> Unit:
        """Returns the unit of that number.

        Raises:
            IndexError: there is none.
        """
        if not 0 <= number < self.num_units:
            raise IndexError(f"unit {number}: the plan has units 0 to {self.num_units - 1}")
        view, place = divmod(number, self.units_per_view)
        start = place * self.unit_samples
        return Unit(number, view, start, min(start + self.unit_samples, self.num_samples))

    def units(self) -> Iterator[Unit]:
        return map(self.unit, range(self.num_units))

    def in_order(self, numbers: np.ndarray, *, by_range: bool = False) -> list[int]:
        """Returns ascending numbers of units as a list; `by_range`: all views of a range of samples follow each other."""
        if by_range:
            numbers = numbers[np.lexsort((numbers // self.units_per_view, numbers % self.units_per_view))]
        return numbers.tolist()

    def num_samples_of(self, numbers: np.ndarray) -> int:
        """Returns how many samples units have together, views counted."""
        starts = numbers % self.units_per_view * self.unit_samples
        return int((np.minimum(starts + self.unit_samples, self.num_samples) - starts).sum())

    def locate(self, view: int, sample: int) -> Unit:
        """Returns the unit that holds a sample of a view."""
        return self.unit(view * self.units_per_view + sample // self.unit_samples)


def _is_none(value: Any) -> bool:
    return (
        value is None
    )  # such a field is not written: manifests stay, byte for byte, what they were without it


def _is_empty(value: Any) -> bool:
    return not value


class RaggedRows(Document):
    """Samples with a row per token: how their rows lie in the arrays.

    Unit n's rows start at row n * `shard_rows` of every array and follow one another, sample by sample.

    Attributes:
        num_rows: of all samples together.
        shard_rows: rows that one shard has room for: as many as the largest unit has, rounded up to whole chunks.
        chunk_rows: rows that are compressed together.
    """

    num_rows: Size
    shard_rows: Size
    chunk_rows: Size

    @model_validator(mode="after")
    def _check(self) -> RaggedRows:
        if self.shard_rows % self.chunk_rows:
            raise ValueError("shard_rows must be a multiple of chunk_rows")
        return self


class SharedObject(Document):
    """An object that all rows of a cache share, such as the head of its hidden states.

    Attributes:
        path: relative to the cache.
        num_bytes: its size.
        sha256: of its bytes.
    """

    path: Path
    num_bytes: Count
    sha256: Digest


class TeacherReport(Document):
    """What is known of the teacher besides its identity; not compared between runs.

    Attributes:
        eval_accuracy: share of the evaluation split's rows whose first guess is right.
        eval_loss: mean negative log-likelihood of these rows, nats; of a detector its own loss, mean over images.
        eval_map: of a detector, the mean average precision over IoU 0.5 to 0.95 on the evaluation split.
        eval_map50: the same at IoU 0.5.
        eval_miou: of a teacher of masks, the mean over classes of the intersection over union of its pixels.
    """

    num_parameters: Count = 0
    eval_accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    eval_loss: Annotated[float, Field(ge=0)] | None = Field(None, exclude_if=_is_none)
    eval_map: Annotated[float, Field(ge=-1, le=1)] | None = Field(None, exclude_if=_is_none)
    eval_map50: Annotated[float, Field(ge=-1, le=1)] | None = Field(None, exclude_if=_is_none)
    eval_miou: Annotated[float, Field(ge=0, le=1)] | None = Field(None, exclude_if=_is_none)
    eval_samples: Count = 0


class Manifest(Document):
    """A whole cache; see docs/format.md.

    Attributes:
        identity: what the labels are of: teacher, source, views, labels, codec. A run with another identity
            is refused.
        data: where the columns are, relative to the cache.
        rows: None where every sample has one row.
        samples: the table of keys and ground truth, relative to the cache.
        objects: what all rows share, by name; written before the manifest.
        features: what a reader must know besides version 1 (`softcache.cache.features`).
        extensions: of others, by a name that is theirs; readers pass over them, copies keep them.
        attributes: free; readers pass over them, copies keep them.
        slimmed_from: sha256 of the manifest of the bigger cache that this one was made of (`softcache.tools.shrink`); like
        the
            teacher's report not compared between runs.
    """

    format_version: Literal[1] = 1
    softcache_version: str = ""
    kind: LabelKind
    identity: dict[str, dict[str, Any]]
    num_classes: Annotated[int, Field(ge=1, le=2**31)]
    class_names: tuple[str, ...] = ()
    codec: dict[str, Any]
    plan: Plan
    rows: RaggedRows | None = Field(None, exclude_if=_is_none)
    store: Literal["zarr", "parquet"]
    data: Path
    samples: Path = "samples.parquet"
    samples_sha256: Digest
    teacher: TeacherReport = TeacherReport()
    objects: Annotated[
        dict[Annotated[str, Field(pattern=EXTENSION_NAME)], SharedObject], Field(max_length=64)
    ] = Field({}, exclude_if=_is_empty)
    features: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=64)], ...], Field(max_length=64)
    ] = Field((), exclude_if=_is_empty)
    extensions: dict[Annotated[str, Field(pattern=EXTENSION_NAME)], Any] = Field({}, exclude_if=_is_empty)
    attributes: dict[str, Any] = Field({}, exclude_if=_is_empty)
    slimmed_from: Digest | None = Field(None, exclude_if=_is_none)

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        try:
            check_features(self.features, where="features")
            codec = codec_from_dict(self.codec)
        except ManifestError as error:
            raise ValueError(str(error)) from error
        if codec.num_classes != self.num_classes:
            raise ValueError(f"num_classes {self.num_classes} differs from the codec's {codec.num_classes}")
        if unnamed := [name for name in codec.features if name not in self.features]:
            raise ValueError(f"codec {codec.name}: features must name {unnamed[0]!r}, which it is of")
        check_kind(self.kind, codec=codec, identity=self.identity, has_rows=self.rows is not None)
        self._check_sizes(codec)
        return self

    def _check_sizes(self, codec: Codec) -> None:
        row_bytes = _row_bytes(codec)
        for name, described in self.objects.items():
            # Two matrices of float32, the head's and the coordinates', with a bias each.
            most = 4 * (self.num_classes + MAX_STATE_WIDTH) * (row_bytes + 1) + MAX_MARKER_BYTES
            if described.num_bytes > most:
                raise ValueError(
                    f"objects.{name}: has {described.num_bytes:,} bytes, at most {most:,} are read for this codec"
                )
        unit_rows, chunk_rows = self.plan.unit_samples, self.plan.chunk_samples
        if self.rows is not None:
            unit_rows, chunk_rows = self.rows.shard_rows, self.rows.chunk_rows
            if self.rows.num_rows > self.plan.units_per_view * unit_rows:
                raise ValueError("rows.num_rows is more than the units have room for")
        if max(unit_rows, self.plan.unit_samples) > MAX_UNIT_ROWS or unit_rows * row_bytes > MAX_UNIT_BYTES:
            raise ValueError(
                f"a unit has {unit_rows:,} rows of {row_bytes:,} bytes, at most {MAX_UNIT_ROWS:,} and {MAX_UNIT_BYTES:,} "
                "bytes together are read; make units smaller (capture.unit_samples)"
            )
        if chunk_rows * row_bytes > MAX_CHUNK_BYTES:
            raise ValueError(
                f"a chunk has {chunk_rows:,} rows of {row_bytes:,} bytes, at most {MAX_CHUNK_BYTES:,} bytes together are "
                "read; make chunks smaller (capture.chunk_samples)"
            )

    @classmethod
    def parse(cls, data: bytes, *, where: str) -> Manifest:
        found = super().parse(data, where=where)
        if missing := sorted(set(found.build_codec().shared) - found.objects.keys()):
            raise ManifestError(
                f"{where}: objects: expected {missing[0]!r}, which codec {found.codec['name']} reads; found "
                f"{sorted(found.objects)}; restore the manifest from a copy"
            )
        return found

    @property
    def total_rows(self) -> int:
        """Rows of all views together."""
        return (self.rows.num_rows if self.rows else self.plan.num_samples) * self.plan.num_views

    @property
    def skips_positions(self) -> bool:
        """Whether only some of a sample's rows have a label: its `labels.positions` were not "all". Of a detector's cells a
        batch has no other rows than those."""
        return "boxes" not in self.identity and "positions" in self.identity["labels"]

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit's columns, before compression."""
        num_rows = self.plan.unit_samples if self.rows is None else self.rows.shard_rows
        return num_rows * _row_bytes(self.build_codec())

    @property
    def mixes_images(self) -> bool:
        """Whether views above 0 may be mixtures of two images, whose rows have two ground-truth classes."""
        return "mix_probability" in self.identity.get("views", {}).get("settings", {})

    def build_codec(self) -> Codec:
        return codec_from_dict(self.codec)

    def soft_codec(self, what: str) -> SoftLabelCodec:
        """Returns the codec of a cache of `SoftLabels`.

        Args:
            what: needs one, and on which cache.

        Raises:
            LabelError: it is a cache of other labels, such as a detector's.
        """
        codec = self.build_codec()
        if not isinstance(codec, SoftLabelCodec):
            whose = "a detector" if "boxes" in self.identity else "independent classes"
            whose = "vectors (hidden states)" if codec.name == "vectors" else whose
            raise LabelError(
                f"{what}: expected labels that are one distribution over all classes; found those of codec {codec.name!r}, "
                f"of {whose}, for which it is not made; give another cache"
            )
        return codec


def _row_bytes(codec: Codec) -> int:
    """Bytes of a row with its fingerprint and position, before compression."""
    return codec.row_bytes + 16


def diff_manifests(here: Manifest, there: Manifest) -> list[str]:
    """Returns one line `field: here; there` for every field in which two caches cannot be one.

    The spec of a teacher is where it was loaded from; its weights, architecture and dtype are its identity.
    """
    compared = {"identity", "plan", "rows", "store", "kind", "num_classes"}
    one, other = (json.loads(manifest.model_dump_json(include=compared)) for manifest in (here, there))
    teachers = [document["identity"]["teacher"] for document in (one, other)]
    is_named = all("architecture" in teacher for teacher in teachers)  # caches of before have the spec alone
    for teacher in teachers:
        teacher.pop("spec" if is_named else "architecture", None)
    return list(_differ(one, other, ""))


def _differ(one: Any, other: Any, prefix: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(set(one) | set(other)):
            yield from _differ(one.get(key), other.get(key), f"{prefix}{key}.")
    elif one != other:
        yield f"{prefix.rstrip('.')}: {one!r}; {other!r}"


class Shard(Document):
    """One object of a unit.

    Attributes:
        path: relative to the cache.
        column: the column that it holds, or None if it holds all.
        num_bytes: its size.
        sha256: of its bytes.
    """

    path: Path
    column: str | None
    num_bytes: Count
    sha256: Digest


class UnitMarker(Document):
    """A finished unit; written last. A reader trusts only what a marker names.

    Attributes:
        extensions: of others, by a name that is theirs; readers pass over them.
    """

    unit: Count
    view: Count
    start: Count
    stop: Count
    num_rows: Count
    manifest_sha256: Digest
    shards: Annotated[tuple[Shard, ...], Field(min_length=1, max_length=64)]
    extensions: dict[Annotated[str, Field(pattern=EXTENSION_NAME)], Any] = Field({}, exclude_if=_is_empty)


def owner_of(path: str, store: Any, number: int) -> int | None:
    """Returns `number` if the unit of that number has a shard of this path in a store, else None."""
    plan = store.manifest.plan
    return number if 0 <= number < plan.num_units and path in store.shard_paths(plan.unit(number)) else None


def marker_path(number: int) -> str:
    return f"units/{number:05d}.json"


def claim_path(number: int) -> str:
    """Returns the path of the claim on a unit, held to make it or to remove the remains of one."""
    return f"units/{number:05d}.lock"
