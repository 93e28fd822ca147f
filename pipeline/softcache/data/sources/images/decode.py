"""Pictures of every kind as RGB of 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["to_rgb"]


def to_rgb(image: Image, *, upright: bool = True) -> np.ndarray:
    """Returns uint8 [H, W, 3] of an opened picture.

    Transparent pixels are shown on white. Grey of 16 bits is scaled to 8, and of floats from 0..1; Pillow's own conversion
    cuts both off, so that a picture becomes all white or all black.

    Args:
        upright: turned by its EXIF orientation.

    Raises:
        ValueError: it has numbers outside of 0..65535, or floats outside of 0..1, so that white is not known; or 32 bits a
            pixel that 8 could hold.
    """
    from PIL import Image as images
    from PIL import ImageOps

    if upright:
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.array(image)
        if image.mode == "I" and values.min() >= 0 and 0 < values.max() <= 255:
            raise ValueError(
                f"pixels of 32 bits from {values.min()} to {values.max()}: white may be 255 or 65535; save 8 or 16 bits"
            )
        return np.repeat(_eight_bits(values)[..., None], 3, axis=2)
    if image.has_transparency_data:
        white = images.new("RGBA", image.size, "white")
        image = images.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Returns uint8 of whole numbers of 16 bits, or of floats from 0 to 1."""
    low, high = values.min(), values.max()
    highest = 1 if values.dtype.kind == "f" else 65535
    if not (low >= 0 and high <= highest):  # NaN, too
        raise ValueError(f"pixels of {values.dtype} from {low} to {high}; expected 0 to {highest}")
    return np.rint(values.astype(np.float64) * (255 / highest)).astype(np.uint8)
