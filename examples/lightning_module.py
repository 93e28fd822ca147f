"""A student learns from a cache in Lightning; stopped at any batch, the same command goes on there.

From the repository's root:

    softcache teacher-logits --config configs/digits.toml
    python examples/lightning_module.py runs/digits/cache configs/digits.toml runs/lightning
"""

import sys
from pathlib import Path

from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from softcache import MemmapSettings, open_cache
from softcache.config.load import load_config
from softcache.data.sources import open_source
from softcache.losses import LossSettings
from softcache.models.image import build_model
from softcache.student.integrations.lightning import SoftLabelDataModule, SoftLabelModule

cache, config, out = open_cache(sys.argv[1], memmap=MemmapSettings()), load_config(sys.argv[2]), sys.argv[3]
train, held_out = (open_source(config.source, split=split) for split in ("train", "eval"))
seed_everything(0)
student = build_model("mlp?width=64", num_classes=cache.num_classes, input_shape=(1, 8, 8))
module = SoftLabelModule(student, cache, loss=LossSettings(temperature=4.0, alpha=0.9), lr=1e-2)
data = SoftLabelDataModule(train, cache, evaluation=held_out, batch_size=64)
keep = ModelCheckpoint(out, save_last=True, every_n_train_steps=20)
trainer = Trainer(max_epochs=12, callbacks=[keep], logger=False, accelerator="cpu", devices=1)
last = Path(out, "last.ckpt")
trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
print(f"accuracy {trainer.validate(module, data, verbose=False)[0]['val_accuracy']:.4f}")
