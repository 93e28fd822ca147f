"""Several views of an image come from one decoding of its file, at capture and in a batch, and are what they were."""

from collections import Counter
from copy import deepcopy

import numpy as np
import pytest
import torch

from softcache.cache.create import create_cache
from softcache.cache.storage.open import open_objects
from softcache.data.images import ViewedSource
from softcache.data.sources.images.base import InMemorySource, decodes
from softcache.data.sources.images.custom import Subset
from softcache.data.transforms import Views
from softcache.reader.dataset import HardLabelDataset, SoftLabelDataset
from softcache.runs import capture_labels, open_data, open_teacher
from softcache.teacher.capture import run
from softcache.teacher.capture.estimate import estimate_capture
from softcache.teacher.capture.plan import plan_manifest
from tests.support.caches import digits_config

NUM_SAMPLES, NUM_VIEWS = 100, 3
DECODED: Counter[int] = Counter()


class Files(InMemorySource):
    """Images that count how often each is decoded; like files they come one by one."""

    def image(self, sample):
        DECODED[sample] += 1
        return super().image(sample)


def source(kind=Files):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_SAMPLES, 1, 8, 8), generator=generator, dtype=torch.uint8)
    keys = [f"{number}.png" for number in range(NUM_SAMPLES)]
    return kind("files", images, np.arange(NUM_SAMPLES) % 10, keys, list("0123456789"))


class Loader:
    """torch's DataLoader with its processes in this one: requests are dealt to them in turn."""

    def __init__(self, dataset, *, sampler, num_workers, **_):
        self.loaders = [deepcopy(dataset) for _ in range(max(1, num_workers))]
        self.requests = sampler

    def __iter__(self):
        for number, request in enumerate(self.requests):
            yield self.loaders[number % len(self.loaders)][request]


@pytest.fixture(scope="module")
def config():
    return digits_config(
        views={"erase": 0.5},
        labels={"num_views": NUM_VIEWS},
        capture={
            "unit_samples": 64,
            "chunk_samples": 32,
            "batch_size": 20,
            "device": "cpu",
            "evaluate": False,
        },
    )


class OfSource:
    """What `capture_labels` needs of a run's data."""

    num_classes = 10

    def __init__(self, config, kind):
        self.train = self.evaluation = ViewedSource(source(kind), Views(config.views))


def captured(config, folder, kind, **settings):
    DECODED.clear()
    config = config.model_copy(update={"capture": config.capture.model_copy(update=settings)})
    data = OfSource(config, kind)
    cache, _ = capture_labels(config, data, open_teacher(config, open_data(config)), str(folder))
    return cache, {
        path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_file_is_decoded_once_for_all_its_views(config, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(run, "DataLoader", Loader)
    _, expected = captured(config, tmp_path / "memory", InMemorySource)
    before = Counter(DECODED)
    assert not before
    _, found = captured(config, tmp_path / "files", Files, workers=workers)
    assert found == expected
    first_rows = Counter(range(NUM_SAMPLES))  # the teacher is scored on the plain view before
    assert Counter(DECODED) - first_rows == Counter(range(NUM_SAMPLES))


def test_units_that_are_made_together_are_bounded_by_their_bytes(config, tmp_path, monkeypatch):
    cache, expected = captured(config, tmp_path / "together", Files)
    monkeypatch.setattr(run, "MAX_OPEN_BYTES", 2 * cache.manifest.unit_bytes)
    _, found = captured(config, tmp_path / "two", Files)
    assert found == expected
    assert set(DECODED.values()) == {1 + 2}  # scored, then views 0 and 1, then view 2


def test_units_that_are_made_together_share_their_time_and_an_estimate_measures_single_ones(config, tmp_path):
    settings = config.capture.model_copy(update={"unit_samples": 100, "chunk_samples": 100})
    data, teacher = OfSource(config, Files), open_teacher(config, open_data(config))
    objects = open_objects(str(tmp_path / "cache"), create=True)
    how = {"data": data.train, "teacher": teacher, "labels": config.labels, "settings": settings}
    found = estimate_capture(objects, evaluation=data.evaluation, measure_seconds=0.0, **how)
    assert (found.measured_chunks, found.units) == (2, NUM_VIEWS)
    manifest, samples = plan_manifest(data.train, teacher, config.labels, settings)
    manifest, digest = create_cache(objects, manifest, samples)
    units = []
    report = run.capture(objects, manifest, digest, on_unit=units.append, **how)
    assert [unit.view for unit in units] == [0, 1, 2]
    assert sum(unit.seconds for unit in units) == pytest.approx(report.seconds, rel=0.5)


def test_views_of_one_sample_in_a_batch_come_from_one_decoding(config, tmp_path):
    cache, _ = captured(config, tmp_path / "cache", Files)
    for dataset in (SoftLabelDataset(source(), cache), HardLabelDataset(OfSource(config, Files).train)):
        DECODED.clear()
        pairs = [(4, 1), (7, 1), (4, 2), (9, 2), (4, 1), (7, 0)]
        batch = dataset.fetch(pairs)
        assert Counter({4: 1, 7: 1, 9: 1}) == DECODED
        for row, (sample, view) in enumerate(pairs):
            assert torch.equal(batch.images[row], dataset[sample, view].images[0])
        DECODED.clear()
        dataset.fetch(pairs[:2])
        assert Counter({4: 1, 7: 1}) == DECODED


def test_a_subset_decodes_as_its_source_does():
    assert decodes(source())
    assert not decodes(source(InMemorySource))
    assert decodes(Subset(source(), 5))
    assert not decodes(Subset(source(InMemorySource), 5))
