"""Every parser of softcache's own files by itself: changed bytes and documents, and only softcache's errors may come out.

    python -m tests.chaos.parsers --seconds 60 --seed 0

A target is a file that is valid, and what reads it. `tests.chaos.fuzz` forges whole caches; here one file is changed at a
time, up to thousands of times a second. A secret in the environment must be in no message.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import os
import random
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from accelerate import Accelerator

from softcache.cache.finished import UnitIndex
from softcache.cache.folded import TAIL_BYTES, FoldedBlock, block_path, encode_block, marker_of, record_of
from softcache.cache.manifest import Manifest, UnitMarker
from softcache.cache.samples import check_samples, read_row_counts, read_samples
from softcache.cache.storage.lease import LeaseManager
from softcache.cache.storage.local import LocalObjects
from softcache.cache.storage.open import open_objects
from softcache.cache.units import open_index, open_store
from softcache.errors import SoftcacheError
from softcache.reader.memmap import MemmapSettings
from softcache.reader.memmap.folder import MemmapFolder
from softcache.reader.open import open_cache
from softcache.runs import train_student
from softcache.runs.report.load import _read as read_run
from softcache.student.bucket_sync import BucketSync, _holder
from softcache.student.checkpoint import RunDirectory
from softcache.tools.import_logprobs.jsonl import LineLocation, parse_line
from tests.chaos.forge import make_small
from tests.chaos.fuzz import NUMBERS, TEXTS, places_of

SECRET = "AKIA-not-to-be-shown"


@dataclass(frozen=True)
class Target:
    """A parser: the bytes of a valid file, and what reads such bytes."""

    name: str
    valid: bytes
    read: Callable[[bytes], Any]
    is_json: bool = True


def _in_file(path: Path, read: Callable[[], Any]) -> Callable[[bytes], Any]:
    def written(data: bytes) -> Any:
        path.write_bytes(data)
        return read()

    return written


def make_targets(folder: Path) -> Iterator[Target]:
    """Yields a target of each kind of file; what they are made from stays in `folder`."""
    yield from cache_targets(folder, "images-zarr")
    yield from cache_targets(folder, "images-parquet")
    yield from cache_targets(folder, "tokens-parquet")
    yield from _run_targets(folder)
    answer = b'{"key": "a", "model": "m", "prompt_token_ids": [1, 2], "prompt_logprobs": [null, {"3": -0.5}]}'
    yield Target("answers of a server", answer, lambda line: parse_line(line, LineLocation(Path("f"), 1)))


def cache_targets(folder: Path, kind: str) -> Iterator[Target]:
    _, _, files = make_small(kind, folder)
    root = folder / kind
    cache = open_cache(str(root))
    manifest, objects = cache.manifest, open_objects(str(root))
    unit = manifest.plan.unit(0)
    yield Target(
        f"manifest, {kind}", files["manifest.json"], lambda raw: Manifest.parse(raw, where="manifest")
    )
    yield Target(
        f"marker, {kind}", files["units/00000.json"], lambda raw: UnitMarker.parse(raw, where="marker")
    )

    yield from _block_targets(folder / f"{kind}-block", open_index(objects, manifest, cache.manifest_sha256))

    def samples(raw: bytes) -> None:
        _quiet(lambda: read_samples(raw, manifest.plan.num_samples))
        if manifest.rows is not None:
            _quiet(lambda: read_row_counts(raw, manifest.plan.num_samples))
        check_samples(raw, manifest.plan, manifest.rows)

    yield Target(f"samples.parquet, {kind}", files[manifest.samples], samples, is_json=False)

    def unit_file() -> None:
        store = open_store(manifest, objects)
        (path,) = store.shard_paths(unit)
        store.check_decompressed_size(None, objects.get(path), "unit")
        store.read(unit, unit.start, unit.stop)

    if kind == "images-parquet":
        (path,) = open_store(manifest, objects).shard_paths(unit)
        yield Target("unit.parquet", files[path], _in_file(root / path, unit_file), is_json=False)
    if manifest.store == "zarr":
        described = open_store(manifest, objects)
        for name in ("zarr.json", "ids/zarr.json"):
            path = f"{manifest.data}/{name}"
            yield Target(
                name,
                files[path],
                _in_file(root / path, described.check_metadata),
            )
    if kind == "images-zarr":
        yield from _memmap_targets(folder, root)


def _block_targets(folder: Path, index: UnitIndex) -> Iterator[Target]:
    columns = index.limits.columns
    records = np.array(
        [record_of(index.loose_marker(n), columns, index.dtype) for n in range(index.manifest.plan.num_units)]
    )
    valid = encode_block(index.limits, 0, np.ones(len(records), bool), records)
    place = LocalObjects(folder, create=True)
    path = folder / block_path(0, 0)
    path.parent.mkdir(parents=True)

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        block = FoldedBlock(place, index.limits, 0, 0, raw[-TAIL_BYTES:], len(raw))
        block.records()
        for number in np.flatnonzero(block.finished):
            unit = index.manifest.plan.unit(int(number))
            marker_of(block.record(unit.number), unit, "0" * 64, index.store.shard_paths(unit))

    yield Target(f"block of markers, {folder.name}", valid, read, is_json=False)
    body, footer = records.nbytes, 44

    def signed(raw: bytes) -> None:
        """Reads it with digests that fit, as far as the bytes are where they were."""
        map_bytes = (len(records) + 7) // 8
        digests = hashlib.sha256(raw[:body]).digest()  # of one page
        tail = raw[body : body + map_bytes] + digests + raw[body + map_bytes + 32 : -footer]
        read(raw[:body] + tail + hashlib.sha256(tail).digest() + raw[32 - footer :])

    yield Target(f"block of markers, signed, {folder.name}", valid, signed, is_json=False)


def _memmap_targets(folder: Path, root: Path) -> Iterator[Target]:
    place = folder / "memmaps"

    def mapped() -> None:
        cache = open_cache(str(root), memmap=MemmapSettings(1 << 24, str(place), required=True))
        assert cache.memmap(0) is not None
        MemmapFolder(place).entries()

    mapped()
    (path,) = place.glob("*.thaw")
    yield Target("memory-mapped view", path.read_bytes(), _in_file(path, mapped), is_json=False)


def _run_targets(folder: Path) -> Iterator[Target]:
    config, data, _ = make_small("images-parquet", folder / "of-run")
    out = folder / "run"
    train_student(config, data, model="linear", labels="ground_truth", out=str(out))
    identity = json.loads((out / "config.json").read_bytes())
    for name in ("config.json", "resolved.json", "metrics.json"):

        def run() -> None:
            _quiet(lambda: RunDirectory(out, identity).metrics)
            _quiet(lambda: RunDirectory(out, identity))
            read_run(out)

        yield Target(f"run, {name}", (out / name).read_bytes(), _in_file(out / name, run))
    yield from checkpoint_targets(folder)
    places = LocalObjects(folder / "places", create=True)
    places.put("run.lock", b"{}")
    sync = object.__new__(BucketSync)
    sync.url, sync._objects, sync.folder = "s3://bucket/run", places, folder / "places"  # type: ignore[assignment]
    files = {"files": {"model.safetensors": "0" * 64}}
    yield Target(
        "checkpoint.json of a bucket",
        json.dumps(files).encode(),
        _in_file(folder / "places/checkpoint.json", sync._named),
    )
    lease = b'{"owner": "a", "host": "h", "pid": 1, "seconds": 60.0, "expires": 1.0}'

    def claimed() -> None:
        _holder(places, "run.lock")
        with LeaseManager(places).claim("run.lock"):
            pass

    yield Target("lease", lease, _in_file(folder / "places/run.lock", claimed))


def checkpoint_targets(folder: Path) -> Iterator[Target]:
    import torch

    model = torch.nn.Linear(3, 2)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    assert prepared
    where = RunDirectory(folder / "checkpointed", {})
    where.save_checkpoint(accelerator, {"epoch": 1, "step": 2})

    def load() -> None:
        _quiet(where.checkpoint_epoch)
        where.load_checkpoint(accelerator)

    for path in sorted((folder / "checkpointed/checkpoint").iterdir()):
        is_json = path.suffix == ".json"
        yield Target(f"checkpoint, {path.name}", path.read_bytes(), _in_file(path, load), is_json)
    progress = folder / "checkpointed/checkpoint/progress.json"
    progress.write_text('{"epoch": 1, "step": 2}')  # as of versions that wrote no checksums
    for path in sorted((folder / "checkpointed/checkpoint").iterdir()):
        if path != progress:
            name = f"checkpoint without checksums, {path.name}"
            yield Target(name, path.read_bytes(), _in_file(path, load), is_json=False)


def _quiet(read: Callable[[], Any]) -> None:
    with suppress(SoftcacheError):
        read()


def _check_message(error: SoftcacheError) -> None:
    assert str(error).strip(), "an error without a message"
    assert SECRET not in str(error), "a secret in a message"


ODD = [
    *NUMBERS,
    *TEXTS,
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": None},
    float("nan"),
    float("inf"),
    1e308,
    ["x"],
]
DEEP = b"[" * 100_000 + b"]" * 100_000


def changed_document(draw: random.Random, data: bytes) -> bytes:
    """JSON with one to three values changed, dropped, doubled, added, or nested deep; or no object at all."""
    document = json.loads(data)
    if draw.random() < 0.02:
        return draw.choice(
            [DEEP, b"", b"\xff", json.dumps(draw.choice(ODD[:-6])).encode("utf-8", "surrogatepass")]
        )
    for _ in range(draw.randint(1, 3)):
        if not (places := places_of(document)):
            break
        *parents, key = draw.choice(places)
        table = document
        for parent in parents:
            table = table[parent]
        act = draw.choice(["set", "set", "set", "drop", "add", "double", "near", "swap"])
        if act == "drop":
            del table[key]
        elif act == "add" and isinstance(table, dict):
            table[draw.choice(TEXTS)] = draw.choice(ODD)
        elif act == "double" and isinstance(table, list):
            table.append(table[key])
        elif act == "near" and isinstance(table[key], int | float) and abs(table[key]) < 1e300:
            table[key] += draw.choice([-1, 1, 16, -16, 0.5])
        elif act == "swap" and isinstance(table, dict):
            other = draw.choice(list(table))
            table[key], table[other] = table[other], table[key]
        else:
            table[key] = copy.deepcopy(draw.choice(ODD))
    return json.dumps(document).encode("utf-8", "surrogatepass")


def changed_bytes(draw: random.Random, data: bytes) -> bytes:
    """Bytes turned, set, cut, dropped or put in; those near the ends, where heads and footers are, more often."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        end = max(1, len(out))
        low, high = draw.choice([(0, end), (max(0, end - 600), end), (0, min(64, end))])
        place, act = (
            draw.randrange(low, high),
            draw.choice(["turn", "turn", "turn", "set", "cut", "put", "drop"]),
        )
        if act == "turn" and place < len(out):
            out[place] ^= 1 << draw.randrange(8)
        elif act == "set":
            word = draw.choice([b"\x00" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80"])
            out[place : place + len(word)] = word
        elif act == "cut":
            del out[place:]
        elif act == "put":
            out[place:place] = draw.randbytes(draw.randint(1, 40))
        elif act == "drop":
            del out[place : place + draw.randint(1, 40)]
    return bytes(out)


def fuzz(
    target: Target, *, number: int, seconds: float = 3600.0, files: int = 10**9, goes_on: bool = False
) -> Counter[str]:
    """Reads changed files for so long, or so many; returns how many were refused, and how many were read.

    Raises whatever is not an error of softcache's own, with the seed of the bytes that led there; or prints and counts it
    (`goes_on`).
    """
    logger = logging.getLogger("softcache")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with mock.patch.dict(os.environ, AWS_SECRET_ACCESS_KEY=SECRET, AWS_SESSION_TOKEN=SECRET):
            return _fuzz(target, number, seconds, files, goes_on)
    finally:
        logger.setLevel(level)


def _fuzz(target: Target, number: int, seconds: float, files: int, goes_on: bool) -> Counter[str]:
    tally, end, turn = Counter[str](), time.monotonic() + seconds, 0
    target.read(target.valid)
    while time.monotonic() < end and turn < files:
        draw, turn = random.Random(f"{target.name} {number} {turn}"), turn + 1
        change = changed_document if target.is_json and draw.random() < 0.7 else changed_bytes
        data = change(draw, target.valid)
        try:
            target.read(data)
            tally["read"] += 1
        except SoftcacheError as error:
            _check_message(error)
            tally["refused"] += 1
        except Exception as error:
            error.add_note(f"{target.name}, seed {number}, file {turn - 1}: {data[:2000]!r}")
            if not goes_on:
                raise
            tally["raw errors"] += 1
            if tally["raw errors"] <= 3:
                traceback.print_exception(error)
    target.read(target.valid)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose names begin so")
    asked = parser.parse_args()
    print("| parser | changed files | refused | read | raw errors |\n|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for target in make_targets(Path(folder)):
            if target.name.startswith(asked.only):
                tally = fuzz(target, seconds=asked.seconds, number=asked.seed, goes_on=True)
                print(
                    f"| {target.name} | {tally.total():,} | {tally['refused']:,} | {tally['read']:,} | {tally['raw errors']} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
