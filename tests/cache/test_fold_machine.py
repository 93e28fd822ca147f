"""Folded markers under every order of requests: writers, folders, readers, garbage collectors and repairs are stopped between any
two requests, listings are late, answers are lost, requests arrive twice, leases run out, processes die.

Three machines, since what may be promised depends on what may happen:

    equal bytes, no repair       leases run out, requests are repeated late: no finished unit is ever lost or damaged
    different bytes, repairs     leases hold: no finished unit is lost or damaged, but those that are unmarked
    everything                   no reader trusts other bytes than it believes; repair and a rerun make the cache whole

A deletion has no condition. So in the first two a garbage collector keeps its claims and its deletions are not repeated, and no
writer is paused for longer than `--older-than`, between its first shard and its marker; in the third all of that happens.
"""

import math
import os
from contextlib import closing

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from softcache.cache import finished, folded, folding, units
from softcache.cache.finished import UnitIndex
from softcache.cache.folding import fold_markers, unmark_units
from softcache.cache.units import check_unit, claimed_units, publish_unit
from softcache.errors import CorruptionError
from softcache.hashing.digests import digest_bytes
from softcache.testing.simulation import ANSWERED, LOST, REPEATED, LateObjects, LateStorage, Process
from softcache.tools import garbage
from tests.contracts.test_stores import manifest_of

MANIFEST = manifest_of("parquet", num_samples=5, num_views=2, unit_samples=1, chunk_samples=1)
DIGEST = digest_bytes(MANIFEST.to_bytes())
NUM_UNITS = MANIFEST.plan.num_units
CONSTANTS = (
    (folded, "BLOCK_UNITS", 4),
    (folded, "PAGE_UNITS", 2),
    (finished, "MIN_FOLDED_UNITS", 1),
    (folding, "MIN_LOOSE", 1),
    (folding, "CLAIM_SECONDS", 0.0),
    (folding, "CLAIM_POLL_SECONDS", 0.0),
    (units, "FOLD_EVERY", 3),
    (units, "WAIT_SECONDS", 0.0),
)
MAX_LIVE = 4
RECORDED = {"steps": 0, "examples": 0, "requests": 0}


class TwoShards:
    """A store of two objects per unit, whose bytes name the unit and what made it."""

    manifest = MANIFEST
    columns = (units.Column("a", "uint8"),)

    def __init__(self, maker=0):
        self._maker = maker

    def shard_paths(self, unit):
        return {f"parquet/{name}/{unit.number}": name for name in "ab"}

    def unit_of(self, path):
        return int(path.rsplit("/", 1)[1])

    def max_shard_bytes(self, name):
        return 100

    def described(self):
        return ()

    def encode(self, unit, columns):
        return {
            path: (name, f"{name} of {unit.number} by {self._maker}".encode())
            for path, name in self.shard_paths(unit).items()
        }


class FoldMachine(RuleBasedStateMachine):
    """See the module docstring; `lapses`, `repeats`, `repairs` and `makers` are what may happen."""

    lapses, repeats, repairs, makers, strict = True, True, False, 1, True

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        for module, name, value in CONSTANTS:
            self.patch.setattr(module, name, value)
        for module in (units, garbage):
            self.patch.setattr(module, "open_store", lambda manifest, objects: TwoShards())
        self.storage, self.processes = LateStorage(), []
        self.storage.put("manifest.json", MANIFEST.to_bytes())
        self.storage.put(MANIFEST.samples, b"samples")
        self.storage.show()
        self.finished: set[int] = set()
        self.unmarked: dict[int, float] = {}  # when; for ever while it goes on
        self.clock = 0
        RECORDED["examples"] += 1

    @initialize(count=st.integers(0, NUM_UNITS), is_folded=st.booleans())
    def begin(self, count, is_folded):
        objects = LateObjects(self.storage)
        for number in range(count):
            self.publish(objects, MANIFEST.plan.unit(number), 0)
        self.storage.show()
        if is_folded:
            fold_markers(self.index(objects))
            self.storage.show()

    # -- processes ------------------------------------------------------------------------------------------

    def start(self, name, function):
        self.processes.append(Process(self.storage, name, function))

    def publish(self, objects, unit, maker):
        publish_unit(objects, TwoShards(maker), DIGEST, unit, {"a": np.zeros(1)})
        self.finished.add(unit.number)
        if not self.repairs_of(unit.number):
            self.unmarked[unit.number] = self.clock

    @precondition(lambda self: len(self.live()) < MAX_LIVE)
    @rule(first=st.integers(0, NUM_UNITS - 1), count=st.integers(1, 5), maker=st.integers(0, 3))
    def start_writer(self, first, count, maker):
        wanted = [MANIFEST.plan.unit(number % NUM_UNITS) for number in range(first, first + count)]

        def write(objects):
            with closing(claimed_units(self.index(objects), wanted)) as claimed:
                for unit in claimed:
                    self.publish(objects, unit, maker % self.makers)

        self.start("writer", write)

    @precondition(lambda self: len(self.live()) < MAX_LIVE)
    @rule(kept=st.integers(0, 2))
    def start_folder(self, kept):
        self.patch.setattr(folding, "KEPT_LOOSE", kept)
        self.start("folder", lambda objects: fold_markers(self.index(objects)))

    @precondition(lambda self: len(self.live()) < MAX_LIVE)
    @rule()
    def start_reader(self):
        before, began = set(self.finished), self.clock

        def read(objects):
            index = self.index(objects)
            found = index.snapshot()
            for number in range(NUM_UNITS):
                marker = found.get(number)
                if marker is None and found.refresh(number):
                    marker = found[number]
                if marker is None:
                    assert number not in before or self.unmarked.get(number, -1) > began, (
                        f"unit {number} was lost"
                    )
                    continue
                try:
                    self.check(objects, marker)
                except CorruptionError:
                    if found.refresh(number):
                        marker = found[number]
            assert len(found) == len(list(found)) == int(found.is_finished.sum())

        self.start("reader", read)

    @precondition(lambda self: len(self.live()) < MAX_LIVE)
    @rule()
    def start_gc(self):
        older_than = 1.0 if self.strict else 0.0
        self.start("gc", lambda objects: garbage.collect_garbage(objects, delete=True, older_than=older_than))

    @precondition(lambda self: self.repairs and len(self.live()) < MAX_LIVE)
    @rule(number=st.integers(0, NUM_UNITS - 1))
    def start_repair(self, number):
        def repair(objects):
            self.unmarked[number] = math.inf
            self.finished.discard(number)
            unmark_units(self.index(objects), [number])
            self.finished.discard(number)
            self.clock += 1
            if self.repairs_of(number) == 1:  # another one may still unmark what is published now
                self.unmarked[number] = self.clock

        self.start(f"repair {number}", repair)

    def index(self, objects):
        return UnitIndex(objects, MANIFEST, DIGEST, TwoShards())

    def check(self, objects, marker):
        """A reader's check, and then that what it reads is what it believes."""
        check_unit(objects, marker)

    # -- what becomes of them -------------------------------------------------------------------------------

    def repairs_of(self, number):
        return sum(process.name == f"repair {number}" for process in self.live())

    def live(self):
        return [process for process in self.processes if not process.is_done]

    @precondition(lambda self: self.live())
    @rule(which=st.integers(0, 99), count=st.integers(1, 30))
    def step(self, which, count):
        process = self.live()[which % len(self.live())]
        for _ in range(count):
            if process.is_done:
                break
            process.step()
            RECORDED["requests"] += 1
        self.look(process)

    @precondition(lambda self: self.live())
    @rule(which=st.integers(0, 99))
    def finish(self, which):
        """Lets a process run on, to its end unless it waits for another one."""
        self.step(which, 150)

    @precondition(lambda self: self.live())
    @rule(which=st.integers(0, 99), fate=st.sampled_from([LOST, REPEATED]))
    def break_request(self, which, fate):
        process = self.live()[which % len(self.live())]
        repeats = self.repeats and not (self.strict and process.name == "gc")
        process.step(ANSWERED if fate == REPEATED and not repeats else fate)
        self.look(process)

    @precondition(lambda self: self.live())
    @rule(which=st.integers(0, 99))
    def crash(self, which):
        self.live()[which % len(self.live())].crash()

    @precondition(lambda self: self.storage.late)
    @rule(which=st.integers(0, 99))
    def arrive_late(self, which):
        self.storage.late.pop(which % len(self.storage.late))()

    @rule(chosen=st.one_of(st.none(), st.sets(st.integers(0, 15))))
    def show(self, chosen):
        paths = sorted({*self.storage.listed, *self.storage.written})
        self.storage.show(None if chosen is None else [paths[n] for n in chosen if n < len(paths)])

    @precondition(lambda self: self.storage.claims)
    @rule(which=st.integers(0, 99))
    def lapse(self, which):
        path = sorted(self.storage.claims)[which % len(self.storage.claims)]
        holder = self.storage.claims[path]
        lapses = self.lapses and not (self.strict and holder is not None and holder.name == "gc")
        if lapses or holder is None or holder.is_dead:
            del self.storage.claims[path]

    def look(self, process):
        RECORDED["steps"] += 1
        if process.error is not None:
            lost = "no answer" in str(process.error)
            if not lost and not (
                process.name.startswith("repair") and "held by another process" in str(process.error)
            ):
                raise AssertionError(f"{process.name}: {process.error!r}") from process.error

    def teardown(self):
        try:
            self.end()
        finally:
            for process in self.live():
                process.crash()
            self.patch.undo()

    def end(self):
        for process in self.live():
            process.crash()
        while self.storage.late:
            self.storage.late.pop()()
        self.storage.claims.clear()
        self.storage.show()
        objects = LateObjects(self.storage)
        found = self.index(objects).snapshot()
        if self.strict:
            unmarked = {number for number, when in self.unmarked.items() if when == math.inf}
            lost = self.finished - unmarked - set(found)
            assert not lost, f"units {sorted(lost)} were lost"
            for marker in found.values():
                check_unit(objects, marker)
        damaged = []
        for number, marker in found.items():
            try:
                check_unit(objects, marker)
            except CorruptionError:
                damaged.append(number)
        unmark_units(self.index(objects), damaged)
        for unit in claimed_units(self.index(objects), MANIFEST.plan.units()):
            self.publish(objects, unit, 0)
        self.storage.show()
        fold_markers(self.index(objects))
        self.storage.show()
        report = garbage.collect_garbage(objects, delete=True, older_than=0)
        assert not report.foreign, report
        found = self.index(objects).snapshot()
        assert list(found) == list(range(NUM_UNITS))
        assert found.num_loose == 0
        for marker in found.values():
            check_unit(objects, marker)


class RepairMachine(FoldMachine):
    lapses, repeats, repairs, makers = False, False, True, 3


class WildMachine(FoldMachine):
    lapses, repeats, repairs, makers, strict = True, True, True, 3, False


def run(machine, examples, steps):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


@pytest.mark.parametrize("machine", [FoldMachine, RepairMachine, WildMachine])
def test_folding_in_any_order_of_requests(machine):
    run(machine, 30, 40)


def test_a_folder_whose_claim_has_run_out_ends_when_its_generation_is_retired():
    machine = WildMachine()
    machine.begin(count=3, is_folded=False)
    machine.start_folder(kept=0)
    machine.step(which=0, count=14)  # it has made a generation and deletes no marker yet
    machine.lapse(which=0)
    machine.start_repair(number=0)
    machine.finish(which=1)
    machine.finish(which=0)
    machine.teardown()


@pytest.mark.chaos
@pytest.mark.parametrize("machine", [FoldMachine, RepairMachine, WildMachine])
def test_folding_at_length(machine):
    RECORDED.update(dict.fromkeys(RECORDED, 0))
    run(machine, int(os.environ.get("SOFTCACHE_FOLD_EXAMPLES", "1500")), 80)
    print(f"{machine.__name__}: {RECORDED}")
