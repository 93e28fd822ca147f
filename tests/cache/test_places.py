"""Places that a cache may lie in, and what may lie in a cache: each is read, or refused by one message."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from softcache.cache.storage.base import check_machine, is_bucket
from softcache.cache.storage.open import open_objects
from softcache.errors import CorruptionError, ManifestError, SoftcacheError, StorageError
from softcache.reader import manifest_watch
from softcache.reader.memmap import MemmapSettings
from softcache.reader.memmap.folder import _locked
from softcache.reader.open import open_cache
from softcache.stages.cli import main
from softcache.student.bucket_sync import BucketSync
from softcache.tools.convert import convert_cache
from softcache.tools.garbage import collect_garbage
from softcache.tools.shrink import ShrinkSettings, shrink_cache
from softcache.tools.status import read_status
from softcache.tools.verify.checksums import verify_units
from tests.support.caches import ROOT, make_cache


@pytest.fixture
def cache(shared_cache, tmp_path):
    """A copy of a finished cache."""
    shutil.copytree(shared_cache[2].url, tmp_path / "cache")
    return tmp_path / "cache"


def run_command(*arguments):
    with mock.patch.object(sys, "argv", ["softcache", *arguments]):
        main()


STRAYS = [
    "units/._00000.json",
    "units/00000 (1).json",
    "units/copy/00000.json",
    "units/²0000.json",
    "units/x.json",
]


def test_stray_files_are_passed_over_by_readers_and_named_by_verify_and_gc(cache):
    whole = open_cache(str(cache)).read(np.arange(8), 0)
    for path in STRAYS:
        (cache / path).parent.mkdir(exist_ok=True)
        (cache / path).write_bytes(b"\0\5\x16\7")
    found = open_cache(str(cache))
    np.testing.assert_array_equal(found.read(np.arange(8), 0).ids, whole.ids)
    assert read_status(open_objects(str(cache))).units_done == found.num_units
    faults = list(verify_units(found))
    assert len(faults) == len(STRAYS)
    assert all(any(f"{path}: not written by softcache" in fault for fault in faults) for path in STRAYS)
    assert collect_garbage(open_objects(str(cache)), delete=True, older_than=0).foreign == sorted(STRAYS)


def replace_objects(place, other):
    """Has another cache take the place of one, as `rm -r` and a new capture do."""
    for path in place.list(""):
        place.delete(path)
    for path in other.list(""):
        place.put(path, other.get(path))


@pytest.fixture(scope="module")
def two_teachers(tmp_path_factory):
    """Caches of the same samples by two teachers, of the same units and chunks, by store."""
    folder, found = tmp_path_factory.mktemp("two"), {}
    for store in ("zarr", "parquet"):
        plan = {"capture": {"store": store, "unit_samples": 256, "chunk_samples": 16}}
        one = make_cache(folder / f"{store}-one", **plan)[2]
        other = make_cache(folder / f"{store}-other", teacher={"model": "tests.fakes:known_scaled"}, **plan)[
            2
        ]
        found[store] = one.url, other.url
    return found


@pytest.mark.parametrize("store", ["zarr", "parquet"])
@pytest.mark.parametrize("kind", ["folder", "bucket"])
@pytest.mark.parametrize("how", ["read", "prefetch", "removed"])
def test_a_cache_that_another_one_replaces_while_it_is_read_is_refused(
    two_teachers, tmp_path, monkeypatch, request, store, kind, how
):
    """Every checksum of what is there now is right, and a unit is compared with its marker once: rows were of either teacher."""
    for name in ("FOLDER_SECONDS", "BUCKET_SECONDS"):
        monkeypatch.setattr(manifest_watch, name, 0.0)
    url = str(tmp_path / "cache") if kind == "folder" else request.getfixturevalue("bucket")
    place = open_objects(url, create=True)
    replace_objects(place, open_objects(two_teachers[store][0]))
    cache = open_cache(url)
    cache.read(np.arange(16), 0)
    if how == "removed":
        for path in place.list(""):
            place.delete(path)
    else:
        replace_objects(place, open_objects(two_teachers[store][1]))
    if how == "prefetch":
        cache.prefetch([(0, np.arange(200, 240))])
    with pytest.raises(
        CorruptionError, match=r"manifest\.json is not the one that was opened|cannot be decoded"
    ):
        cache.read(np.arange(200, 240), 0)


def test_a_cache_that_is_copied_over_itself_is_read_on(cache, monkeypatch):
    monkeypatch.setattr(manifest_watch, "FOLDER_SECONDS", 0.0)
    found = open_cache(str(cache))
    before = found.read(np.arange(8), 0)
    shutil.copytree(cache, cache.with_name("copy"))
    shutil.copytree(cache.with_name("copy"), cache, dirs_exist_ok=True)
    found.close()
    np.testing.assert_array_equal(found.read(np.arange(8), 0).ids, before.ids)


def test_a_home_folder_that_no_shell_has_put_in(cache, tmp_path, monkeypatch):
    """The args of a container, and `--cache=~/x` in bash: a folder named ~ was made, of which nothing else knows."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert open_cache("~/cache").num_units == open_cache(str(cache)).num_units
    with pytest.raises(SystemExit, match="0"):
        run_command("convert", "~/cache", "~/copy", "--store", "parquet")
    assert open_cache(str(tmp_path / "copy")).is_complete
    assert not (tmp_path / "~").exists()
    with pytest.raises(StorageError, match=r"~nobody-of-this-name/x: .*set HOME, or give the path without ~"):
        open_objects("~nobody-of-this-name/x")


def test_a_user_without_a_home_folder(cache, monkeypatch):
    """A container that runs as any user id: views are decoded into memory, and a run in a bucket is one message."""
    for name in ("HOME", "XDG_CACHE_HOME", "SOFTCACHE_MEMMAP_DIR", "SOFTCACHE_RUNS_DIR"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert len(open_cache(str(cache), memmap=MemmapSettings()).read(np.arange(8), 0).ids) == 8
    with pytest.raises(
        StorageError, match=r"no home folder; set SOFTCACHE_MEMMAP_DIR, XDG_CACHE_HOME or HOME"
    ):
        open_cache(str(cache), memmap=MemmapSettings(required=True)).read(np.arange(8), 0)
    with pytest.raises(StorageError, match=r"no home folder; set SOFTCACHE_RUNS_DIR, XDG_CACHE_HOME or HOME"):
        BucketSync("s3://bucket/run")


FEW_FILES = """
import os
import resource
import sys

import numpy as np

from softcache.errors import SoftcacheError
from softcache.reader.open import open_cache

cache = open_cache(sys.argv[1])
cache.read([0])
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
for view in range(cache.num_views):
    cache.read(np.random.default_rng(0).permutation(300), view)
    cache.prefetch([(view, np.arange(300))])
    cache.read(np.arange(300), view)
cache.close()
again = open_cache(sys.argv[1])
again.read([0])
held = []
while True:
    try:
        held.append(open(os.devnull))
    except OSError:
        break
try:
    again.read(np.arange(300)[::-1], 1)
except SoftcacheError as error:
    print(type(error).__name__, error)
os._exit(0)
"""


@pytest.mark.parametrize(
    "capture", [{"store": "zarr"}, {"store": "zarr", "codec": {"name": "packed"}}, {"store": "parquet"}]
)
def test_a_process_that_may_open_few_files_calls_no_label_damaged(tmp_path, capture):
    """It was told to delete the markers of good units; with `ulimit -n 64` a hundred files were kept open."""
    make_cache(tmp_path / "cache", capture={**capture, "unit_samples": 4, "chunk_samples": 2})
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert re.search(r"^StorageError .*cannot be read: Too many open files", done.stdout), done.stdout


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("NOT_FOUND: x [os_error_code='2']"), None),
        (ValueError("DATA_LOSS: Invalid blosc-compressed data"), None),
        (OSError("Couldn't deserialize thrift"), None),
        (FileNotFoundError(errno.ENOENT, "no such file"), None),
        (
            ValueError("RESOURCE_EXHAUSTED: x [os_error_code='24']"),
            r"unit 3: cannot be read: Too many open files; raise the limit",
        ),
        (
            ValueError("UNAVAILABLE: x [os_error_code='116']"),
            r"cannot be read: Stale file handle; mend that and run again",
        ),
        (
            OSError(errno.EIO, "Input/output error"),
            r"cannot be read: Input/output error; .*; this is no sign of damage",
        ),
    ],
)
def test_what_the_machine_refuses_to_read_is_not_called_damaged(error, message):
    if message is None:
        check_machine(error, "unit 3")
        return
    with pytest.raises(StorageError, match=message):
        check_machine(error, "unit 3")


PRINTED = """
import sys
from softcache.stages.cli import main
from softcache import open_cache
from softcache.tools.convert import convert_cache

cache = open_cache(sys.argv[1])
copy = convert_cache(cache, sys.argv[1] + ".copy", store="parquet")
assert (cache.read([0], 0).ids == copy.read([0], 0).ids).all()
sys.argv = ["softcache", "inspect", copy.url]
main()
"""


@pytest.mark.parametrize(("utf8", "output"), [("0", "latin-1"), ("1", "utf-8")])
def test_a_locale_that_lacks_the_letters_of_a_path_or_of_the_output(cache, tmp_path, utf8, output):
    """tensorstore takes names as UTF-8, and what commands print has more letters than ASCII."""
    (tmp_path / "höme").mkdir()
    cache.rename(tmp_path / "höme" / "cäche")
    locale = {
        "LC_ALL": "C",
        "PYTHONUTF8": utf8,
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": output,
        "SOFTCACHE_MEMMAP_DIR": str(tmp_path / "m"),
    }
    done = subprocess.run(
        [sys.executable, "-c", PRINTED, str(tmp_path / "höme" / "cäche")],
        env=os.environ | locale | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert (b"\xe2\x80\xa6" if utf8 == "1" else rb"\u2026") in done.stdout


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_labels_whose_manifest_was_removed_are_not_mixed_with_those_of_another_cache(cache, tmp_path, store):
    """zarr and datasets read whatever is in the folder: a description of other columns, files of units that are no more."""
    place = tmp_path / "place"
    convert_cache(open_cache(str(cache)), str(place), store=store)
    (place / "manifest.json").unlink()
    shutil.rmtree(place / "units")
    before = sorted(place.rglob("*"))
    with pytest.raises(
        StorageError, match=r"place: expected no labels where there is no manifest\.json; found .* more, of a"
    ):
        shrink_cache(open_cache(str(cache)), str(place), ShrinkSettings(k=2, store=store))
    assert sorted(place.rglob("*")) == before


def test_verify_refuses_what_a_reader_refuses_to_open(cache):
    shutil.copy(cache / "units/00000.json", cache / "units/99999.json")
    with pytest.raises(ManifestError, match=r"99999\.json: is of no unit"):
        open_cache(str(cache)).markers  # noqa: B018
    assert any("99999.json: is of no unit" in fault for fault in verify_units(open_cache(str(cache))))


def test_a_description_of_any_size_is_refused_before_it_is_read(cache):
    for path in ("labels.zarr/zarr.json", "labels.zarr/ids/zarr.json"):
        with open(cache / path, "r+b") as file:
            file.truncate(40 << 30)  # a file of holes
    assert any("42,949,672,960 bytes; at most" in fault for fault in verify_units(open_cache(str(cache))))
    with open(cache / "manifest.json", "r+b") as file:
        file.truncate(40 << 30)
    for look in (lambda: open_cache(str(cache)), lambda: read_status(open_objects(str(cache)))):
        with pytest.raises(CorruptionError, match="42,949,672,960 bytes; at most"):
            look()


def test_a_cache_that_may_not_be_read_is_refused_by_name(cache, monkeypatch):
    stat = Path.stat

    def refused(self, **kwargs):
        if self.is_relative_to(cache):
            raise PermissionError(13, "Permission denied")
        return stat(self, **kwargs)

    monkeypatch.setattr(Path, "stat", refused)
    with pytest.raises(
        StorageError, match=r"manifest\.json: cannot be read: Permission denied; make it readable"
    ):
        open_cache(str(cache))


def test_a_complete_cache_is_joined_without_a_write(cache, monkeypatch):
    from softcache.cache.create import create_cache
    from softcache.cache.storage.local import LocalObjects

    there = open_cache(str(cache))

    def refused(self, *args):
        raise AssertionError("a write")

    monkeypatch.setattr(LocalObjects, "_staged", refused)
    objects = open_objects(str(cache), create=True)
    samples = (cache / there.manifest.samples).read_bytes()
    assert create_cache(objects, there.manifest, samples)[1] == there.manifest_sha256


@pytest.mark.parametrize("name", ["back\\slash", "a b", "Käse", "a%20b", "a#b", "a:b"])
def test_a_folder_of_any_name_holds_a_cache(cache, name):
    whole = open_cache(str(cache)).read(np.arange(4), 0).ids
    cache.rename(cache.with_name(name))
    url = str(cache.with_name(name))
    np.testing.assert_array_equal(open_cache(url).read(np.arange(4), 0).ids, whole)
    np.testing.assert_array_equal(open_cache(Path(url).as_uri()).read(np.arange(4), 0).ids, whole)


@pytest.mark.parametrize("url", ["file:///a#b", "file:///a?x", "file://host/a"])
def test_a_file_url_that_names_more_than_a_path_is_refused(url):
    with pytest.raises(StorageError, match="expected file:///PATH"):
        open_objects(url)


@pytest.mark.parametrize("url", ["s3:/bucket/x", "s3:bucket", "gs:/x", "S3:/x"])
def test_a_bucket_that_lacks_a_slash_is_no_folder(url):
    with pytest.raises(StorageError, match="found no two slashes"):
        is_bucket(url)
    with pytest.raises(StorageError, match="found no two slashes"):
        open_objects(url, create=True)
    assert not is_bucket(f"./{url}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000", "AWS_ENDPOINT_URL: expected http://HOST"),
        ("AWS_ENDPOINT_URL", "http://loc alhost", "AWS_ENDPOINT_URL: expected http://HOST"),
        ("AWS_ACCESS_KEY_ID", "secret-one\n", "AWS_ACCESS_KEY_ID holds a line break"),
        ("AWS_SESSION_TOKEN", "secret\rone", "AWS_SESSION_TOKEN holds a line break"),
        (
            "AWS_REGION",
            "secret one",
            "the client cannot make a request of its settings; check AWS_ENDPOINT_URL",
        ),
    ],
)
def test_an_environment_that_no_request_can_be_made_of_is_one_message(monkeypatch, name, value, message):
    pytest.importorskip("obstore")
    for there in [there for there in os.environ if there.startswith("AWS_")]:
        monkeypatch.delenv(there)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    monkeypatch.setenv("SOFTCACHE_RETRY_SECONDS", "1")
    monkeypatch.setenv(name, value)
    with pytest.raises(SoftcacheError, match=message) as raised:
        open_objects("s3://bucket/x").size("manifest.json")
    assert "secret" not in str(raised.value).replace("AWS_SECRET_ACCESS_KEY", "").lower()


def test_a_lock_of_a_memory_map_follows_no_link(tmp_path):
    import fcntl

    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "key.use").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        _locked(tmp_path / "key.use", fcntl.LOCK_EX)
    assert (tmp_path / "elsewhere").read_text() == "kept"
