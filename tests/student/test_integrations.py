"""Caches in other people's loops: each example learns, labels arrive as they were stored, a stopped run goes on exactly."""

import ast
import os
import runpy
import sys

import numpy as np
import pytest
import timm.data
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from timm.data import create_loader
from torch import nn
from torchvision.transforms import v2

from softcache import MemmapSettings, open_cache
from softcache.config.load import load_config
from softcache.errors import AlignmentError, ConfigError, IncompleteCacheError, LabelError, RunError
from softcache.losses import LossSettings, distillation_loss
from softcache.reader.dataset import SoftLabelDataset
from softcache.runs import capture_labels, make_teacher, open_data, open_teacher
from softcache.student.integrations.lightning import SoftLabelDataModule, SoftLabelModule
from softcache.student.integrations.timm import TimmDataset, TimmImages, TimmLoss
from softcache.student.integrations.timm_rows import LabelRows
from tests.support.caches import ROOT, make_cache

CONFIG = """
[source]
name = "digits"
[views]
crop = "padded"
padding = 1
mean = [0.305]
std = [0.376]
[teacher]
model = "mlp?width=64"
weights = "runs/adapters/teacher/model.safetensors"
[train_teacher]
epochs = 12
batch_size = 64
lr = 1e-2
device = "cpu"
[labels]
k = 5
num_views = 4
[capture]
device = "cpu"
"""


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """The folder of a run.toml and a cache of all digits, by a teacher that knows them."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "adapters.toml").write_text(CONFIG)
    before = os.getcwd()
    os.chdir(folder)
    try:
        config = load_config("adapters.toml")
        data = open_data(config)
        make_teacher(config, data)
        capture_labels(config, data, open_teacher(config, data), str(folder / "cache"))
    finally:
        os.chdir(before)
    return folder


# -- the examples ------------------------------------------------------------------------------------------


def run_example(name, monkeypatch, capsys, *args):
    """Returns the accuracy that the example prints."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    torch.manual_seed(0)
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return float(capsys.readouterr().out.rpartition("accuracy ")[2])


@pytest.mark.parametrize("name", ["torch_loop.py", "lightning_module.py", "timm_train.py"])
def test_an_example_learns(name, labeled, in_tmp, monkeypatch, capsys):
    out = [in_tmp / "out"] if name == "lightning_module.py" else []
    accuracy = run_example(name, monkeypatch, capsys, labeled / "cache", labeled / "adapters.toml", *out)
    assert accuracy > 0.9, "ten classes: a student that learnt nothing has 0.1"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_says_its_command(path):
    text = path.read_text()
    docstring = ast.parse(text).body[0]
    code = [line for line in text.splitlines()[docstring.end_lineno :] if line.strip()]
    assert len(code) <= 30
    assert f"python examples/{path.name} " in docstring.value.value


# -- Lightning ---------------------------------------------------------------------------------------------


class StopAfter(Callback):
    """Saves after so many steps, and dies there."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("power cut")


class Seen(Callback):
    """Notes the samples and the view of every batch."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append((batch.view, batch.samples.tolist()))


def student():
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def fit(shared, folder, *callbacks, ckpt_path=None, epochs=3, trainer=None, **settings):
    """Three epochs of six batches; returns the module and the batches that it saw."""
    _, data, cache = shared
    seen = Seen()
    module = SoftLabelModule(student(), cache, loss=LossSettings(temperature=2.0, alpha=0.7), lr=1e-2)
    loaded = SoftLabelDataModule(
        data.train.source, cache, evaluation=data.evaluation.source, batch_size=50, seed=1, **settings
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_epochs=epochs, callbacks=[seen, *callbacks], default_root_dir=folder, accelerator="cpu", devices=1,
        enable_model_summary=False, num_sanity_val_steps=0, **quiet, **(trainer or {}),
    )  # fmt: skip
    trainer.fit(module, loaded, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return module, seen.batches, trainer


def test_lightning_sees_every_sample_once_an_epoch_and_the_views_in_turn(shared_cache, tmp_path):
    _, batches, _ = fit(shared_cache, tmp_path)
    assert [view for view, _ in batches] == [0] * 6 + [1] * 6 + [0] * 6
    orders = [[s for _, samples in batches[start : start + 6] for s in samples] for start in (0, 6, 12)]
    assert all(sorted(order) == list(range(300)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("step", [4, 6, 7, 12])
def test_lightning_goes_on_at_the_batch_where_it_was_stopped(shared_cache, tmp_path, step):
    """In the middle of an epoch, and at its last batch."""
    module, batches, _ = fit(shared_cache, tmp_path)
    checkpoint = tmp_path / "stopped.ckpt"
    with pytest.raises(RuntimeError, match="power cut"):
        fit(shared_cache, tmp_path, StopAfter(step, checkpoint))
    resumed, rest, trainer = fit(shared_cache, tmp_path, ckpt_path=checkpoint)
    assert rest == batches[step:]
    assert trainer.global_step == 18
    for name, weights in module.state_dict().items():
        assert torch.equal(weights, resumed.state_dict()[name]), name


def test_lightning_begins_the_next_epoch_where_it_ended_one_early(shared_cache, tmp_path):
    """limit_train_batches, with a checkpoint of the end of an epoch: what is left of it is never seen."""
    few = {"limit_train_batches": 4}
    _, batches, _ = fit(shared_cache, tmp_path, trainer=few)
    assert [view for view, _ in batches] == [0] * 4 + [1] * 4 + [0] * 4
    with pytest.raises(RuntimeError, match="power cut"):
        fit(shared_cache, tmp_path, StopAfter(4, tmp_path / "stopped.ckpt"), trainer=few)
    _, rest, trainer = fit(shared_cache, tmp_path, ckpt_path=tmp_path / "stopped.ckpt", trainer=few)
    assert rest == batches[4:]
    assert trainer.global_step == 12


def test_lightning_has_the_epochs_order_and_view_in_loaders_that_it_asks_for_again(shared_cache, tmp_path):
    _, batches, _ = fit(shared_cache, tmp_path)
    again = {"reload_dataloaders_every_n_epochs": 1}
    _, reloaded, _ = fit(shared_cache, tmp_path, trainer=again)
    assert reloaded == batches
    with pytest.raises(RuntimeError, match="power cut"):
        fit(shared_cache, tmp_path, StopAfter(8, tmp_path / "stopped.ckpt"), trainer=again)
    assert fit(shared_cache, tmp_path, ckpt_path=tmp_path / "stopped.ckpt", trainer=again)[1] == batches[8:]


def test_lightning_scores_the_held_out_split_by_samples(shared_cache, tmp_path):
    module, _, trainer = fit(shared_cache, tmp_path, epochs=1)
    _, data, _ = shared_cache
    batch = data.evaluation.load(range(100), 0)
    right = (module.eval()(batch.images).argmax(-1) == batch.targets).float().mean()
    assert float(trainer.callback_metrics["val_accuracy"]) == pytest.approx(float(right), abs=1e-6)


def test_lightning_steps_by_the_loss_of_the_settings(shared_cache):
    _, data, cache = shared_cache
    module = SoftLabelModule(student(), cache, loss=LossSettings(name="jsd", temperature=3.0, alpha=0.5))
    module.log = lambda *args, **kwargs: None
    batch = SoftLabelDataset(data.train.source, cache).fetch([1, 7, 4])
    logits = module.model((batch.images.float() / 255 - 0.3) / 0.4)
    expected = distillation_loss(logits, batch.labels, batch.targets, temperature=3.0, alpha=0.5, loss="jsd")
    assert module.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_lightning_refuses_a_place_in_another_order(shared_cache):
    _, data, cache = shared_cache
    loaders = [
        SoftLabelDataModule(data.train.source, cache, batch_size=50, seed=seed).train_dataloader()
        for seed in (0, 1)
    ]
    with pytest.raises(RunError, match=r"seed 0 in the saved state, 1 here"):
        loaders[1].load_state_dict(loaders[0].state_dict())
    one_view = SoftLabelDataModule(data.train.source, cache, batch_size=50, num_views=1).train_dataloader()
    with pytest.raises(RunError, match=r"num_views 2 in the saved state, 1 here"):
        one_view.load_state_dict(loaders[0].state_dict())
    with pytest.raises(RunError, match=r"cache other in the saved state"):
        loaders[0].load_state_dict(loaders[0].state_dict() | {"cache": "other"})


def test_lightning_refuses_what_it_cannot_do(shared_cache):
    _, data, cache = shared_cache
    moving = LossSettings.model_validate({"temperature_schedule": {"kind": "linear", "end": 2.0}})
    with pytest.raises(ConfigError, match=r"SoftLabelModule: loss has a schedule or a curriculum"):
        SoftLabelModule(student(), cache, loss=moving)
    with pytest.raises(ConfigError, match=r"num_views 3; cache .* holds 2"):
        SoftLabelDataModule(data.train.source, cache, batch_size=8, num_views=3)
    several = SoftLabelDataModule(data.train.source, cache, batch_size=8)
    several.trainer = type("Several", (), {"world_size": 2})()
    with pytest.raises(ConfigError, match=r"runs 2 processes; expected one"):
        several.setup("fit")


# -- timm --------------------------------------------------------------------------------------------------


def loader_of(dataset, **settings):
    settings = {"is_training": True, "no_aug": True, "num_workers": 0} | settings
    return create_loader(
        dataset, dataset.input_size, 50, device=torch.device("cpu"), mean=dataset.mean, std=dataset.std, **settings
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_and_pixels_come_through_timms_loader_as_they_were_stored(shared_cache, workers):
    """Collated, prefetched, from another process: each image with its own label, in the view of the epoch."""
    _, data, cache = shared_cache
    cache = open_cache(cache.url, memmap=MemmapSettings()) if workers else cache
    dataset = TimmDataset(data.train.source, cache)
    loader, loss_fn = loader_of(dataset, num_workers=workers), TimmLoss(dataset, LossSettings(temperature=2))
    for epoch in range(2):
        dataset.set_epoch(epoch)
        stored = SoftLabelDataset(data.train.source, cache, view=epoch)
        everything = stored.fetch(list(range(300)))
        pixels = (everything.images.float() - 0.3 * 255) / (0.4 * 255)
        found = []
        for images, targets in loader:
            # Each image is found by its pixels, which the label's place in the batch knows nothing of.
            distances = torch.cdist(images.flatten(1), pixels.flatten(1))
            samples = distances.argmin(1).tolist()
            assert float(distances.min(1).values.max()) < 1e-2
            labels, truth = dataset.rows.unpack(targets)
            expected = stored.fetch(samples)
            for name in ("ids", "log_probs", "log_tail", "stats", "target_log_prob"):
                here, there = getattr(labels, name), torch.as_tensor(getattr(expected.labels, name))
                assert torch.equal(here.double(), there.double()), name
            assert torch.equal(truth, expected.targets)
            logits = torch.randn(len(images), 10)
            assert float(loss_fn(logits, targets)) == pytest.approx(
                float(distillation_loss(logits, expected.labels, truth, temperature=2.0, alpha=0.9)), rel=1e-5
            )
            found += samples
        assert len(found) == len(set(found)) == 300


def test_timm_sees_the_held_out_split_with_plain_classes(shared_cache):
    _, data, cache = shared_cache
    images = TimmImages(data.evaluation.source, cache)
    batches = list(loader_of(images, is_training=False, no_aug=False))
    assert (
        torch.cat([targets for _, targets in batches]).tolist() == data.evaluation.source.targets().tolist()
    )
    plain = data.evaluation.load(range(100), 0).images.float()
    assert torch.allclose(torch.cat([pixels for pixels, _ in batches]), (plain - 76.5) / 102, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"no_aug": False}, r"timm's RandomResized\w+ would change the pixels"),
        ({"use_prefetcher": False}, r"timm's MaybeToTensor would change the pixels"),
    ],
)
def test_timms_own_augmentation_is_refused(shared_cache, settings, what):
    dataset = TimmDataset(shared_cache[1].train.source, shared_cache[2])
    with pytest.raises(ConfigError, match=what):
        loader_of(dataset, **settings)


def test_another_size_than_the_views_is_refused(shared_cache):
    dataset = TimmDataset(shared_cache[1].train.source, shared_cache[2])
    with pytest.raises(ConfigError, match=r"timm wants images of .*224.*the cache's views have 8x8"):
        create_loader(dataset, (1, 224, 224), 8, is_training=True, no_aug=True, device=torch.device("cpu"))


def test_targets_that_mixup_made_are_refused(shared_cache):
    loss_fn = TimmLoss(TimmDataset(shared_cache[1].train.source, shared_cache[2]))
    with pytest.raises(LabelError, match=r"shape \(8, 10\); expected float32 \[batch, \d+\].*mixup"):
        loss_fn(torch.randn(8, 10), torch.rand(8, 10))


def mixers(width):
    """Mixers of images and targets that take rows of numbers as if they were one-hot."""
    return [
        v2.MixUp(alpha=1.0),
        v2.CutMix(alpha=1.0),
        timm.data.Mixup(num_classes=width, label_smoothing=0.0, multi_label=True),
        timm.data.Mixup(num_classes=width, mixup_alpha=0.0, cutmix_alpha=1.0, label_smoothing=0.1, multi_label=True),
        timm.data.Mixup(num_classes=width, mode="elem", label_smoothing=0.0, multi_label=True),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(5))
def test_rows_that_a_mixer_averaged_are_refused(shared_cache, number):
    """Averages of class numbers are class numbers, and the loss of them is finite."""
    dataset = TimmDataset(shared_cache[1].train.source, shared_cache[2])
    loss_fn, mix = TimmLoss(dataset), mixers(dataset.rows.width)[number]
    images, targets = (
        torch.stack(list(values)) for values in zip(*dataset.__getitems__(range(8)), strict=True)
    )
    np.random.seed(number)  # noqa: NPY002  # timm draws from it
    torch.manual_seed(number)
    mixed, rows = mix(images.float(), targets.clone())
    assert rows.shape == targets.shape
    assert not torch.equal(mixed, images.float())
    with pytest.raises(LabelError, match=r"of 8 rows are not those of the labeled dataset.*MixUp"):
        loss_fn(torch.randn(8, 10), rows)
    assert torch.isfinite(loss_fn(torch.randn(8, 10), targets.flip(0)))


def test_a_row_of_which_one_bit_is_off_is_refused(shared_cache):
    dataset = TimmDataset(shared_cache[1].train.source, shared_cache[2])
    (_, row) = dataset[0]
    for place in range(len(row)):
        wrong = row.clone()
        wrong.view(torch.int32)[place] ^= 1
        with pytest.raises(LabelError, match="1 of 1 rows are not those"):
            dataset.rows.unpack(wrong[None])


@pytest.mark.parametrize(
    "policy",
    [
        {"policy": "sample", "num_samples": 6},
        {"policy": "hybrid", "k": 3, "num_samples": 3},
        {"policy": "dense"},
    ],
)
def test_rows_hold_every_kind_of_record(policy, tmp_path):
    _, data, cache = make_cache(tmp_path / "cache", labels={"num_views": 1} | policy)
    batch = SoftLabelDataset(data.train.source, cache).fetch([5, 2])
    rows = LabelRows.of(batch.labels)
    packed = rows.pack(batch.labels, batch.targets)
    assert packed.shape == (2, rows.width)
    logits = torch.randn(2, 10)
    labels, truth = rows.unpack(packed)
    losses = [
        distillation_loss(logits, each, batch.targets, temperature=2.0, alpha=0.5) for each in (labels, batch.labels)
    ]  # fmt: skip
    assert torch.equal(truth, batch.targets)
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)


# -- both --------------------------------------------------------------------------------------------------


class Darker:
    """A source whose pixels changed after it was labeled; its digest does not show it."""

    def __init__(self, source):
        self._source = source

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self):
        return len(self._source)

    def image(self, sample):
        return self._source.image(sample) // 2

    def images(self, samples):
        return self._source.images(samples) // 2


def test_pixels_that_changed_are_refused_by_name(shared_cache):
    source = Darker(shared_cache[1].train.source)
    with pytest.raises(AlignmentError, match=r"sample '.*', view 0: the teacher saw content"):
        TimmDataset(source, shared_cache[2])
    loader = SoftLabelDataModule(source, shared_cache[2], batch_size=8).train_dataloader()
    with pytest.raises(AlignmentError, match=r"sample '.*', view 0: the teacher saw content"):
        next(iter(loader))


@pytest.mark.parametrize("adapter", [TimmDataset, lambda s, c: SoftLabelDataModule(s, c, batch_size=8)])
def test_an_unfinished_cache_is_refused(adapter, tmp_path):
    _, data, cache = make_cache(tmp_path / "cache")
    (tmp_path / "cache" / "units" / "00003.json").unlink()
    with pytest.raises(IncompleteCacheError, match=r"1 of 10 units are missing"):
        adapter(data.train.source, type(cache)(cache.url))


@pytest.mark.parametrize("name", ["lightning"])
def test_a_missing_framework_names_its_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"softcache.student.integrations.{name}")
    with pytest.raises(ImportError, match=rf"softcache\.student\.integrations\.{name}.*softcache\[{name}\]"):
        __import__(f"softcache.student.integrations.{name}")
