"""The join: the right label with the right sample, or an error that names the sample."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from softcache import SoftLabelDataset, open_cache
from softcache.errors import (
    AlignmentError,
    CacheNotFoundError,
    CorruptionError,
    IncompleteCacheError,
    ManifestError,
)
from softcache.runs import open_data
from tests.support.caches import digits_config, make_cache


class Renamed:
    """A source with one thing changed; everything else is passed through."""

    def __init__(self, source, *, digest=None, order=None, image=None, target=None):
        self._source, self._order, self._image, self._target = source, order, image, target
        self.digest = digest or source.digest
        self.name, self.num_classes, self.class_names = source.name, source.num_classes, source.class_names

    def _at(self, sample):
        return sample if self._order is None else int(self._order[sample])

    def __len__(self):
        return len(self._source if self._order is None else self._order)

    def key(self, sample):
        return self._source.key(self._at(sample))

    def keys(self):
        return [self.key(sample) for sample in range(len(self))]

    def target(self, sample):
        changed = self._target is not None and sample == self._target
        return (self._source.target(self._at(sample)) + changed) % self.num_classes

    def targets(self):
        return np.array([self.target(sample) for sample in range(len(self))])

    def image(self, sample):
        image = self._source.image(self._at(sample))
        return image ^ 1 if sample == self._image else image


def test_labels_come_back_in_the_order_they_were_asked_for(shared_cache):
    cache = shared_cache[2]
    everything = cache.read(np.arange(300), view=1)
    wanted = np.random.default_rng(0).permutation(300)[:120]
    some = cache.read(wanted, view=1)
    for name in ("ids", "log_probs", "log_tail", "target_log_prob", "stats"):
        assert np.array_equal(getattr(some, name), getattr(everything, name)[wanted]), name
    assert len(cache.read([])) == 0
    assert np.array_equal(cache.read([7, 7, 7], view=1).ids, everything.ids[[7]].repeat(3, 0))


def test_a_small_window_gives_the_same_labels(shared_cache):
    cache = open_cache(shared_cache[2].url, window_blocks=1)
    wanted = np.random.default_rng(1).permutation(300)
    assert np.array_equal(cache.read(wanted).log_tail, shared_cache[2].read(wanted).log_tail)


@pytest.mark.parametrize(("samples", "view"), [([300], 0), ([-1], 0), ([0], 2), ([0], -1)])
def test_rows_outside_of_the_cache(shared_cache, samples, view):
    with pytest.raises(IndexError, match=r"view|sample"):
        shared_cache[2].read(samples, view)


def test_no_cache_there(tmp_path):
    with pytest.raises(CacheNotFoundError, match="run `softcache teacher-logits`"):
        open_cache(tmp_path / "nothing")


def test_a_cache_survives_pickling(shared_cache):
    copy = pickle.loads(pickle.dumps(shared_cache[2]))  # between our own processes only
    assert np.array_equal(copy.read([3, 4]).ids, shared_cache[2].read([3, 4]).ids)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_plain_dataloader_gives_batches_with_their_labels(shared_cache, workers):
    _, data, cache = shared_cache
    dataset = SoftLabelDataset(data.train.source, cache)
    loader = DataLoader(
        dataset,
        batch_size=64,
        shuffle=True,
        collate_fn=None if workers else dataset.collate,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        persistent_workers=workers > 0,  # they see the view of the next epoch, too
    )
    for view in (1, 0):
        dataset.view = view
        seen = []
        for batch in loader:
            expected = cache.read(batch.samples, view)
            assert np.array_equal(batch.labels.to_numpy().ids, expected.ids)
            assert torch.equal(batch.images, data.train.load(batch.samples, view).images)
            assert batch.targets.tolist() == [data.train.source.target(s) for s in batch.samples]
            seen += batch.samples.tolist()
        assert sorted(seen) == list(range(300))


def test_single_items_and_mixed_views(shared_cache):
    _, data, cache = shared_cache
    dataset = SoftLabelDataset(data.train.source, cache)
    assert len(dataset) == 300
    assert dataset[5].samples.tolist() == [5]
    mixed = dataset.fetch([(5, 0), (6, 1)])
    assert torch.equal(mixed.labels.log_tail[1], torch.from_numpy(cache.read([6], 1).log_tail[0]))


# -- what must never pass ----------------------------------------------------------------------------------


def test_a_reordered_source_is_refused_and_the_sample_named(shared_cache):
    _, data, cache = shared_cache
    order = np.arange(300)
    order[[10, 20]] = order[[20, 10]]
    source = Renamed(data.train.source, digest="other", order=order)
    with pytest.raises(
        AlignmentError,
        match=rf"sample 10 was '{data.train.source.key(10)}' when labeled and is '{data.train.source.key(20)}'",
    ):
        SoftLabelDataset(source, cache)


def test_a_shorter_source_is_refused(shared_cache):
    _, data, cache = shared_cache
    with pytest.raises(AlignmentError, match="300 samples were labeled, the source has 299"):
        SoftLabelDataset(Renamed(data.train.source, digest="other", order=np.arange(299)), cache)


def test_changed_ground_truth_is_refused(shared_cache):
    _, data, cache = shared_cache
    with pytest.raises(AlignmentError, match=rf"sample '{data.train.source.key(4)}' had ground truth"):
        SoftLabelDataset(Renamed(data.train.source, digest="other", target=4), cache)


def test_changed_contents_are_refused_by_digest(shared_cache):
    _, data, cache = shared_cache
    with pytest.raises(AlignmentError, match=rf"contents of sample '{data.train.source.key(33)}' changed"):
        SoftLabelDataset(Renamed(data.train.source, digest="other", image=33), cache)


@pytest.mark.parametrize("view", [0, 1])
def test_changed_contents_behind_an_unchanged_digest_are_caught_on_the_batch(shared_cache, view):
    _, data, cache = shared_cache
    dataset = SoftLabelDataset(Renamed(data.train.source, image=33), cache, view=view)
    dataset.fetch(list(range(33)))
    with pytest.raises(
        AlignmentError, match=rf"sample '{data.train.source.key(33)}', view {view}: the teacher saw content"
    ):
        dataset.fetch(list(range(20, 40)))


def test_swapped_samples_behind_an_unchanged_digest_are_caught(shared_cache):
    _, data, cache = shared_cache
    order = np.arange(300)
    order[[10, 20]] = order[[20, 10]]
    dataset = SoftLabelDataset(Renamed(data.train.source, order=order), cache)
    with pytest.raises(AlignmentError, match=data.train.source.key(20)):
        dataset.fetch([10])


def test_the_first_samples_are_checked_even_with_a_share_of_zero(shared_cache):
    _, data, cache = shared_cache
    source = Renamed(data.train.source, image=33)
    with pytest.raises(AlignmentError, match=data.train.source.key(33)):
        SoftLabelDataset(source, cache, fingerprint_fraction=0.0, fingerprint_first=64).fetch([33])
    unchecked = SoftLabelDataset(source, cache, fingerprint_fraction=0.0, fingerprint_first=0)
    assert len(unchecked.fetch([33])) == 1


@pytest.mark.parametrize("change", [{"padding": 2}, {"seed": 5}, {"flip": 0.5}, {"mean": [0.1]}])
def test_another_transform_is_refused(shared_cache, change):
    data = open_data(digits_config(views=change))
    with pytest.raises(AlignmentError, match="its views were made by another transform"):
        SoftLabelDataset(data.train.source, shared_cache[2], views=data.train.views)


def test_a_users_transform_is_replayed_but_never_taken_from_the_cache(tmp_path):
    _, data, cache = make_cache(
        tmp_path / "cache",
        views={"transform": "tests.fakes:inverting_transform", "crop": "none", "padding": 0},
    )
    with pytest.raises(AlignmentError, match="a cache never names code"):
        SoftLabelDataset(data.train.source, cache)
    batch = SoftLabelDataset(data.train.source, cache, views=data.train.views, view=1)[3]
    assert torch.equal(batch.images[0], 255 - data.train.source.image(3))


# -- damage ------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path, shared_cache):
    shutil.copytree(shared_cache[2].url, tmp_path / "cache")
    return tmp_path / "cache"


def shards(url):
    return sorted(p for p in (url / "labels.zarr").rglob("*") if p.is_file() and "/c/" in p.as_posix())


def read_everything(url):
    cache = open_cache(url)
    return [cache.read(range(300), view) for view in range(2)]


def test_a_flipped_bit_in_any_shard_is_refused_where_it_is_read(damaged):
    for path in shards(damaged):
        if "temperature" in path.as_posix():
            continue
        good = path.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 4
        path.write_bytes(bad)
        with pytest.raises(CorruptionError, match=r"unit \d+"):
            read_everything(damaged)
        path.write_bytes(good)
    read_everything(damaged)


def test_a_truncated_and_a_missing_shard(damaged):
    path = shards(damaged)[0]
    good = path.read_bytes()
    path.write_bytes(good[:-7])
    with pytest.raises(CorruptionError, match="bytes"):
        read_everything(damaged)
    path.unlink()
    with pytest.raises(CorruptionError, match="missing"):
        read_everything(damaged)


def test_an_unmarked_unit_is_not_trusted(damaged):
    (damaged / "units" / "00002.json").unlink()
    cache = open_cache(damaged)
    assert cache.missing_units == [2]
    assert len(cache.read(range(128))) == 128
    with pytest.raises(
        IncompleteCacheError, match=r"unit 2 \(view 0, samples 128 to 191\) is not finished; 1 of 10"
    ):
        cache.read([130])


def test_a_marker_of_another_unit_is_not_trusted(damaged):
    shutil.copy(damaged / "units" / "00001.json", damaged / "units" / "00002.json")
    with pytest.raises(ManifestError, match="unit"):
        open_cache(damaged).read([130])


def test_an_edited_manifest_does_not_match_its_markers(damaged):
    path = damaged / "manifest.json"
    path.write_text(path.read_text().replace("tests.fakes:known", "tests.fakes:other"))
    with pytest.raises(ManifestError, match="manifest"):
        open_cache(damaged).read([0])


@pytest.mark.parametrize("place", ["../elsewhere", "/etc", "a/../../b"])
def test_a_manifest_whose_paths_leave_the_cache(damaged, place):
    path = damaged / "manifest.json"
    path.write_text(path.read_text().replace('"labels.zarr"', f'"{place}"'))
    with pytest.raises(ManifestError, match="data"):
        open_cache(damaged)
