"""A timm student learns from a cache through timm's own loaders, optimizer and accuracy.

From the repository's root:

    softcache teacher-logits --config configs/digits.toml
    python examples/timm_train.py runs/digits/cache configs/digits.toml
"""

import sys

import torch
from timm import create_model
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter, accuracy

from softcache import MemmapSettings, open_cache
from softcache.config.load import load_config
from softcache.data.sources import open_source
from softcache.losses import LossSettings
from softcache.student.integrations.timm import TimmDataset, TimmImages, TimmLoss

cache, source = open_cache(sys.argv[1], memmap=MemmapSettings()), load_config(sys.argv[2]).source
train = TimmDataset(open_source(source, split="train"), cache)
held_out = TimmImages(open_source(source, split="eval"), cache)
both = {"mean": train.mean, "std": train.std, "device": torch.device("cpu"), "num_workers": 0}
loader = create_loader(train, train.input_size, 64, is_training=True, no_aug=True, **both)
model = create_model("test_efficientnet", num_classes=cache.num_classes, in_chans=1)
optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-3)
loss_fn = TimmLoss(train, LossSettings(temperature=4.0, alpha=0.9))
for epoch in range(4):
    train.set_epoch(epoch)
    for images, targets in loader:
        optimizer.zero_grad()
        loss_fn(model.train()(images), targets).backward()
        optimizer.step()
top1 = AverageMeter()
for images, targets in create_loader(held_out, held_out.input_size, 64, **both):
    top1.update(accuracy(model.eval()(images), targets)[0].item(), len(images))
print(f"accuracy {top1.avg / 100:.4f}")
