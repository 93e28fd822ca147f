"""The lines that copies of timm's and torchvision's scripts need, as those scripts call them."""

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
