"""The numbered invariants of docs/format.md: each one that is broken is named with its row, and no cache that is right breaks one."""

import dataclasses
import io
import re
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from softcache.cache.codecs import OpenCodec, PackedCodec
from softcache.cache.codecs.bernoulli import BernoulliCodec
from softcache.cache.codecs.precision import HALF
from softcache.cache.create import create_cache
from softcache.cache.invariants import INVARIANTS
from softcache.cache.invariants.independent import independent_violations
from softcache.cache.invariants.soft_labels import RowFacts, soft_label_violations
from softcache.cache.storage.open import open_objects
from softcache.cache.units import open_store, publish_unit
from softcache.errors import CorruptionError
from softcache.hashing.digests import digest_bytes
from softcache.labels import DEFAULT_TEMPERATURES
from softcache.labels.sparsify import dense, hybrid, sample, top_k, top_p
from softcache.labels.sparsify.bernoulli import top_k_bernoulli
from softcache.labels.truncate import truncate_labels
from softcache.reader.open import open_cache
from softcache.tools.verify.checksums import verify_units
from tests.support.caches import ROOT

P, V, K = 12, 40, 6
GRIDS = (DEFAULT_TEMPERATURES, (1.0,), (1.0, 1.1, 2.0, 20.0))
RANDOM = torch.Generator().manual_seed(0)


def logits_of(kind):
    x = torch.randn(P, V, generator=RANDOM)
    if kind == "masked":
        x[:, 4:] = -torch.inf
    if kind == "one class":
        x[:, 1:] = -torch.inf
    if kind == "one-hot":
        x[:, 3] = 200.0
    if kind == "bimodal":
        x[torch.rand(P, V, generator=RANDOM) < 0.7] -= 15.0
    return {
        "flat": x * 0,
        "bfloat16": (x * 8).bfloat16(),
        "float16": (x * 30).half(),
        "far": x * 1e4,
        "beyond float16": x * 1e5,
    }.get(kind, x * 4)


KINDS = (
    "normal",
    "flat",
    "masked",
    "one class",
    "one-hot",
    "bimodal",
    "bfloat16",
    "float16",
    "far",
    "beyond float16",
)


def codecs_of(labels):
    how = {
        "num_classes": labels.num_classes,
        "k": labels.k,
        "temperatures": labels.temperatures,
        "stats": labels.stats is not None,
        "sampling": labels.sampling,
    }
    yield OpenCodec(**how, values="float32")
    yield OpenCodec(**how)
    yield PackedCodec(**how)
    yield PackedCodec(**how, step=8.0)
    yield PackedCodec(**how, step=1 / 16384, tail="float32")
    yield PackedCodec(**how, step=None, tail="float32")


def broken(codec, labels, targets=None, **facts):
    arrays = codec.unpack(codec.encode(labels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return soft_label_violations(codec, arrays, RowFacts(codec.precision, **facts), targets)


@pytest.mark.parametrize("grid", GRIDS, ids=len)
@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_every_policy_in_every_codec_break_none(kind, grid):
    logits, targets = logits_of(kind), np.arange(P)
    how = {"temperatures": grid, "targets_P": torch.arange(P)}
    drawn = {"seeds_P": torch.arange(P), **how}
    made = [
        top_k(logits, k=K, **how),
        top_p(logits, p=0.8, max_k=K, **how),
        dense(logits, **how),
        sample(logits, draws=20, **drawn),
        hybrid(logits, k=3, draws=5, **drawn),
        dataclasses.replace(top_k(logits, k=1, **how), stats=None),
    ]
    for labels in (record.to_numpy() for record in made):
        for codec in codecs_of(labels):
            assert broken(codec, labels, targets) == broken(codec, labels) == []
    kept = OpenCodec(V, V, grid)
    whole = kept.decode(kept.encode(made[2].to_numpy()))
    for smaller in (truncate_labels(whole, 2), truncate_labels(whole, K, p=0.7)):
        for codec in (OpenCodec(V, smaller.k, grid), PackedCodec(V, smaller.k, grid)):
            assert broken(codec, smaller, targets, moved=HALF) == []


# -- each invariant, broken in one row of an exact cache ------------------------------------------------------------

ROW = 5


def set_to(name, place, value):
    def change(arrays):
        array = arrays[name][ROW : ROW + 1] if place == () else arrays[name][ROW]
        array[place] = value(array[place]) if callable(value) else value

    return change


def change_ids(arrays):
    arrays["ids"][ROW, 1] = arrays["ids"][ROW, 0]


def ascend(arrays):
    arrays["ids"][ROW], arrays["log_probs"][ROW] = arrays["ids"][ROW, ::-1], arrays["log_probs"][ROW, ::-1]


def add(nats):
    return lambda x: x + nats


BROKEN = [
    ("I20", top_k, set_to("ids", 2, V + 1), "column ids: 41 in slot 2; expected 0 to 40"),
    (
        "I20",
        top_k,
        lambda a: (set_to("ids", 2, V)(a), set_to("log_probs", 2, -np.inf)(a)),
        "expected 40 behind",
    ),
    ("I21", top_k, change_ids, "each class once"),
    ("I22", top_k, set_to("ids", 5, V), "-inf in an unused slot"),
    ("I30", top_k, set_to("log_probs", 1, np.nan), "column log_probs: nan in slot 1"),
    ("I31", top_k, set_to("log_probs", 0, 0.5), "in slot 0; expected at most 0"),
    ("I32", top_k, ascend, "no more than in the slot before"),
    ("I33", top_k, set_to("log_probs", slice(None), add(-0.1)), "expected a mass of 1"),
    ("I33", top_k, set_to("log_tail", slice(None), add(1.0)), "expected a mass of 1"),
    ("I33", hybrid, set_to("log_tail", slice(None), add(0.5)), "expected a mass of 1"),
    ("I33", sample, set_to("log_tail", slice(None), add(-0.1)), "expected a mass of 1"),
    ("I40", top_k, set_to("log_tail", 3, -np.inf), "column log_tail: -inf in slot 3"),
    ("I41", top_k, set_to("log_tail", 7, -3.0), "no less than at the temperature before"),
    ("I42", top_k, set_to("log_tail", 3, add(0.05)), "no more than the chord"),
    ("I42", sample, set_to("log_tail", 3, add(0.1)), "no more than the chord"),
    ("I43", top_k, lambda a: (set_to("stats", 3, V - 30)(a), set_to("stats", 0, 1.0)(a)), "no likelier than"),
    ("I44", dense, set_to("log_tail", slice(None), -5.0), "-inf: as many classes are kept"),
    ("I50", top_k, set_to("stats", 3, 99), "column stats.support: 99; expected"),
    ("I50", top_k, set_to("stats", 3, 12.5), "column stats.support: 12.5"),
    ("I51", top_k, set_to("stats", 0, 4.0), "column stats.entropy: 4; expected 0 to log support"),
    ("I52", top_k, set_to("stats", 0, add(0.7)), "column stats.entropy"),
    ("I52", dense, set_to("stats", 0, add(-0.01)), "column stats.entropy"),
    ("I53", top_k, set_to("stats", 1, -1.0), "at most -log support"),
    ("I53", top_k, set_to("stats", 2, -1.0), "at least 0"),
    ("I60", top_k, set_to("target_log_prob", (), 0.5), "column target_log_prob: 0.5; expected at most 0"),
    ("I60", top_k, set_to("target_log_prob", (), np.nan), "there is a ground truth"),
    ("I61", dense, set_to("target_log_prob", (), add(-0.1)), "column target_log_prob"),
    ("I62", top_k, set_to("target_log_prob", (), 0.0), "expected"),
    ("I70", sample, set_to("counts", 0, add(1)), "20 draws"),
    (
        "I71",
        hybrid,
        lambda a: (set_to("ids", 7, V)(a), set_to("log_probs", 7, -np.inf)(a)),
        "column slots of drawn",
    ),
]


@pytest.mark.parametrize(("number", "policy", "change", "detail"), BROKEN)
@pytest.mark.parametrize("values", ["float32", "float16"])
def test_each_one_that_is_broken_is_named_with_row_and_value(number, policy, change, detail, values):
    how = {top_k: {"k": K}, dense: {}, sample: {"draws": 20}, hybrid: {"k": 3, "draws": 5}}[policy]
    if policy in (sample, hybrid):
        how["seeds_P"] = torch.arange(P)
    logits = torch.randn(P, V, generator=torch.Generator().manual_seed(1)) * 2
    targets = torch.full((P,), 1)
    labels = policy(logits, temperatures=DEFAULT_TEMPERATURES, targets_P=targets, **how).to_numpy()
    codec = OpenCodec(V, labels.k, DEFAULT_TEMPERATURES, values=values, sampling=labels.sampling)
    arrays = {name: array.copy() for name, array in codec.encode(labels).items()}
    facts = RowFacts(codec.precision, takes_largest=policy is not sample)
    assert soft_label_violations(codec, arrays, facts, targets.numpy()) == []
    change(arrays)
    found = soft_label_violations(codec, arrays, facts, targets.numpy())
    named = [violation for violation in found if violation.number == number and detail in violation.detail]
    assert named, [str(violation) for violation in found]
    assert {violation.row for violation in found} == {ROW}
    assert str(named[0]).startswith(f"row {ROW}: column ")
    assert INVARIANTS[number] in str(named[0])


@pytest.mark.parametrize("k", [3, V])
@pytest.mark.parametrize("values", ["float32", "float16"])
def test_independent_classes(k, values):
    for scale in (1e6, 0.01, 4.0):
        logits = torch.randn(P, V, generator=RANDOM) * scale
        logits[0] = -torch.inf
        codec = BernoulliCodec(V, k, values)
        arrays = {n: a.copy() for n, a in codec.encode(top_k_bernoulli(logits, k).to_numpy()).items()}
        assert independent_violations(arrays, V, codec.precision.log_probs) == []
    changes = {
        "I80": ("logits", (ROW, slice(None)), arrays["logits"][ROW, ::-1].copy()),
        "I81": ("dropped_bound", ROW, 1e5),
        "I82": ("dropped_mass", ROW, V + 1.0),
        "I21": ("ids", (ROW, 1), arrays["ids"][ROW, 0]),
        "I30": ("dropped_mass", ROW, np.nan),
    }
    for number, (name, place, value) in changes.items():
        wrong = {n: a.copy() for n, a in arrays.items()}
        wrong[name][place] = value
        found = independent_violations(wrong, V, codec.precision.log_probs)
        assert number in {violation.number for violation in found}
        assert {violation.row for violation in found} == {ROW}


def test_the_page_lists_every_invariant_by_its_number():
    page = (ROOT / "docs/format.md").read_text()
    listed = dict(re.findall(r"^\| (I\d+) \| (.+?) \|$", page, re.MULTILINE))
    assert listed.keys() == INVARIANTS.keys()


# -- whole caches that are signed anew ------------------------------------------------------------------------------


def rewritten(place, folder, change, *, samples=None):
    """Copies a frozen cache; its first unit has changed columns, and all checksums are right."""
    frozen = open_cache(place)
    manifest, unit = frozen.manifest, frozen.manifest.plan.unit(0)
    table = (place / "samples.parquet").read_bytes() if samples is None else samples
    manifest = manifest.model_copy(update={"samples_sha256": digest_bytes(table)})
    objects = open_objects(str(folder), create=True)
    manifest, digest = create_cache(objects, manifest, table)
    reading, writing = open_store(frozen.manifest, open_objects(str(place))), open_store(manifest, objects)
    for unit in manifest.plan.units():
        rows = frozen.rows.span(unit, unit.start, unit.stop)
        columns = reading.read(unit, unit.start, unit.stop, rows=rows)
        columns = {name: np.array(values) for name, values in columns.items()}
        if unit.number == 0:
            change(columns)
        publish_unit(objects, writing, digest, unit, columns)
    return list(verify_units(open_cache(str(folder))))


def assigned(name, place, value):
    def change(columns):
        columns[name][place] = value

    return change


def reversed_positions(columns):
    count = int(columns["num_rows"][0])
    columns["position"][:count] = columns["position"][:count][::-1]


def swapped_cells(columns):
    columns["cells"][1] = columns["cells"][0]


CACHES = [
    ("v1/zarr", "I21", assigned("ids", (3, 1), 0), lambda c: c["ids"].__setitem__((3, 0), 0)),
    ("v1/parquet", "I31", assigned("log_probs", (3, 0), 0.5), None),
    ("v1/zarr", "I33", lambda c: c["log_tail"].__iadd__(np.float32(1.0)), None),
    ("v1/zarr", "I50", assigned("stats", (3, 3), 99), None),
    ("v1/parquet", "I60", assigned("target_log_prob", 3, np.nan), None),
    ("v1-tokens/zarr", "I12", reversed_positions, None),
    (
        "v1-tokens/parquet",
        "I12",
        lambda c: c["position"].__setitem__(slice(1, 3), c["position"][0] + [1, 2]),
        None,
    ),
    ("v1-cells/zarr", "I12", lambda c: c["position"].__iadd__(np.uint32(1)), None),
    ("v1-cells/parquet", "I90", swapped_cells, None),
    ("v1-cells/zarr", "I80", lambda c: c["logits"].__setitem__(3, c["logits"][3, ::-1].copy()), None),
    ("v1-drawn/zarr", "I70", assigned("counts", (3, 0), 12), None),
    ("v1-wide/zarr", "I20", assigned("ids", (3, 1), 70_001), None),
]


@pytest.mark.parametrize(
    ("place", "number", "change", "before"), CACHES, ids=[f"{c[0]}-{c[1]}" for c in CACHES]
)
def test_verify_names_the_invariant_that_a_cache_breaks(tmp_path, place, number, change, before):
    def both(columns):
        if before:
            before(columns)
        change(columns)

    faults = rewritten(ROOT / "tests/golden" / place, tmp_path / "cache", both)
    assert any(f"invariant {number}: {INVARIANTS[number]}" in line and "unit 0" in line for line in faults), (
        faults
    )
    assert all("row 3:" in line for line in faults) or number in ("I12", "I33", "I90"), faults
    if number in ("I20", "I31"):
        with pytest.raises(
            CorruptionError, match=r"in row 3; expected (0 to|at most 0: no probability is above 1)"
        ):
            open_cache(tmp_path / "cache").read(np.arange(8))


@pytest.mark.parametrize(
    ("place", "change", "number", "message"),
    [
        ("v1/zarr", lambda t: {**t, "key": ["same"] * len(t["key"])}, "I2", "key 'same' is there twice"),
        ("v1/zarr", lambda t: {**t, "sample": t["sample"][::-1]}, "I2", "not numbered 0, 1, 2"),
        (
            "v1-tokens/parquet",
            lambda t: {**t, "first_row": [1 + n for n in t["first_row"]]},
            "I2",
            "first_row of sample 0 is 1",
        ),
    ],
)
def test_the_table_of_samples(tmp_path, place, change, number, message):
    table = pq.ParquetFile(ROOT / "tests/golden" / place / "samples.parquet").read()
    sink = io.BytesIO()
    pq.write_table(pa.table(change(table.to_pydict())), sink)
    faults = rewritten(
        ROOT / "tests/golden" / place, tmp_path / "cache", lambda columns: None, samples=sink.getvalue()
    )
    assert any(message in line and f"invariant {number}" in line for line in faults), faults
