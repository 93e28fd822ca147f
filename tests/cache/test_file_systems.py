"""File systems that lack flock, hard links or flushes, or whose locks hold on one host: each works, or is one message."""

import errno
import fcntl
import os
import time
from pathlib import Path

import pytest

from softcache.cache import units
from softcache.cache.storage import lease, locks
from softcache.cache.storage.locks import find_locks
from softcache.cache.storage.open import open_objects
from softcache.errors import RunError, StorageError
from softcache.runs import capture_labels, open_data, open_teacher
from softcache.student.checkpoint import hold_run
from softcache.tools.convert import convert_cache
from softcache.tools.doctor import store_access
from softcache.tools.garbage import collect_garbage
from softcache.tools.verify.teacher import verify_units
from tests.support.caches import digits_config


@pytest.fixture(autouse=True)
def news(monkeypatch):
    """What this process has reported; each test begins anew."""
    monkeypatch.setattr(locks, "_REPORTED", set())


def refuse(monkeypatch, owner, name, code, *, when=lambda *_: True):
    real = getattr(owner, name)

    def refused(*args, **kwargs):
        if when(*args):
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, refused)


def files(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in Path(root).rglob("*")
        if path.is_file() and ".staging" not in path.parts
    }


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_flock_claims_are_leases(tmp_path, monkeypatch, capsys, code):
    refuse(monkeypatch, fcntl, "flock", code)
    objects = open_objects(str(tmp_path / "cache"), create=True)
    with (
        objects.claim("units/0.lock") as mine,
        open_objects(str(tmp_path / "cache")).claim("units/0.lock") as second,
    ):
        assert (mine, second) == (True, False)
        assert b'"expires"' in objects.get("units/0.lock")
    assert objects.list("units") == []
    objects.put("a", b"1")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "claims are leases" in line]
    assert f"no flock on this file system ({os.strerror(code)})" in line
    assert "no flock on this file system" in store_access(str(tmp_path / "cache"))["locks"]
    monkeypatch.undo()
    assert open_objects(str(tmp_path / "cache")).locks().kind == "lease", (
        "all processes use what the first one chose"
    )


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV])
def test_without_hard_links_one_writer_wins(tmp_path, monkeypatch, capsys, code):
    refuse(monkeypatch, os, "link", code)
    objects = [open_objects(str(tmp_path), create=True) for _ in range(3)]
    assert [place.put_if_absent("manifest.json", b"%d" % n) for n, place in enumerate(objects)] == [
        True,
        False,
        False,
    ]
    assert objects[0].get("manifest.json") == b"0"
    assert "no hard links on this file system" in capsys.readouterr().err
    assert not list((tmp_path / ".staging").iterdir())


def test_a_capture_without_both_has_the_bytes_of_any_other(tmp_path, monkeypatch, shared_cache):
    refuse(monkeypatch, fcntl, "flock", errno.ENOSYS)
    refuse(monkeypatch, os, "link", errno.EPERM)
    refuse(
        monkeypatch, os, "fsync", errno.EINVAL, when=lambda handle: os.path.isdir(f"/proc/self/fd/{handle}")
    )
    config = digits_config()
    capture_labels(config, data := open_data(config), open_teacher(config, data), str(tmp_path / "cache"))
    assert files(tmp_path / "cache") == files(shared_cache[2].url)
    assert collect_garbage(open_objects(str(tmp_path / "cache")), delete=True, older_than=0).stray == {}


@pytest.mark.parametrize(
    ("owner", "name", "code", "message"),
    [
        (os, "fsync", errno.ENOSYS, "fsync: Function not implemented; this file system lacks it"),
        (os, "fsync", errno.EIO, "Input/output error; the device or its network fails"),
        (os, "fsync", errno.ESTALE, "Stale file handle; the folder was removed or replaced on its server"),
        (fcntl, "flock", errno.EIO, "Input/output error; the device or its network fails"),
        (fcntl, "flock", errno.ESTALE, "Stale file handle; the folder was removed"),
        (Path, "replace", errno.EXDEV, r"Invalid cross-device link; \.staging must be on the file system"),
        (Path, "replace", errno.EPERM, "Operation not permitted; choose a place that can be written"),
    ],
)
def test_what_cannot_be_replaced_is_one_message(tmp_path, monkeypatch, owner, name, code, message):
    objects = open_objects(str(tmp_path), create=True)
    refuse(monkeypatch, owner, name, code)
    with pytest.raises(StorageError, match=message):
        objects.put("a", b"1")
    monkeypatch.undo()
    assert objects.size("a") is None
    assert not list((tmp_path / ".staging").iterdir())


def test_a_handle_that_is_stale_for_a_moment_is_taken_anew(tmp_path, monkeypatch):
    objects, seen = open_objects(str(tmp_path), create=True), []
    objects.put("a", b"1")
    refuse(monkeypatch, fcntl, "flock", errno.ESTALE, when=lambda *_: seen.append(1) or len(seen) <= 2)
    with objects.claim("x.lock") as mine:
        assert mine


def test_flock_that_excludes_no_second_holder_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    objects = open_objects(str(tmp_path), create=True)
    assert objects.locks() == ("lease", "flock does not exclude a second holder")


TABLE = """22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:40 / /nfs rw,relatime - nfs4 server:/x rw,vers=4.2,local_lock=none
31 22 0:41 / /nfs\\040local rw - nfs server:/x rw,vers=3,nolock,local_lock=all
32 22 0:42 / /lustre rw - lustre mds@tcp:/fs rw,flock
33 22 0:43 / /scratch rw - lustre mds@tcp:/fs rw,localflock
34 22 0:44 / /fuse rw - fuse.sshfs host: rw
35 34 0:45 / /fuse/tmp rw - tmpfs tmp rw
36 22 0:46 / /bee rw - beegfs beegfs_nodev rw
"""


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("/home/x", ""),
        ("/nfs/x", ""),
        ("/nfs local/x", "locks of this nfs mount hold on one host only (local_lock=all, nolock)"),
        ("/lustre", ""),
        ("/scratch/x", "locks of this lustre mount hold on one host only (localflock)"),
        ("/fuse/x", "locks of a fuse.sshfs file system may hold on one host only"),
        ("/fuse/tmp/x", ""),
        ("/bee/x", "locks of a beegfs file system may hold on one host only"),
    ],
)
def test_locks_of_one_host_are_known_by_the_mount_table(tmp_path, monkeypatch, folder, reason):
    monkeypatch.setattr(Path, "read_text", lambda self, **how: TABLE)
    found = find_locks(Path(folder), tmp_path)
    assert found == (("lease", reason) if reason else ("flock", ""))


def test_the_setting_overrides_the_probes(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTCACHE_LOCKS", "leases")
    with pytest.raises(StorageError, match="SOFTCACHE_LOCKS: expected auto, flock or lease; found 'leases'"):
        open_objects(str(tmp_path), create=True).put("a", b"1")
    monkeypatch.setenv("SOFTCACHE_LOCKS", "lease")
    assert open_objects(str(tmp_path)).locks() == ("lease", "SOFTCACHE_LOCKS=lease")
    monkeypatch.setenv("SOFTCACHE_LOCKS", "flock")
    assert open_objects(str(tmp_path)).locks().kind == "flock"


def test_leases_of_crashed_processes_and_their_tokens_run_out(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTCACHE_LOCKS", "lease")
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.2)
    objects = open_objects(str(tmp_path), create=True)
    crashed = b'{"owner": "gone", "seconds": 0.2, "expires": %d}\n' % (
        time.time() + 3600
    )  # its clock was ahead
    objects.put("x.lock", crashed)
    (
        tmp_path / ".staging" / f"{locks_token(objects, 'x.lock')}"
    ).touch()  # it crashed while it replaced its lease
    end = time.monotonic() + 20
    while True:
        with objects.claim("x.lock") as mine:
            if mine:
                break
        assert time.monotonic() < end
        time.sleep(0.05)
    assert sorted(path.name for path in (tmp_path / ".staging").iterdir()) == ["leases"]


def locks_token(objects, path):
    from softcache.hashing.digests import digest_bytes

    tag = objects.get_tagged(path)[1]
    return f"{digest_bytes(f'{path} {tag}'.encode())[:32]}.token"


def test_one_run_on_an_out_without_flock(tmp_path, monkeypatch):
    refuse(monkeypatch, fcntl, "flock", errno.ENOLCK)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.3)
    monkeypatch.setattr("softcache.student.bucket_sync.WAIT_SECONDS", 0.05)
    with (
        hold_run(tmp_path / "out", None),
        pytest.raises(RunError, match=r"another run works on it \(host .*, process \d+\)"),
        hold_run(tmp_path / "out", None),
    ):
        pass
    (tmp_path / "out/.lock").write_text('{"owner": "gone", "seconds": 0.3, "expires": 1}')
    with hold_run(tmp_path / "out", None):
        pass
    assert not (tmp_path / "out/.lock").exists()


# -- locks of one host ---------------------------------------------------------------------------------------


def test_gc_and_three_captures_where_every_lock_looks_free(tmp_path, monkeypatch):
    """At each step of a commit two more captures run to their end, and gc runs after each step."""
    monkeypatch.setenv("SOFTCACHE_LOCKS", "flock")
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    few = {"source": {"max_train_samples": 64, "max_eval_samples": 10}, "capture": {"unit_samples": 32}}
    config, url = digits_config(**few, labels={"num_views": 1}), str(tmp_path / "cache")
    data = open_data(config)
    deleted, inside = [], []

    def step(name):
        if name == "before_marker" and len(inside) < 2:
            inside.append(name)
            capture_labels(config, data, open_teacher(config, data), url)
        deleted.extend(collect_garbage(open_objects(url), delete=True).stray)

    monkeypatch.setattr(units, "_failpoint", step)
    cache, _ = capture_labels(config, data, open_teacher(config, data), url)
    assert len(inside) == 2
    assert deleted == []
    assert cache.num_units == 2
    assert not list(verify_units(cache))


def test_gc_leaves_what_is_young_and_units_whose_claim_is(tmp_path, shared_cache):
    convert_cache(shared_cache[2], str(tmp_path / "cache"), store="parquet")
    root, objects = tmp_path / "cache", open_objects(str(tmp_path / "cache"))
    for number in (1, 2, 3):
        (root / f"units/{number:05d}.json").unlink()
    (root / ".staging/f00").write_bytes(b"half")
    (root / ".staging/f01").write_bytes(b"half")
    (root / "units/00003.lock").touch()
    old = time.time() - 7200
    for path in ("labels/00002.parquet", "labels/00003.parquet", ".staging/f01"):
        os.utime(next(root.glob(path.replace("labels", "*"))), (old, old))
    found = collect_garbage(objects, delete=True)
    assert sorted(found.stray) == sorted(
        [".staging/f01", *(p for p in found.stray if p.endswith("00002.parquet"))]
    )
    assert len(found.stray) == 2
    assert [path.rsplit("/")[-1] for path in found.young] == ["00001.parquet"]
    assert found.held == [3]
    assert len(collect_garbage(objects, delete=True, older_than=0).stray) == 3


def test_the_age_of_objects_is_by_the_clock_of_the_file_system(tmp_path, monkeypatch):
    objects = open_objects(str(tmp_path), create=True)
    objects.put("a", b"1")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86400)  # this machine's clock is a day ahead
    assert objects.age("a") < 60
    assert objects.age("none") is None


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_a_rerun_makes_marked_units_that_lack_objects(tmp_path, shared_cache, capsys, store):
    config, url = digits_config(capture={"store": store}), tmp_path / "cache"
    data = open_data(config)
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(url))
    whole = files(url)
    for number in (2, 7):
        (url / cache.markers[number].shards[-1].path).unlink()
    _, report = capture_labels(config, data, open_teacher(config, data), str(url))
    assert (report.units_done, report.units_found) == (2, 8)
    assert "2 units were marked as finished and lack an object (2, 7)" in capsys.readouterr().err
    assert files(url) == whole
