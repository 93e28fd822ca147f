"""Caches in other people's loops: `lightning` for Lightning, `timm` for timm's loaders and training script.

Each module needs its framework, and a missing one names its extra. A plain torch loop needs no adapter
(`examples/torch_loop.py`); transformers' Trainer has its own room, `softcache.student.integrations.huggingface`.
"""
