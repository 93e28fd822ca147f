"""What must not matter and needs another process, or another codec: packed records, two ranks, hash seed and threads."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.reader.open import open_cache
from softcache.tools.shrink import ShrinkSettings, shrink_cache
from tests.support.alignment import Found, Tables, World, Worlds, attempt, attempt_elsewhere
from tests.support.caches import ROOT
from tests.support.process_groups import run_ranks

__all__ = ["ELSEWHERE", "copies"]

Copies = list[tuple[str, Path, Tables]]


def copies(worlds: Worlds, folder: Path) -> Copies:
    """Returns (kind, folder, tables) of a world of images and one of text, both fresh."""
    made = []
    for kind in ("images", "text"):
        with worlds.copy(kind) as world:
            shutil.copytree(world.folder, folder / kind)
            made.append((kind, folder / kind, world.tables))
    return made


def _clear(made: Copies) -> None:
    """So that the next attempt is not a rerun of the last one."""
    for _, folder, _ in made:
        shutil.rmtree(folder / "out", ignore_errors=True)


def packed(made: Copies, folder: Path, untouched: dict[str, Found]) -> bool:
    """Whether a cache of packed records shows the same samples, with log-probabilities within half a step."""
    same = []
    for kind, place, tables in made:
        with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
            plain = open_cache("cache")
            small = shrink_cache(plain, "packed", ShrinkSettings(codec="packed"))
            world = World(kind, place, tables, patch)
            world.cache = "packed"
            found = attempt(world)
            one, other = plain.read(np.arange(len(plain))), small.read(np.arange(len(small)))
        # What was packed had been rounded to float16 before.
        error = np.abs(other.log_probs.astype(np.float64) - one.log_probs).max()
        near = np.array_equal(one.ids, other.ids) and error <= small.manifest.codec["step"] / 2 + 1e-4
        same.append(near and found.code == 0 and _contents(found) == _contents(untouched[kind]))
    _clear(made)
    return all(same)


def _contents(found: Found) -> list[Any]:
    """The steps without their labels."""
    return [(step.epoch, step.view, [sample[:2] for sample in step.samples]) for step in found.steps]


def two_ranks(made: Copies, folder: Path, untouched: dict[str, Found]) -> bool:
    """Whether two processes together see in every step what one sees."""
    ended = run_ranks(folder, 2, attempt_elsewhere, made)
    _clear(made)
    if [end.code for end in ended] != [0, 0]:
        print(*(end.err for end in ended), sep="\n")
        return False
    same = []
    for number, (kind, _, _) in enumerate(made):
        first, second = (end.value[number] for end in ended)  # type: ignore[index]
        whole = [sorted(step.samples) for step in untouched[kind].steps]
        halves = [
            sorted(one.samples + two.samples) for one, two in zip(first.steps, second.steps, strict=False)
        ]
        print(first.err, second.err, sep="\n")  # shown where it fails
        same.append(first.code == second.code == 0 and halves == whole)
    return all(same)


def other_environment(made: Copies, folder: Path, untouched: dict[str, Found]) -> bool:
    """Whether a process with another PYTHONHASHSEED, which orders sets, and two threads sees the same."""
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "found.pickle"
    subprocess.run(
        [sys.executable, "-m", "tests.support.alignment"],
        input=pickle.dumps((made, str(result))),
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "4242", "OMP_NUM_THREADS": "2"},
        cwd=ROOT,
        check=True,
    )
    _clear(made)
    found = pickle.loads(result.read_bytes())
    return all(
        one.code == 0 and one.steps == untouched[kind].steps
        for (kind, _, _), one in zip(made, found, strict=True)
    )


ELSEWHERE = [
    ("packed records", "same batches, log-probabilities within half a step", packed),
    ("two processes", "same batches, cut in two", two_ranks),
    ("another PYTHONHASHSEED, two OMP threads", "same batches", other_environment),
]
