"""Kills and full disks: everything that writes is stopped at random, run again, and compared with an uninterrupted run.

    python -m tests.chaos.crash --kills 200 --seed 0
    python -m tests.chaos.crash --every-step

One trial: a process is forked and killed with SIGKILL, after a random time or at a step of its work (before and after each
flush, rename, link and removal of a file, and at each step of a commit), up to three times; then it is run to its end, and
`softcache gc --delete` after it. After every kill each marker that is there, and each object that it names, is that of
the uninterrupted run, byte for byte; at the end the whole folder is, and nothing else is in it. The same with several
processes at once, with a concurrent reader, and on a disk that is full.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from softcache.reader.open import open_cache
from tests.chaos.forge import Files, read_files
from tests.chaos.processes import REFUSED, Child, full_disk, kill_at_step
from tests.chaos.scenarios import Scenario, make_scenarios

PAGE = 4096
NOT_COMPARED = (".use", ".lock")
"""Times and inodes of materialized views, and claims, which are empty."""


class Trial:
    """A scenario, what it writes when it is not interrupted, and how long and how many steps that takes."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario, self.folder = scenario, folder
        self.root, self.log = folder / "here", folder / "log"
        counts, started = mmap.mmap(-1, 8), time.monotonic()
        assert self._run(kill_at_step(-1, counts)) == 0, self.log.read_text()
        self.num_steps = int.from_bytes(counts[:8])
        self.seconds = time.monotonic() - started
        self.expected = self.files()
        self.tally: Counter[str] = Counter()

    def _run(self, *prepare: Callable[[], None]) -> int:
        return self.start(*prepare).wait()

    def start(self, *prepare: Callable[[], None], log: str = "log") -> Child:
        self.root.mkdir(exist_ok=True)
        return Child(lambda: self.scenario.work(self.root), self.folder / log, *prepare)

    def clear(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def files(self) -> Files:
        return Files(
            {name: data for name, data in read_files(self.root).items() if not name.endswith(NOT_COMPARED)}
        )

    def check_whole_units(self) -> None:
        """Compares what a reader would trust, now, with the uninterrupted run."""
        found = self.files()
        for path in found:
            if path.startswith("units/") and path.endswith(".json"):
                assert found[path] == self.expected[path], f"{path} differs"
                for shard in json.loads(found[path])["shards"]:
                    name = shard["path"]
                    assert found.get(name) == self.expected[name], f"{name} is marked and differs"
            if path.endswith(".thaw") or path in ("manifest.json", "samples.parquet"):
                assert found[path] == self.expected[path], f"{path} differs"

    def finish(self) -> None:
        """Runs to the end, collects what is stray, and compares everything."""
        report = self.folder / "report"
        child = Child(lambda: self.scenario.finish(self.root, report), self.log)
        assert child.wait() == 0, child.log_text()
        found = self.files()
        assert found.keys() == self.expected.keys(), sorted(found.keys() ^ self.expected.keys())
        assert found == self.expected, [path for path in found if found[path] != self.expected[path]]
        self.tally["objects compared"] += len(found)
        self.tally["orphans deleted"] += int(report.read_text())
        self.tally["reruns equal"] += 1

    def killed(self, *prepare: Callable[[], None], seconds: float | None = None) -> None:
        child = self.start(*prepare)
        if seconds is not None:
            time.sleep(seconds)
            child.kill()
        code = child.wait()
        assert code <= 0, child.log_text()
        self.tally["killed" if code else "done before the kill"] += 1
        self.check_whole_units()


# -- one process --------------------------------------------------------------------------------------------


def kill_at_random(trial: Trial, draw: random.Random, trials: int) -> None:
    """Half after a random time, half at a random step; up to three kills before the run that is let be."""
    for _ in range(trials):
        trial.clear()
        for _ in range(draw.randint(1, 3)):
            if draw.random() < 0.5:
                trial.killed(seconds=draw.uniform(0.0, 1.1 * trial.seconds))
            else:
                trial.killed(kill_at_step(draw.randrange(trial.num_steps)))
        trial.finish()


def kill_at_every_step(trial: Trial) -> None:
    for number in range(trial.num_steps):
        trial.clear()
        trial.killed(kill_at_step(number))
        trial.finish()


# -- several, and a reader ----------------------------------------------------------------------------------


def kill_among(trial: Trial, draw: random.Random, trials: int, processes: int) -> None:
    """So many at once on one folder, some of them killed; then as many again, that are let be."""
    for _ in range(trials):
        trial.clear()
        first = [trial.start(log=f"log{number}") for number in range(processes)]
        for child in draw.sample(first, draw.randint(1, processes)):
            time.sleep(draw.uniform(0.0, 0.6 * trial.seconds))
            child.kill()
            trial.tally["killed"] += 1
            trial.check_whole_units()
        second = [trial.start(log=f"again{number}") for number in range(processes)]
        for child in [*first, *second]:
            code = child.wait()
            assert code in (0, -9), child.log_text()
        trial.finish()


def read_concurrently(trial: Trial, draw: random.Random, trials: int) -> int:
    """A reader of what is finished, concurrent with writers that are killed; returns how often it read."""
    reads = 0
    reference = trial.folder / "reference"
    shutil.rmtree(reference, ignore_errors=True)
    trial.clear()
    trial.finish()
    shutil.copytree(trial.root, reference)
    for _ in range(trials):
        trial.clear()
        stop, count = trial.folder / "stop", trial.folder / "reads"
        stop.unlink(missing_ok=True)
        reader = Child(
            lambda stop=stop, count=count: _read(trial.root, reference, stop, count), trial.folder / "reader"
        )  # type: ignore[misc]
        for _ in range(2):
            trial.killed(seconds=draw.uniform(0.0, trial.seconds))
        assert trial._run() == 0, trial.log.read_text()
        stop.touch()
        assert reader.wait() == 0, reader.log_text()
        reads += int(count.read_text())
        trial.finish()
    return reads


def _read(root: Path, reference: Path, stop: Path, count: Path) -> None:
    """Opens the cache again and again, and compares all rows that it shows with the reference."""
    truth = open_cache(str(reference))
    samples = np.arange(len(truth))
    expected = [truth.read_rows(samples, view) for view in range(truth.num_views)]
    starts = truth.rows.starts(np.append(samples, len(truth)), 0)
    reads, seen, last = 0, set(), False
    while not last:
        last = stop.exists()
        time.sleep(0.005)
        if not (root / "manifest.json").exists():
            continue
        cache = open_cache(str(root))
        seen.add(len(cache.markers))
        for view in range(cache.num_views):
            found = cache.samples_in(view)
            if not len(found):
                continue
            reads += 1
            labels, prints = cache.read_rows(found, view)
            rows = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in found])
            assert np.array_equal(prints, expected[view][1][found])
            for name in ("ids", "log_probs", "log_tail", "target_log_prob"):
                assert np.array_equal(getattr(labels, name), getattr(expected[view][0], name)[rows]), name
    assert max(seen) == len(truth.markers)
    count.write_text(str(reads))


# -- a full disk --------------------------------------------------------------------------------------------


def fill_disk(trial: Trial, draw: random.Random, trials: int) -> None:
    """A file system that is too small, then larger; where none can be mounted, a limit on every file's size."""
    sizes = list(map(len, trial.expected.values()))
    total, largest = sum(-(-size // PAGE) * PAGE for size in sizes), max(sizes)
    for _ in range(trials):
        trial.clear()
        trial.root.mkdir()
        mounted = _mount(trial.root, draw.randint(PAGE, total))
        try:
            prepare = () if mounted else (full_disk(draw.randint(1, largest)),)
            child = trial.start(*prepare)
            code = child.wait()
            assert code in (0, REFUSED), child.log_text()
            assert code == 0 or "free some space" in child.log_text(), child.log_text()
            trial.tally["disk full" if code else "done before the disk was full"] += 1
            trial.check_whole_units()
            if mounted:
                subprocess.run(["mount", "-o", "remount,size=64m", str(trial.root)], check=True)
            trial.finish()
        finally:
            if mounted:
                subprocess.run(["umount", str(trial.root)], check=True)


def _mount(root: Path, num_bytes: int) -> bool:
    """Mounts a file system of that size, if this user may."""
    if os.geteuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(root)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# -- all of it ----------------------------------------------------------------------------------------------

Fault = Callable[[Trial, random.Random, int], str]
"""Does a number of trials; returns what to call them."""


def _random_kills(trial: Trial, draw: random.Random, trials: int) -> str:
    kill_at_random(trial, draw, trials)
    return "killed at random"


def _every_step(trial: Trial, draw: random.Random, trials: int) -> str:
    kill_at_every_step(trial)
    return f"killed at each of {trial.num_steps} steps"


def _two(trial: Trial, draw: random.Random, trials: int) -> str:
    kill_among(trial, draw, max(1, trials // 4), 2)
    return "two at once, some killed"


def _four(trial: Trial, draw: random.Random, trials: int) -> str:
    kill_among(trial, draw, max(1, trials // 4), 4)
    return "four at once, some killed"


def _reader(trial: Trial, draw: random.Random, trials: int) -> str:
    reads = read_concurrently(trial, draw, max(1, trials // 4))
    return f"killed during a reader, which read {reads:,} times"


def _full_disk(trial: Trial, draw: random.Random, trials: int) -> str:
    fill_disk(trial, draw, max(1, trials // 4))
    return "disk full"


SHORT: dict[str, tuple[Fault, ...]] = {
    "capture, images, zarr": (_random_kills, _reader),
    "capture, text, parquet": (_random_kills, _two, _full_disk),
    "convert to zarr": (_random_kills,),
    "materialize": (_random_kills,),
}


def _faults_of(scenario: Scenario, *, every_step: bool, short: bool) -> tuple[Fault, ...]:
    if every_step:
        return (_every_step,)
    if short:
        return SHORT[scenario.name]
    several = (_two, _four, _reader) if scenario.name.startswith("capture") else ()
    return (_random_kills, *several, _full_disk)


def run(
    folder: Path, *, kills: int, seed: int, every_step: bool = False, short: bool = False
) -> Iterator[tuple[str, Counter[str]]]:
    """Yields what happened, by scenario and fault; a mismatch raises AssertionError with what it was."""
    scenarios = make_scenarios(folder, SHORT if short else None)
    each = max(1, kills // len(scenarios) // 2)
    for scenario in scenarios:
        faults = _faults_of(scenario, every_step=every_step, short=short)
        place = folder / "trial"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        trial, draw = Trial(scenario, place), random.Random(f"{scenario.name} {seed}")
        for fault in faults:
            trial.tally = Counter()
            outcome = fault(trial, draw, each)
            yield f"{scenario.name}: {outcome}", trial.tally


COLUMNS = ("killed", "disk full", "reruns equal", "objects compared", "orphans deleted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="about so many, over all scenarios")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--every-step", action="store_true", help="one kill at every step of every scenario instead"
    )
    parser.add_argument("--short", action="store_true", help="some of the scenarios, one trial of each")
    asked = parser.parse_args()
    print("| what was stopped | " + " | ".join(COLUMNS) + " |\n|---|" + "--:|" * len(COLUMNS), flush=True)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for name, tally in run(
            Path(folder), kills=asked.kills, seed=asked.seed, every_step=asked.every_step, short=asked.short
        ):
            _print_row(name, tally)
            total += tally
    _print_row("all", total)


def _print_row(name: str, tally: Counter[str]) -> None:
    print(f"| {name} | " + " | ".join(f"{tally[column]:,}" for column in COLUMNS) + " |", flush=True)


if __name__ == "__main__":
    main()
