"""Files that other tools write are compared by what they hold: what differs and decides no number is read, anything else refused."""

import io
import json

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec

from softcache.errors import CorruptionError, ManifestError
from softcache.reader.open import open_cache
from softcache.tools.convert import convert_cache
from softcache.tools.verify.checksums import verify_units
from tests.chaos.forge import MANIFEST, Files, make_small, signed, write_files
from tests.support.caches import make_cache

SMALL = {"source": {"max_train_samples": 40, "max_eval_samples": 20}}
CUT = {"unit_samples": 16, "chunk_samples": 8, "evaluate": False}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    kinds = ("images-zarr", "images-parquet", "tokens-parquet", "images-packed")
    found = {kind: make_small(kind, folder)[2] for kind in kinds}
    cache = make_cache(folder / "packed", **SMALL, capture={**CUT, "store": "parquet", "codec": "packed"})[2]
    return found | {"packed-parquet": _files(cache.url)}


def _files(url):
    from pathlib import Path

    root = Path(url)
    return Files({p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()})


def read_all(cache):
    stored = cache.read_stored(np.arange(len(cache)), 0)
    names = ("ids", "log_probs", "log_tail", "target_log_prob", "stats")
    return {name: getattr(stored.labels, name) for name in names} | {"fingerprint": stored.fingerprints}


def check_same(files, changed, folder):
    """The changed cache verifies, and is read number for number as the other one."""
    write_files(folder / "before", files, Files())
    write_files(folder / "after", signed(Files(changed)), Files())
    after = open_cache(folder / "after")
    assert list(verify_units(after)) == []
    unchanged = open_cache(folder / "before")
    before = read_all(unchanged)
    for name, values in read_all(after).items():
        assert values.dtype == before[name].dtype
        np.testing.assert_array_equal(values, before[name], err_msg=name)
    some = [3, len(after) - 1, 17]
    np.testing.assert_array_equal(
        open_cache(folder / "after").read(some).log_probs, unchanged.read(some).log_probs
    )


# -- Parquet ------------------------------------------------------------------------------------------------------


def by_polars(data):
    """Other kinds of lists and strings, columns in another order, everything nullable, one row group, no checksums."""
    table = pq.ParquetFile(io.BytesIO(data)).read()
    frame, sink = pl.from_arrow(table), io.BytesIO()
    frame.select(sorted(frame.columns)).write_parquet(sink, compression="snappy")
    return sink.getvalue()


def by_pyarrow(data):
    """Lists of any length, 64-bit integers, dictionary pages, gzip, row groups of 5, another column and metadata."""
    table, columns = pq.ParquetFile(io.BytesIO(data)).read(), {}
    for name in reversed(table.column_names):
        column = table[name].combine_chunks()
        kind = column.type
        if pa.types.is_fixed_size_list(kind):
            column = column.cast(pa.list_(kind.value_type))
            if name == "ids":
                column = column.cast(pa.list_(pa.int64()))
        elif pa.types.is_fixed_size_binary(kind):
            column = column.cast(pa.binary())
        elif name in ("view", "sample", "position", "num_rows"):
            column = column.cast(pa.int64())
        columns[name] = column
    columns["comment"] = pa.array(["another tool's"] * len(table))
    sink = io.BytesIO()
    pq.write_table(
        pa.table(columns).replace_schema_metadata({"tool": "other"}),
        sink,
        row_group_size=5,
        compression="gzip",
    )
    return sink.getvalue()


@pytest.mark.parametrize("rewritten", [by_polars, by_pyarrow])
@pytest.mark.parametrize("kind", ["images-parquet", "tokens-parquet", "packed-parquet"])
def test_files_of_other_writers_of_parquet_are_read(small, tmp_path, kind, rewritten):
    files = small[kind]
    changed = {path: rewritten(data) if path.endswith(".parquet") else data for path, data in files.items()}
    check_same(files, changed, tmp_path)


def replaced(name, values):
    def change(data):
        table, sink = pq.ParquetFile(io.BytesIO(data)).read(), io.BytesIO()
        place = table.schema.get_field_index(name)
        table = (
            table.drop_columns(name) if values is None else table.set_column(place, name, values(table[name]))
        )
        pq.write_table(table, sink)
        return sink.getvalue()

    return change


def shorter(column):
    return pa.array([row[:-1] if number == 3 else row for number, row in enumerate(column.to_pylist())])


def with_null(column):
    return pa.array([None if n == 3 else value for n, value in enumerate(column.to_pylist())], column.type)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("log_tail", None), "it has 0 columns log_tail"),
        (
            replaced("log_tail", lambda c: c.cast(pa.list_(pa.float64(), 8))),
            "log_tail is of type .*double.*expected",
        ),
        (replaced("ids", shorter), "column ids has lists of other lengths than 4"),
        (replaced("fingerprint", with_null), "column fingerprint has nulls"),
    ],
)
def test_what_would_be_other_numbers_is_refused(small, tmp_path, change, message):
    files, unit = small["images-parquet"], "parquet/00000.parquet"
    write_files(tmp_path, signed(Files({**files, unit: change(files[unit])})), Files())
    cache = open_cache(tmp_path)
    with pytest.raises(CorruptionError, match=message):
        cache.read([0])
    assert [line for line in verify_units(cache) if "invariant I10" in line]


def bomb(data):
    """Records of 2 MB each, of which a file needs one."""
    table = pq.ParquetFile(io.BytesIO(data)).read()
    records, sink = pa.array([bytes(2_000_000)] * len(table), pa.large_binary()), io.BytesIO()
    pq.write_table(table.set_column(table.schema.get_field_index("record"), "record", records), sink)
    return sink.getvalue()


def many(data):
    """Lists of a hundred thousand equal numbers, which take a few bytes."""
    table = pq.ParquetFile(io.BytesIO(data)).read()
    ids, sink = pa.array([np.zeros(100_000, np.uint16)] * len(table)), io.BytesIO()
    pq.write_table(table.set_column(table.schema.get_field_index("ids"), "ids", ids), sink)
    return sink.getvalue()


@pytest.mark.parametrize(("kind", "forged"), [("packed-parquet", bomb), ("images-parquet", many)])
def test_a_few_bytes_that_stand_for_many_are_not_expanded(small, tmp_path, kind, forged):
    files, unit = small[kind], "parquet/00000.parquet"
    write_files(tmp_path, signed(Files({**files, unit: forged(files[unit])})), Files())
    with pytest.raises(CorruptionError, match=r"claims to hold|cannot be decoded: Failed casting"):
        open_cache(tmp_path).read([0])


# -- Zarr -----------------------------------------------------------------------------------------------------------


def rewrite_zarr(files, folder, codecs_of):
    """Returns the files of a cache whose arrays zarr-python has written anew, with codecs of the caller's choice."""
    write_files(folder, files, Files())
    old = zarr.open_group(folder / "labels.zarr", mode="r")
    new = zarr.open_group(folder / "new.zarr", mode="w", attributes={**old.attrs, "made_by": "another tool"})
    for name, array in old.arrays():
        if name == "temperature":
            continue
        filters, compressors = codecs_of(name, array)
        made = new.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            shards=array.shards,
            chunks=array.chunks,
            fill_value=array.fill_value,
            dimension_names=array.metadata.dimension_names,
            filters=filters,
            compressors=compressors,
            attributes={"long_name": name},
            config={"write_empty_chunks": True},
        )
        made[...] = array[...]
    new.create_array("another", shape=(2,), dtype="float32")
    written = {
        f"labels.zarr/{path.relative_to(folder / 'new.zarr').as_posix()}": path.read_bytes()
        for path in (folder / "new.zarr").rglob("*")
        if path.is_file()
    }
    return {path: data for path, data in files.items() if not path.startswith("labels.zarr/")} | written


def with_features(changed, *features):
    manifest = json.loads(changed[MANIFEST]) | {"features": list(features)}
    return changed | {MANIFEST: json.dumps(manifest).encode()}


def other_parameters(name, array):
    if name == "record":
        return [TransposeCodec(order=(2, 0, 1))], [ZstdCodec(level=9), Crc32cCodec()]
    blosc = BloscCodec(cname="lz4", clevel=9, shuffle="shuffle", typesize=array.dtype.itemsize)
    return [], [Crc32cCodec()] if name == "fingerprint" else [blosc, Crc32cCodec()]


def zstandard(name, array):
    return [], [ZstdCodec(level=1)]


def gzip(name, array):
    return [TransposeCodec(order=tuple(reversed(range(array.ndim))))], [GzipCodec(level=1), Crc32cCodec()]


def uncompressed(name, array):
    return [], []


@pytest.mark.parametrize("kind", ["images-zarr", "images-packed"])
def test_parameters_of_compressors_attributes_and_further_arrays_are_the_writers(small, tmp_path, kind):
    check_same(small[kind], rewrite_zarr(small[kind], tmp_path / "made", other_parameters), tmp_path)


@pytest.mark.parametrize("codecs_of", [zstandard, gzip, uncompressed])
def test_other_codecs_are_a_feature_that_the_manifest_names(small, tmp_path, codecs_of):
    changed = rewrite_zarr(small["images-zarr"], tmp_path / "made", codecs_of)
    check_same(small["images-zarr"], with_features(changed, "array_codecs"), tmp_path)
    copy = convert_cache(open_cache(tmp_path / "after"), tmp_path / "copy", store="zarr")
    assert copy.manifest.features == ()
    np.testing.assert_array_equal(
        copy.read(np.arange(40)).ids, open_cache(tmp_path / "before").read(np.arange(40)).ids
    )
    write_files(tmp_path / "silent", signed(Files(changed)), Files())
    cache = open_cache(tmp_path / "silent")
    with pytest.raises(CorruptionError, match=r"cannot be decoded|claims to hold"):
        cache.read([0])
    assert [line for line in verify_units(cache) if "zarr.json" in line and "invariant I6" in line]


def test_chunks_of_another_size_are_refused(small, tmp_path):
    changed = with_features(rewrite_zarr(small["images-zarr"], tmp_path / "made", gzip), "array_codecs")
    manifest = json.loads(changed[MANIFEST])
    manifest["plan"] |= {"chunk_samples": 4}
    refused = Files(changed | {MANIFEST: json.dumps(manifest).encode()})
    write_files(tmp_path / "other", signed(refused), Files())
    with pytest.raises(CorruptionError, match="does not describe what the manifest implies"):
        open_cache(tmp_path / "other").read([0])


# -- manifest -------------------------------------------------------------------------------------------------------


def test_optional_keys_may_be_left_out(small, tmp_path):
    manifest = json.loads(small["images-zarr"][MANIFEST])
    for key in ("softcache_version", "class_names", "teacher", "samples"):
        del manifest[key]
    check_same(
        small["images-zarr"], small["images-zarr"] | {MANIFEST: json.dumps(manifest).encode()}, tmp_path
    )


def test_a_feature_that_is_not_known_is_refused_by_its_name(small, tmp_path):
    """Also where it comes with keys and values that are not known either."""
    manifest = json.loads(small["images-zarr"][MANIFEST]) | {
        "features": ["matrices"],
        "matrices": {"size": 3},
    }
    write_files(
        tmp_path, signed(Files({**small["images-zarr"], MANIFEST: json.dumps(manifest).encode()})), Files()
    )
    with pytest.raises(
        ManifestError, match="uses the feature 'matrices', which this softcache does not know"
    ):
        open_cache(tmp_path)


def test_extensions_and_attributes_are_kept_by_copies(small, tmp_path):
    more = {"extensions": {"org.example.audit": {"by": ["A"]}}, "attributes": {"license": "CC0"}}
    manifest = json.loads(small["images-zarr"][MANIFEST]) | more
    changed = signed(Files({**small["images-zarr"], MANIFEST: json.dumps(manifest).encode()}))
    marker = json.loads(changed["units/00000.json"]) | {"extensions": {"org.example.audit": 1}}
    changed["units/00000.json"] = json.dumps(marker).encode()
    write_files(tmp_path / "made", changed, Files())
    cache = open_cache(tmp_path / "made")
    assert list(verify_units(cache)) == []
    copy = convert_cache(cache, tmp_path / "copy", store="parquet")
    written = json.loads((tmp_path / "copy" / MANIFEST).read_bytes())
    assert {key: written[key] for key in more} == more
    assert copy.manifest.extensions == more["extensions"]


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("temperature/c/0", None),
        ("temperature/zarr.json", None),
        ("ids/zarr.json", (b'"cname"', b'"cnaie"')),
        ("ids/zarr.json", (b'"endian"', b'"endiam"')),
        ("log_tail/zarr.json", (b'"bitshuffle"', b'"bitrhuffle"')),
        ("zarr.json", (b'"fill_value": 10', b'"fill_value": 11')),
        ("zarr.json", (b'"data_type": "uint16"', b'"data_type": "uint32"')),
        (
            "zarr.json",
            (b'"consolidated_metadata": {', b'"consolidated_metadata": {"metadata": 1, "other": {'),
        ),
    ],
)
def test_what_only_other_tools_read_is_verified_too(small, tmp_path, path, change):
    """Of which softcache itself needs nothing: half of the coordinate, a codec's parameters, copies in the group."""
    files, path = Files(small["images-zarr"]), f"labels.zarr/{path}"
    data = files.pop(path)
    if change is not None:
        assert change[0] in data
        files[path] = data.replace(*change, 1)
    write_files(tmp_path, files, Files())
    (fault,) = verify_units(open_cache(str(tmp_path)))
    assert path in fault


def test_other_writers_may_leave_the_coordinate_out(small, tmp_path):
    kept = {path: data for path, data in small["images-zarr"].items() if "/temperature/" not in path}
    write_files(tmp_path, Files(kept), Files())
    assert list(verify_units(open_cache(str(tmp_path)))) == []
