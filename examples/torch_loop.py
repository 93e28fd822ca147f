"""A student learns from a cache in a loop of your own, with nothing but torch.

From the repository's root:

    softcache teacher-logits --config configs/digits.toml
    python examples/torch_loop.py runs/digits/cache configs/digits.toml
"""

import sys

import torch

from softcache import BlockSampler, MemmapSettings, SoftLabelDataset, losses, open_cache
from softcache.config.load import load_config
from softcache.data.images import ViewedSource
from softcache.data.sources import open_source
from softcache.models.image import Normalize, build_model
from softcache.reader.dataset import cached_views

cache, source = open_cache(sys.argv[1], memmap=MemmapSettings()), load_config(sys.argv[2]).source
dataset = SoftLabelDataset(open_source(source, split="train"), cache)
held_out = ViewedSource(open_source(source, split="eval"), views := cached_views(cache))
normalize = Normalize(views.settings.mean, views.settings.std)
student = build_model("mlp?width=64", num_classes=cache.num_classes, input_shape=(1, 8, 8))
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
order = BlockSampler(dataset, seed=0)
for epoch in range(12):
    order.set_epoch(epoch)
    dataset.view = epoch % cache.num_views  # every epoch sees the images as another of the teacher's views
    for batch in torch.utils.data.DataLoader(dataset, 64, sampler=order):
        logits = student(normalize(batch.images))
        loss = losses.distillation_loss(logits, batch.labels, batch.targets, temperature=4.0, alpha=0.9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
plain = held_out.load(range(len(held_out)), 0)
correct = student(normalize(plain.images)).argmax(-1) == plain.targets
print(f"accuracy {correct.float().mean():.4f}")
