"""softcache.testing: what it refuses, what it injects, and that the caches of the second writer pass it."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import softcache.testing
from softcache.cache.create import create_cache
from softcache.cache.manifest import Manifest
from softcache.cache.storage.local import LocalObjects
from softcache.cache.units import check_unit, open_store, publish_unit, read_marker
from softcache.errors import StorageError
from softcache.reader.open import open_cache
from softcache.testing import FaultyObjects, Killed, schema, validate, vectors
from softcache.testing.format import FormatContract
from tests.golden.vectors import SCHEMA_FILES, VECTORS
from tests.support.caches import ROOT
from tests.support.plain_writer import write_images, write_tokens

GOLDEN = ROOT / "tests/golden"
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module", params=["zarr", "parquet"])
def images(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "cache"
    keys, targets = [f"image {n}" for n in range(13)], np.arange(13) % 7
    pixels = RANDOM.integers(0, 256, (2, 13, 1, 4, 4), np.uint8)
    logits = RANDOM.normal(size=(2, 13, 7))
    write_images(folder, request.param, keys, targets, pixels, logits, settings={}, teacher="another's")
    return folder


@pytest.fixture(scope="module", params=["zarr", "parquet"])
def tokens(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "cache"
    tokens = [RANDOM.integers(0, 50, length).astype(np.int32) for length in RANDOM.integers(2, 30, 23)]
    logits = [RANDOM.normal(size=(len(document) - 1, 50)) for document in tokens]
    write_tokens(folder, request.param, [f"text {n}" for n in range(23)], tokens, logits, teacher="another's")
    return folder


class TestImagesOfTheSecondWriter(FormatContract):
    @pytest.fixture
    def cache_url(self, images):
        return images


class TestTokensOfTheSecondWriter(FormatContract):
    @pytest.fixture
    def cache_url(self, tokens):
        return tokens


class TestFrozenCells(FormatContract):
    @pytest.fixture(params=["zarr", "parquet"])
    def cache_url(self, request):
        return GOLDEN / "v1-cells" / request.param


class TestFrozenFoldedMarkers(FormatContract):
    @pytest.fixture
    def cache_url(self):
        return GOLDEN / "v1-folded" / "parquet"


# -- validate, schema, vectors ---------------------------------------------------------------------------------


def test_a_fault_is_a_line_that_names_its_invariant(tmp_path):
    shutil.copytree(GOLDEN / "v1/parquet", tmp_path / "cache")
    path = tmp_path / "cache/parquet/00002.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    (line,) = validate(tmp_path / "cache")
    assert "invariant I5: an object has the size and sha256 of its marker" in line
    assert validate(open_cache(GOLDEN / "v1/zarr")) == []


def test_what_is_shipped_is_what_is_published():
    assert (Path(softcache.testing.__file__).parent / "vectors.json").read_bytes() == VECTORS.read_bytes()
    assert vectors().keys() >= {"fingerprints", "packed", "tails"}
    for name, path in SCHEMA_FILES.items():
        assert schema(name) == json.loads(path.read_bytes())


def test_pytest_is_imported_by_the_contracts_alone():
    importers = set()
    for path in Path(softcache.testing.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", [])] + [getattr(node, "module", None)]
            if "pytest" in names:
                importers.add(path.stem)
    assert importers == {"storage", "format"}


# -- the store that injects faults -------------------------------------------------------------------------------


def faulty(folder, **how):
    return FaultyObjects(LocalObjects(folder, create=True), **how)


def test_each_fault_does_what_its_name_means(tmp_path):
    store = faulty(
        tmp_path,
        at={("put", 0): "refused", ("put", 1): "lost", ("put", 2): "killed", ("put", 3): "killed_after"},
    )
    for number, error in enumerate((StorageError, StorageError, Killed, Killed)):
        with pytest.raises(error):
            store.put(f"{number}", b"x")
    assert store.objects.list("") == ["1", "3"]
    assert store.injected == {"refused": 1, "lost": 1, "killed": 1, "killed_after": 1}
    again = faulty(tmp_path, rates={"repeated": 1.0})
    assert again.put_if_absent("new", b"1") is False, "the answer to the second request"
    assert again.get("new") == b"1"
    late = faulty(tmp_path, lag=3)
    late.put("late", b"1")
    assert [("late" in late.list("")) for _ in range(4)] == [False, False, True, True]


def test_a_seed_gives_the_same_faults(tmp_path):
    def met(seed):
        store, out = faulty(tmp_path, seed=seed, rates={"refused": 0.3}), []
        for number in range(40):
            try:
                store.put(f"{number}", b"")
                out.append(True)
            except StorageError:
                out.append(False)
        return out

    assert met(1) == met(1) != met(2)
    assert 4 < met(1).count(False) < 24


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_a_unit_is_finished_or_absent_whatever_write_is_the_last(tmp_path, store):
    """Before each put, and after, refused at, or without an answer to the first and the last; a rerun makes the same bytes."""
    frozen = open_cache(GOLDEN / "v1" / store)
    samples = (GOLDEN / "v1" / store / "samples.parquet").read_bytes()
    manifest: Manifest = frozen.manifest
    unit = manifest.plan.unit(1)
    columns = open_store(manifest, LocalObjects(GOLDEN / "v1" / store)).read(unit, unit.start, unit.stop)
    clean = LocalObjects(tmp_path / "clean", create=True)
    _, digest = create_cache(clean, manifest, samples)
    marker = publish_unit(clean, open_store(manifest, clean), digest, unit, columns)
    puts = len(marker.shards) + 1
    for fault in ("killed", "killed_after", "refused", "lost"):
        for number in range(puts) if fault == "killed" else (0, puts - 1):
            folder = tmp_path / f"{fault}-{number}"
            objects = LocalObjects(folder, create=True)
            create_cache(objects, manifest, samples)
            store_of = FaultyObjects(objects, at={("put", number): fault})
            with pytest.raises((Killed, StorageError)):
                publish_unit(store_of, open_store(manifest, objects), digest, unit, columns)
            found = read_marker(objects, manifest, digest, 1)
            is_done = number == puts - 1 and fault in ("killed_after", "lost")
            assert (found == marker) if is_done else found is None
            assert publish_unit(objects, open_store(manifest, objects), digest, unit, columns) == marker
            check_unit(objects, marker)
