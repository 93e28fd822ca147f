"""Damage on purpose: bytes turned, files cut, lengthened, emptied, lost, swapped, and markers of other caches.

    python -m tests.chaos.corruption --faults 2000 --seed 0

After each fault a copy of the cache is verified, and read as a student reads it: every row of every view, joined with
its sample. A fault is *caught* if verify names it; a student is *stopped* if it got an error of ours, *unharmed* if it got
the very numbers that were written. A student that got other numbers, or an error that is not ours, is what must not be.
A fault that verify does not name is *nothing* if the content of the file is the same (white space in JSON), and *missed*
otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from softcache.errors import SoftcacheError
from softcache.reader.cache import Cache
from softcache.reader.dataset import SoftLabelDataset
from softcache.reader.memmap import MemmapSettings
from softcache.reader.open import open_cache
from softcache.tools.verify.teacher import verify_units
from tests.chaos.forge import MANIFEST, SAMPLES, Files, make_small, read_files, write_files

KINDS = ("images-zarr", "images-parquet", "tokens-zarr", "tokens-parquet")
OUTCOMES = ("caught", "nothing", "missed", "stopped", "unharmed", "other numbers")


def kind_of(path: str) -> str:
    """Returns which kind of file a path of a cache is."""
    if path in (MANIFEST, SAMPLES):
        return path
    if path.startswith("units/"):
        return "marker"
    if path.endswith("zarr.json") or "/temperature/" in path:
        return "zarr.json, temperature"
    return "file of a unit" if path.endswith(".parquet") else "shard"


# -- faults: each returns the files that are left -----------------------------------------------------------


def turn_bit(draw: random.Random, files: Files, path: str) -> Files:
    data = bytearray(files[path])
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return Files({**files, path: bytes(data)})


def turn_run(draw: random.Random, files: Files, path: str) -> Files:
    """A sector of zeros, or of noise."""
    data = bytearray(files[path])
    start = draw.randrange(len(data))
    size = len(data[start : start + 512])
    data[start : start + size] = bytes(size) if draw.random() < 0.5 else draw.randbytes(size)
    return Files({**files, path: bytes(data)})


def cut(draw: random.Random, files: Files, path: str) -> Files:
    return Files({**files, path: files[path][: draw.randrange(len(files[path]))]})


def lengthen(draw: random.Random, files: Files, path: str) -> Files:
    return Files({**files, path: files[path] + draw.randbytes(draw.randint(1, 64))})


def empty(draw: random.Random, files: Files, path: str) -> Files:
    return Files({**files, path: b""})


def lose(draw: random.Random, files: Files, path: str) -> Files:
    return Files({name: data for name, data in files.items() if name != path})


def swap(draw: random.Random, files: Files, path: str) -> Files:
    """Two objects of one kind change places."""
    alike = [name for name in files if kind_of(name) == kind_of(path) and files[name] != files[path]]
    other = draw.choice(alike or [path])
    return Files({**files, path: files[other], other: files[path]})


def indent(draw: random.Random, files: Files, path: str) -> Files:
    """The same JSON with other white space."""
    return Files({**files, path: json.dumps(json.loads(files[path]), indent=draw.choice([1, 3, 4])).encode()})


BY_FILE = {f.__name__.replace("_", " "): f for f in (turn_bit, turn_run, cut, lengthen, empty, lose, swap)}


def replay_marker(draw: random.Random, files: Files, other: Files) -> Files:
    """A unit is another version of itself, with the marker of the first: as if made again by a kinder machine."""
    number = draw.choice(sorted(path for path in files if path.startswith("units/")))
    shards = [shard["path"] for shard in json.loads(files[number])["shards"]]
    return Files({**files, **{path: other[path] for path in shards}})


def foreign_marker(draw: random.Random, files: Files, other: Files) -> Files:
    number = draw.choice(sorted(path for path in files if path.startswith("units/")))
    return Files({**files, number: other[number]})


def foreign_unit(draw: random.Random, files: Files, other: Files) -> Files:
    """All objects of a unit, and its marker, are of another cache with the same plan."""
    return replay_marker(
        random.Random(number := draw.random()), foreign_marker(random.Random(number), files, other), other
    )


def swap_units(draw: random.Random, files: Files, other: Files) -> Files:
    """All objects of two units, and their markers, change places."""
    one, two = draw.sample(sorted(path for path in files if path.startswith("units/")), 2)
    places = [[s["path"] for s in json.loads(files[number])["shards"]] + [number] for number in (one, two)]
    out = Files(files)
    for here, there in zip(*places, strict=True):
        out[here], out[there] = files[there], files[here]
    return out


def swap_columns(draw: random.Random, files: Files, other: Files) -> Files:
    """The shards of two columns of a unit change places; in Parquet, the files of two units."""
    number = draw.choice(sorted(path for path in files if path.startswith("units/")))
    shards = [shard["path"] for shard in json.loads(files[number])["shards"]]
    if len(shards) == 1:
        return swap(draw, files, shards[0])
    one, two = draw.sample(shards, 2)
    return Files({**files, one: files[two], two: files[one]})


BY_UNIT = {
    f.__name__.replace("_", " "): f
    for f in (replay_marker, foreign_marker, foreign_unit, swap_units, swap_columns)
}


# -- what becomes of them ------------------------------------------------------------------------------------


class Bench:
    """A small cache, its labels, and a place where copies of it are damaged."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.root, self.memmap_folder = kind, folder / "damaged", folder / "memmaps"
        self.config, self.data, self.files = make_small(kind, folder)
        (folder / "other").mkdir()
        other = folder / "other"
        if kind.startswith("tokens"):
            shutil.copytree(
                folder, other, dirs_exist_ok=True, ignore=lambda at, names: {kind, "other"} & set(names)
            )
        # Of the same data and the same plan, by a teacher with other outputs.
        self.other = make_small(kind, other, other_teacher=True)[2]
        shutil.copytree(folder / kind, self.root)
        self._on_disk = self.files
        self.truth = self.read()

    def put(self, files: Files) -> None:
        write_files(self.root, files, self._on_disk)
        self._on_disk = files

    def read(self, memmap: bool = False) -> list[np.ndarray]:
        """Returns every number that a student would learn from."""
        settings = MemmapSettings(1 << 24, str(self.memmap_folder), required=True) if memmap else None
        cache = open_cache(str(self.root), memmap=settings)
        dataset, out = SoftLabelDataset(self.data.train, cache), []
        for view in range(cache.num_views):
            stored = cache.read_stored(np.arange(len(cache)), view)
            dataset.join(dataset.unlabeled_dataset.load(np.arange(len(cache)), view), stored)
            labels = stored.labels
            out += [
                np.asarray(getattr(labels, name))
                for name in ("ids", "log_probs", "log_tail", "target_log_prob")
            ]
        return out

    def verdicts(self, files: Files) -> tuple[str, str]:
        """Returns the verdict of verify on such a cache, and how a student fares."""
        self.put(files)
        try:
            cache: Cache = open_cache(str(self.root))
            faults = list(verify_units(cache))
        except SoftcacheError as error:
            faults = [str(error)]
        verdict = "caught" if faults else "nothing" if self._is_equivalent(files) else "missed"
        return verdict, self.student(self.read)

    def student(self, read: Callable[[], list[np.ndarray]]) -> str:
        try:
            found = read()
        except SoftcacheError:
            return "stopped"
        same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found, self.truth, strict=True))
        return "unharmed" if same else "other numbers"

    def _is_equivalent(self, files: Files) -> bool:
        return files.keys() == self.files.keys() and all(
            data == self.files[path] or (path.endswith(".json") and _same_json(data, self.files[path]))
            for path, data in files.items()
        )


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except (ValueError, RecursionError):
        return False


def damage(kind: str, folder: Path, *, faults: int, seed: int) -> dict[tuple[str, str], Counter[str]]:
    """Injects so many faults into one kind of cache; returns the outcomes by (kind of file, fault)."""
    bench, draw = Bench(kind, folder), random.Random(f"{kind} {seed}")
    by_kind: dict[str, list[str]] = {}
    for path in sorted(bench.files):
        by_kind.setdefault(kind_of(path), []).append(path)
    plans: list[tuple[str, str]] = [(of, fault) for of in by_kind for fault in BY_FILE]
    plans = [plan for plan in plans if plan[1] != "swap" or len(by_kind[plan[0]]) > 1]
    plans += [(of, "indent") for of in by_kind if any(path.endswith(".json") for path in by_kind[of])]
    plans += [("whole units", fault) for fault in BY_UNIT]
    table: dict[tuple[str, str], Counter[str]] = {}
    for number in range(faults):
        of, fault = plans[number % len(plans)]
        if of == "whole units":
            files = BY_UNIT[fault](draw, bench.files, bench.other)
        else:
            paths = [path for path in by_kind[of] if fault != "indent" or path.endswith(".json")]
            files = (BY_FILE | {"indent": indent})[fault](draw, bench.files, draw.choice(paths))
        if files == bench.files:  # a sector of zeros over zeros: no fault
            continue
        verdict, student = bench.verdicts(files)
        table.setdefault((of, fault), Counter()).update([verdict, student])
    bench.put(bench.files)
    table |= _damage_memmaps(bench, draw, max(5, faults // 20))
    table |= _damage_while_read(bench, draw, max(5, faults // 20))
    return table


def _damage_memmaps(bench: Bench, draw: random.Random, faults: int) -> dict[tuple[str, str], Counter[str]]:
    """Damages materialized views; a reader throws them away and makes them again, so its numbers are those of the cache."""
    table: dict[tuple[str, str], Counter[str]] = {}
    bench.read(memmap=True)
    whole = read_files(bench.memmap_folder)
    for number in range(faults):
        fault = list(BY_FILE)[number % len(BY_FILE)]
        path = draw.choice(sorted(path for path in whole if path.endswith(".thaw")))
        files = BY_FILE[fault](draw, whole, path)
        if files == whole:
            continue
        write_files(bench.memmap_folder, files, read_files(bench.memmap_folder))
        student = bench.student(lambda: bench.read(memmap=True))
        mended = read_files(bench.memmap_folder).get(path) == whole[path]
        table.setdefault(("materialized view", fault), Counter()).update(
            ["caught" if mended else "missed", student]
        )
    return table


def _damage_while_read(bench: Bench, draw: random.Random, faults: int) -> dict[tuple[str, str], Counter[str]]:
    """Turns a bit of a unit that this very reader has compared with its marker already: chunks have their own checksums."""
    tally: Counter[str] = Counter()
    shards = [path for path in bench.files if kind_of(path) in ("shard", "file of a unit")]
    for _ in range(faults):
        bench.put(bench.files)
        cache = open_cache(str(bench.root), window_blocks=1)
        first = [cache.manifest.plan.unit(number) for number in cache.markers]
        for unit in first:
            cache.read([unit.start], unit.view)
        bench.put(turn_bit(draw, bench.files, draw.choice(shards)))
        tally.update([bench.student(lambda cache=cache: _numbers(cache))])  # type: ignore[misc]
    bench.put(bench.files)
    return {("shard, after its check", "turn bit"): tally}


def _numbers(cache: Cache) -> list[np.ndarray]:
    out: list[np.ndarray] = []
    for view in range(cache.num_views):
        labels = cache.read(np.arange(len(cache)), view)
        out += [
            np.asarray(getattr(labels, name)) for name in ("ids", "log_probs", "log_tail", "target_log_prob")
        ]
    return out


def merged(tables: list[dict[tuple[str, str], Counter[str]]]) -> dict[str, Counter[str]]:
    """Returns the outcomes by kind of file."""
    out: dict[str, Counter[str]] = {}
    for table in tables:
        for (of, _), tally in table.items():
            out.setdefault(of, Counter()).update(tally)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=1000, help="in each kind of cache")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    tables: list[Any] = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            tables.append(damage(kind, Path(folder), faults=asked.faults, seed=asked.seed))
    print(
        "| damaged | faults | verify: caught | nothing changed | missed | student: stopped | unharmed | other numbers |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    total: Counter[str] = Counter()
    for of, tally in merged(tables).items():
        total.update(tally)
        print(f"| {of} | {_count(tally):,} | " + " | ".join(f"{tally[name]:,}" for name in OUTCOMES) + " |")
    print(f"| all | {_count(total):,} | " + " | ".join(f"{total[name]:,}" for name in OUTCOMES) + " |")


def _count(tally: Counter[str]) -> int:
    return tally["stopped"] + tally["unharmed"] + tally["other numbers"]


if __name__ == "__main__":
    main()
