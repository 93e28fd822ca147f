"""A transform of the user's own: found by its name, and repeatable by seeding what it may draw from."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from softcache.errors import SpecError

__all__ = ["import_factory", "seeded"]


def import_factory(spec: str) -> Callable[[], Callable[[torch.Tensor], torch.Tensor]]:
    module, _, attribute = spec.partition(":")
    expected = "expected an importable module:factory, where factory() returns a callable"
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"views.transform {spec!r}: {error}; {expected}") from error
    if not callable(factory):
        raise SpecError(f"views.transform {spec!r}: found {type(factory).__name__}; {expected}")
    return factory


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of Python, NumPy and torch (CPU); puts their states back afterwards."""
    # Not torch.manual_seed: it would seed the accelerators' generators as well, and those could not be put back.
    generator = torch.default_generator
    python, array, tensor = random.getstate(), np.random.get_state(), generator.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    generator.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)  # noqa: NPY002
        generator.set_state(tensor)
