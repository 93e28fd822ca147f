"""The lines that copies of timm's and torchvision's scripts need, as those scripts call them."""

from argparse import Namespace

import pytest
import torch
from timm.data import create_loader
from torch.utils.data import DataLoader, RandomSampler

from softcache.errors import ConfigError, LabelError
from softcache.losses import LossSettings, distillation_loss
from softcache.runs.foreign_scripts import (
    TimmLoss,
    TorchvisionLoss,
    create_dataset,
    load_cached_data,
    open_datasets,
    truth_of,
)

CONFIG = """
[source]
name = "digits"
max_train_samples = 300
max_eval_samples = 100

[loss]
temperature = 3
alpha = 0.6
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "run.toml").write_text(CONFIG)
    return str(tmp_path / "run.toml")


def test_timms_script_has_the_labels_and_the_loss_of_the_config(config, shared_cache):
    cache = shared_cache[2]
    train = create_dataset(
        f"softcache:{cache.url}", root=config, split="train", is_training=True, repeats=0, batch_size=16
    )
    held_out = create_dataset(
        f"softcache:{cache.url}", root=config, split="validation", is_training=False, batch_size=16
    )
    assert (len(train), len(held_out)) == (300, 100)
    both = {"mean": train.mean, "std": train.std, "device": torch.device("cpu"), "num_workers": 0}
    images, targets = next(iter(create_loader(train, train.input_size, 16, no_aug=True, **both)))
    logits = torch.randn(len(images), 10)
    expected = distillation_loss(
        logits, cache.read(range(16)).to_torch(), truth_of(targets), temperature=3.0, alpha=0.6
    )
    torch.testing.assert_close(TimmLoss(train)(logits, targets), expected)
    assert TimmLoss(train, LossSettings(temperature=1.0))(logits, targets) != expected


def test_timms_own_datasets_are_timms(tmp_path):
    with pytest.raises(RuntimeError, match="Found 0 images"):
        create_dataset("", root=str(tmp_path), split="train", is_training=True)
    with pytest.raises(ConfigError, match="expected a cache and a config: --dataset softcache:CACHE"):
        create_dataset("softcache:cache", root=None, is_training=True)


def test_torchvisions_script_has_normalized_images_and_rows_of_labels(config, shared_cache):
    cache = shared_cache[2]
    train, held_out = open_datasets(config, cache.url)
    assert len(train.classes) == 10
    criterion = TorchvisionLoss(train)
    train.set_epoch(1)
    loader = DataLoader(train, batch_size=50, sampler=RandomSampler(train))
    order, images, targets = [], [], []
    for image, target in loader:
        images.append(image)
        targets.append(target)
        order += truth_of(target).tolist()
    assert sorted(order) == sorted(cache.samples_table().targets.tolist())
    seen = torch.cat(images)
    assert seen.dtype == torch.float32
    logits = torch.randn(50, 10, requires_grad=True)
    assert criterion(logits, targets[0]) > 0
    image, target = next(iter(DataLoader(held_out, batch_size=10)))
    torch.testing.assert_close(
        criterion(logits[:10].detach(), target), torch.nn.functional.cross_entropy(logits[:10], target)
    )
    assert torch.equal(truth_of(target), target)
    with pytest.raises(LabelError, match="in training; expected the rows of a TorchvisionDataset"):
        criterion(logits[:10], target)


def test_images_are_normalized_as_the_students_are(config, shared_cache):
    train, _ = open_datasets(config, shared_cache[2].url)
    pixels = train._batch([5]).images[0].float() / 255
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (train.mean, train.std))
    torch.testing.assert_close(train[5][0], (pixels - mean) / std)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("mixup", 0.2, "--mixup 0.2: the teacher labeled no mixed image"),
        ("cutmix_minmax", [0.2, 0.8], "--cutmix-minmax .*views.cutmix"),
        ("aug_repeats", 3, "--aug-repeats 3: an epoch has one view of each sample"),
        ("aug_splits", 3, "--aug-splits 3: the pixels would not be those"),
        ("jsd_loss", True, r"--jsd-loss True: it is of the loss whose place \[loss\] takes; leave it out"),
    ],
)
def test_arguments_of_timms_script_that_would_mix_or_be_ignored_are_named(
    config, shared_cache, name, value, match
):
    train = create_dataset(f"softcache:{shared_cache[2].url}", root=config, is_training=True)
    off = {
        "mixup": 0.0,
        "cutmix": 0.0,
        "cutmix_minmax": None,
        "aug_repeats": 0,
        "aug_splits": 0,
        "smoothing": 0.1,
    }
    TimmLoss(train, arguments=Namespace(**off, bce_loss=False, jsd_loss=False))
    with pytest.raises(ConfigError, match=match):
        TimmLoss(train, arguments=Namespace(**off | {name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mixup_alpha", 0.2),
        ("cutmix_alpha", 1.0),
        ("ra_sampler", True),
        ("auto_augment", "ra"),
        ("random_erase", 0.1),
        ("label_smoothing", 0.1),
    ],
)
def test_arguments_of_torchvisions_script_that_would_mix_or_be_ignored_are_named(
    config, shared_cache, name, value
):
    arguments = Namespace(distributed=False, **{name: value})
    with pytest.raises(
        ConfigError, match=f"load_cached_data: --{name.replace('_', '-')} {value}: .*leave it out"
    ):
        load_cached_data(config, shared_cache[2].url, arguments)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_torchvisions_processes_have_a_part_of_an_epoch_each(config, shared_cache, process_group):
    found = load_cached_data(config, shared_cache[2].url, Namespace(distributed=True, mixup_alpha=0.0))
    train, held_out, train_sampler, test_sampler = found
    train_sampler.set_epoch(1)  # as the script does
    assert sorted(train_sampler) == list(range(300)) != list(train_sampler)
    assert list(test_sampler) == list(range(100))
    assert (len(train), len(held_out)) == (300, 100)
    *_, alone, in_order = load_cached_data(config, shared_cache[2].url, Namespace(distributed=False))
    assert isinstance(alone, RandomSampler)
    assert list(in_order) == list(range(100))
