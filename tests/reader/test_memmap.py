"""A materialized view is what the cache holds, whole or not there at all, and made once however many ask for it."""

import fcntl
import multiprocessing
import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest
from click.testing import CliRunner

from softcache.errors import CorruptionError, StorageError
from softcache.labels import ARRAYS
from softcache.reader.memmap import MemmapFolder, MemmapSettings
from softcache.reader.memmap import file as files
from softcache.reader.memmap import folder as thaw_folder
from softcache.reader.open import open_cache
from softcache.stages.materialize import materialize as materialize_command
from tests.support import caches, text_caches
from tests.support.programs import run_program


def make_cache(url, **tables):
    return caches.make_cache(url, **tables)[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("images") / "cache").url


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return text_caches.make_text_cache(folder / "cache", folder)[2].url


def opened(url, folder, **changes):
    return open_cache(url, memmap=MemmapSettings(folder=str(folder), required=True, **changes))


def thawed_files(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".use")


def same(one, other):
    assert np.array_equal(one.fingerprints, other.fingerprints)
    assert np.array_equal(one.counts, other.counts)
    for name in ARRAYS:
        a, b = getattr(one.labels, name), getattr(other.labels, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype
            assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), name
    if one.positions is not None:
        assert np.array_equal(one.positions, other.positions)


@pytest.mark.parametrize("kind", ["images", "texts"])
@pytest.mark.parametrize("store", [None, "parquet"])
def test_any_order_reads_the_same_as_from_the_chunks(kind, store, request, tmp_path):
    url = request.getfixturevalue(kind)
    if store is not None:
        from softcache.tools.convert import convert_cache

        convert_cache(open_cache(url), str(tmp_path / "other"), store=store)
        url = str(tmp_path / "other")
    plain, fast = open_cache(url), opened(url, tmp_path / "thaw")
    shuffle = np.random.default_rng(0)
    for view in range(plain.num_views):
        samples = np.concatenate([shuffle.permutation(len(plain)), [0, 0, len(plain) - 1]])
        same(plain.read_stored(samples, view), fast.read_stored(samples, view))
        same(plain.read_stored([], view), fast.read_stored([], view))
    assert fast.memmap(0) is not None
    assert len(thawed_files(tmp_path / "thaw")) == plain.num_views


@pytest.mark.parametrize("codec", ["open", "packed"])
@pytest.mark.parametrize(
    "labels", [{"policy": "sample", "num_samples": 20}, {"policy": "hybrid", "k": 2, "num_samples": 3}]
)
def test_drawn_labels_and_packed_records_thaw_too(codec, labels, tmp_path):
    url = make_cache(tmp_path / "cache", labels=labels, capture={"codec": codec}).url
    samples = np.random.default_rng(1).permutation(len(open_cache(url)))
    same(open_cache(url).read_stored(samples), opened(url, tmp_path / "thaw").read_stored(samples))


def test_columns_are_views_of_what_was_gathered_and_torch_takes_them_without_a_copy(images, tmp_path):
    labels = opened(images, tmp_path).read([3, 1, 4])
    address = labels.log_probs.ctypes.data
    tensors = labels.to_torch()
    assert tensors.log_probs.data_ptr() == address
    assert labels.ids.base is not None


def test_samples_and_views_outside_are_refused(images, tmp_path):
    cache = opened(images, tmp_path)
    for sample in (-1, len(cache)):
        with pytest.raises(IndexError, match="it holds"):
            cache.read([sample])
    with pytest.raises(IndexError, match="view"):
        cache.read([0], view=99)


def test_a_second_reader_uses_what_the_first_one_made(images, tmp_path, monkeypatch):
    opened(images, tmp_path).read([0])
    monkeypatch.setattr(thaw_folder, "write_file", lambda *_: pytest.fail("made again"))
    opened(images, tmp_path).read([0])
    pickle.loads(pickle.dumps(opened(images, tmp_path))).read([0])  # our own object


def test_a_cache_that_does_not_fit_is_read_by_chunks(images, tmp_path):
    cache = opened(images, tmp_path, limit_bytes=1000)
    assert not cache.fits_in_memmap
    same(cache.read_stored([5, 2]), open_cache(images).read_stored([5, 2]))
    assert cache.memmap(0) is None
    assert not list(tmp_path.iterdir())


def test_views_that_are_not_finished_are_not_thawed(tmp_path):
    cache = make_cache(tmp_path / "cache", capture={"unit_samples": 64, "chunk_samples": 32})
    units = [unit for unit in cache.manifest.plan.units() if unit.view == 1]
    (tmp_path / f"cache/units/{units[0].number:05d}.json").unlink()
    cache = opened(cache.url, tmp_path / "thaw")
    assert cache.memmap(1) is None
    assert not cache.fits_in_memmap


# -- stale, damaged, interrupted ---------------------------------------------------------------------------


def test_a_thaw_of_another_content_is_never_used(tmp_path):
    """The same place, the same size, other labels."""
    url, folder = tmp_path / "cache", tmp_path / "thaw"
    make_cache(url)
    before = opened(url, folder).read(np.arange(50))
    url.rename(tmp_path / "old")
    make_cache(url, teacher={"model": "tests.fakes:known_scaled"})
    after = opened(url, folder).read(np.arange(50))
    assert not np.array_equal(before.log_probs, after.log_probs)
    assert np.array_equal(after.log_probs, open_cache(str(url)).read(np.arange(50)).log_probs)


@pytest.mark.parametrize("place", [0, 2000, 5000, -3])
def test_a_damaged_file_is_thrown_away_and_made_again(place, images, tmp_path, capsys):
    expected = opened(images, tmp_path).read_stored(np.arange(300))
    (path,) = [path for path in tmp_path.glob("*.thaw") if "view 0" in thaw_folder._about(path)]
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    again = opened(images, tmp_path)
    same(again.read_stored(np.arange(300)), expected)
    assert "is damaged" in capsys.readouterr().err


def test_a_truncated_file_is_made_again(images, tmp_path):
    expected = opened(images, tmp_path).read_stored(np.arange(300))
    (path,) = tmp_path.glob("*.thaw")
    os.truncate(path, 4096 + 64)
    same(opened(images, tmp_path).read_stored(np.arange(300)), expected)


def test_the_checksum_is_read_once_until_the_file_or_the_boot_changes(images, tmp_path, monkeypatch):
    opened(images, tmp_path).read([0])
    reads = []
    real = files.xxhash.xxh3_128
    monkeypatch.setattr(files.xxhash, "xxh3_128", lambda *a: reads.append(1) or real(*a))
    opened(images, tmp_path).read([0])
    assert not reads
    (path,) = tmp_path.glob("*.thaw")
    os.utime(path, ns=(1, 1))
    opened(images, tmp_path).read([0])
    assert len(reads) == 1


def test_damage_in_the_cache_itself_is_found_before_it_is_thawed(tmp_path):
    cache = make_cache(tmp_path / "cache")
    shard = next((tmp_path / "cache/labels.zarr/log_probs/c").rglob("[0-9]"))
    path = shard if shard.is_file() else next(p for p in shard.rglob("*") if p.is_file())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for verify in (True, False):
        thaws = MemmapSettings(folder=str(tmp_path / "thaw"))
        with pytest.raises(CorruptionError, match="sha256"):
            open_cache(cache.url, verify=verify, memmap=thaws).read([0])
    assert not list((tmp_path / "thaw").glob("*.thaw"))


KILLED = """
import os, signal, sys
from softcache.reader.open import open_cache
from softcache.reader.memmap import MemmapSettings, file as files
def stop(name):
    if name == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
files._failpoint = stop
open_cache(sys.argv[1], memmap=MemmapSettings(folder=sys.argv[2])).read([0])
"""


@pytest.mark.parametrize("where", ["writing", "before_rename"])
def test_a_thaw_that_was_killed_is_not_used_and_leaves_nothing_behind(where, images, tmp_path):
    done = run_program(KILLED, images, tmp_path, where)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [name for name in thawed_files(tmp_path) if name.endswith(".tmp")], "killed while it wrote"
    assert not list(tmp_path.glob("*.thaw"))
    same(opened(images, tmp_path).read_stored([7, 3]), open_cache(images).read_stored([7, 3]))
    assert [name.rsplit(".")[-1] for name in thawed_files(tmp_path)] == ["thaw"]


def test_a_full_disk_stops_the_thaw_and_leaves_nothing(images, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "posix_fallocate", full)
    with pytest.raises(
        StorageError, match="No space left on device; free some space, or set SOFTCACHE_MEMMAP_DIR"
    ):
        opened(images, tmp_path).read([0])
    assert not thawed_files(tmp_path)
    automatic = open_cache(images, memmap=MemmapSettings(folder=str(tmp_path)))
    same(automatic.read_stored([7, 3]), open_cache(images).read_stored([7, 3]))
    assert "into this process's own memory instead" in capsys.readouterr().err
    assert automatic.fits_in_memmap, "the order is chosen by it, and must not depend on the disk"
    automatic.read([0], view=1)
    assert not capsys.readouterr().err, "printed once"


def test_a_folder_that_cannot_be_written_is_named(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/in.* cannot be memory-mapped"):
        opened(images, tmp_path / "file/in").read([0])


# -- many at once ------------------------------------------------------------------------------------------


def _read(url, folder, barrier, results):
    cache = opened(url, folder)
    written = []
    real = thaw_folder.write_file

    def slow(*args):
        written.append(1)
        time.sleep(0.3)
        real(*args)

    thaw_folder.write_file = slow
    barrier.wait(60)
    labels = cache.read(np.arange(100))
    barrier.wait(60)  # none leaves, and so closes the file, before all have read
    results.put((len(written), float(np.nansum(labels.log_probs.astype(np.float64)))))


def test_processes_that_thaw_at_once_make_it_once_and_nobody_waits_for_its_users(images, tmp_path):
    context = multiprocessing.get_context("forkserver")
    barrier, results = context.Barrier(3), context.Queue()
    all_three = [context.Process(target=_read, args=(images, tmp_path, barrier, results)) for _ in range(3)]
    for process in all_three:
        process.start()
    found = [results.get(timeout=60) for _ in all_three]
    for process in all_three:
        process.join(60)
    assert sorted(written for written, _ in found) == [0, 0, 1]
    assert len({total for _, total in found}) == 1


def test_who_wants_to_make_it_does_not_wait_for_the_users_of_what_was_made_meanwhile(
    images, tmp_path, monkeypatch
):
    locked, other = thaw_folder._locked, opened(images, tmp_path)

    def late(path, how, *args):
        if how & fcntl.LOCK_EX:
            monkeypatch.setattr(thaw_folder, "_locked", locked)
            other.read([0])  # makes it, and keeps it in use
        return locked(path, how, *args)

    monkeypatch.setattr(thaw_folder, "_locked", late)
    reader = threading.Thread(target=opened(images, tmp_path).read, args=([0],), daemon=True)
    reader.start()
    reader.join(20)
    assert not reader.is_alive()


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    urls = [make_cache(tmp_path / str(seed), views={"seed": seed}).url for seed in (1, 2, 3)]
    size = opened(urls[0], tmp_path / "thaw").memmap_plan(0).num_bytes
    views = open_cache(urls[0]).num_views
    room = {"limit_bytes": size * views * 2 + size // 2}
    for url in urls[:2]:
        cache = opened(url, tmp_path / "thaw", **room)
        for view in range(views):
            cache.read([0], view)
        del cache
    for entry in MemmapFolder(tmp_path / "thaw").entries():
        if urls[1] in entry.about:  # the first one was used last
            os.utime(entry.path.with_suffix(".use"), (1, 1))
    held = opened(urls[2], tmp_path / "thaw", **room)
    held.read([0])
    left = [entry.about for entry in MemmapFolder(tmp_path / "thaw").entries()]
    assert sum(urls[0] in about for about in left) == views
    assert sum(urls[1] in about for about in left) == views - 1


def test_a_view_in_use_is_not_removed_and_one_that_is_not_is(images, tmp_path):
    cache = opened(images, tmp_path)
    cache.read([0])
    folder = MemmapFolder(tmp_path)
    (entry,) = folder.entries()
    assert not folder.remove(entry)
    assert entry.path.exists()
    del cache
    assert folder.remove(entry)
    assert not list(tmp_path.iterdir())


# -- the command -------------------------------------------------------------------------------------------


def test_the_command_thaws_lists_and_clears(images, tmp_path):
    run = lambda *args: CliRunner().invoke(materialize_command, [*args, "--folder", str(tmp_path)])
    views = open_cache(images).num_views
    first, second = run(images), run(images)
    assert first.output.count("made") == views
    assert second.output.count("found") == views
    assert len(list(tmp_path.glob("*.thaw"))) == views
    assert f"{views} views" in run("--list").output.replace("\n", "")
    assert f"removed {views} views" in run("--clear").output
    assert run("--list", images).exit_code == 2
    assert run(images, "--limit", "much").exit_code == 2
    with pytest.raises(StorageError, match=r"raise --limit"):
        CliRunner().invoke(
            materialize_command, [images, "--limit", "1KB", "--folder", str(tmp_path)], catch_exceptions=False
        )
