"""What breaks in other soft-label caches for vision must not break here; each test names the peer and its bug.

Bugs that other files put to the test already: reordered and swapped samples (TinyViT's 404-byte records, by
position; test_reader, test_imagefolder), float16 mass above one (TinyViT; test_labels), a kill that loses an epoch
(TinyViT; test_capture), other weights under the same name (nvalchemi; test_capture), an update of NumPy or torch that
cannot read what was written (TinyViT, FKD; test_golden).
"""

import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.data import DataLoader

from softcache.cache import units
from softcache.data.sources.images.base import InMemorySource
from softcache.errors import IdentityError, SoftcacheError, StorageError
from softcache.reader.dataset import SoftLabelDataset
from softcache.reader.open import open_cache
from softcache.reader.order import BlockShuffle
from softcache.runs import cache_is_ready, capture_labels, open_data, open_teacher, train_student
from softcache.stages.verify import verify
from softcache.tools.verify.teacher import verify_against_teacher, verify_units
from tests.support.caches import digits_config, make_cache

SMALL = {"max_train_samples": 100, "max_eval_samples": 10}  # two units for each of two views

# -- ids and values ----------------------------------------------------------------------------------------

EDGES = (2_047, 2_049, 32_767, 32_768, 39_999, 65_535, 65_536, 69_999)


class EdgeTeacher(nn.Module):
    """Sure of the classes at the edges of number formats, the highest first; a little of the image in each."""

    def __init__(self, num_classes):
        super().__init__()
        self.register_buffer("logits", torch.zeros(num_classes))
        edges = [edge for edge in EDGES if edge < num_classes]
        self.logits[edges] = torch.linspace(9, 12, len(edges))

    def forward(self, images_BCHW):
        return self.logits + images_BCHW.flatten(1).mean(1, keepdim=True) * self.logits / 100


def edges(num_classes):
    return EdgeTeacher(num_classes)


def wide_source(split, num_classes):
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 4, 4), np.uint8)
    known = [edge for edge in EDGES if edge < num_classes]
    targets = [known[number % len(known)] for number in range(20)]
    names = [str(number) for number in range(num_classes)]
    return InMemorySource(
        f"wide/{split}", torch.from_numpy(images), targets, list(map(str, range(20))), names
    )


def wide_2050(split):
    return wide_source(split, 2_050)


def wide_40000(split):
    return wide_source(split, 40_000)


def wide_70000(split):
    return wide_source(split, 70_000)


@pytest.mark.parametrize("store", ["zarr", "parquet"])
@pytest.mark.parametrize("num_classes", [2_050, 40_000, 70_000])
def test_class_ids_come_back_whatever_their_size(tmp_path, num_classes, store):
    """FKD stores ids as float16 (2049 becomes 2048); TinyViT as int16 (32768 becomes -32768)."""
    config, data, cache = make_cache(
        tmp_path / "cache",
        source={"name": f"tests.peers.test_images:wide_{num_classes}"},
        teacher={"model": "tests.peers.test_images:edges"},
        capture={"store": store},
    )
    wanted = sorted((edge for edge in EDGES if edge < num_classes), reverse=True)[:4]
    for view in range(2):
        ids = cache.read(range(20), view).ids.astype(np.int64)
        assert (ids[:, : len(wanted)] == wanted).all()
    # The class of the ground truth is looked up by its id as well.
    logits_PV = open_teacher(config, data).logits(data.train.source.image(0)[None].expand(20, -1, -1, -1))
    exact = torch.log_softmax(logits_PV.double(), -1)[0, data.train.source.target(0)]
    assert cache.read([0]).target_log_prob[0] == pytest.approx(float(exact), abs=1e-5)


def test_what_was_not_kept_is_neither_dropped_nor_renormalised_away(shared_cache):
    """TinyViT and FKD keep K probabilities and forget the rest, so that a softened target is too sharp."""
    config, data, cache = shared_cache
    logits_PV = open_teacher(config, data).logits(data.train.load(range(300), 1).images).double()
    labels = cache.read(range(300), view=1)
    ids = torch.from_numpy(labels.ids.astype(np.int64))
    for temperature in (1.0, 4.0):
        truth = torch.softmax(logits_PV / temperature, -1).gather(1, ids)
        softened = labels.at_temperature(temperature)
        np.testing.assert_allclose(np.exp(softened.log_probs), truth, atol=1e-3)
        np.testing.assert_allclose(np.exp(softened.log_tail), 1 - truth.sum(1), atol=1e-3)
    renormalised = truth / truth.sum(1, keepdim=True)
    assert (renormalised - truth).abs().max() > 0.1, "which is what dropping the tail would have cost"


class HalfMasked(nn.Module):
    def forward(self, images_BCHW):
        logits = images_BCHW.flatten(1)[:, 20:30] * 2.0
        logits[:, ::2] = -torch.inf
        return logits


def half_masked():
    return HalfMasked()


def test_classes_that_the_teacher_rules_out_stay_ruled_out(tmp_path):
    """ReLabel fills classes that it has no score for with a logit of 0, which softening lifts above real ones."""
    config, data, cache = make_cache(
        tmp_path / "cache", teacher={"model": "tests.peers.test_images:half_masked"}, labels={"k": 7}
    )
    logits_PV = open_teacher(config, data).logits(data.train.load(range(300), 0).images).double()
    softened = cache.read(range(300)).at_temperature(8.0)
    truth = torch.softmax(logits_PV / 8, -1).numpy()
    found = np.zeros((300, 10))
    np.put_along_axis(found, softened.ids.astype(np.int64), np.exp(softened.log_probs), 1)
    np.testing.assert_allclose(found, truth, atol=1e-3)
    assert (found[:, ::2] == 0).all()
    assert np.isneginf(softened.log_tail).all()


def test_the_temperature_is_the_students_choice(shared_cache, tmp_path):
    """TinyViT stores probabilities at T = 1 without their tail; another temperature needs the teacher again."""
    cache, losses = shared_cache[2], []
    for temperature in (1, 6):
        config = digits_config(loss={"temperature": temperature, "alpha": 1.0}, train={"epochs": 1})
        data = open_data(config)
        assert cache_is_ready(config, data, cache.url)
        out = tmp_path / str(temperature)
        student = train_student(config, data, model="linear", labels="cache", cache=cache, out=out)
        live = train_student(
            config,
            data,
            model="linear",
            labels="online",
            teacher=open_teacher(config, data),
            out=tmp_path / f"live{temperature}",
        )
        # The first epoch of either sees view 0; the bucketed loss is a little below the dense one.
        losses.append(student["history"][0]["train_loss"])
        assert losses[-1] <= live["history"][0]["train_loss"] * 1.01
    assert losses[0] != losses[1]


def test_a_reader_cannot_assume_another_record_size(shared_cache, tmp_path):
    """TinyViT's records of 404 bytes do not say that K is 100: a reader set to another K reads other bytes."""
    cache = shared_cache[2]
    assert open_cache(cache.url).read([0]).k == 4, "the reader finds it in the cache"
    config = digits_config(labels={"k": 3})
    data = open_data(config)
    with pytest.raises(IdentityError, match=r"labels\.k: 3 in the config, 4 in the cache"):
        train_student(config, data, model="linear", labels="cache", cache=cache, out=tmp_path / "student")
    with pytest.raises(IdentityError, match=r"labels\.k: 3 in the config, 4 in the cache"):
        cache_is_ready(config, data, cache.url)


# -- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_a_half_written_file_is_written_again(tmp_path, monkeypatch, store):
    """FKD skips a file that exists, so one that a crash cut short stays for ever."""
    real = units._failpoint

    def crash(name):
        if name == "after_shard":
            raise StorageError("the power went")

    monkeypatch.setattr(units, "_failpoint", crash)
    with pytest.raises(StorageError, match="the power went"):
        make_cache(tmp_path / "cache", source=SMALL, capture={"store": store})
    monkeypatch.setattr(units, "_failpoint", real)
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and _is_shard(path)]
    assert left
    assert not list((tmp_path / "cache" / "units").glob("*.json"))
    for path in left:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # a disk that lied about its flush
    again = make_cache(tmp_path / "cache", source=SMALL, capture={"store": store})[2]
    assert list(verify_units(again)) == []
    other = make_cache(tmp_path / "other", source=SMALL, capture={"store": store})[2]
    assert _bytes_of(again) == _bytes_of(other)


def _is_shard(path):
    in_zarr = "/c/" in path.as_posix() and "temperature" not in path.as_posix()
    return in_zarr or path.parent.name == "parquet"


def _bytes_of(cache):
    shards = [shard.path for marker in cache.markers.values() for shard in marker.shards]
    return {path: (Path(cache.url) / path).read_bytes() for path in shards}


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_a_truncated_file_is_found_and_one_rerun_heals_it(tmp_path, store):
    """FKD has no checksum and no rerun that would mend a truncated file."""
    config, data, cache = make_cache(tmp_path / "cache", source=SMALL, capture={"store": store})
    before = _bytes_of(cache)
    path = tmp_path / "cache" / cache.markers[3].shards[0].path
    path.write_bytes(path.read_bytes()[:-20])
    (fault,) = verify_units(open_cache(cache.url))
    assert "unit 3" in fault
    (tmp_path / "cache" / "units" / "00003.json").unlink()  # as the message advises
    healed, report = capture_labels(config, data, open_teacher(config, data), cache.url)
    assert (report.units_done, report.units_found) == (1, 3)
    assert _bytes_of(healed) == before


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_no_file_of_a_cache_can_run_code(tmp_path, store):
    """FKD, ReLabel, torchdistill and apple/ml-dr store pickles: to open such a cache is to run its author's code."""
    _, _, cache = make_cache(tmp_path / "cache", source=SMALL, capture={"store": store})
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    pickle.loads(bomb)
    assert (tmp_path / "ran").exists(), "the bomb is real"
    (tmp_path / "ran").unlink()
    shard = cache.markers[0].shards[0].path
    for place in ("manifest.json", "samples.parquet", "units/00000.json", shard):
        path = tmp_path / "cache" / place
        good = path.read_bytes()
        path.write_bytes(bomb)
        with pytest.raises(SoftcacheError):
            _read_everything(open_cache(cache.url, verify=False))
        path.write_bytes(good)
    _read_everything(open_cache(cache.url, verify=False))
    assert not (tmp_path / "ran").exists()


def _read_everything(cache):
    cache.samples_table()
    for view in range(cache.num_views):
        cache.read(range(len(cache)), view)


def test_a_loader_process_gets_a_url_and_no_table_of_keys(shared_cache, tmp_path):
    """TinyViT's loader processes parse every key again in every epoch: 271 MB each for ImageNet."""
    shutil.copytree(shared_cache[2].url, tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    _read_everything(cache)
    packed = pickle.dumps(cache)
    assert len(packed) < 1000, "decoded blocks stay where they are"
    (tmp_path / "cache" / "samples.parquet").unlink()
    copy = pickle.loads(packed)
    assert np.array_equal(copy.read([299, 0], 1).ids, shared_cache[2].read([299, 0], 1).ids)


def test_the_checker_has_a_threshold_and_a_failing_exit(tmp_path):
    """TinyViT's checker has no threshold and no failing exit."""
    config, data, cache = make_cache(tmp_path / "cache", source=SMALL)
    same = verify_against_teacher(
        cache, data.train, open_teacher(config, data), num_rows=64, threshold_nats=1e-4, seed=1
    )
    assert list(same) == []
    other = digits_config(teacher={"model": "tests.fakes:known_scaled"})
    faults = list(
        verify_against_teacher(
            cache, data.train, open_teacher(other, data), num_rows=64, threshold_nats=1e-4, seed=1
        )
    )
    assert len(faults) > 32
    assert all("the teacher disagrees with its record: KL" in fault for fault in faults)
    assert CliRunner().invoke(verify, [cache.url]).exit_code == 0
    path = tmp_path / "cache" / cache.markers[3].shards[0].path
    path.write_bytes(path.read_bytes()[::-1])
    assert CliRunner().invoke(verify, [cache.url]).exit_code == 1


# -- views and order ---------------------------------------------------------------------------------------


def careless_transform():
    """A user's augmentation that draws from every global generator."""

    def transform(image):
        image = image.roll(random.randrange(8), -1).roll(int(np.random.randint(8)), -2)  # noqa: NPY002
        return image ^ torch.randint(0, 64, image.shape, dtype=torch.uint8)

    return transform


def test_random_views_do_not_depend_on_the_loader_processes(tmp_path):
    """TinyViT replays by a seed of the process's generators; drawn in another order, the crop is another one."""
    views = {"crop": "none", "padding": 0, "transform": "tests.peers.test_images:careless_transform"}
    _, data, cache = make_cache(
        tmp_path / "cache", views=views, source={"max_train_samples": 60}, capture={"workers": 0}
    )
    dataset = SoftLabelDataset(data.train.source, cache, views=data.train.views, view=1)
    expected = data.train.load(range(60), 1).images
    assert all(not torch.equal(expected[n], data.train.source.image(n)) for n in range(60))
    for workers, batch_size in ((0, 60), (0, 7), (2, 9)):
        random.seed(workers)
        torch.manual_seed(batch_size)
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=True,
            collate_fn=dataset.collate,
            num_workers=workers,
            multiprocessing_context="forkserver" if workers else None,
        )
        seen = 0
        for batch in loader:  # every row is compared with its fingerprint on the way
            assert torch.equal(batch.images, expected[batch.samples])
            seen += len(batch)
        assert seen == 60


def test_a_recorded_flip_is_a_flip_of_the_students_image(tmp_path):
    """ReLabel replays the crop and nothing else: the label of a mirrored image meets the plain one."""
    views = {"crop": "none", "padding": 0, "flip": 0.5}
    config, data, cache = make_cache(
        tmp_path / "cache", views=views, capture={"codec": {"values": "float32"}}
    )
    source, teacher = data.train.source, open_teacher(config, data)
    batch = SoftLabelDataset(source, cache, view=1).fetch(list(range(300)))
    flips = [data.train.views.parameters(source.key(n), 1, 8, 8).flip for n in range(300)]
    assert 100 < sum(flips) < 200
    for sample, flip in enumerate(flips):
        image = source.image(sample)
        assert torch.equal(batch.images[sample], image.flip(-1) if flip else image)
    dense_PV = torch.log_softmax(teacher.logits(batch.images), -1)
    found = dense_PV.gather(1, batch.labels.ids.long())
    torch.testing.assert_close(batch.labels.log_probs, found, atol=1e-5, rtol=0)
    plain_PV = torch.log_softmax(teacher.logits(torch.stack([source.image(n) for n in range(300)])), -1)
    assert (plain_PV.gather(1, batch.labels.ids.long()) - found).abs().max() > 0.5, "a wrong flip would show"


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_the_last_incomplete_batch_is_labeled_and_learned_from(tmp_path, store):
    """A writer or loader with drop_last leaves out what does not fill its last batch; whittle keeps every 10th batch."""
    _, data, cache = make_cache(
        tmp_path / "cache",
        source={"max_train_samples": 37},
        capture={"store": store, "batch_size": 16, "unit_samples": 20, "chunk_samples": 10},
    )
    assert not cache.missing_units
    dataset = SoftLabelDataset(data.train.source, cache)
    order = BlockShuffle(
        cache.samples_in,
        batch_size=16,
        view_of=lambda epoch: epoch,
        block_samples=10,
        window_blocks=2,
        seed=0,
    )
    for epoch in range(2):
        order.load_state_dict({"epoch": epoch, "step": 0})
        batches = list(DataLoader(dataset, batch_sampler=order, collate_fn=dataset.collate))
        assert [len(batch) for batch in batches] == [16, 16, 5]
        assert sorted(np.concatenate([batch.samples for batch in batches])) == list(range(37))
        last = batches[-1]
        assert np.array_equal(last.labels.to_numpy().ids, cache.read(last.samples, epoch).ids)
