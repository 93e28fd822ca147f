"""Caches of mixed views: the teacher labels the mixed image, every kind of student sees it again, both classes count."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from timm.data import create_loader

from softcache.data.batch import ranges
from softcache.errors import AlignmentError, ConfigError, LabelError
from softcache.labels import MixedTargets
from softcache.reader.dataset import SoftLabelDataset, cached_views
from softcache.runs import open_data, open_teacher
from softcache.runs.batches import cached_batches
from softcache.runs.student import train_student
from softcache.stages.inspect import inspect_command
from softcache.student.integrations.lightning import SoftLabelDataModule, SoftLabelModule
from softcache.student.integrations.timm import TimmDataset, TimmLoss
from softcache.tools.fidelity.teacher_logits import rerun_teacher
from softcache.tools.fuse import FusionSettings, fuse_caches
from tests.support.caches import digits_config, make_cache

MIX = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_probability": 0.9}
DENSE = {"policy": "dense", "num_views": 3}


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    return make_cache(
        tmp_path_factory.mktemp("mixed") / "cache", views=MIX, labels={"policy": "dense", "num_views": 3}
    )


def dense_truth(targets, num_classes=10):
    if isinstance(targets, torch.Tensor):
        return F.one_hot(targets, num_classes).float()
    first, second = F.one_hot(targets.first, num_classes), F.one_hot(targets.second, num_classes)
    return targets.shares[:, None] * first + (1 - targets.shares)[:, None] * second


def test_labels_and_fingerprints_are_of_the_mixed_pixels(captured):
    config, data, cache = captured
    teacher = open_teacher(config, data)
    dataset = SoftLabelDataset(data.train.source, cache)  # with the views of the manifest
    assert cached_views(cache).digest == data.views.digest
    for view in (0, 2):
        for samples in (np.arange(300), np.array([250, 3, 3, 77])):
            batch = dataset.load(samples, view)
            assert isinstance(batch.targets, MixedTargets) == (view > 0)
            expected = teacher.logits(batch.images).log_softmax(1)
            found = torch.full_like(expected, torch.nan).scatter_(
                1, batch.labels.ids.long(), batch.labels.log_probs.float()
            )
            assert torch.allclose(found, expected, atol=2e-3, rtol=2e-3)
    own = np.log(
        np.take_along_axis(
            teacher.logits(batch.images).softmax(1).numpy(), batch.targets.first.numpy()[:, None], 1
        )
    )
    assert np.allclose(batch.labels.target_log_prob, own[:, 0], atol=2e-3, rtol=2e-3)
    assert cache.manifest.mixes_images
    other = digits_config(views=MIX | {"seed": 1}, labels=DENSE)
    with pytest.raises(AlignmentError, match=r"views\.seed: 0 there, 1 here"):
        SoftLabelDataset(open_data(other).train, cache)


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_number_of_ranks_trains_on_the_same_mixed_images(captured, ranks):
    config, data, cache = captured
    feed = cached_batches(config, data, cache, 3, False)
    feed.order.epoch = 1
    requests = list(feed.order)
    whole = [feed.dataset.load(request.samples, request.view) for request in requests]
    for rank in range(ranks):
        feed.order._rank, feed.order._num_ranks = rank, ranks
        for request, batch in zip(list(feed.order), whole, strict=True):
            mine = feed.dataset.load(request.samples, request.view)
            rows = [batch.samples.tolist().index(sample) for sample in request.samples]
            assert torch.equal(mine.images, batch.images[rows])
            assert torch.equal(mine.targets.shares, batch.targets.shares[rows])
    feed.order._rank, feed.order._num_ranks = 0, 1


def expected_loss(logits, batch, temperature, alpha):
    hard = -(dense_truth(batch.targets) * logits.log_softmax(1)).sum(1)
    p = torch.zeros_like(logits).scatter_(1, batch.labels.ids.long(), batch.labels.log_probs.float().exp())
    p = (p.clamp(min=1e-30).log() / temperature).softmax(1)
    soft = (p * (p.log() - (logits / temperature).log_softmax(1))).sum(1)
    return float(((1 - alpha) * hard + alpha * temperature**2 * soft).mean())


def test_native_timm_and_lightning_students_have_one_loss(captured):
    config, data, cache = captured
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    loss = config.loss
    batch = SoftLabelDataset(data.train, cache).load(np.arange(40), 1)
    normalized = data.normalize()(batch.images)
    with torch.no_grad():
        logits = model(normalized)
        expected = expected_loss(logits, batch, loss.temperature, loss.alpha)
        task = data.task(config, "linear")
        assert float(task.loss(model, batch)) == pytest.approx(expected, rel=2e-3)
        module = SoftLabelModule(model, cache, loss=loss)
        assert float(module._task.loss(model, batch)) == pytest.approx(expected, rel=2e-3)
        timm_data = TimmDataset(data.train.source, cache)
        timm_data.set_epoch(1)
        loader = create_loader(
            timm_data, timm_data.input_size, 40, no_aug=True, mean=timm_data.mean, std=timm_data.std, num_workers=0,
            device=torch.device("cpu"), use_prefetcher=True, persistent_workers=False,
        )  # fmt: skip
        images, targets = next(iter(loader))
        assert float(TimmLoss(timm_data, loss)(model(images), targets)) == pytest.approx(expected, rel=2e-3)
        timm_data.set_epoch(0)
        plain = timm_data.rows.unpack(
            torch.stack([target for _, target in timm_data.__getitems__(list(range(9)))])
        )[1]
        assert plain.shares.eq(1).all()
    lightning = SoftLabelDataModule(data.train.source, cache, batch_size=50)._dataset.load(np.arange(40), 1)
    assert torch.equal(lightning.images, batch.images)


def test_students_of_the_cache_the_ground_truth_and_an_online_teacher_learn(captured, tmp_path):
    config, data, cache = captured
    kinds = {"cache": {"cache": cache}, "ground_truth": {}, "online": {"teacher": open_teacher(config, data)}}
    for labels, more in kinds.items():
        metrics = train_student(config, data, model="linear", labels=labels, out=tmp_path / labels, **more)
        assert metrics["history"][-1]["train_loss"] < metrics["history"][0]["train_loss"] * 1.2
    batches = list(ranges(len(data.evaluation), 50))
    assert isinstance(data.evaluation.load(batches[0], 0).targets, torch.Tensor)


def test_what_needs_one_class_or_the_image_alone_is_refused(captured):
    config, data, cache = captured
    for name in ("dkd", "nkd"):
        with pytest.raises(
            ValueError, match=rf"loss\.name: {name} reads the ground-truth class, and an image of"
        ):
            digits_config(views=MIX, loss={"name": name})
    with pytest.raises(ValueError, match=r"loss\.weights\.by: gap reads the ground-truth class"):
        digits_config(views=MIX, loss={"weights": {"by": "gap"}})
    digits_config(views=MIX | {"mix_probability": 0}, loss={"name": "dkd"})
    with pytest.raises(LabelError, match="targets of mixed images"):
        TimmLoss(TimmDataset(data.train.source, cache), digits_config(loss={"name": "dkd"}).loss)(
            torch.zeros(1, 10), TimmDataset(data.train.source, cache)[0][1][None]
        )
    with pytest.raises(ConfigError, match=r"reader\.num_views: 2.*has views of two images mixed"):
        cached_batches(config, _Alone(data), cache, 2, False)


class _Alone:
    """Data of a student that sees its own image, not the teacher's views."""

    def __init__(self, data):
        self.train = data.train

    def replays_teacher_views(self, config):
        return False


def test_caches_are_not_fused_by_a_truth_of_two_classes(captured, tmp_path):
    _, _, other = make_cache(
        tmp_path / "other", views=MIX, labels=DENSE, teacher={"model": "tests.fakes:known_scaled"}
    )
    with pytest.raises(
        LabelError, match="rule 'best' weighs teachers by the ground-truth class; views of cache"
    ):
        fuse_caches(
            [captured[2], other],
            str(tmp_path / "fused"),
            FusionSettings(caches=("a", "b"), rule="best", allow_weak_teachers=True),
        )
    fused = fuse_caches(
        [captured[2], other],
        str(tmp_path / "fused"),
        FusionSettings(caches=("a", "b"), allow_weak_teachers=True),
    )
    assert fused.manifest.mixes_images


def test_tools_count_the_ground_truth_where_there_is_one(captured):
    config, data, cache = captured
    found = json.loads(CliRunner().invoke(inspect_command, [cache.url, "--json"]).stdout)
    assert (found["rows"], found["agreement_rows"]) == (900, 300)
    plain = cache.read(np.arange(300), 0).ids[:, 0]
    assert found["agreement"] == pytest.approx((plain == data.train.source.targets()).mean())
    again = rerun_teacher(cache, data.train, open_teacher(config, data), num_rows=30, seed=0)
    assert again.targets_P.dtype == torch.int64
