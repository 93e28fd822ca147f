"""Packed caches that were frozen stay readable, and docs/format.md is enough to read them.

tests/support/plain_packed.py is a reader written from that document alone. If one of these fails, mend the code or the
document, not tests/golden.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch

from softcache.cache.codecs import PackedCodec
from softcache.cache.manifest import diff_manifests
from softcache.labels import SoftLabels
from softcache.labels.sparsify import hybrid, sample, top_k, top_p
from softcache.reader.open import open_cache
from softcache.runs import capture_labels, open_data, open_teacher, train_student
from softcache.teacher.capture.plan import plan_manifest
from softcache.tools.verify.teacher import verify_units
from tests.golden.make import (
    ARRAYS,
    NUM_SAMPLES,
    NUM_VIEWS,
    PACKED_COLUMNS,
    STEP,
    TEMPERATURES,
    K,
    decode_plainly,
    main,
    packed_config,
    read_plainly,
)
from tests.support import plain_packed
from tests.support.caches import ROOT

GOLDEN = ROOT / "tests" / "golden" / "v1-packed"
LAST_BIT = 2.0**-22
"""Of a tail's size: two readers add its terms in different orders."""


@pytest.fixture(params=["zarr", "parquet"])
def store(request):
    return request.param


@pytest.fixture
def expected(store):
    with np.load(GOLDEN / "expected_packed.npz") as file:  # allow_pickle is off unless it is asked for
        return {name.removeprefix(f"{store}/"): file[name] for name in file if name.startswith(f"{store}/")}


def rows_of(cache, view):
    labels, prints = cache.read_rows(np.arange(len(cache)), view)
    return {name: getattr(labels, name) for name in ARRAYS} | {"fingerprint": prints}


def assert_same(found, wanted, name):
    """Equal in every bit; of a tail that is predicted, but for the last one."""
    assert found.dtype == wanted.dtype, name
    if name == "log_tail":
        np.testing.assert_array_equal(found[..., 0], wanted[..., 0], err_msg=name)
        np.testing.assert_allclose(found, wanted, rtol=LAST_BIT, atol=LAST_BIT / 4, err_msg=name)
    else:
        np.testing.assert_array_equal(found, wanted, err_msg=name)


def test_what_was_frozen_is_read_number_for_number(store, expected):
    cache = open_cache(str(GOLDEN / store))
    assert (len(cache), cache.num_views, cache.num_classes) == (NUM_SAMPLES, NUM_VIEWS, 10)
    for view in range(NUM_VIEWS):
        for name, found in rows_of(cache, view).items():
            assert_same(found, expected[name][view], name)
    assert cache.read([0]).ids.shape == (1, K)


def test_other_tools_still_find_the_frozen_bytes(store, expected):
    for name, found in read_plainly(GOLDEN / store, PACKED_COLUMNS).items():
        assert found.dtype == expected[name].dtype
        np.testing.assert_array_equal(found, expected[name], err_msg=name)


def test_a_reader_written_from_the_document_reads_the_frozen_records(store, expected):
    for name, found in decode_plainly(GOLDEN / store).items():
        assert_same(found, expected[name], name)


def test_the_frozen_records_say_what_was_packed_within_the_documents_bound(store, expected):
    for name in ARRAYS:
        found, wanted = expected[name], expected[f"whole/{name}"]
        assert (np.abs(found - wanted) > 0).any() == (name != "ids")  # so that the bounds are of something
        if name == "ids":
            np.testing.assert_array_equal(found, wanted)
        elif name == "stats":
            np.testing.assert_allclose(found[..., :3], wanted[..., :3], rtol=2.0**-11, atol=2.0**-25)
            np.testing.assert_array_equal(found[..., 3], wanted[..., 3])
        else:
            np.testing.assert_allclose(found, wanted, rtol=0, atol=STEP / 2 + 1e-6, err_msg=name)


def test_packing_the_same_labels_today_gives_the_same_bytes(store, expected):
    """From frozen float32 labels: another CPU may round the teacher's arithmetic in another way."""
    codec = open_cache(str(GOLDEN / store)).manifest.build_codec()
    for view in range(NUM_VIEWS):
        whole = {name: expected[f"whole/{name}"][view] for name in ARRAYS}
        labels = SoftLabels(**whole, num_classes=10, temperatures=tuple(TEMPERATURES))
        np.testing.assert_array_equal(codec.encode(labels)["record"], expected["record"][view])


def test_labeling_the_same_data_today_gives_the_same_rows(store, tmp_path, expected):
    run = packed_config(store)
    data = open_data(run)
    fresh, _ = capture_labels(run, data, open_teacher(run, data), str(tmp_path / "cache"))
    for view in range(NUM_VIEWS):
        found = rows_of(fresh, view)
        np.testing.assert_array_equal(found["fingerprint"], expected["fingerprint"][view])
        for name in ("log_probs", "log_tail", "target_log_prob"):
            wanted = expected[f"whole/{name}"][view]
            np.testing.assert_allclose(found[name], wanted, rtol=0, atol=STEP / 2 + 1e-4, err_msg=name)
        np.testing.assert_allclose(found["stats"], expected["whole/stats"][view], rtol=2e-3, atol=1e-4)


def test_todays_run_has_the_identity_of_the_frozen_one(store):
    frozen = open_cache(str(GOLDEN / store)).manifest
    run = packed_config(store)
    data = open_data(run)
    today, _ = plan_manifest(data.train, open_teacher(run, data), run.labels, run.capture)
    # The fake teacher's weights are cosines, whose last bit is the CPU's.
    assert [line for line in diff_manifests(today, frozen) if "weights_digest" not in line] == []


def test_every_frozen_unit_still_matches_its_marker(store):
    cache = open_cache(str(GOLDEN / store))
    assert len(cache.markers) == 4
    assert list(verify_units(cache)) == []


def test_a_frozen_manifest_is_written_again_byte_for_byte(store):
    cache = open_cache(str(GOLDEN / store))
    assert cache.manifest.to_bytes() == (GOLDEN / store / "manifest.json").read_bytes()
    for number, marker in cache.markers.items():
        assert marker.to_bytes() == (GOLDEN / store / "units" / f"{number:05d}.json").read_bytes()


def test_a_student_still_learns_from_a_frozen_cache(store, tmp_path):
    run = packed_config(store)
    data, cache = open_data(run), open_cache(str(GOLDEN / store))
    metrics = train_student(run, data, model="linear", labels="cache", cache=cache, out=tmp_path / "student")
    assert metrics["epochs"] == 2


def test_frozen_caches_are_small_and_hold_only_what_a_cache_needs(store):
    files = [path for path in (GOLDEN / store).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 50_000
    named = {s.path for marker in open_cache(str(GOLDEN / store)).markers.values() for s in marker.shards}
    others = {path.relative_to(GOLDEN / store).as_posix() for path in files} - named
    metadata = {path for path in others if path.endswith("zarr.json") or "/temperature/c/" in path}
    units = {f"units/0000{n}.json" for n in range(4)}
    assert others - metadata == {"manifest.json", "samples.parquet"} | units


def test_what_is_frozen_is_never_written_again(monkeypatch):
    monkeypatch.setattr("tests.golden.make.capture", lambda *_: pytest.fail("it labels"))
    for arguments in ([], ["packed"]):
        with pytest.raises(SystemExit, match="never written again"):
            main(arguments)


# -- what the document specifies for records that the frozen ones are not ------------------------------------------------

LONG = tuple(2.0**n for n in range(20))  # here the reach of what is known matters
CLOSE = (1.0, 2.0, 9.99, 9.999, 9.9999, 10.0)  # and here
FROZEN, DEFAULT = tuple(TEMPERATURES), tuple(8 / n for n in range(8, 0, -1))


def labels_of(policy, num_classes, k, grid):
    random = torch.Generator().manual_seed(num_classes + k)
    logits = torch.randn(40, num_classes, generator=random) * 4
    logits[5, 3:] = -torch.inf  # fewer classes are possible than there are slots
    logits[6] = -torch.inf
    logits[6, 1] = 0.0
    how = {"temperatures": grid, "targets_P": torch.arange(40) % num_classes}
    if policy is top_k:
        return top_k(logits, k=k, **how).to_numpy()
    if policy is top_p:
        return top_p(logits, p=0.7, max_k=k, **how).to_numpy()
    how["seeds_P"] = torch.arange(40)
    if policy is sample:
        return sample(logits, draws=k, **how).to_numpy()
    return hybrid(logits, k=2, draws=k - 2, **how).to_numpy()


@pytest.mark.parametrize(
    ("policy", "num_classes", "k", "grid", "how"),
    [
        (top_k, 10, 3, FROZEN, {"step": STEP}),
        (top_k, 10, 10, DEFAULT, {}),
        (top_k, 2, 1, (1.0,), {}),
        (top_k, 129, 1, (1.0, 2.0), {"step": 8.0}),
        (top_k, 256, 7, DEFAULT, {"step": 1 / 100}),
        (top_k, 1000, 70, DEFAULT, {"tail": "float32"}),
        (top_k, 5000, 9, DEFAULT, {"step": None, "tail": "float32"}),
        (top_k, 70_000, 300, (1.0, 4.0), {"step": 1 / 16384}),
        (top_k, 1000, 5, LONG, {}),
        (top_k, 1000, 5, CLOSE, {}),
        (top_p, 300, 20, DEFAULT, {}),
        (hybrid, 300, 12, DEFAULT, {}),
        (sample, 300, 20, DEFAULT, {}),
        (sample, 700, 300, FROZEN, {"step": STEP}),
        (top_k, 1000, 10, DEFAULT, {"tail": "steps", "level": 16}),
        (sample, 300, 20, (1.0,), {"tail": "steps", "step": 1.0}),
    ],
)
@pytest.mark.parametrize("stats", [True, False])
def test_the_document_is_enough_for_any_packed_record(policy, num_classes, k, grid, how, stats):
    labels = labels_of(policy, num_classes, k, grid)
    if not stats:
        labels = dataclasses.replace(labels, stats=None)
    codec = PackedCodec(num_classes, labels.k, grid, stats=stats, sampling=labels.sampling, **how)
    columns = codec.encode(labels)
    record, decoded = columns["record"], codec.decode(columns)
    described = json.loads(json.dumps(codec.to_dict()))
    names = [name for name in (*ARRAYS, "counts", "log_threshold") if getattr(labels, name) is not None]
    for row in range(len(record)):
        plain = plain_packed.decode(described, bytes(record[row]))
        assert set(plain) == set(names)
        for name in names:
            found = getattr(decoded, name)[row]
            assert_same(np.asarray(plain[name], found.dtype), found, name)
    bound = 1e-5 + (codec.step or 0) / 2
    possible = np.isfinite(labels.log_tail)
    assert np.array_equal(possible, np.isfinite(decoded.log_tail))
    np.testing.assert_allclose(decoded.log_tail[possible], labels.log_tail[possible], rtol=0, atol=bound)
