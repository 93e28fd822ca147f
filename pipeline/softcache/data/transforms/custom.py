"""A transform of the user's own: found by its name, and repeatable by seeding what it may draw from."""

from __future__ import annotations

import importlib
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from softcache.errors import SoftcacheError, SpecError

__all__ = ["call_transform", "import_factory", "seeded"]


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


def call_transform(factory: Callable[[], Any], image: torch.Tensor, what: str, key: str) -> Any:
    """Returns what a transform, made anew, makes of an image, which it may write into.

    Raises:
        SpecError: the factory or the transform fails; where, and with which sample.
    """
    try:
        transform = factory()
    except Exception as error:
        raise SpecError(
            f"{what}: {_where(error)}; expected a function without arguments that returns a callable of uint8 [C, H, W]; "
            "for a transform itself write one: def augment(): return transform"
        ) from error
    if not callable(transform):
        raise SpecError(f"{what}: returns {type(transform).__name__}; expected a callable of uint8 [C, H, W]")
    try:
        return transform(image)
    except SoftcacheError:
        raise
    except Exception as error:
        raise SpecError(
            f"{what}: {_where(error)}, of sample {key!r}; it is given a uint8 tensor [C, H, W], as torchvision's v2 "
            "transforms take it: begin with v2.ToPILImage() where pictures are expected"
        ) from error


def _where(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({place.filename}:{place.lineno})"


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
