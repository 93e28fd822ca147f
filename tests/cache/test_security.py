"""Caches, weights and samples are untrusted: nothing in them runs, leads out of the cache, or fills the memory."""

import ast
import io
import json
import os
import pickle
import resource
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from click.testing import CliRunner

from softcache.cache.arrays.parquet_footer import read_row_groups
from softcache.cache.codecs import OpenCodec
from softcache.cache.manifest import Manifest
from softcache.cache.samples import read_samples
from softcache.cache.storage.open import open_objects
from softcache.cache.units import open_store, publish_unit
from softcache.data.sources.images.image_folder import ImageFolderSource
from softcache.errors import (
    AlignmentError,
    CorruptionError,
    LabelError,
    ManifestError,
    RunError,
    SoftcacheError,
    SourceError,
    SpecError,
)
from softcache.models.image import build_model
from softcache.models.weight_files import load_weights
from softcache.reader.dataset import cached_views
from softcache.reader.open import open_cache
from softcache.runs import train_student
from softcache.stages.cli import main, softcache
from softcache.tools.import_caches.unpickle import _Plain
from softcache.tools.verify.teacher import verify_units
from tests.chaos.forge import MANIFEST, Files, make_small, signed, write_files
from tests.chaos.fuzz import fuzz
from tests.chaos.parsers import cache_targets
from tests.support.caches import ROOT, make_cache


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return {kind: make_small(kind, folder) for kind in ("images-zarr", "images-parquet", "images-packed")}


@pytest.fixture
def forge(small, tmp_path):
    """Returns a function that writes a forged cache, all its digests right, and returns where it is."""

    def write(kind, changes, *, sign=True):
        files = Files({**small[kind][2], **changes})
        files = signed(files) if sign else files
        write_files(tmp_path / "forged", files, {})
        return str(tmp_path / "forged")

    return write


def use_all(url):
    """Reads every kind of object of a cache, and writes one."""
    cache = open_cache(str(url))
    cache.samples_table()
    cache.read(range(40))
    open_objects(str(url)).put("new", b"")


def edited(files, path, change):
    document = json.loads(files[path])
    change(document)
    return {path: json.dumps(document).encode()}


# -- nothing runs ------------------------------------------------------------------------------------------

EVIL = """
import pathlib
pathlib.Path({mark!r}).write_text("it ran")
def run(*args, **kwargs):
    raise SystemExit("it ran")
"""


def test_code_that_a_cache_names_is_never_imported(small, forge, tmp_path, monkeypatch):
    """The manifest names a module as teacher, transform, source and codec; no command on the cache imports it."""
    mark = tmp_path / "mark"
    (tmp_path / "evil_of_the_cache.py").write_text(EVIL.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path)
    name = "evil_of_the_cache:run"

    def change(manifest):
        manifest["identity"]["teacher"]["spec"] = name
        manifest["identity"]["source"]["name"] = name
        manifest["identity"]["views"]["settings"]["transform"] = name
        manifest["softcache_version"] = name

    url = forge("images-zarr", edited(small["images-zarr"][2], MANIFEST, change))
    out = str(tmp_path / "out")
    for command in (
        ["inspect", url],
        ["verify", url],
        ["verify", url, "--config", str(ROOT / "configs/digits.toml")],
        ["train-student", "--config", str(ROOT / "configs/digits.toml"), "--cache", url, "--out", out],
        ["fidelity", url, "--config", str(ROOT / "configs/digits.toml"), "--out", out],
        ["convert", url, out + "-parquet", "--store", "parquet"],
        ["shrink", url, out + "-small", "--k", "2"],
        ["materialize", url, "--folder", out + "-memmap"],
        ["gc", url],
    ):
        done = CliRunner().invoke(softcache, command)
        assert done.exception is None or isinstance(done.exception, SoftcacheError | SystemExit), command
    with pytest.raises(AlignmentError, match="a cache never names code to run"):
        cached_views(open_cache(url))
    assert not mark.exists()
    assert "evil_of_the_cache" not in sys.modules


class _RunsWhenUnpickled:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights.safetensors"])
def test_weights_with_code_in_them_are_refused_and_do_not_run(tmp_path, name):
    torch.save({"weight": _RunsWhenUnpickled(str(tmp_path / "mark"))}, tmp_path / name)
    model = build_model("linear", num_classes=3, input_shape=(1, 2, 2))
    with pytest.raises(SpecError, match=r"cannot be loaded"):
        load_weights(model, tmp_path / name)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
@pytest.mark.parametrize("signed_again", [False, True])
def test_a_checkpoint_with_code_in_it_is_refused_and_does_not_run(tmp_path, shared_cache, name, signed_again):
    config, data, cache = shared_cache
    config = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 1})})

    def train():
        return train_student(config, data, model="linear", labels="cache", cache=cache, out=tmp_path / "out")

    train()
    (tmp_path / "out/metrics.json").unlink()
    torch.save({"state": _RunsWhenUnpickled(str(tmp_path / "mark"))}, tmp_path / "out/checkpoint" / name)
    progress = tmp_path / "out/checkpoint/progress.json"
    if signed_again:
        found = json.loads(progress.read_text())
        found["checksums"][name] = xxhash.xxh3_128((progress.parent / name).read_bytes()).hexdigest()
        progress.write_text(json.dumps(found))
    if signed_again and name == "random_states_0.pkl":
        train()  # accelerate passes over states that it may not read
    else:
        with pytest.raises(RunError, match=r"checkpoint: (cannot be loaded|a file differs)"):
            train()
    assert not (tmp_path / "mark").exists()


UNPICKLER = ROOT / "pipeline/softcache/tools/import_caches/unpickle.py"
"""The one unpickler, of other programs' caches; it finds no class at all."""


def test_nothing_in_the_code_unpickles_evaluates_or_reads_yaml():
    """What would run code that it is given is not called anywhere; torch.load passes weights_only each time."""
    for module, name in (("builtins", "dict"), ("os", "system")):
        with pytest.raises(pickle.UnpicklingError, match=f"it names {module}.{name}"):
            _Plain(io.BytesIO(f"c{module}\n{name}\n.".encode())).load()
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").rglob("*.py")]:
        text = path.read_text()
        for call in (
            "pickle.load",
            "pickle.Unpickler",
            "yaml.load",
            "allow_pickle=True",
            " eval(",
            " exec(",
            "marshal.",
        ):
            allowed = 1 if (path, call) == (UNPICKLER, "pickle.Unpickler") else 0
            assert text.count(call) == allowed, f"{path} calls {call}"
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load":
                assert "weights_only=True" in map(ast.unparse, call.keywords), path


# -- nothing leads out -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "/etc/passwd",
        "a/../../x",
        "a\x00b",
        "C:\\x",
        "\\\\host\\share",
        "a//b",
        "./a",
        "é",
        "",
        "a b",
        ".",
        "a\n",
    ],
)
@pytest.mark.parametrize("where", ["data", "samples", "shard"])
def test_a_path_out_of_the_cache_is_refused(small, forge, path, where):
    files = small["images-zarr"][2]
    document = "units/00000.json" if where == "shard" else MANIFEST

    def change(found):
        (found["shards"][0] if where == "shard" else found)[where if where != "shard" else "path"] = path

    url = forge("images-zarr", edited(files, document, change))
    with pytest.raises(ManifestError, match=r"path|data|samples"):
        open_cache(url).read([0])


@pytest.mark.parametrize(
    "name", ["manifest.json", "samples.parquet", "units", "labels.zarr", "labels.zarr/ids", ".staging"]
)
def test_a_link_out_of_the_cache_is_refused_by_every_reader_and_writer(forge, tmp_path, name):
    url = Path(forge("images-zarr", {}))
    (url / ".staging").mkdir(exist_ok=True)
    (tmp_path / "elsewhere").mkdir()
    (url / name).rename(tmp_path / "elsewhere" / "moved")
    (url / name).symlink_to(tmp_path / "elsewhere" / "moved")
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    with pytest.raises(SoftcacheError, match="link leads out"):
        use_all(url)
    assert sorted((tmp_path / "elsewhere").rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["manifest.json", "samples.parquet", "units/00000.json", "labels.zarr/ids/c/0/0/0"]
)
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(forge, name):
    url = Path(forge("images-zarr", {}))
    (url / name).unlink()
    os.mkfifo(url / name)
    with pytest.raises(SoftcacheError, match=r"no regular file|bytes expected|not finished"):
        use_all(url)


# -- nothing fills the memory ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["plan"].update(unit_samples=2**40, chunk_samples=2**40), "a unit has"),
        (
            lambda m: m["plan"].update(num_samples=2**40, unit_samples=2**28, chunk_samples=2**28),
            "a unit has|a chunk has",
        ),
        (lambda m: m["plan"].update(num_views=2**31), "units"),
        (
            lambda m: (m["codec"].update(k=2**30, num_classes=2**31), m.update(num_classes=2**31)),
            "a unit has",
        ),
        (lambda m: m["codec"].update(temperatures=[1.0 + n for n in range(65)]), "codec"),
        (lambda m: m["codec"].update(k="4"), "codec"),
        (lambda m: m["codec"].update(k=4.5), "codec"),
        (lambda m: m["codec"].update(temperatures="12"), "codec"),
        (lambda m: m["identity"]["teacher"].update(spec=["x"]), "identity.teacher must have spec, a str"),
        (lambda m: m["identity"]["views"].update(settings="x"), "identity.views must have settings, a dict"),
        (lambda m: m["identity"]["labels"].update(temperatures=["x"]), "temperatures must be numbers"),
    ],
)
def test_numbers_that_would_fill_the_memory_are_refused_by_the_manifest(small, change, message):
    files = edited(small["images-zarr"][2], MANIFEST, change)
    with pytest.raises(ManifestError, match=message):
        Manifest.parse(files[MANIFEST], where="cache x")


def test_a_plan_that_would_be_refused_is_refused_before_the_teacher_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("softcache.cache.manifest.MAX_UNIT_BYTES", 100)
    with pytest.raises(SoftcacheError, match=r"make units smaller \(capture.unit_samples\)"):
        make_cache(tmp_path / "cache")


@pytest.mark.parametrize("name", ["manifest.json", "units/00000.json", "samples.parquet"])
def test_a_file_of_holes_is_refused_by_its_size(forge, name):
    url = Path(forge("images-zarr", {}))
    os.truncate(url / name, 2**42)
    with pytest.raises(CorruptionError, match=r"4,398,046,511,104 bytes; at most"):
        use_all(url)


def test_a_marker_that_calls_for_a_file_of_holes_is_refused(small, forge):
    path = "units/00000.json"
    url = forge(
        "images-zarr", edited(small["images-zarr"][2], path, lambda m: m["shards"][0].update(num_bytes=2**42))
    )
    os.truncate(Path(url) / "labels.zarr/ids/c/0/0/0", 2**42)
    with pytest.raises(ManifestError, match=r"a unit of this cache has [\d,]+ at most"):
        open_cache(url).read([0])


def test_a_blosc_bomb_is_refused_by_its_head(small, forge):
    """The first chunk of a shard claims two gigabytes; the checksums are right."""
    import google_crc32c

    shard = bytearray(small["images-zarr"][2]["labels.zarr/ids/c/0/0/0"])
    start, length = struct.unpack("<QQ", shard[-36:-20])
    shard[start + 4 : start + 8] = struct.pack("<I", 2**31 - 32)
    chunk = bytes(shard[start : start + length - 4])
    shard[start + length - 4 : start + length] = struct.pack("<I", google_crc32c.value(chunk))
    url = forge("images-zarr", {"labels.zarr/ids/c/0/0/0": bytes(shard)})
    with pytest.raises(CorruptionError, match=r"a chunk claims to hold 2,147,483,616 bytes; 64 expected"):
        open_cache(url).read([0])


def test_a_zstandard_bomb_is_decoded_no_further_than_what_is_expected(small, tmp_path):
    """A frame of a gigabyte in place of a chunk of packed records, its crc32c right; met by the store itself."""
    import google_crc32c

    _, _, files = small["images-packed"]
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        for _ in range(1024):
            stream.write(bytes(2**20))
    frame = sink.getvalue().to_pybytes()
    chunk = frame + struct.pack("<I", google_crc32c.value(frame))
    missing = struct.pack("<Q", 2**64 - 1) * 2
    index = struct.pack("<QQ", 0, len(chunk)) + missing
    shard = chunk + index + struct.pack("<I", google_crc32c.value(index))
    write_files(tmp_path / "forged", Files({**files, "labels.zarr/record/c/0/0/0": shard}), {})
    objects = open_objects(str(tmp_path / "forged"))
    manifest = Manifest.parse(files[MANIFEST], where="here")
    store, unit = open_store(manifest, objects), manifest.plan.unit(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptionError, match="column record: cannot be decoded"):
        store.read(unit, 0, 8, ["record"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kilobytes"


def bomb_table(rows):
    """A table of samples that claims to have so many, in a few kilobytes."""
    sink = io.BytesIO()
    schema = pa.schema(
        [
            pa.field("sample", pa.int64(), nullable=False),
            pa.field("key", pa.string(), nullable=False),
            ("target", pa.int64()),
        ]
    )
    columns = {
        "sample": pa.array(np.zeros(rows, np.int64)),
        "key": pa.array([""] * rows),
        "target": pa.nulls(rows, pa.int64()),
    }
    pq.write_table(pa.table(columns, schema=schema), sink, compression="zstd")
    return sink.getvalue()


def test_a_table_of_more_samples_than_its_bytes_can_name_is_refused_unread():
    data = bomb_table(1_000_000)
    assert len(data) < 50_000
    with pytest.raises(CorruptionError, match="1000000 samples in"):
        read_samples(data, 1_000_000)
    with pytest.raises(CorruptionError, match=r"1000000 samples in .* expected 40"):
        read_samples(data, 40)


def test_a_parquet_unit_of_more_rows_than_the_plan_has_is_refused_unread(small, forge):
    files = small["images-parquet"][2]
    path = "parquet/00000.parquet"
    table = pq.read_table(pa.BufferReader(files[path]))
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables([table] * 2000), sink, compression="zstd")
    url = forge("images-parquet", {path: sink.getvalue()})
    with pytest.raises(SoftcacheError, match=r"claims to hold 32,000 rows|at most"):
        open_cache(url).read([0])


def png_bomb(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def test_a_footer_is_read_as_pyarrow_reads_it():
    lists = pa.array([[1, 2], [3, 4], [5, 6], None], pa.list_(pa.int32(), 2))
    table = pa.table({"a": [1.5, None, 2.5, 3.5], "b": lists, "ü": ["x", "y", None, "z"]})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=3)
    known = pq.read_metadata(io.BytesIO(sink.getvalue()))
    found = read_row_groups(sink.getvalue())
    assert len(found) == known.num_row_groups == 2
    for number, group in enumerate(found):
        expected = known.row_group(number)
        assert (group.num_rows, group.num_bytes) == (expected.num_rows, expected.total_byte_size)
        leaves = [expected.column(leaf) for leaf in range(3)]
        assert group.num_values == {leaf.path_in_schema.partition(".")[0]: leaf.num_values for leaf in leaves}


@pytest.mark.parametrize(
    "footer", [b"", b"\x1c" * 99, b"\x19" * 99, b"\x19\xf6" + b"\xff" * 10, b"\x1b", b"\x26" + b"\xff" * 12]
)
def test_a_footer_that_is_none_is_refused(footer):
    """Nested too deep, a list longer than the file, a map, a number of more than 64 bits."""
    with pytest.raises(ValueError, match="footer"):
        read_row_groups(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def test_a_parquet_unit_with_a_list_too_long_anywhere_in_its_footer_does_not_end_the_process(tmp_path):
    """pyarrow calls std::terminate where it looks at a column whose histogram of levels is too long."""
    (target,) = [t for t in cache_targets(tmp_path, "images-parquet") if t.name == "unit.parquet"]
    data = target.valid
    size, refused = int.from_bytes(data[-8:-4], "little"), 0
    for place in range(len(data) - 8 - size, len(data) - 8):
        if (
            data[place] & 15 == 6 and 0 < data[place] >> 4 < 14
        ):  # a list of 1 to 13 int64, or what looks like it
            longer = data[:place] + bytes([data[place] + 16, 0]) + data[place + 1 : -8]
            try:
                target.read(longer + (size + 1).to_bytes(4, "little") + b"PAR1")
            except CorruptionError:
                refused += 1
    assert refused > 20


@pytest.mark.parametrize("size", [(30_000, 30_000), (2**31 - 1, 1), (10_000, 10_000)])
def test_a_png_bomb_is_refused_by_its_head(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_bomb(*size))
    source = ImageFolderSource("x", tmp_path, [("bomb.png", 0)], ["a"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SourceError, match=r"bomb\.png: .*pixels"):
        source.image(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


@pytest.mark.parametrize(
    "data", [b"[" * 10_000_000, b'{"a":' * 1_000_000, b"1" * 10_000_000, b'"' + b"\\u0000" * 10**6]
)
def test_json_made_to_exhaust_a_parser_is_one_error(data):
    with pytest.raises(ManifestError, match="cache x"):
        Manifest.parse(data, where="cache x")


# -- nothing odd reaches a loss ----------------------------------------------------------------------------


def arrays(**changes):
    given = {
        "ids": np.array([[1, 3], [0, 4]], np.uint16),
        "log_probs": np.array([[-0.5, -2.0], [-0.1, -np.inf]], np.float16),
        "log_tail": np.full((2, 1), -3.0, np.float32),
    }
    return given | changes


def test_numbers_that_no_teacher_can_give_are_refused_by_column_and_row():
    codec = OpenCodec(num_classes=4, k=2, temperatures=(1.0,))
    codec.validate(arrays())
    codec.validate({name: array[:0] for name, array in arrays().items()})
    for changes, message in (
        ({"ids": np.array([[1, 3], [0, 5]], np.uint16)}, "column ids: 5 in row 1; expected 0 to 4"),
        (
            {"log_probs": np.array([[-0.5, -2], [-0.1, -9]], np.float16)},
            "log_probs: -9.0 in row 1; expected -inf in an",
        ),
        ({"log_probs": np.array([[-0.5, np.nan], [-0.1, -np.inf]], np.float16)}, "log_probs: nan in row 0"),
        ({"log_probs": np.array([[np.inf, -1], [-0.1, -np.inf]], np.float32)}, "log_probs: inf in row 0"),
        ({"log_tail": np.array([[np.nan], [0]], np.float32)}, "log_tail: nan in row 0"),
        ({"stats": np.array([[0, 0, 0, 0], [0, np.inf, 0, 0]], np.float32)}, "stats: inf in row 1"),
    ):
        with pytest.raises(LabelError, match=message):
            codec.validate(arrays(**changes))


def test_an_id_behind_right_checksums_never_reaches_a_compiled_loss(tmp_path):
    """Written by our own store with every digest right: refused by the reader, and by verify, with unit and row."""
    make_small("images-zarr", tmp_path)
    cache = open_cache(str(tmp_path / "images-zarr"))
    objects, unit = open_objects(cache.url), cache.manifest.plan.unit(1)
    store = open_store(cache.manifest, objects)
    columns = store.read(unit, unit.start, unit.stop)
    columns["ids"] = columns["ids"].copy()
    columns["ids"][3, 0] = 60_000
    publish_unit(objects, store, cache.manifest_sha256, unit, columns)
    cache = open_cache(cache.url)
    with pytest.raises(CorruptionError, match=r"unit 1 .*column ids: 60000 in row 3; expected 0 to 10"):
        cache.read([unit.start])
    assert any("column ids: 60000" in fault for fault in verify_units(cache))


# -- fuzzing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["images-zarr", "images-parquet", "images-packed", "tokens-zarr", "tokens-parquet"]
)
def test_forged_caches_meet_softcache_errors_only(tmp_path, kind):
    tally = fuzz(kind, tmp_path, examples=60, number=7)
    assert tally["refused"] > 30


def test_a_cache_that_cannot_be_read_is_one_line_and_exit_code_1(tmp_path, monkeypatch, capsys):
    (tmp_path / "manifest.json").write_bytes(b"\x80\x04\x95")
    monkeypatch.setattr(sys, "argv", ["softcache", "inspect", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        main()
    err = capsys.readouterr().err
    assert err.startswith("softcache: ")
    assert "Traceback" not in err


@pytest.mark.chaos
@pytest.mark.parametrize(
    "kind", ["images-zarr", "images-parquet", "images-packed", "tokens-zarr", "tokens-parquet"]
)
def test_thousands_of_forged_caches(tmp_path, kind, chaos_seed):
    tally = fuzz(kind, tmp_path, examples=3000, number=chaos_seed)
    print(dict(tally))
    assert tally["refused"] > 2000
