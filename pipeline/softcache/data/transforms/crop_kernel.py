"""Padded crops and mirrors of a batch of images, and mixtures of two, compiled: one pass over the pixels.

Crops are equal to `torch.nn.functional.pad`, a slice and `flip` of each image; of 256 images of 1x28x28 they take a fifth
of a millisecond where those take four. A mixture of two images of 3x224x224 takes 0.03 ms. Importing this module takes
numba along, so import it where it is used.

Shape suffixes: `B` images, `C` channels, `H` height, `W` width.
"""

from __future__ import annotations

import numpy as np

from softcache.runtime.jit import compiled

__all__ = ["blend", "crop_and_flip"]


@compiled
def blend(first, second, share):  # type: ignore[no-untyped-def]
    """Returns share / 2^16 of one image and the rest of another, to the nearest level (halves up), uint8 [n].

    Args:
        first, second: uint8 [n].
        share: 0 to 2^16.
    """
    out = np.empty(len(first), np.uint8)
    one, other, half, bits = np.uint32(share), np.uint32(65536 - share), np.uint32(32768), np.uint32(16)
    for place in range(len(first)):
        out[place] = (np.uint32(first[place]) * one + np.uint32(second[place]) * other + half) >> bits
    return out


@compiled
def crop_and_flip(image_BCHW, top_B, left_B, flip_B, padding):  # type: ignore[no-untyped-def]
    """Returns the windows of images with `padding` zeros around them, of the images' size, uint8 [B, C, H, W].

    Args:
        image_BCHW: uint8.
        top_B, left_B: int64, where in the padded image each window begins, 0 to 2 * padding.
        flip_B: bool, whether it is then mirrored left to right.
        padding: zeros on each side.
    """
    images, channels, height, width = image_BCHW.shape
    out_BCHW = np.empty((images, channels, height, width), np.uint8)
    for image in range(images):
        down, right, mirrored = top_B[image] - padding, left_B[image] - padding, flip_B[image]
        first, last = max(0, -right), min(width, width - right)  # columns that show the image
        for channel in range(channels):
            for y in range(height):
                row = out_BCHW[image, channel, y]
                row[:] = 0
                if not 0 <= y + down < height:
                    continue
                source = image_BCHW[image, channel, y + down]
                if mirrored:
                    for x in range(first, last):
                        row[width - 1 - x] = source[x + right]
                else:
                    for x in range(first, last):
                        row[x] = source[x + right]
    return out_BCHW
