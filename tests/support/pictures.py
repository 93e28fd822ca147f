"""Small pictures for tests."""

import io

import numpy as np
from PIL import Image

__all__ = ["encoded", "pixels_of", "write_pictures"]


def pixels_of(seed):
    """Returns uint8 [8, 9, 3], noise of a seed."""
    return np.random.default_rng(seed).integers(0, 256, (8, 9, 3), np.uint8)


def encoded(seed, kind="png"):
    """Returns a picture as bytes."""
    into = io.BytesIO()
    Image.fromarray(pixels_of(seed)).save(into, kind)
    return into.getvalue()


def write_pictures(folder, count, name="", first=0):
    """Writes PNG files NAME0.png, NAME1.png, …"""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{name}{number}.png").write_bytes(encoded(first + number))
